"""What each parameter of `ProtoPNetClassifier` may be; checked when a fit begins."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from os.path import isfile
from typing import Any, TypeVar

import joblib
import numpy as np
import torch

from protoclf.messages import first_few, first_quoted
from protoclf.rules import (
    COUNT,
    NON_NEGATIVE,
    Rule,
    either,
    integer,
    one_of,
    optional,
)

T = TypeVar("T")

_MOST_AUTO = 20  # prototypes of a class

_LARGEST_SEED = 2**32 - 1  # of a RandomState

_LONGEST_VALUE = 60  # characters, in a list of parameters

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std


def _is_size(value: Any) -> bool:
    if isinstance(value, str):
        return value == "full"
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(COUNT.holds, value))


def _is_count(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto"
    counts = value.values() if isinstance(value, Mapping) else [value]
    return all(map(COUNT.holds, counts))


def _is_class_weight(value: Any) -> bool:
    if isinstance(value, str):
        return value == "balanced"
    if isinstance(value, Mapping):
        return all(isinstance(weight, Real) for weight in value.values())
    return value is None


def _is_folder(value: Any) -> bool:
    return value is None or (isinstance(value, str | os.PathLike) and os.fspath(value) != "")


def _is_memory(value: Any) -> bool:
    folder = value.location if isinstance(value, joblib.Memory) else value
    return _is_folder(folder) and not (folder is not None and isfile(folder))


def _is_device(value: Any) -> bool:
    try:
        return value == "auto" or torch.device(value).type != "meta"
    except (RuntimeError, TypeError):
        return False


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _are_callbacks(value: Any) -> bool:
    if isinstance(value, str):
        return value == "disable"
    return value is None or (isinstance(value, list) and all(map(_is_callback, value)))


def _is_callback(value: Any) -> bool:
    named = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    callback = value[1] if named else value
    return hasattr(callback, "on_epoch_end")  # of an instance or a class


def _is_seed(value: Any) -> bool:
    if value is None or isinstance(value, np.random.RandomState):
        return True
    return integer(0, _LARGEST_SEED).holds(value)


_OTHER_NAMES = {  # of what is ours by another name, elsewhere
    **dict.fromkeys(("max_epochs", "n_epochs", "num_epochs", "epochs"), "joint_epochs"),
    **dict.fromkeys(("prototypes", "n_prototypes", "num_prototypes"), "prototypes_per_class"),
    **dict.fromkeys(("learning_rate", "learning_rate_init"), "lr"),
    **dict.fromkeys(("seed", "random_seed"), "random_state"),
    **{"pretrained": "weights", "img_size": "image_size", "cache_dir": "memory"},
}

NOT_OURS = ("module", "criterion", "dataset", "max_epochs", "predict_nonlinearity", "classes")
"""Parameters of skorch's nets that ours sets itself."""

_NESTED = ("optimizer", "iterator_train", "iterator_valid", "callbacks", "compile")

