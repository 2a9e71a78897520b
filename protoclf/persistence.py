"""`save` and `load`: a fitted classifier as a folder of safetensors and JSON, and back.

What is read may come from anybody: nothing of it is run, imported by name or unpickled, and it is
checked before memory is taken for it. C classes, m prototypes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from warnings import warn

import numpy as np
import pandas as pd
import torch
from skorch.history import History
from torch import Tensor, nn

from protoclf.activations import Activations
from protoclf.backbones import build_backbone
from protoclf.explanation import BOX, EDIT_COLUMNS, prototype_table
from protoclf.files import write_bytes
from protoclf.geometry import Preprocessing
from protoclf.images import names_column
from protoclf.last_layer import LastLayerResult
from protoclf.messages import installed_version
from protoclf.model_files import (
    FORMAT,
    MODEL,
    MOST_JSON,
    TENSORS,
    as_json,
    encode,
    read_in_one,
    refusal,
    write_tensors,
    written_whole,
)
from protoclf.network import ProtoPNet
from protoclf.network_structure import (
    is_finite,
    kinds_of,
    layers_of,
    probe,
)
from protoclf.parameters import changed_parameters, check_parameters
from protoclf.saved_labels import labels_to_json
from protoclf.saved_model import COLUMNS, MOST_IMAGE_SIZE, PATH_COLUMNS, VERSION, SavedModel
from protoclf.saved_parameters import parameters_to_json
from protoclf.saved_sources import (
    THUMBNAILS_RULE,
    Thumbnails,
    kept_picture,
    read_thumbnails,
    write_thumbnails,
)
from protoclf.source_files import SourceFile
from protoclf.torch_settings import OwnRandomNumbers, ShapesOnly, on_cpu_by_default

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

C = TypeVar("C", bound="ProtoPNetClassifier")

_OF_SKLEARN = {"_sklearn_output_config": "set_output", "_metadata_request": "requests of metadata"}

_SAME_FEATURES = 0.02  # relative difference that processors and versions may make

# Saving -----------------------------------------------------------------------------------------


def save_classifier(
    clf: ProtoPNetClassifier,
    folder: str | os.PathLike[str],
    thumbnails: int | None,
    overwrite: bool,
) -> Path:
    """Write a fitted classifier: see `ProtoPNetClassifier.save`."""
    THUMBNAILS_RULE.check(thumbnails=thumbnails)
    check_parameters(vars(clf))
    image_size = clf.preprocessing_.image_size
    if image_size > MOST_IMAGE_SIZE:
        raise ValueError(
            f"Saved models have an image_size of {MOST_IMAGE_SIZE} at most, and this one has "
            f"{image_size}. A pickle holds it."
        )
    with on_cpu_by_default(), written_whole(folder, overwrite) as temporary:
        pictures = _pictures(clf, None if thumbnails is None else int(thumbnails))
        text, left_out = _description(clf, pictures)
        write_bytes(temporary / MODEL, text)
        write_tensors(temporary / TENSORS, _tensors(clf, pictures))
        if isinstance(pictures, Thumbnails):
            write_thumbnails(temporary, pictures)
    if left_out:
        again = ", and give `forbid` or `encourage` again what they were given"
        warn(
            f"Not saved: {', '.join(left_out)}. Predictions and sheets do without; before another "
            f"fit, set these parameters again{again if clf.concepts_ is not None else ''}.",
            UserWarning,
            stacklevel=3,
        )
    return Path(folder)


def _pictures(clf: ProtoPNetClassifier, side: int | None) -> Mapping[int, np.ndarray]:
    if side is None:
        return clf.source_images_
    firsts = clf.prototypes_.drop_duplicates("source_index")
    sources = zip(firsts["source_index"].tolist(), firsts["prototype"].tolist(), strict=True)
    return Thumbnails(side, {i: kept_picture(clf.source_image(j), side) for i, j in sources})


def _description(
    clf: ProtoPNetClassifier, pictures: Mapping[int, np.ndarray]
) -> tuple[bytes, list[str]]:
    """Return what model.json holds, and the names of what it cannot hold."""
    parameters, left_out = parameters_to_json(clf)
    history, not_kept = _history(clf)
    result = {name: v for name, v in vars(clf.last_layer_result_).items() if name != "weight"}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {"protoclf": installed_version(), "torch": str(torch.__version__)},
        "parameters": parameters,
        "classes": labels_to_json(clf.classes_),
        "network": _network_facts(clf),
        "fit": {
            "seed": clf.seed_,
            "backbone_trained": clf.backbone_trained_,
            "lambda_l1": float(clf.lambda_l1_),
        },
        "last_layer_result": encode(result),
        "sources": [str(name) for name in clf.prototypes_["source"]],
        "source_digests": _source_digests(clf),
        "thumbnails": pictures.facts() if isinstance(pictures, Thumbnails) else None,
        "edits": encode(clf.edits_.to_numpy()) if hasattr(clf, "edits_") else None,
        "history": history,
    }
    left_out += not_kept
    left_out += [name for attribute, name in _OF_SKLEARN.items() if attribute in vars(clf)]
    if clf.concepts_ is not None:  # they hold pixels of training images
        left_out += ["what is forbidden and encouraged"]
    text = as_json(content)
    if len(text) > MOST_JSON:  # a long training
        content["history"] = [row | {"batches": []} for row in history]
        text, left_out = as_json(content), [*left_out, "the batches in history"]
    return text, left_out


def _source_digests(clf: ProtoPNetClassifier) -> list[str | None]:
    files = clf._source_files
    return [files[i].digest if i in files else None for i in clf.prototypes_["source_index"]]


def _history(clf: ProtoPNetClassifier) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of the history, and the names of columns that JSON cannot hold."""
    rows, left_out = [], []
    for row in clf.history.to_list():
        kept = {}
        for name, value in row.items():
            try:
                kept[name] = encode(value)
            except TypeError:
                left_out.append(f"{name!r} in history")
        rows.append(kept)
    return rows, list(dict.fromkeys(left_out))


