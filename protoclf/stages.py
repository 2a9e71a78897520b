"""The stages of a fit: warm-up, joint, projection and last layer, as data that knows how to run.

Chen et al., NeurIPS 2019, section 2.2, and their settings (supplement). Each stage says what it
trains, with what learning rates and for how long, or what it computes. Epochs run through
skorch's own loop, so that callbacks and the history see every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol
from warnings import warn

import numpy as np
import torch
from skorch.callbacks import EarlyStopping
from torch import Tensor
from torch.utils.data import Dataset

from protoclf.acceleration import return_freed_memory
from protoclf.activations import Activations
from protoclf.discriminants import find_discriminants
from protoclf.features import Arrays, FitData
from protoclf.fingerprints import described
from protoclf.image_dataset import in_whole
from protoclf.initialization import centre_latents, kmeans_prototypes
from protoclf.interrupts import noticing_ctrl_c
from protoclf.net import SkorchProtoPNet
from protoclf.patch_search import project, view_activations
from protoclf.penalty import auto_penalty, penalties_to_try, penalty_path
from protoclf.progress import with_bar
from protoclf.selection import selected_prototypes
from protoclf.self_matches import rare_classes, replace_self_matches
from protoclf.stage_cache import remembered
from protoclf.torch_settings import widest_float

_PLACE = ("image", "row", "col", "box", "moved")  # of the sources


class Stage(Protocol):
    """One step of the schedule.

    Attributes
    ----------
    costly : bool
        Whether an interrupted fit should not have to take it again.
    """

    costly: ClassVar[bool]

    def run(self, net: SkorchProtoPNet, data: FitData) -> None:
        """Take the step."""


def schedule(net: SkorchProtoPNet, first: bool) -> list[Stage]:
    """Return the stages of a fit; those before the first cycle only where it is the first fit."""
    stages: list[Stage] = []
    if first:
        stages.append(Start(net.prototype_init))
        heads = {"add_on": net.lr, "prototypes": net.lr}
        stages.append(Training("warm-up", net.warmup_epochs, heads))
    joint = {"backbone": net.backbone_lr, "add_on": net.lr, "prototypes": net.lr}
    cycles = net.cycles if net.trains_backbone else 1  # another projection would change nothing
    for cycle in range(cycles):
        if net.train_backbone:
            before = net.joint_epochs * cycle
            stages.append(Training("joint", net.joint_epochs, joint, net.lr_schedule, before))
        stages += [Projection(net.distinct), LastLayer.of(net)]
    return stages


@dataclass(frozen=True)
class Start:
    """Set prototypes and last layer to where the training begins."""

    prototype_init: str
    name: str = "start"
    costly: ClassVar[bool] = True

    def run(self, net: SkorchProtoPNet, data: FitData) -> None:
        """Find discriminants, centre cosines, and choose prototypes as the parameters say."""
        counts = net.prototypes_per_class
        distinct = net.distinct if counts == "auto" else None
        what = self, described(counts), net.weight_of_discriminants(), distinct
        found = remembered(net, data, what, net.head(), lambda: self._begin(net, data))
        net.set_state(found, strict=False)
        net.agree()

    def _begin(self, net: SkorchProtoPNet, data: FitData) -> Arrays:
        """Start; return all parts of the network but the backbone."""
        find_discriminants(net, data)
        centre_latents(net, data)
        if self.prototype_init == "kmeans":
            kmeans_prototypes(net, data)
        elif self.prototype_init == "selected":
            selected_prototypes(net, data)
        return net.head()


@dataclass(frozen=True)
class Training:
    """Epochs of gradient steps on the joint loss, the last layer fixed.

    Attributes
    ----------
    name : str
    epochs : int
    learning_rates : mapping of str to float
        For each part that is trained; the others are frozen.
    lr_schedule : {None, "cosine", "step"}
        How the rates fall from epoch to epoch: not at all, to 0 along half a cosine in each
        stage, or to a tenth every 5 epochs (the paper's).
    epochs_before : int
        Epochs of this kind in earlier cycles, which count for the steps.
    done : int
        Epochs of this stage that a fit which was interrupted has done.
    after_epoch : callable or None
        Told how many epochs are done, after each but the last.
    """

    name: str
    epochs: int
    learning_rates: Mapping[str, float]
    lr_schedule: str | None = None
    epochs_before: int = 0
    done: int = 0
    after_epoch: Callable[[int], None] | None = None
    costly: ClassVar[bool] = True

    def run(self, net: SkorchProtoPNet, data: FitData) -> None:
        """Train; on cached features wherever the backbone is frozen."""
        if not self.epochs:
            return
        net.module_.train_only(self.learning_rates)
        net.module_.reset_last_layer()
        if not self.done:
            net.optimizer_.state.clear()
            _forget_misses(net)
        data.forget_latents()
        on_images = "backbone" in self.learning_rates
        if on_images:
            net.backbone_trained_ = True
            data.forget_features()
            net.find_folds()
        train = data.augmented_train_images if on_images else data.features_to_learn_from
        valid = data.valid_images if on_images else data.valid_features
        batches = net.get_iterator(train, training=True)
        if hasattr(batches, "__len__") and not len(batches):
            raise ValueError(
                f"iterator_train__drop_last=True leaves no batch to train on: there are "
                f"{len(data.train_y)} images, and batch_size is {net.batch_size}."
            )
        with net.data_parallel(), net.in_pieces() if on_images else nullcontext():
            for epoch in range(self.done, self.epochs):
                self._set_learning_rates(net.optimizer_, epoch)
                torch.manual_seed(net.processes.own_seed(net.seed_ + len(net.history)))
                what = f"{self.name}, epoch {epoch + 1} of {self.epochs}"
                shown = with_bar(batches, what, net.shows_progress)
                with _history_row(net, data, self.name) as row:
                    net.run_single_epoch(shown, True, "train", net.train_step)
                    net.agree()
                    _validate(net, valid)
                if row.stopped:
                    break
                if self.after_epoch is not None and epoch + 1 < self.epochs:
                    self.after_epoch(epoch + 1)
        net.optimizer_.zero_grad()  # gradients are as large as the network
        if on_images:
            return_freed_memory()  # stages without gradients need less

    def _set_learning_rates(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates.get(group["part"], 0.0) * self._factor(epoch)

    def _factor(self, epoch: int) -> float:
        if self.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.lr_schedule == "step":
            return 0.1 ** ((self.epochs_before + epoch) // 5)
        return 1.0


@dataclass(frozen=True)
class Projection:
    """Move every prototype onto the nearest latent patch of its class, for ever."""

    distinct: str | None
    name: str = "projection"
    costly: ClassVar[bool] = False  # it needs the features that the last layer needs too

    def run(self, net: SkorchProtoPNet, data: FitData) -> None:
        """Search all training images in one pass, then read the chosen patches."""
        module = net.module_.eval()
        module.train_only(())
        _forgive_a_miss(net)
        with _history_row(net, data, self.name):
            what = self, described(net.concepts_), described(data.groups)
            work = partial(project, net, data, self.distinct)
            found = remembered(net, data, what, net.head(), work)
            module.prototypes.data.copy_(torch.as_tensor(found["prototypes"]))
            data.train_distance = torch.as_tensor(found["distance"], device=net.device)
            net.sources_ = {name: np.asarray(found[name]) for name in _PLACE}
            self._record_distinct(net)
            _record_train_loss(net, data)
            _validate(net, data.valid_features)

    def _record_distinct(self, net: SkorchProtoPNet) -> None:
        image, row, col = (net.sources_[name] for name in ("image", "row", "col"))
        m = len(image)
        patches = len(np.unique(np.stack([image, row, col]), axis=1).T)
        images = len(np.unique(image))
        net.history.record("distinct_patches", patches)
        net.history.record("distinct_images", images)
        if patches < 0.8 * m:
            warn(
                f"{m} prototypes were projected onto {patches} distinct patches only. Use fewer "
                'prototypes_per_class, or distinct="patches".',
                UserWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class LastLayer:
    """Solve the convex problem of the last layer on the activations of all training images.

    Attributes
    ----------
    lambda_l1 : float, "auto" or "cv"
        "cv" chooses the penalty of the lowest cross-entropy on images left out.
    self_matches : {"auto", "median", "keep"}
        What becomes of a prototype's activation on its own source image.
    lambda_l2 : float or "auto"
    """

    lambda_l1: float | str
    self_matches: str
    lambda_l2: float | str
    name: str = "last layer"
    costly: ClassVar[bool] = True

    @classmethod
    def of(cls, net: SkorchProtoPNet) -> LastLayer:
        """Return the last layer that the parameters of a net ask for."""
        return cls(net.lambda_l1, net.self_matches, net.lambda_l2)

    def run(self, net: SkorchProtoPNet, data: FitData) -> None:
        """Solve and set W."""
        module = net.module_
        _forgive_a_miss(net)
        with _history_row(net, data, self.name), torch.no_grad():
            g = module.activations(data.train_distance)  # (N, m)
            net.activations_ = Activations(
                *(g, data.train_y.to(g.device), module.owner, len(module.last_layer.weight)),
                weight=data.train_weight,
                views=view_activations(net, data, as_if_new=True),
            )
            if widest_float(g.device) != torch.float64:  # the solver's work is the CPU's then
                net.activations_ = net.activations_.cpu()
            net.lambda_l1_ = self._penalty(net, data)
            self.solve(net)
            net.agree()
            net.activations_ = net.activations_.cpu()
            net.history.record("objective", net.last_layer_result_.objective)
            net.history.record("residual", net.last_layer_result_.residual)
            _record_train_loss(net, data)
            _validate(net, data.valid_features)

    @torch.no_grad()
    def solve(self, net: SkorchProtoPNet) -> None:
        """Set W to the optimum for the activations that the net holds."""
        (result,) = self._shown(net).solve([net.lambda_l1_], lambda_l2=self.ridge(net))
        weight = net.module_.last_layer.weight
        weight.copy_(result.weight)
        net.last_layer_result_ = replace(result, weight=weight.cpu().clone())
        net.strongest_share_ = _strongest_share(net.activations_.g)

    def _shown(
        self, net: SkorchProtoPNet, median: bool = False, groups: np.ndarray | None = None
    ) -> Activations:
        """Return what the solver is shown: in float64, where rounding W costs no optimality."""
        a, rule = net.activations_, "median" if median else self.self_matches
        some = rare_classes(a.y, a.n_classes)[a.owner] if rule == "auto" else None  # (m,)
        if rule == "median" or (some is not None and some.any().item()):
            source = torch.from_numpy(net.sources_["image"]).to(a.g.device)
            alike = None if groups is None else torch.from_numpy(groups).to(a.g.device)
            places = a.y, a.owner, source, alike, some
            a = a.changed(lambda g: replace_self_matches(g, *places))
        return a.changed(torch.Tensor.double)

    def lasso(self, net: SkorchProtoPNet) -> float | str:
        """Return the weight of the absolute penalty; "cv" where it is to be chosen."""
        return auto_penalty("lambda_l1", self.lambda_l1, _kind_of_features(net), len(net.classes_))

    def ridge(self, net: SkorchProtoPNet) -> float:
        """Return the weight of the squared penalty."""
        return auto_penalty("lambda_l2", self.lambda_l2, _kind_of_features(net), len(net.classes_))

    def _penalty(self, net: SkorchProtoPNet, data: FitData) -> float:
        """Return the penalty.

        Where it is chosen by cross-validation, no held-out image, nor one of its group, may be the
        source of a prototype.
        """
        lambda_l1 = self.lasso(net)
        if not isinstance(lambda_l1, str):
            net.__dict__.pop("last_layer_path_", None)  # of an earlier fit
            return lambda_l1
        shown = self._shown(net, median=True, groups=data.groups)
        penalties = penalties_to_try(shown, torch.from_numpy(net.sources_["image"]), data.groups)
        path = penalty_path(shown, penalties, 4, net.seed_, data.groups, self.ridge(net))
        if path["cross_entropy"].isna().all():
            raise ValueError(
                'lambda_l1="cv" needs a class of two images at least, of two groups where there '
                "are groups; give lambda_l1 a number."
            )
        net.last_layer_path_ = path
        return float(path["lambda_l1"][path["cross_entropy"].argmin()])


def _kind_of_features(net: SkorchProtoPNet) -> str:
    if net.backbone_trained_:
        return "trained"
    return "given" if net.plain_module.discriminants is None else "given, with discriminants"


@torch.no_grad()
def drop_unused_prototypes(net: SkorchProtoPNet) -> None:
    """Keep the prototypes that have a weight for any class, and one of each: no logit changes."""
    module = net.module_
    used = (module.last_layer.weight != 0).any(0)  # (m,)
    for c in range(len(module.last_layer.weight)):
        own = (module.owner == c).nonzero()[:, 0]
        used[own[:1]] |= not used[own].any()
    net.activations_ = net.activations_.of_prototypes(used.cpu())
    net.last_layer_result_ = replace(
        net.last_layer_result_, weight=net.last_layer_result_.weight[:, used.cpu()]
    )
    net.strongest_share_ = _strongest_share(net.activations_.g)
    keep_prototypes(net, used)


@torch.no_grad()
def keep_prototypes(net: SkorchProtoPNet, index: Tensor) -> None:
    """Go on with some of the prototypes, by index or mask, and with their sources and weights."""
    module = net.module_
    index = index.to(module.owner.device)
    weight = module.last_layer.weight[:, index].clone()
    net.replace_prototypes(module.prototypes[index].clone(), module.owner[index], weight)
    kept = index.cpu().numpy()
    net.sources_ = {name: values[kept] for name, values in net.sources_.items()}


def _strongest_share(g: Tensor) -> np.ndarray:
    """Return the share of images in which each prototype is the strongest, (m,)."""
    return g.argmax(1).bincount(minlength=g.shape[1]).cpu().numpy() / len(g)


class _Row:
    """Whether a callback, such as early stopping, ended the stage with this row."""

    stopped = False


@contextmanager
def _history_row(net: SkorchProtoPNet, data: FitData, stage: str) -> Iterator[_Row]:
    """Open a row of the history for the stage, and close it with the callbacks."""
    datasets = {"dataset_train": data.train_images, "dataset_valid": data.valid_images}
    net.notify("on_epoch_begin", **datasets)
    net.history.record("stage", stage)
    row = _Row()
    yield row
    net.history[-1:] = net.processes.agreed(net.history[-1:])
    with noticing_ctrl_c() as ctrl_c:
        net.on_epoch_end(net, **datasets)
        for _, callback in net.callbacks_:  # all of them: the log comes last
            try:
                callback.on_epoch_end(net, **datasets)
            except KeyboardInterrupt:  # skorch's early stopping speaks so: it ends the stage alone
                if ctrl_c.is_set():
                    raise
                row.stopped = True


def _early_stopping(net: SkorchProtoPNet) -> list[EarlyStopping]:
    return [callback for _, callback in net.callbacks_ if isinstance(callback, EarlyStopping)]


def _forget_misses(net: SkorchProtoPNet) -> None:
    """Let early stopping count anew: the losses of one stage say nothing of the next."""
    for callback in _early_stopping(net):
        callback.on_train_begin(net)


def _forgive_a_miss(net: SkorchProtoPNet) -> None:
    """Let early stopping see the one row of a stage that it cannot end."""
    for callback in _early_stopping(net):
        callback.misses_ = -1


def _validate(net: SkorchProtoPNet, valid: Dataset | None) -> None:
    if valid is not None:
        batches = net.get_iterator(valid, training=False)
        net.run_single_epoch(batches, False, "valid", net.validation_step)


@torch.no_grad()
def _record_train_loss(net: SkorchProtoPNet, data: FitData) -> None:
    """Show skorch the training images as one batch, whose distances are known already."""
    module, y, distance = net.module_, data.train_y, data.train_distance
    cells = torch.empty(0)  # which no loss reads
    outputs = module.last_layer(module.activations(distance)), distance, cells
    inputs = {"index": torch.from_numpy(in_whole(data.train_images)[1])}
    if data.train_weight is not None:
        inputs["sample_weight"] = data.train_weight
    step = {"loss": net.get_loss(outputs, y, X=inputs), "y_pred": outputs}
    net.run_single_epoch([(inputs, y)], True, "train", lambda batch: step)