RULES: dict[str, Rule] = {
    "on_bad_image": one_of("raise", "skip"),
    "train_backbone": Rule(_is_flag, "True or False"),
    "image_size": COUNT,
    "resize": one_of("crop", "squash"),
    "prototypes_per_class": Rule(_is_count, '"auto", an int >= 1, or a dict of one for each class'),
    "prototype_size": Rule(_is_size, '"full" or (rows, columns), ints >= 1'),
    "latent_dim": optional(COUNT),
    "similarity": one_of("log", "cosine"),
    "discriminant_weight": either("auto", rule=NON_NEGATIVE),
    "prototype_init": one_of("selected", "kmeans", "random"),
    "distinct": one_of(None, "patches", "images"),
    "self_matches": one_of("auto", "median", "keep"),
    "class_weight": Rule(_is_class_weight, 'None, "balanced" or a dict of a number for each class'),
    "lambda_clst": NON_NEGATIVE,
    "lambda_sep": NON_NEGATIVE,
    "lambda_patch": NON_NEGATIVE,
    "lambda_l1": either("auto", "cv", rule=NON_NEGATIVE),
    "lambda_l2": either("auto", rule=NON_NEGATIVE),
    "warmup_epochs": integer(0),
    "joint_epochs": integer(0),
    "cycles": COUNT,
    "augmented_views": either("auto", rule=integer(0)),
    "batch_norm": one_of("keep", "train"),
    "lr": NON_NEGATIVE,
    "backbone_lr": NON_NEGATIVE,
    "lr_schedule": one_of("cosine", "step", None),
    "batch_size": COUNT,
    "micro_batch_size": optional(either("auto", rule=COUNT)),
    "precision": one_of("auto", "float32", "bfloat16"),
    "memory": Rule(_is_memory, "None, a folder (and no file) or a joblib.Memory"),
    "checkpoint": Rule(_is_folder, "None or a folder"),
    "device": Rule(_is_device, '"auto" or a device of torch, such as "cpu" or "cuda:0"'),
    "verbose": Rule(lambda value: isinstance(value, Integral), "an int, 0 or more"),
    "tune_allocator": Rule(_is_flag, "True or False"),
    "optimizer": Rule(callable, "a class of optimizers, such as torch.optim.Adam"),
    "train_split": optional(Rule(callable, "callable, such as skorch.dataset.ValidSplit(5)")),
    "callbacks": Rule(_are_callbacks, 'None, "disable" or a list of skorch callbacks'),
    "random_state": Rule(_is_seed, "None, an int >= 0 and < 2**32 or a numpy.random.RandomState"),
    "iterator_train": Rule(callable, "a class of loaders, such as torch.utils.data.DataLoader"),
    "iterator_valid": Rule(callable, "a class of loaders, such as torch.utils.data.DataLoader"),
    "warm_start": Rule(_is_flag, "True or False"),
}


def check_parameters(params: Mapping[str, Any]) -> None:
    """Raise ValueError where a parameter of the classifier cannot be used."""
    for name, rule in RULES.items():
        rule.check(**{name: params[name]})
    _check_nested(params)
    auto, start = params["prototypes_per_class"] == "auto", params["prototype_init"]
    if auto and start != "selected":
        raise ValueError(
            'prototypes_per_class="auto" chooses among the candidates of '
            f'prototype_init="selected"; got prototype_init={start!r}.'
        )
    plain = params["latent_dim"] is None and params["similarity"] == "cosine"
    if params["discriminant_weight"] not in ("auto", 0) and not plain:
        raise ValueError(
            'discriminant_weight is for similarity="cosine" and latent_dim=None; got '
            f"similarity={params['similarity']!r}, latent_dim={params['latent_dim']!r}. Set it to "
            '"auto" or 0.'
        )


def _check_nested(params: Mapping[str, Any]) -> None:
    """Raise for nested parameters that loaders and optimizer do not have, or must not be given.

    Not all fits make every loader, so that one with a typing error would not be missed.
    """
    for name in params:
        component, nested, own = name.partition("__")
        if name == "optimizer__lr":
            raise ValueError(
                "optimizer__lr would not be heeded: lr is the learning rate of add-on layers and "
                "prototypes, backbone_lr that of the backbone."
            )
        if name == "iterator_train__batch_size":
            raise ValueError("iterator_train__batch_size would be a second batch_size: set that.")
        if not nested or component not in ("iterator_train", "iterator_valid", "optimizer"):
            continue
        known = inspect.signature(params[component]).parameters
        if own in known or any(p.kind == p.VAR_KEYWORD for p in known.values()):
            continue
        hint = _nearest(own, known, before=component + nested)
        raise TypeError(f"{component} has no parameter {own!r}.{hint}")
    check_order(params)


def check_order(params: Mapping[str, Any]) -> None:
    """Raise ValueError where parameters of loaders would lose images, or their order."""
    for own in ("shuffle", "drop_last", "sampler", "batch_sampler"):
        if params.get(f"iterator_valid__{own}"):
            raise ValueError(
                f"iterator_valid__{own} must not be set: answers are in the order of X, one for "
                "each image."
            )