def _network_facts(clf: ProtoPNetClassifier) -> dict[str, Any]:
    """Return what the network is; parameters may have been set to something else since."""
    module, backbone = clf.plain_module, clf.backbone
    layers = layers_of(module.backbone)
    with ShapesOnly():
        built = build_backbone(backbone, None)
    if layers_of(built) != layers or kinds_of(built) != kinds_of(module.backbone):
        raise ValueError(
            "The parameter backbone was set to another than the fitted network has. Set it back, "
            "or fit again, before saving."
        )
    named = isinstance(backbone, str)
    return {
        "backbone": backbone if named else None,
        "layers": None if named else layers,
        "image_size": clf.preprocessing_.image_size,
        "resize": clf.preprocessing_.resize,
        "latent_dim": module.latent_dim,
        "similarity": module.similarity,
        "frozen": list(module.frozen),
    }


def _tensors(clf: ProtoPNetClassifier, pictures: Mapping[int, np.ndarray]) -> dict[str, Tensor]:
    module, table = clf.plain_module, clf.prototypes_
    arrays: dict[str, Any] = {
        f"prototypes.{name}": table[BOX if name == "box" else name].to_numpy() for name in COLUMNS
    }
    arrays |= {f"sources.{name}": clf.sources_[name] for name in ("image", "box")}
    if not isinstance(pictures, Thumbnails):
        arrays |= {f"pixels.{index}": pixels for index, pixels in pictures.items()}
    if hasattr(clf, "last_layer_path_"):
        for name in PATH_COLUMNS:
            values = clf.last_layer_path_[name].tolist()  # of numbers, or of arrays
            arrays[f"last_layer_path.{name}"] = np.array(values, PATH_COLUMNS[name])
    return {
        **_network_state(module),
        **{name: torch.tensor(array) for name, array in arrays.items()},
        **_activations_of(clf),
        "last_layer_result.weight": torch.as_tensor(clf.last_layer_result_.weight),
        "probe": probe(module, clf.preprocessing_.image_size),
    }


def _activations_of(clf: ProtoPNetClassifier) -> dict[str, Tensor]:
    if not hasattr(clf, "activations_"):
        return {}
    fields = vars(clf.activations_).items()
    held = {n: t for n, t in fields if n != "owner" and isinstance(t, Tensor) and len(t)}
    return {f"activations.{name}": tensor for name, tensor in held.items()}


