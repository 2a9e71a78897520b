"""A saved model as its folder holds it: every name, type, shape and number of it checked.

Each check rests on those before it, and all of them come before memory is taken for a network.
C classes, m prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protoclf.backbones import available_backbones, build_backbone
from protoclf.explanation import EDIT_COLUMNS
from protoclf.model_files import (
    FORMAT,
    MODEL,
    OBJECT,
    TENSORS,
    Record,
    decode,
    read_json,
    read_tensors,
    refusal,
)
from protoclf.network import ProtoPNet, PrototypeSpec
from protoclf.network_structure import Kind, is_finite, kind_of, kinds_of, layers_of
from protoclf.parameters import RULES, normalization
from protoclf.rules import Rule, integer
from protoclf.saved_labels import labels_from_json
from protoclf.saved_parameters import checked_parameters
from protoclf.saved_sources import MOST_SIDE
from protoclf.torch_settings import ShapesOnly

VERSION = 3


def _second(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content["source_digests"] = [None] * len(content["sources"])
    content["network"]["frozen"] = []


def _third(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content["parameters"]["lambda_l2"] = content["last_layer_result"]["lambda_l2"] = 0.0


MIGRATIONS: dict[int, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {
    1: _second,
    2: _third,
}
"""For each older version what turns its JSON and tensors, in place, into those of the next."""

PATH_COLUMNS = {
    **dict.fromkeys(("lambda_l1",), "float64"),
    **dict.fromkeys(("n_nonzero", "n_prototypes"), "int64"),
    **dict.fromkeys(("objective", "train_accuracy", "accuracy", "accuracy_std"), "float64"),
    **dict.fromkeys(("cross_entropy", "cross_entropy_std", "weight"), "float64"),
}
"""Columns of `last_layer_path_`; `weight` holds arrays."""

MOST_IMAGE_SIZE = 4096
"""Pixels, up to which `load` takes the memory of a pass, to compare what the network computes."""

COLUMNS: dict[str, Kind] = {
    **dict.fromkeys(("source_index", "row", "col"), ("int64", ())),
    "box": ("int64", (4,)),
    **dict.fromkeys(("moved", "strongest_share"), ("float64", ())),
}
"""Columns of `prototypes_`, for a prototype each; of its box four in one."""


class SavedModel:
    """What the files of a folder say, or `ModelFileError`.

    Parameters
    ----------
    folder : Path
    backbone : nn.Module or None
        Of a model whose backbone has no name.

    Attributes
    ----------
    file, tensor_file : Path
        For errors.
    parameters : dict
    classes : ndarray of shape (C,)
    network : dict
        backbone, layers, image_size, resize, latent_dim, similarity, frozen.
    fit : dict
        seed, backbone_trained, lambda_l1.
    last_layer_result : dict
    sources : list of m str
    source_digests : list of m, str or None
        Of the bytes of their files.
    indices : list of m int
        Their positions in the training images.
    thumbnails : dict or None
        side and sizes.
    edits : list of list, or None
        Rows of `edits_`.
    history : list of dict
    tensors : dict of Tensor
        Mapped to the file.
    backbone : str or nn.Module
    """

    def __init__(self, folder: Path, backbone: nn.Module | None) -> None:
        self.folder, self.file, self.tensor_file = folder, folder / MODEL, folder / TENSORS
        content = read_json(self.file)
        _check_version(content, self.file)
        self.tensors = read_tensors(self.tensor_file)
        self._migrate(content)
        self._read(Record(content, self.file))
        self.backbone = self._backbone(backbone)
        self._check_tensors()
        self._check_values()

    def _migrate(self, content: dict[str, Any]) -> None:
        for version in range(content["version"], VERSION):
            try:
                MIGRATIONS[version](content, self.tensors)
            except (LookupError, TypeError, AttributeError) as error:
                raise refusal(self.file, f"is no model of version {version}: {error}") from error

    def _read(self, record: Record) -> None:
        for name in ("format", "version", "written_by"):  # the last is for people
            record.take(name, _ANY)
        self.parameters = checked_parameters(self._decoded(record, "parameters"), self.file)
        self.classes = labels_from_json(record.record("classes"))
        self.network = record.record("network").take_all(_NETWORK)
        self.fit = record.record("fit").take_all(_FIT)
        result = Record(self._decoded(record, "last_layer_result"), self.file, "last_layer_result")
        self.last_layer_result = result.take_all(_LAST_LAYER)
        self.sources: list[str] = record.take("sources", _STRINGS)
        self.source_digests: list[str | None] = record.take("source_digests", _DIGESTS)
        thumbnails = record.take("thumbnails", _OBJECT_OR_NOT)
        self.thumbnails = thumbnails
        if thumbnails is not None:
            self.thumbnails = Record(thumbnails, self.file, "thumbnails").take_all(_THUMBNAILS)
        self.edits = record.take("edits", _EDITS)
        self.history = self._decoded(record, "history", _ROWS)
        record.finish()

    def _decoded(self, record: Record, name: str, rule: Rule | None = None) -> Any:
        value = record.take(name, rule or OBJECT)
        try:
            decoded = decode(value)
        except ValueError as error:
            raise refusal(self.file, f"holds what no save writes, in {name}: {error}") from error
        if type(decoded) is not type(value):
            raise refusal(self.file, f"holds a {type(decoded).__name__} as {name}.")
        return decoded

    def _backbone(self, given: nn.Module | None) -> str | nn.Module:
        name, layers = self.network["backbone"], self.network["layers"] or {}
        if name is not None:
            if given is not None:
                raise refusal(self.file, f"has the backbone {name!r}: give none to load it.")
            if name not in available_backbones():
                raise refusal(self.file, f"names the backbone {name!r}, which is not known.")
            return name
        if given is None:
            problem = "has a backbone of its own, which is code and not in the file: give a module "
            raise refusal(self.file, problem + "of the same layers, load(folder, backbone=module).")
        found = layers_of(given)
        for layer in {**layers, **found}:
            saved, here = (kinds.get(layer, "not there") for kinds in (layers, found))
            if saved != here:
                problem = f"has another backbone than the one given: its layer {layer!r} is "
                raise refusal(self.file, problem + f"{saved}, and {here} in the one given.")
        return given

    # Names, types and shapes --------------------------------------------------------------------

    def _check_tensors(self) -> None:
        m, n_classes = len(self.sources), len(self.classes)
        first: dict[str, Kind] = {
            "network.owner": ("int64", (m,)),
            "network.prototypes": ("float32", (m, None, None, None)),
            "network.last_layer.weight": ("float32", (n_classes, m)),
        }
        if not m:
            raise refusal(self.file, "has no prototypes.")
        self._check_kinds(first)
        if len(self.source_digests) != m:
            raise refusal(self.file, f"has {m} sources and {len(self.source_digests)} digests.")
        expected = first | self._expected_network(m, n_classes)
        expected |= {f"prototypes.{n}": (d, (m, *shape)) for n, (d, shape) in COLUMNS.items()}
        expected |= {"sources.image": ("int64", (m,)), "sources.box": ("float64", (m, 4))}
        expected["last_layer_result.weight"] = "float32", (n_classes, None)
        expected["probe"] = "float32", (None,)
        if self.part("activations."):
            expected |= self._expected_activations(m)
        if self.part("last_layer_path."):
            expected |= self._expected_path(n_classes)
        pixels = [f"pixels.{digits}" for digits in self.part("pixels.")]
        self._check_kinds(expected | dict.fromkeys(pixels, ("uint8", (None, None, 3))))
        others = [name for name in self.tensors if name not in expected and name not in pixels]
        if others:
            raise refusal(self.tensor_file, f"holds tensors too many, {others[:3]}.")

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, by what follows it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def _first_add_on(self) -> Tensor | None:
        """Return the weight of the first add-on layer, if there are more than the last one."""
        weight = self.tensors.get("network.add_on.0.weight", torch.empty(0))
        return weight if weight.ndim > 1 else None

    @property
    def has_discriminants(self) -> bool:
        """Whether the network has them, which only networks without a `latent_dim` may have."""
        return self.network["latent_dim"] is None and self._first_add_on() is not None

    def _expected_network(self, m: int, n_classes: int) -> dict[str, Kind]:
        latents, rows, cols = self.tensors["network.prototypes"].shape[1:]
        latent_dim = self.network["latent_dim"]
        if latent_dim not in (None, latents):
            raise refusal(self.file, f"has latent_dim {latent_dim}, and {latents} in the tensors.")
        weight = self._first_add_on()
        channels = latents if weight is None else weight.shape[1]
        spec = PrototypeSpec([0] * m, n_classes, (rows, cols), self.network["similarity"])
        with ShapesOnly():
            backbone = build_backbone(self.backbone, None)
            net = ProtoPNet(
                *(backbone, channels, spec, latent_dim, normalization("imagenet")),
                discriminants=self.has_discriminants,
            )
        layers = dict(backbone.named_parameters())
        if not set(self.network["frozen"]) <= set(layers):
            raise refusal(self.file, "names frozen layers that the backbone does not have.")
        return {f"network.{name}": kind for name, kind in kinds_of(net).items()}

    def _expected_activations(self, m: int) -> dict[str, Kind]:
        n = self.tensors.get("activations.y", torch.empty(0)).numel()
        kinds: dict[str, Kind] = {"g": ("float32", (n, m)), "y": ("int64", (n,))}
        optional: dict[str, tuple[int | None, ...]] = {"weight": (n,), "views": (None, n, m)}
        held = self.part("activations.")
        kinds |= {name: ("float32", shape) for name, shape in optional.items() if name in held}
        return {f"activations.{name}": kind for name, kind in kinds.items()}

    def _expected_path(self, n_classes: int) -> dict[str, Kind]:
        n = self.tensors.get("last_layer_path.lambda_l1", torch.empty(0)).numel()
        kinds: dict[str, Kind] = {name: (kind, (n,)) for name, kind in PATH_COLUMNS.items()}
        kinds["weight"] = PATH_COLUMNS["weight"], (n, n_classes, None)
        return {f"last_layer_path.{name}": kind for name, kind in kinds.items()}

    def _check_kinds(self, expected: Mapping[str, Kind]) -> None:
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise refusal(self.tensor_file, f"lacks tensors, {missing[:3]}.")
        for name, (dtype, shape) in expected.items():
            found, lengths = kind_of(self.tensors[name])
            if found != dtype or not _is_shape(lengths, shape):
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise refusal(
                    self.tensor_file,
                    f"holds {name!r} as {found} of shape {lengths}; it must be {dtype} of shape "
                    f"({wanted}).",
                )

    # Numbers ------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        unknown = {f"last_layer_path.{n}" for n in PATH_COLUMNS if n != "weight"}  # without folds
        for name, tensor in self.tensors.items():
            if name not in unknown and not is_finite(tensor):
                raise refusal(self.tensor_file, f"holds NaN or infinity in {name!r}.")
        self.check_range("network.owner", len(self.classes))
        self.check_range("prototypes.source_index", 2**62)
        y = self.tensors.get("activations.y")
        self.check_range("sources.image", 2**62 if y is None else y.numel())
        if y is not None:
            self.check_range("activations.y", len(self.classes))
        self.check_range("prototypes.strongest_share", 1 + 1e-9)
        box = self.tensors["prototypes.box"]
        if not ((box[:, :2] >= 0).all() and (box[:, :2] < box[:, 2:]).all()):
            raise refusal(self.tensor_file, "holds boxes of prototypes that are no boxes.")
        if not (self.tensors["network.std"] > 0).all():
            raise refusal(self.tensor_file, "holds 'network.std' that is not above 0.")
        self.indices: list[int] = self.tensors["prototypes.source_index"].tolist()
        names = dict(zip(self.indices, self.sources, strict=True))
        if any(names[i] != name for i, name in zip(self.indices, self.sources, strict=True)):
            raise refusal(self.file, "names two sources for one training image.")

    def check_range(self, name: str, stop: float) -> None:
        """Refuse values of a tensor below 0, or from `stop` on."""
        values = self.tensors[name]
        if not ((values >= 0) & (values < stop)).all():
            raise refusal(self.tensor_file, f"holds {name!r} out of the range 0 to {stop}.")


def _check_version(content: dict[str, Any], file: Path) -> None:
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise refusal(file, "is not the description of a saved protoclf model.")
    if version > VERSION:
        raise refusal(
            file,
            f"was saved by a newer version of protoclf: its format is {version}, and this one "
            f"reads up to {VERSION}. Update protoclf.",
        )


def _is_shape(lengths: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    pairs = list(zip(lengths, shape, strict=False))
    fits = all(n > 0 if wanted is None else n == wanted for n, wanted in pairs)
    return fits and len(lengths) == len(shape)


# Rules of the fields ----------------------------------------------------------------------------


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_layers(value: Any) -> bool:
    names = isinstance(value, dict) and _is_list_of(str, list(value.values()))
    return value is None or names


def _is_sizes(value: Any) -> bool:
    """Whether this is a list of [index, width, height]."""
    if not isinstance(value, list) or not all(_is_list_of(int, size) for size in value):
        return False
    return all(len(size) == 3 and size[0] >= 0 and min(size[1:]) > 0 for size in value)


def _is_rows(value: Any) -> bool:
    rows = _is_list_of(dict, value)
    return rows and all(_is_list_of(dict, row.get("batches")) for row in value)


def _is_edits(value: Any) -> bool:
    if value is None:
        return True
    rows = _is_list_of(list, value) and all(len(row) == len(EDIT_COLUMNS) for row in value)
    return rows and all(type(row[0]) is int for row in value)


_ANY = Rule(lambda value: True, "anything")
_OBJECT_OR_NOT = Rule(lambda value: value is None or isinstance(value, dict), "an object or null")
_FLAG = Rule(lambda value: type(value) is bool, "true or false")
_NUMBER = Rule(lambda value: type(value) in (int, float), "a number")
_STRINGS = Rule(lambda value: _is_list_of(str, value), "a list of strings")
_DIGESTS = Rule(
    lambda value: isinstance(value, list) and all(type(d) in (str, type(None)) for d in value),
    "a list of strings and nulls",
)
_EDITS = Rule(_is_edits, f"null, or a list of rows of {len(EDIT_COLUMNS)}")
_ROWS = Rule(_is_rows, "a list of objects, each with a list of batches")

_NETWORK: dict[str, Rule] = {
    "backbone": Rule(lambda value: value is None or type(value) is str, "a name or null"),
    "layers": Rule(_is_layers, "an object of names, or null"),
    "image_size": integer(1, MOST_IMAGE_SIZE),
    "resize": RULES["resize"],
    "latent_dim": RULES["latent_dim"],
    "similarity": RULES["similarity"],
    "frozen": _STRINGS,
}
_FIT: dict[str, Rule] = {
    "seed": integer(0, 2**31),
    "backbone_trained": _FLAG,
    "lambda_l1": _NUMBER,
}
_LAST_LAYER: dict[str, Rule] = {
    **dict.fromkeys(("objective", "residual", "lambda_l1", "lambda_l2"), _NUMBER),
    **dict.fromkeys(("n_iter", "n_evaluations", "n_products"), integer(0, 2**53)),
    "converged": _FLAG,
}
_THUMBNAILS: dict[str, Rule] = {
    "side": integer(1, MOST_SIDE),
    "sizes": Rule(_is_sizes, "a list of [index, width, height]"),
}