def prototype_counts(spec: str | int | Mapping[Any, int], classes: np.ndarray) -> list[int]:
    """Return the number of prototypes of each of the classes (C,); with "auto", the most."""
    if not isinstance(spec, Mapping):
        return [_MOST_AUTO if spec == "auto" else int(spec)] * len(classes)
    labels = classes.tolist()
    missing = [label for label in labels if label not in spec]
    unknown = [label for label in spec if label not in labels]
    if missing or unknown:
        raise ValueError(
            "prototypes_per_class as a dict must name every class of y once; "
            f"missing: {first_quoted(missing)}; not in y: "
            f"{first_quoted(unknown)}."
        )
    return [int(spec[label]) for label in labels]


def check_enough_images(
    counts: list[int],
    y: np.ndarray,
    classes: np.ndarray,
    per_image: int,
    first: bool = True,
    divided: bool = False,
) -> None:
    """Raise ValueError where a class has too few images for prototypes; y holds class indices.

    An image has room for `per_image` of them. In the `first` fit the numbers of prototypes are
    still to be chosen. Where they are `divided`, these are the images that `train_split` has left.
    """
    have = per_image * np.bincount(y, minlength=len(classes))
    short = [
        f"{label!r} has {n} for {k} prototypes"
        for label, n, k in zip(classes.tolist(), have, counts, strict=True)
        if n < k
    ]
    if short:
        help_ = (
            'Set prototypes_per_class="auto", which does not need as many, lower it (a dict sets '
            "it for each class), or add images."
        )
        if not first:
            help_ = "Set distinct=None, which does not need as many, or add images."
        if not have.all():
            help_ = "Each fit needs images of every class, since prototypes are parts of them."
            if divided:
                help_ += " ValidSplit(5, stratified=True), say, leaves some of each."
        what = "training images" + (" that train_split leaves" if divided else "")
        if per_image > 1:
            what = f"patches, {per_image} for each of the {what},"
        raise ValueError(
            f"Some classes have fewer {what} than prototypes: {first_few(short)}. {help_}"
        )


def check_positions(positions: np.ndarray, n: int) -> None:
    """Raise ValueError where a part of n images has a position that none of them has, or a mask."""
    if positions.dtype == bool:
        raise ValueError(
            "train_split must name positions, and names them by a mask: np.flatnonzero(mask) gives "
            "them."
        )
    beyond = positions[positions >= n]
    if len(beyond):
        raise ValueError(
            f"train_split names position {beyond[0]}, and the fit has {n} images. It counts those "
            "that are left: images of weight 0 and, skipped, unreadable ones are not among them. "
            "Leave them out of X, y and the split."
        )


def check_positions_known(train_split: Any, positions: np.ndarray) -> None:
    """Raise ValueError where a split is given by positions, and those in X are not 0, 1 and so on.

    `positions` (N,) are those of the images that are left of X.
    """
    listed = isinstance(getattr(train_split, "cv", None), Iterable)
    shifted = np.flatnonzero(positions != np.arange(len(positions)))
    if listed and len(shifted):
        raise ValueError(
            f"train_split names positions, and the image at position {shifted[0]} of X is left "
            "out, since its weight is 0 or it cannot be read: those behind it would be taken for "
            "one another. Leave it, and its like, out of X, y and the split."
        )


def check_apart(train: np.ndarray, valid: np.ndarray) -> None:
    """Raise ValueError where the groups of two parts of the data have one in common."""
    both = np.intersect1d(train, valid)
    if len(both):
        raise ValueError(
            f"train_split takes {len(both)} groups apart. Give it a splitter that heeds groups, "
            "such as ValidSplit(GroupKFold(5))."
        )