def _network_state(module: nn.Module) -> dict[str, Tensor]:
    state = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"The state of the network holds {name}, which is no tensor.")
        if not is_finite(tensor):
            raise ValueError(f"The network holds NaN or infinity in {name}: it is of no use.")
    return state


# Loading ----------------------------------------------------------------------------------------


def load_classifier(
    cls: type[C],
    folder: str | os.PathLike[str],
    backbone: nn.Module | None,
    device: Any,
) -> C:
    """Read a classifier that was saved: see `ProtoPNetClassifier.load`."""
    if backbone is not None and not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be the nn.Module that was fitted; got {backbone!r}.")
    with torch.inference_mode(False), on_cpu_by_default(), OwnRandomNumbers():
        saved, images = read_in_one(Path(folder), lambda: _read(Path(folder), backbone))
        clf = _built(cls, saved, device)
        _fill_network(clf, saved)
        _restore_fit(clf, saved, images)
    return clf


def _read(folder: Path, backbone: nn.Module | None) -> tuple[SavedModel, Mapping[int, np.ndarray]]:
    """Return what the files say, and the images of the sources."""
    saved = SavedModel(folder, backbone)
    return saved, _source_images(saved)


def _built(cls: type[C], saved: SavedModel, device: Any) -> C:
    """Return a classifier with a network of the right shapes, as skorch has it before a fit."""
    clf: C
    try:
        clf = cls(saved.backbone, **saved.parameters, device=device)
        check_parameters(vars(clf))
    except (TypeError, ValueError) as error:
        raise refusal(saved.file, f"has parameters that cannot be used: {error}") from error
    torch.empty(0, device=clf.device)  # is there such a device?
    clf.classes_inferred_ = saved.classes
    as_fitted = _parameters_of_the_network(saved)  # they may have been set to others since
    now = {name: clf.__dict__[name] for name in as_fitted}
    clf.__dict__.update(as_fitted)
    try:
        clf.initialize()
        no_images: Any = [0]
        for training in (True, False):
            clf.get_iterator(no_images, training)
    except Exception as error:  # whatever a backbone or a parameter makes others raise
        raise refusal(saved.file, f"cannot be built: {type(error).__name__}: {error}") from error
    clf.__dict__.update(now)
    return clf


def _parameters_of_the_network(saved: SavedModel) -> dict[str, Any]:
    names = ("image_size", "latent_dim", "similarity")
    return {
        **{name: saved.network[name] for name in names},
        "weights": None,
        "discriminant_weight": float(saved.has_discriminants),  # for now
        "prototypes_per_class": 1,  # for now
        "prototype_size": tuple(saved.tensors["network.prototypes"].shape[2:]),
        "normalization": "imagenet",  # for now
    }


def _fill_network(clf: ProtoPNetClassifier, saved: SavedModel) -> None:
    module = clf.plain_module
    module.frozen = tuple(saved.network["frozen"])
    try:
        clf.set_state(saved.part("network."))
    except RuntimeError as error:
        raise refusal(saved.tensor_file, f"does not fit the network: {error}") from error
    module.train_only(())
    if isinstance(clf.backbone, nn.Module) and not saved.fit["backbone_trained"]:
        clf.backbone = _as_given(clf.backbone, module)  # another fit and clones start from it
    try:
        before, now = saved.tensors["probe"], probe(module, saved.network["image_size"])
    except (MemoryError, RuntimeError) as error:
        raise refusal(saved.file, f"has a network that cannot be run here: {error}") from error
    if before.shape != now.shape or (before - now).norm() > _SAME_FEATURES * before.norm() + 1e-6:
        raise refusal(
            saved.tensor_file,
            "holds the weights of a backbone that is not computed in the same way here.",
        )


def _as_given(backbone: nn.Module, module: ProtoPNet) -> nn.Module:
    """Return a copy of the backbone with the weights, and the frozen layers, of the network's."""
    copied = copy.deepcopy(backbone)
    copied.load_state_dict(module.backbone.state_dict())
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name not in module.frozen)
    return copied


