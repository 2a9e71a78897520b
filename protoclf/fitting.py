"""A fit from X and y to the table of prototypes: data, stages, checkpoint, and what is kept."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from warnings import catch_warnings, filterwarnings, warn

import numpy as np
import pandas as pd
import torch
from numpy.random import RandomState
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from skorch.callbacks import EpochScoring, LRScheduler
from skorch.dataset import ValidSplit
from torch.utils.data import Dataset

from protoclf.acceleration import return_freed_memory
from protoclf.augmentation import augmentation_of
from protoclf.checkpoint import FILE, Checkpoint
from protoclf.explanation import prototype_table
from protoclf.features import FitData
from protoclf.fit_key import changes, data_key, fit_key
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset, in_whole
from protoclf.images import Images, repeated_files, skipped_images
from protoclf.labels import check_single_precision, class_weights, read_targets
from protoclf.messages import first_few, first_quoted
from protoclf.net import NotFinite, SkorchProtoPNet
from protoclf.parameters import (
    changed_parameters,
    check_apart,
    check_enough_images,
    check_parameters,
    check_positions,
    check_positions_known,
    prototype_counts,
)
from protoclf.saved_sources import sources_among
from protoclf.source_files import SourceFile, changes_since, stamps
from protoclf.stages import Stage, Training, drop_unused_prototypes, schedule
from protoclf.torch_datasets import unpacked
from protoclf.torch_settings import on_cpu_by_default, random_numbers_from, without_autocast

_OF_VALIDATION = ("valid_loss", "valid_loss_best", "valid_acc", "valid_acc_best")

_IN_LESS_MEMORY = (
    "A smaller micro_batch_size, such as 8, takes less memory, and so does batch_size."
)

_FITTED = (
    *("prototypes_", "source_images_", "last_layer_result_", "last_layer_path_", "lambda_l1_"),
    *("classes_inferred_", "activations_", "edits_", "skipped_"),
)


class TrainingData(NamedTuple):
    """The images of a fit, and what goes with them.

    Attributes
    ----------
    dataset : ImageDataset
        Of the images that are left, with their classes and weights.
    classes : ndarray of shape (C,)
        The labels, sorted.
    groups : ndarray of shape (N,) or None
    skipped : DataFrame
        The images that could not be read.
    """

    dataset: ImageDataset
    classes: np.ndarray
    groups: np.ndarray | None
    skipped: pd.DataFrame


class StagedNet(SkorchProtoPNet):
    """A net that is fitted through all stages."""

    prototypes_: pd.DataFrame
    classes_inferred_: np.ndarray
    _fitting = False
    _settings: Mapping[str, str] = MappingProxyType({})  # of the last fit, other than by default

    def _fit(self, X: Any, y: Any, sample_weight: Any, groups: Any, first: bool):
        before = None if first else self._copied_state()
        table = vars(self).get("prototypes_")
        drawn_from = self.random_state
        stream = drawn_from.get_state() if isinstance(drawn_from, RandomState) else None
        self._fitting = True
        try:
            with on_cpu_by_default():
                return self._fit_all(X, y, sample_weight, groups, first)
        except BaseException as error:
            if stream is not None:  # the same call goes on from a checkpoint, or begins as this one
                drawn_from.set_state(stream)
            if before is not None:
                self.__dict__ = before
            elif self._is_trained() and self.prototypes_ is not table:  # stopped at its very end
                self._forget()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._after_interrupt()) from error
            raise
        finally:
            self.__dict__.pop("_fitting", None)

    def _copied_state(self) -> dict[str, Any]:
        """Return what `partial_fit` goes on from, to go back to should it fail."""
        state = dict(self.__dict__)
        for names in (("module_", "criterion_", "optimizer_"), ("history_",)):
            copies = copy.deepcopy([state[name] for name in names])  # one refers to another
            state |= dict(zip(names, copies, strict=True))
        return state

    def _after_interrupt(self) -> str:
        left = "is as it was before" if self._is_trained() else "is not fitted"
        kept = self.checkpoint is not None and (Path(self.checkpoint) / FILE).exists()
        how = " The same call goes on from its checkpoint." if kept else ""
        return f"The fit was interrupted; the classifier {left}.{how}"

    def _fit_all(self, X: Any, y: Any, sample_weight: Any, groups: Any, first: bool):
        check_parameters(vars(self))
        augmentation_of(self.augmentation)  # a wrong one is refused now
        if not first:
            self._check_preprocessing()
        X, y = unpacked(X, y)
        images = Images(X)
        paths = images.paths or []
        before = stamps(paths)
        data = self._training_data(images, y, sample_weight, groups, first)
        if first:
            self._forget()
            self.classes_inferred_ = data.classes
        self.__dict__.pop("skipped_", None)  # of an earlier fit
        if self.on_bad_image == "skip":
            self.skipped_ = data.skipped
        self.preprocessing_ = data.dataset.preprocessing
        self._check_agreement(data)
        checkpoint = self._checkpoint(data, first)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        begun = None if checkpoint is None else checkpoint.seed
        self.seed_ = self.processes.agreed(seed if begun is None else begun)
        try:
            self._train(data, first, checkpoint)
        except NotFinite as error:
            raise FloatingPointError(self._about(error, data.dataset.images)) from error
        except torch.cuda.OutOfMemoryError as error:
            raise torch.cuda.OutOfMemoryError(f"{error} {_IN_LESS_MEMORY}") from error
        finally:
            return_freed_memory()
        self._settings = changed_parameters(self)
        self.optimizer_.state.clear()  # the moments of Adam are twice the size of the network
        self.module_.eval()
        self._warn_of_bare_classes()
        changed = changes_since(paths, before)
        if changed:
            warn(
                f"While fit took its time, {changed}. It saw what was there when it read the "
                "images; the pictures of prototypes may be others now.",
                stacklevel=4,
            )
        return self

    def _check_preprocessing(self) -> None:
        """Raise ValueError where the network would see other images than those it was fitted to."""
        for name in ("image_size", "resize"):
            now, before = getattr(self, name), getattr(self.preprocessing_, name)
            if now != before:
                raise ValueError(
                    f"{name} is {now!r} now and was {before!r} in the fit that this one goes on "
                    "from. Set it back, or fit anew (warm_start=False)."
                )

    def _train(self, data: TrainingData, first: bool, checkpoint: Checkpoint | None) -> None:
        """Build the network, or take over parameters set since, and walk the stages."""
        device = torch.device(self.device)
        whole: dict[str, Any] = {"X": data.dataset, "y": data.dataset.y.numpy()}
        with (
            random_numbers_from(self.seed_, device),  # one fit at a time
            without_autocast(device),  # `precision` is what says
        ):
            if first:
                self.initialize()
                self._warn_of_one_cell()
                self._warn_of_random_features()
            self.prepare_processor()
            if not first:
                self.heed_parameters()
            self._check_callbacks()
            self.module_.keep_statistics(self.batch_norm == "keep")
            self.notify("on_train_begin", **whole)
            with self.plain_module.taking(self.images_at_once()):
                self.fit_loop(**whole, first=first, groups=data.groups, checkpoint=checkpoint)

    def _warn_of_one_cell(self) -> None:
        if self.prototype_size != "full" and self.geometry_.height * self.geometry_.width == 1:
            warn(
                f"The backbone makes a single cell of an image of {self.image_size} pixels: each "
                "prototype is a whole image, and each box too. Raise image_size, or leave out the "
                'backbone\'s last layers; with prototype_size="full" nothing warns.',
                UserWarning,
                stacklevel=6,
            )

    def _warn_of_random_features(self) -> None:
        has_no_weights = self.backbone == "small_cnn" and self.weights == "DEFAULT"
        if has_no_weights and not self.train_backbone:
            warn(
                '"small_cnn" has no pretrained weights, and train_backbone=False keeps its random '
                "ones. Train it, or take a pretrained backbone; with weights=None nothing warns.",
                UserWarning,
                stacklevel=6,
            )

    def _warn_of_bare_classes(self) -> None:
        bare = (self.weight_matrix() == 0).all(1)  # (C,)
        if not bare.any():
            return
        names = first_quoted(self.classes_[bare].tolist())
        warn(
            f"lambda_l1={self.lambda_l1_:g} leaves no weight for the classes {names}: their logit "
            "is always 0, and sheets have no row for them. A smaller one may leave some.",
            UserWarning,
            stacklevel=5,
        )

    def _check_callbacks(self) -> None:
        """Raise ValueError for callbacks that would fail after an epoch, or not be heeded."""
        for name, callback in self.callbacks_:
            monitor = getattr(callback, "monitor", None)
            if self.train_split is None and monitor in _OF_VALIDATION:
                raise ValueError(
                    f"The callback {name!r} monitors {monitor!r}, and there is no validation "
                    "split. Set one, train_split=skorch.dataset.ValidSplit(5, stratified=True), or "
                    "have it monitor 'train_loss'."
                )
            if _scores_without_labels(callback):
                scoring = "score" if callback.scoring is None else callback.scoring
                raise ValueError(
                    f"The callback {name!r} would be shown no labels for {scoring!r}: "
                    "leave use_caching at True."
                )
            if isinstance(callback, LRScheduler):
                raise ValueError(
                    f"The callback {name!r} would not be heeded: lr_schedule sets the learning "
                    "rates, for each stage anew. Leave it out."
                )

    def _about(self, error: NotFinite, images: Images) -> str:
        """Say where a fit came upon NaN, and what may help."""
        names = [images.name(i) for i in error.index.tolist()]
        row = self.history[-1] if len(self.history) else {}
        where = f" in row {row['epoch']} of the history, stage {row['stage']!r}" if row else ""
        return (
            f"{error.what}{where}, for the images {first_few(names)}. Try lower learning rates "
            f"(lr is {self.lr:g}, backbone_lr {self.backbone_lr:g}), gradient clipping "
            '(skorch.callbacks.GradientNormClipping) or precision="float32"; where it happens '
            "without training, look at the weights of the backbone."
        )

    def _is_trained(self) -> bool:
        return hasattr(self, "prototypes_")

    def initialize(self):
        """Build the network as it is before a fit, which calls this; what was fitted is gone."""
        if "classes_inferred_" not in vars(self):
            raise NotFittedError("The network is built for the classes of y; call fit, not this.")
        if not self._fitting:
            classes = self.classes_inferred_
            self._forget()
            self.classes_inferred_ = classes
        return super().initialize()

    def _forget(self) -> None:
        """Drop what an earlier fit learned, so that an interrupted one cannot be taken for it."""
        for name in _FITTED:
            self.__dict__.pop(name, None)
        self.concepts_ = None

    def _training_data(
        self, images: Images, y: Any, sample_weight: Any, groups: Any, first: bool
    ) -> TrainingData:
        """Check y and what goes with it, and decode all images; and say what is left out."""
        given = read_targets(images, y, sample_weight, groups, None if first else self.classes_)
        preprocessing = Preprocessing(self.image_size, self.resize)
        dataset = ImageDataset(images, preprocessing, on_bad_image=self.on_bad_image)
        show = bool(self.verbose)
        if self.memory is not None and not self.trains_backbone and self.on_bad_image == "raise":
            dataset.check(show)
        else:
            dataset.keep(show, self.memory_folder)
        readable = ~dataset.failed(np.arange(len(images)))
        skipped = skipped_images(dataset.failures.values(), given.y, np.flatnonzero(readable))
        good = np.flatnonzero(readable & given.counting())
        given = given.of(good)
        weight = self.weights_of(given.codes, given.classes, given.weight)
        part = dataset.of(good, given.codes, weight)
        return TrainingData(part, given.classes, given.groups, skipped)

    def weights_of(
        self, codes: np.ndarray, classes: np.ndarray, sample_weight: Any
    ) -> np.ndarray | None:
        """Return the weights of images (n,): checked ones of their own, times their classes'."""
        weight = sample_weight
        if self.class_weight is not None:
            of_classes = class_weights(self.class_weight, codes, classes)
            weight = of_classes if weight is None else of_classes * weight
        check_single_precision(weight)
        return weight

    def fit_loop(  # type: ignore[override]  # skorch's takes any metadata
        self,
        X: Dataset,
        y: Any = None,
        epochs: None = None,
        *,
        first: bool = True,
        groups: np.ndarray | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        """Walk the stages over a data set of images (called by `fit`)."""
        train, valid = self._divided(X, y, groups)
        whole = in_whole(X)[0]
        if any(in_whole(part)[0] is not whole for part in (train, valid) if part is not None):
            raise ValueError(
                "train_split must divide the images that fit was given. For a validation set of "
                "your own, pass all images and ValidSplit(PredefinedSplit(fold)), with fold -1 for "
                "those to train on and 0 for the others."
            )
        parts = [in_whole(part)[1] for part in (train, valid) if part is not None]
        for part in parts:
            check_positions(part, len(whole))
        if groups is not None and valid is not None:
            check_apart(*(groups[part] for part in parts))
        positions = parts[0]
        check_enough_images(
            self._prototypes_to_place(first),
            y[positions],
            self.classes_,
            self._places_per_image(),
            first=first,
            divided=valid is not None,
        )
        by_folds = self.lambda_l1 == "cv" or self.plain_module.discriminants is not None
        if groups is None and by_folds:
            groups = repeated_files(whole.images)
        data = FitData(self, train, valid, None if groups is None else groups[positions])
        stages = schedule(self, first)
        self._run(stages, data, positions, checkpoint)
        settled = [p.clone() for p in (self.module_.prototypes, self.module_.last_layer.weight)]
        self.notify("on_train_end", X=X, y=y)
        if not self._is_settled(settled):  # a callback with load_best went back to an earlier epoch
            data.forget_features()
            for stage in stages[-2:]:
                stage.run(self, data)
        if self.prototypes_per_class == "auto":  # now that no callback goes back any more
            drop_unused_prototypes(self)
        self._keep_sources(train)
        if checkpoint is not None:
            checkpoint.remove()
            self.processes.agreed(None)  # another fit of a process finds none: it waited
        return self

    def _divided(self, X: Dataset, y: Any, groups: np.ndarray | None) -> tuple[Any, Any]:
        """Return the training and the validation part."""
        check_positions_known(self.train_split, in_whole(X)[0].images.positions)
        together = {} if groups is None else {"groups": groups}
        try:
            with catch_warnings():  # whether groups stay together is checked
                filterwarnings("ignore", "The groups parameter is ignored", UserWarning)
                train, valid = self.get_split_datasets(X, y, **together)
        except StopIteration:  # of a PredefinedSplit that is -1 throughout
            train, valid = X, ()
        except (TypeError, ValueError) as error:
            if not isinstance(self.train_split, ValidSplit):
                raise
            raise ValueError(
                f"train_split cannot divide the images ({error}). ValidSplit shows groups to its "
                "splitter if fit was given them, and y to StratifiedKFold and "
                "StratifiedShuffleSplit alone. Give it what another splitter, such as "
                "StratifiedGroupKFold, chose: ValidSplit([next(splitter.split(X, y, groups))])."
            ) from error
        if valid is not None and not len(valid):
            raise ValueError(
                "train_split leaves no image to validate on. To train on all, set it to None."
            )
        return train, valid

    def _prototypes_to_place(self, first: bool) -> list[int]:
        """Return for how many prototypes of each class a fit needs patches that differ."""
        if first and self.prototypes_per_class != "auto":
            return prototype_counts(self.prototypes_per_class, self.classes_)
        if first or self.distinct is None:
            return [1] * len(self.classes_)
        return torch.bincount(self.module_.owner, minlength=len(self.classes_)).tolist()

    def _places_per_image(self) -> int:
        """Return how many prototypes may be parts of one image."""
        if self.distinct == "images":
            return 1
        down, right = self.geometry_.n_patches(*self.plain_module.prototype_size)
        return down * right

    def _run(
        self,
        stages: list[Stage],
        data: FitData,
        train: np.ndarray,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Take the steps that are left, and keep the state after each that is costly."""
        if checkpoint is None:
            for stage in stages:
                stage.run(self, data)
            return
        checkpoint.restore(self, stages, train)
        for position in range(checkpoint.stage, len(stages)):
            stage = stages[position]
            if isinstance(stage, Training):
                keep = partial(checkpoint.write, self, position)
                stage = replace(stage, done=checkpoint.epochs, after_epoch=keep)
            stage.run(self, data)
            if stage.costly and stage is not stages[-1]:
                checkpoint.write(self, position + 1, 0)

    def _checkpoint(self, data: TrainingData, first: bool) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        network = None if first else self.module_
        given = data.dataset, data.classes, data.groups
        key = fit_key(self.get_params(deep=False), *given, network, self.concepts_)
        key["the number of processes"] = str(self.processes.count)
        return Checkpoint(self.checkpoint, key, writes=self.processes.is_first)

    def _check_agreement(self, data: TrainingData) -> None:
        """Raise ValueError where several processes were given different data."""
        if self.processes.count == 1:
            return
        key = data_key(data.dataset, data.classes, data.groups)
        found = self.processes.gathered(changes(self.processes.agreed(key), key))
        differing = [f"in process {i} {text}" for i, text in enumerate(found) if text]
        if differing:
            raise ValueError(
                f"The processes of this fit have different data: compared with the first, "
                f"{first_few(differing)}. Give each of them the same, in the same order."
            )

    def _is_settled(self, settled: list[torch.Tensor]) -> bool:
        now = (self.module_.prototypes, self.module_.last_layer.weight)
        return all(torch.equal(a, b) for a, b in zip(now, settled, strict=True))

    def _keep_sources(self, train: Any) -> None:
        """Write the table of prototypes, with positions and pixels of the images that fit saw."""
        dataset, positions = in_whole(train)
        sources = dict(self.sources_)
        places = positions[sources["image"]]  # in the data set
        images, sizes = dataset.images, dataset.sizes(places)
        sources["box"] = dataset.preprocessing.to_original_pixels(sources["box"], sizes)
        sources["image"] = images.positions[places]
        used = np.unique(places).tolist()
        indices = images.positions[used].tolist()
        self.source_images_: Mapping[int, np.ndarray] = {}
        self._source_files: dict[int, SourceFile] = {}
        paths = None
        if images.paths is None:  # pixels would be lost; paths lead to the pictures
            pixels = [np.asarray(images.open(i)) for i in used]
            self.source_images_ = dict(zip(indices, pixels, strict=True))
        else:
            paths = dict(zip(images.positions.tolist(), images.paths, strict=True))
            # one that went during the fit, which warns of that, may have no digest
            digests = dataset.digests(used, readable_alone=True)
            self._source_files = {
                i: SourceFile(paths[i], os.path.abspath(paths[i]), digest or None)
                for i, digest in zip(indices, digests, strict=True)
            }
        self.prototypes_ = prototype_table(
            self.module_.owner.cpu().numpy(),
            self.classes_,
            sources,
            paths,
            self.weight_matrix(),
            self.strongest_share_,
        )
        self._source_boxes: dict[Any, np.ndarray] = {}

    def renew_table(self, kept: np.ndarray) -> None:
        """Renew numbers and weights of the prototypes that an edit kept."""
        owner = self.module_.owner.cpu().numpy()
        weight = self.weight_matrix()
        self.prototypes_ = self.prototypes_.iloc[kept].assign(
            prototype=np.arange(len(kept)),
            weight=weight[owner, np.arange(len(kept))].astype(float),
            strongest_share=self.strongest_share_,
        )
        self.prototypes_ = self.prototypes_.reset_index(drop=True)
        self._source_boxes = {}
        used = set(self.prototypes_["source_index"].tolist())
        self.source_images_ = sources_among(self.source_images_, used)


def _scores_without_labels(callback: Any) -> bool:
    """Return whether a callback gives a scorer of scikit-learn no y, but a data set of ours."""
    ours = isinstance(callback, EpochScoring) and isinstance(callback.scoring, str | None)
    return ours and not callback.use_caching