def normalization(spec: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel, in units where pixels are in [0, 1]."""
    if isinstance(spec, str) and spec == "imagenet":
        return _IMAGENET
    allowed = "normalization must be 'imagenet' or (mean, std), three numbers each"
    try:
        values = np.asarray(spec, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{allowed}; got {spec!r}.") from None
    if values.shape != (2, 3) or not np.isfinite(values).all():
        raise ValueError(f"{allowed}; got {spec!r}.")
    mean, std = values
    if mean.min() < 0 or mean.max() > 1 or std.min() <= 0 or std.max() > 1:
        raise ValueError(
            "normalization is in units where pixels are in [0, 1]: 0 <= mean <= 1 and "
            f"0 < std <= 1; got {spec!r}. Values for pixels in 0..255 are divided by 255."
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def with_parameters_of(base: type) -> Callable[[type[T]], type[T]]:
    """Name the parameters of a base class in a class's signature, in the place of its ``**`` one.

    scikit-learn reads signatures: its repr leaves out what equals the default there.
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Any = vars(cls)["__init__"]
        own = [p for p in inspect.signature(init).parameters.values() if p.kind != p.VAR_KEYWORD]
        hidden = {*NOT_OURS, *(p.name for p in own)}
        theirs = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(vars(base)["__init__"]).parameters.values()
            if p.name not in hidden and p.kind != p.VAR_KEYWORD
        ]
        init.__signature__ = inspect.Signature(own + theirs)
        return cls

    return decorate


def defaults_of(estimator: type) -> dict[str, Any]:
    """Return what the parameters of a class and its bases are by default."""
    inits = [inspect.signature(cls).parameters for cls in estimator.__mro__[-2::-1]]  # but object
    return {p.name: p.default for init in inits for p in init.values() if p.kind != p.VAR_KEYWORD}


def changed_parameters(estimator: Any) -> dict[str, str]:
    """Return the parameters other than by default, as scikit-learn's repr would show them."""
    defaults = defaults_of(type(estimator))
    values = {name: _shown(value) for name, value in estimator.get_params(deep=False).items()}
    return {
        name: value
        for name, value in values.items()
        if name != "verbose" and value != _shown(defaults.get(name, inspect.Parameter.empty))
    }


def _shown(value: Any) -> str:
    text = repr(value)
    if "\n" in text:  # a network
        return f"{type(value).__name__}(…)"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def refuse_unknown(
    names: Iterable[str], estimator: type, error: type[Exception] = TypeError
) -> None:
    """Raise an error for a name that is no parameter of the estimator, naming the nearest."""
    known = set(defaults_of(estimator)) - {"args", *NOT_OURS}
    for name in names:
        prefix, nested, _ = name.partition("__")
        if name in known or (nested and prefix in _NESTED):
            continue
        hint = _nearest(prefix, _NESTED if nested else known, behind=name[len(prefix) :])
        raise error(f"{estimator.__name__} has no parameter {name!r}.{hint}")


def refuse_unknown_of_members(names: Iterable[str], ensemble: Any, members: Iterable[str]) -> None:
    """Raise ValueError for a name that is no parameter of an ensemble, and of no member of it."""
    known = {*inspect.signature(type(ensemble)).parameters, *members}
    for name in names:
        first, nested, own = name.partition("__")
        if first not in known:
            hint = _nearest(first, known, behind=nested + own)
            raise ValueError(f"{type(ensemble).__name__} has no parameter {name!r}.{hint}")


def refuse_unknown_metadata(names: Iterable[str], method: Callable[..., Any]) -> None:
    """Raise TypeError for metadata that a method does not take; skorch's take any."""
    known = inspect.signature(method).parameters.keys() - {"X", "y"}
    for name in names:
        if name not in known:
            what = f"{method.__name__} takes no metadata {name!r}, but {sorted(known)}."
            raise TypeError(what + _nearest(name, known))


def _nearest(name: str, known: Iterable[str], before: str = "", behind: str = "") -> str:
    known, other = sorted(known), _OTHER_NAMES.get(name, "")
    near = [other] if other in known else difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {before + near[0] + behind!r}?" if near else ""