def _restore_fit(
    clf: ProtoPNetClassifier, saved: SavedModel, images: Mapping[int, np.ndarray]
) -> None:
    """Set what a fit leaves behind, beside the network."""
    clf.preprocessing_ = Preprocessing(saved.network["image_size"], saved.network["resize"])
    clf.seed_, clf.backbone_trained_ = saved.fit["seed"], saved.fit["backbone_trained"]
    clf.lambda_l1_ = float(saved.fit["lambda_l1"])
    clf._settings = changed_parameters(clf)
    clf.concepts_ = None
    weight = saved.tensors["last_layer_result.weight"].clone()
    clf.last_layer_result_ = LastLayerResult(weight=weight, **saved.last_layer_result)
    if "last_layer_path.weight" in saved.tensors:
        clf.last_layer_path_ = _last_layer_path(saved)
    clf.sources_ = {name: _array(saved, f"prototypes.{name}") for name in ("row", "col", "moved")}
    clf.sources_ |= {name: _array(saved, f"sources.{name}") for name in ("image", "box")}
    if "activations.g" in saved.tensors:
        clf.activations_ = _activations(saved)
    if saved.edits is not None:
        clf.edits_ = pd.DataFrame(saved.edits, columns=EDIT_COLUMNS, dtype=object)
    clf.strongest_share_ = _array(saved, "prototypes.strongest_share")
    clf.history = History(saved.history)
    clf.source_images_, clf._source_boxes = images, {}
    files = map(SourceFile, saved.sources, [None] * len(saved.sources), saved.source_digests)
    clf._source_files = dict(zip(saved.indices, files, strict=True))
    _check_places(clf, saved)
    clf.prototypes_ = _table(clf, saved)


def _array(saved: SavedModel, name: str) -> np.ndarray:
    return saved.tensors[name].numpy().copy()


def _activations(saved: SavedModel) -> Activations:
    held: dict[str, Any] = {name: t.clone() for name, t in saved.part("activations.").items()}
    owner = saved.tensors["network.owner"].clone()
    return Activations(owner=owner, n_classes=len(saved.classes), **held)


def _last_layer_path(saved: SavedModel) -> pd.DataFrame:
    columns: dict[str, Any] = {n: _array(saved, f"last_layer_path.{n}") for n in PATH_COLUMNS}
    return pd.DataFrame(columns | {"weight": list(columns["weight"])})


def _source_images(saved: SavedModel) -> Mapping[int, np.ndarray]:
    indices, pixels = {str(i): i for i in saved.indices}, saved.part("pixels.")
    if not pixels.keys() <= indices.keys() or 0 < len(pixels) < len(indices):
        raise refusal(saved.tensor_file, "holds pixels of other images than the sources.")
    if saved.thumbnails is None:
        return {indices[digits]: part.numpy().copy() for digits, part in pixels.items()}
    if pixels:
        raise refusal(saved.tensor_file, "holds pixels of images that have thumbnails.")
    sizes = {index: (width, height) for index, width, height in saved.thumbnails["sizes"]}
    if len(sizes) < len(saved.thumbnails["sizes"]) or sizes.keys() != set(saved.indices):
        raise refusal(saved.file, "has thumbnails of other images than the sources.")
    return read_thumbnails(saved.folder, saved.thumbnails["side"], sizes)


def _check_places(clf: ProtoPNetClassifier, saved: SavedModel) -> None:
    """Refuse prototypes that lie outside of the feature map, or of their training image."""
    down, right = clf.geometry_.n_patches(*clf.module_.prototype_size)
    saved.check_range("prototypes.row", down)
    saved.check_range("prototypes.col", right)
    images = clf.source_images_
    thumbnails = images.pictures if isinstance(images, Thumbnails) else {}
    for index, box in zip(saved.indices, saved.tensors["prototypes.box"].tolist(), strict=True):
        if index not in images:
            continue
        shape = thumbnails[index].size if thumbnails else images[index].shape[1::-1]
        if box[2] > shape[0] or box[3] > shape[1]:
            raise refusal(saved.tensor_file, f"has a box outside of training image {index}.")


def _table(clf: ProtoPNetClassifier, saved: SavedModel) -> pd.DataFrame:
    names = {"image": "source_index", "row": "row", "col": "col", "box": "box", "moved": "moved"}
    sources = {name: _array(saved, f"prototypes.{column}") for name, column in names.items()}
    table = prototype_table(
        *(_array(saved, "network.owner"), saved.classes, sources, None),
        *(clf.weight_matrix(), clf.strongest_share_),
    )
    return table.assign(source=names_column(saved.sources))
