"""How skorch sees a ProtoPNet: the hooks of its training loop, its device and its parameters."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import PrintLog
from skorch.dataset import unpack_data
from torch import Tensor, nn
from torch.utils.data import Dataset

from protoclf.acceleration import has_fast_bfloat16, keep_freed_memory
from protoclf.activations import Activations
from protoclf.array_store import folder_of
from protoclf.augmentation import AugmentedDataset
from protoclf.backbone_facts import found_once, shape_and_layout
from protoclf.backbones import build_backbone, copied
from protoclf.concepts import Concepts
from protoclf.folding import find_evaluation_folds, find_folds
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset, is_batches
from protoclf.images import Images
from protoclf.last_layer import LastLayerResult
from protoclf.losses import ProtoPNetLoss
from protoclf.micro_batches import images_stay_apart, learns_statistics, pieces_by_class
from protoclf.network import Outputs, ProtoPNet, PrototypeSpec
from protoclf.parameters import (
    NOT_OURS,
    check_order,
    normalization,
    prototype_counts,
    refuse_unknown,
    refuse_unknown_metadata,
)
from protoclf.processes import OneProcess
from protoclf.receptive_field import BackboneGeometry
from protoclf.torch_settings import on_cpu_by_default

_DISCRIMINANT_WEIGHT = 0.45  # over a frozen backbone
_MICRO_BATCH = 8  # images, on a CPU
_WORTH_FOLDING = 64  # images: to find folds takes as long as a few of them
_MODULES_GIVEN = ("backbone", "augmentation")
_COSTS = ("lambda_clst", "lambda_sep", "lambda_patch")
_NETWORK_INPUTS = ("images", "features")
_OF_WORKERS = frozenset(
    {"num_workers", "persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context"}
)
"""Options of a loader that has worker processes."""

_STAGE_KEYS = ["distinct_patches", "distinct_images", "objective", "residual"]


class NotFinite(FloatingPointError):
    """A fit came upon NaN or infinity, in the images of some positions (k,)."""

    def __init__(self, what: str, index: Tensor) -> None:
        super().__init__(what)
        self.what = what
        self.index = index


class SkorchProtoPNet(NeuralNetClassifier):
    """skorch's net around a `ProtoPNet`; what its stages train is theirs to say."""

    # parameters, which the classifier sets
    backbone: str | nn.Module
    weights: Any
    train_backbone: bool
    image_size: int
    resize: str
    normalization: Any
    prototypes_per_class: str | int | Mapping[Any, int]
    prototype_size: tuple[int, int] | str
    latent_dim: int | None
    similarity: str
    discriminant_weight: float | str
    prototype_init: str
    class_weight: Any
    distinct: str | None
    self_matches: str
    lambda_clst: float
    lambda_sep: float
    lambda_patch: float
    lambda_l1: float | str
    lambda_l2: float | str
    warmup_epochs: int
    joint_epochs: int
    cycles: int
    augmentation: Any
    augmented_views: int | str
    memory: Any
    checkpoint: str | os.PathLike[str] | None
    backbone_lr: float
    lr_schedule: str | None
    batch_norm: str
    micro_batch_size: int | str | None
    precision: str
    on_bad_image: str
    tune_allocator: bool
    random_state: Any

    # what a fit sets
    module_: ProtoPNet
    criterion_: ProtoPNetLoss
    optimizer_: torch.optim.Optimizer
    seed_: int
    preprocessing_: Preprocessing
    geometry_: BackboneGeometry
    backbone_trained_: bool
    channels_last_: bool
    sources_: dict[str, np.ndarray]
    strongest_share_: np.ndarray
    last_layer_result_: LastLayerResult
    last_layer_path_: pd.DataFrame
    activations_: Activations
    lambda_l1_: float
    concepts_: Concepts | None
    _piece_size: int | None = None

    def initialize_module(self):
        """Build the network (called by skorch)."""
        backbone = build_backbone(self.backbone, self.weights)
        geometry, channels_last = found_once(shape_and_layout, backbone, self.image_size)
        self.geometry_, self.channels_last_ = geometry, channels_last
        cells = (geometry.height, geometry.width)
        counts = prototype_counts(self.prototypes_per_class, self.classes_)
        spec = PrototypeSpec(
            np.repeat(np.arange(len(counts)), counts).tolist(),
            len(counts),
            _cells_of_prototype(self.prototype_size, cells),
            self.similarity,
        )
        self.module_ = ProtoPNet(
            *(backbone, geometry.channels, spec, self.latent_dim),
            *(normalization(self.normalization), self.weight_of_discriminants() > 0),
        )
        named = dict(backbone.named_parameters())
        self.module_.frozen = frozen = tuple(n for n, p in named.items() if not p.requires_grad)
        if frozen and len(frozen) == len(named) and self.trains_backbone:
            warn(
                "No parameter of the backbone has requires_grad: it stays as it is. With "
                "train_backbone=False it runs over the images once, which is much faster.",
                stacklevel=2,
            )
        self.backbone_trained_ = False
        return self

    def replace_prototypes(self, prototypes: Tensor, owner: Tensor, weight: Tensor) -> None:
        """Go on with other prototypes of the network, which criterion and optimizer hold too."""
        self.module_.replace_prototypes(prototypes, owner, weight)
        self.criterion_.owner = owner
        for group in self.optimizer_.param_groups:
            if group["part"] == "prototypes":
                group["params"] = [self.module_.prototypes]

    def head(self) -> dict[str, Tensor]:
        """Return the state of the network but for the backbone."""
        state = self.plain_module.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}

    def weight_matrix(self) -> np.ndarray:
        """Return W (C, m) in main memory: on the CPU that of the network, not a copy."""
        return self.plain_module.last_layer.weight.detach().cpu().numpy()

    def set_state(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Give the network a state, such as `head` returned: any number of prototypes."""
        state = {name: torch.as_tensor(v, device=self.device) for name, v in state.items()}
        names = ("prototypes", "owner", "last_layer.weight")
        self.replace_prototypes(*(state[name].clone() for name in names))
        self.plain_module.load_state_dict(state, strict=strict)

    @property
    def plain_module(self) -> ProtoPNet:
        """The network itself, where it is compiled too."""
        return getattr(self.module_, "_orig_mod", self.module_)

    def prepare_processor(self) -> None:
        """Set the network up for the processor that it runs on now, as the parameters allow."""
        device = torch.empty(0, device=self.device).device  # of "cuda", torch's current one
        if self.module_.owner.device != device:  # set since the fit
            self.module_.to(device)
            self.criterion_.to(device)
        if self.tune_allocator and device.type == "cpu":
            keep_freed_memory()
        trained = self.backbone_trained_ or self.trains_backbone
        fast = self.precision == "auto" and not trained and has_fast_bfloat16(device)
        self.module_.half_precision = fast or self.precision == "bfloat16"
        if self.channels_last_ and (device.type == "cpu" or self.module_.half_precision):
            self.module_.channels_last = True
            self.module_.backbone.to(memory_format=torch.channels_last)

    def find_folds(self) -> None:
        """Find out which batch-norm layers training may fold away, unless a compiler has them."""
        module = self.plain_module
        if module.settled and not self.compile:
            module.folds = found_once(find_folds, module.backbone, self.image_size)

    def module_to_evaluate(self, n_images: int) -> ProtoPNet:
        """Return the network for a pass over images, without batch norm where that pays."""
        module = self.module_.eval()
        on_cpu = torch.device(self.device).type == "cpu"
        if not on_cpu or self.compile or module.half_precision or n_images < _WORTH_FOLDING:
            return module
        image_size = self.preprocessing_.image_size
        folds = found_once(find_evaluation_folds, module.backbone, image_size)
        return module.with_folds(folds) if folds else module

    @property
    def trains_backbone(self) -> bool:
        """Whether a fit trains the backbone."""
        return self.train_backbone and self.joint_epochs > 0

    def weight_of_discriminants(self) -> float:
        """Return the `discriminant_weight` that counts here: 0 where there are no discriminants."""
        if not isinstance(self.discriminant_weight, str):  # "auto"
            return self.discriminant_weight
        plain = self.latent_dim is None and self.similarity == "cosine"
        return _DISCRIMINANT_WEIGHT if plain and not self.trains_backbone else 0.0

    def _micro_batch(self) -> int | None:
        size = self.micro_batch_size
        if size == "auto":
            size = _MICRO_BATCH if torch.device(self.device).type == "cpu" else None
        return None if size is None or size >= self.batch_size else int(size)

    def images_at_once(self) -> int | None:
        """Return how many images the backbone takes in a pass of a fit without gradients.

        None for whole batches. Such a pass keeps less of each image than training does, and takes
        more of them.
        """
        size = self._micro_batch() if self.trains_backbone and not self.compile else None
        return None if size is None else 2 * size

    def piece_size(self) -> int | None:
        """Return how many images the backbone is trained on at a time; None for whole batches."""
        size = self._micro_batch()
        if size is None:
            return None
        obstacle = self._obstacle_to_pieces()
        if obstacle and self.micro_batch_size != "auto":
            warn(f"Batches are not taken in pieces of {size} images: {obstacle}.", stacklevel=2)
        return None if obstacle else size

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """Train on `piece_size` images at a time."""
        self._piece_size = self.piece_size()
        try:
            yield
        finally:
            del self._piece_size

    def _obstacle_to_pieces(self) -> str:
        """Say why the step of a batch would be another in pieces, or nothing."""
        self._set_training(True)
        backbone = self.plain_module.backbone
        if self.compile:
            return "compile=True compiles for batches of one size"
        if self.processes.count > 1:
            return "several processes have a part of each batch"
        if type(self).get_loss is not SkorchProtoPNet.get_loss:
            return f"{type(self).__name__} has a get_loss of its own"
        if learns_statistics(backbone):
            return "the backbone learns batch-norm statistics, those of whole batches"
        if not found_once(images_stay_apart, backbone, self.image_size):
            return "what the backbone finds in an image depends on the others of its batch"
        return ""

    def initialize_criterion(self):
        """Build the joint loss (called by skorch)."""
        self.criterion_ = ProtoPNetLoss(self.module_.owner, **self._costs())
        return self

    def _costs(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _COSTS}

    def heed_parameters(self) -> None:
        """Take over costs and optimizer as they were set since the network was built."""
        loss = getattr(self.criterion_, "_orig_mod", self.criterion_)
        for name, value in self._costs().items():
            setattr(loss, name, value)
        self.initialize_optimizer()

    def initialize_optimizer(self, triggered_directly=None):
        """Build one optimizer for all stages, which set its learning rates (called by skorch)."""
        kwargs = {"lr": self.lr} | self.get_params_for("optimizer")
        groups: list[dict[str, Any]] = [
            {"params": list(self.module_.backbone.parameters()), "part": "backbone"},
            {"params": list(self.module_.add_on.parameters()), "part": "add_on"},
            {"params": [self.module_.prototypes], "part": "prototypes"},
        ]
        if "weight_decay" in kwargs:
            groups[2]["weight_decay"] = 0.0  # the paper decays backbone and add-on layers only
        self.optimizer_ = self.optimizer([g for g in groups if g["params"]], **kwargs)
        return self

    def get_dataset(self, X: Any, y: Any = None) -> Dataset:
        """Return batches of images for X (called by skorch)."""
        if is_batches(X):
            return X
        return ImageDataset(Images(X), self.preprocessing_, y, on_bad_image=self.on_bad_image)

    def get_iterator(
        self, dataset: Dataset, training: bool = False, rows: Sequence[int] | None = None
    ):
        """Return a loader of batches (called by skorch); of some rows of the data set alone."""
        check_order(vars(self))  # set since the fit, perhaps
        name = "iterator_train" if training else "iterator_valid"
        kwargs = {"batch_size": int(self.batch_size), "collate_fn": ImageDataset.collate}
        kwargs |= {"shuffle": training} if rows is None else {"sampler": rows}
        kwargs |= self.get_params_for(name)
        by_itself = getattr(dataset, "takes_no_workers", False)
        if by_itself or self.on_bad_image == "skip":  # workers would note failures to themselves
            kwargs = {k: v for k, v in kwargs.items() if k not in _OF_WORKERS}
        workers_draw = isinstance(dataset, AugmentedDataset) and kwargs.get("num_workers")
        if not (training or workers_draw):  # torch's own is a fit's, perhaps in another thread
            kwargs.setdefault("generator", torch.Generator())
        if by_itself:  # its batches may be on the device already
            kwargs.pop("pin_memory", None)
        elif torch.device(self.device).type == "cuda":
            kwargs.setdefault("pin_memory", True)
        return getattr(self, name)(dataset, **kwargs)

    def infer(self, x: Mapping[str, Tensor], **fit_params: Any) -> Outputs:
        """Run the network on a batch (called by skorch)."""
        used = {k: x[k].to(self.device, non_blocking=True) for k in _NETWORK_INPUTS if k in x}
        return self.network_for(training=torch.is_grad_enabled())(**used)

    def get_loss(self, y_pred: Outputs, y_true: Tensor, X=None, training=False) -> Tensor:
        """Return the joint loss of a batch (called by skorch)."""
        loss = self.criterion_(y_pred, y_true.to(self.device), self._weight(X))
        if training and self.concepts_ is not None:
            loss = loss + self.concepts_.cost(self.module_)
        return loss

    def _weight(self, inputs: Any) -> Tensor | None:
        weight = inputs.get("sample_weight") if isinstance(inputs, Mapping) else None
        return None if weight is None else weight.to(self.device)

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Take a step on a batch, whose loss has to be a number (called by skorch)."""
        step = super().train_step(batch, **fit_params)
        if not torch.isfinite(step["loss"]):
            raise NotFinite(f"The loss is {step['loss'].item()}", batch[0]["index"])
        return step

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Compute loss and gradients of a batch, perhaps in pieces (called by skorch)."""
        inputs, y = unpack_data(batch)
        pieces = [] if self._piece_size is None else pieces_by_class(y, self._piece_size)
        if len(pieces) < 2:
            return super().train_step_single(batch, **fit_params)
        self._set_training(True)
        y = y.to(self.device)
        losses, outputs = [], []
        with self.plain_module.sharing_a_fold():
            for piece, share in self.criterion_.shares(pieces, y, self._weight(inputs)):
                part = {name: values[piece] for name, values in inputs.items()}
                found = self.infer(part)
                loss = self.criterion_(found, y[piece], self._weight(part), share)
                loss.backward()
                losses.append(loss.detach())
                outputs.append([output.detach() for output in found])
        if self.concepts_ is not None:
            cost = self.concepts_.cost(self.module_)
            cost.backward()
            losses.append(cost.detach())
        order = torch.cat(pieces).argsort()
        y_pred = tuple(torch.cat(parts)[order] for parts in zip(*outputs, strict=True))
        return {"loss": torch.stack(losses).sum(), "y_pred": y_pred}

    @property
    def shows_progress(self) -> bool:
        """Whether bars are shown: of several processes, by the first alone."""
        return bool(self.verbose) and self.processes.is_first

    def batches_to_evaluate(
        self, dataset: Dataset, rows: Sequence[int] | None = None
    ) -> tuple[Iterator[Any], int | None]:
        """Return batches, from workers that are started now, and their number where it is known."""
        loader = self.get_iterator(dataset, training=False, rows=rows)
        with on_cpu_by_default():  # it draws a number
            return iter(loader), len(loader) if hasattr(loader, "__len__") else None

    def latents(
        self, features: Dataset, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield latent maps and classes of cached features, always in the same batches."""
        batches, _ = self.batches_to_evaluate(features, rows)
        for inputs, y in batches:
            with torch.no_grad():
                yield self.module_.latents(inputs["features"].to(self.device)), y

    @property
    def processes(self) -> OneProcess:
        """The processes that fit the network together."""
        return OneProcess()

    def data_parallel(self) -> AbstractContextManager[None]:
        """Average gradients over the processes, for the parts that a stage trains."""
        return nullcontext()

    def network_for(self, training: bool) -> nn.Module:
        """Return what runs batches."""
        return self.module_

    def agree(self) -> None:
        """Take over the network of the first of several processes, whose rounding may differ."""

    @property
    def memory_folder(self) -> Path | None:
        """Where what several fits can share is kept."""
        return folder_of(self.memory)

    @property
    def _default_callbacks(self) -> list[tuple[str, Any]]:
        """Skorch's callbacks; the log keeps to the columns that every stage has."""
        callbacks = dict(super()._default_callbacks)
        return list((callbacks | {"print_log": PrintLog(keys_ignored=_STAGE_KEYS)}).items())

    @property
    def device(self) -> str | torch.device:
        """The device that `device` stands for on this machine."""
        device = vars(self)["device"]
        if device != "auto":
            return device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @device.setter
    def device(self, value: Any) -> None:
        self.__dict__["device"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULES_GIVEN:  # parameters, which skorch must not take for its modules
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def get_params(self, deep: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Return the parameters as they were given, and those of callbacks."""
        # deep, scikit-learn would ask transforms of torchvision, whose `get_params` is another
        params = super().get_params(deep=False, **kwargs) | {"device": vars(self)["device"]}
        return params | (self._get_params_callbacks(deep=True) if deep else {})

    def __sklearn_clone__(self):
        """Return an unfitted copy; augmentations are copied, whatever methods they have."""
        stand_in, backbone = object.__new__(type(self)), self.backbone
        stand_in.__dict__ = self.__dict__ | {"augmentation": None, "backbone": None}
        cloned = super(SkorchProtoPNet, stand_in).__sklearn_clone__()
        cloned.augmentation = copy.deepcopy(self.augmentation)
        cloned.backbone = copied(backbone) if isinstance(backbone, nn.Module) else backbone
        return cloned

    def set_params(self, **params: Any):
        """Set parameters, nested ones of skorch included; what was learned stays.

        For some of them skorch would build the network anew, or fail.
        """
        refuse_unknown(params, type(self), ValueError)
        in_use = {n: v for n, v in params.items() if n.startswith(("callbacks__", "optimizer__"))}
        for name in params.keys() - in_use:
            setattr(self, name, params[name])
        super().set_params(**in_use)  # skorch gives the optimizer its own, and forgets them
        self.__dict__ |= {n: v for n, v in in_use.items() if n.startswith("optimizer__")}
        if self.initialized_ and any(name.startswith("callbacks") for name in params):
            self._initialize_callbacks()  # fit makes them anew, partial_fit does not
        return self

    def set_fit_request(self, **requests: Any):
        """Say which metadata meta-estimators hand to `fit`: see scikit-learn's metadata routing."""
        refuse_unknown_metadata(requests, self.fit)
        return super().set_fit_request(**requests)

    def set_partial_fit_request(self, **requests: Any):
        """Say which metadata meta-estimators hand to `partial_fit`, likewise."""
        refuse_unknown_metadata(requests, self.partial_fit)
        return super().set_partial_fit_request(**requests)

    def _set_params_callback(self, **params: Any):
        """Set those of callbacks, once it is known that there are such (called by skorch)."""
        known = [name for name, _ in self.callbacks_]
        off = [name for name in params if vars(self).get(name, "") is None]  # of no callback now
        params = {name: value for name, value in params.items() if name not in off}
        for name in params:
            callback = name.split("__")[1]
            if callback not in known:
                raise ValueError(f"{name!r}: there is no callback {callback!r}; there are {known}.")
        return super()._set_params_callback(**params)

    def _get_param_names(self) -> list[str]:  # type: ignore[override]  # as in skorch, no classmethod
        names = super()._get_param_names()
        return sorted(n for n in names if not n.startswith("_") and n not in NOT_OURS)

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state["device"]
        state = state | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        super().__setstate__(state if device == "auto" else state | {"device": device})
        if device == "auto":
            self.device = device


def _cells_of_prototype(size: Any, cells: tuple[int, int]) -> tuple[int, int]:
    if size == "full":
        return cells
    if size[0] > cells[0] or size[1] > cells[1]:
        raise ValueError(
            f"prototype_size {tuple(size)} is larger than the latent map, which has "
            f"{cells[0]} x {cells[1]} cells at this image_size."
        )
    return int(size[0]), int(size[1])
