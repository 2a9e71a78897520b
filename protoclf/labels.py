"""y, validated: any labels that scikit-learn takes, as indices into the sorted classes."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike
from sklearn.utils import column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight

from protoclf.images import Images, conflicting_labels


class Targets(NamedTuple):
    """What goes with n images.

    Attributes
    ----------
    y : ndarray of shape (n,)
        The labels.
    classes : ndarray of shape (C,)
        All labels there are, sorted.
    codes : ndarray of shape (n,), int64
        The labels as indices into these.
    weight, groups : ndarray of shape (n,) or None
    """

    y: np.ndarray
    classes: np.ndarray
    codes: np.ndarray
    weight: np.ndarray | None
    groups: np.ndarray | None

    def counting(self) -> np.ndarray:
        """Return which images count, (n,) bool: one of weight 0 is as good as left out."""
        return np.ones(len(self.y), dtype=bool) if self.weight is None else self.weight > 0

    def of(self, index: np.ndarray) -> Targets:
        """Return what goes with some of the images, by their positions or a mask."""
        weight, groups = (v if v is None else v[index] for v in (self.weight, self.groups))
        return Targets(self.y[index], self.classes, self.codes[index], weight, groups)


def read_targets(
    images: Images, y: Any, sample_weight: Any, groups: Any, classes: np.ndarray | None = None
) -> Targets:
    """Check what a fit is given beside the images; `classes` are those of an earlier fit."""
    n = len(images)
    y = read_labels(y, n)
    labels, codes = encode(y, classes)
    conflicting_labels(images, y)
    weight = checked_weights(sample_weight, n)
    if weight is not None:
        check_no_class_is_left_out(weight, codes, labels)
    return Targets(y, labels, codes, weight, read_groups(groups, n))


def read_labels(y: Any, n: int) -> np.ndarray:
    """Return y as an array of n labels, none of them missing, that have an order."""
    given = y
    if y is None:
        raise ValueError("The classifier requires y to be passed, but the target y is None.")
    if isinstance(y, str):
        raise TypeError(f"y must hold a label for each image; got the string {y!r}.")
    y = _as_column(y, warn=True)
    if len(y) != n:
        raise ValueError(f"X has {n} images and y {len(y)} labels; they must be as many.")
    missing = np.flatnonzero(pd.isna(y))
    if len(missing):
        raise ValueError(
            f"Input y contains NaN: {len(missing)} label(s) are missing, the first at position "
            f"{missing[0]}, {y[missing[0]]}. Leave out images without a label."
        )
    strings = [isinstance(label, str) for label in y] if y.dtype == object else []
    if any(strings) and not all(strings):
        kinds = sorted({type(label).__name__ for label in y})
        raise TypeError(f"y mixes labels of types that have no order: {kinds}. Give them one type.")
    if y.dtype == object and not any(strings):  # numbers or booleans, which numpy has types for
        y = pd.Series(y).infer_objects().to_numpy()
    elif isinstance(given, list | tuple) and any(strings):
        y = y.astype(str)
    if y.dtype == np.float16:  # which pandas cannot group the rows of sheets by
        y = y.astype(np.float32)
    if y.dtype.kind in "mM":
        raise ValueError(f"y must hold strings, numbers or booleans, not {y.dtype}: use strings.")
    _check_labels(y)
    check_classification_targets(y)
    return y


def _check_labels(y: np.ndarray) -> None:
    """Raise an error for objects that have no order, and for text that cannot be written."""
    if y.dtype.kind not in "UO":
        return
    try:
        labels = np.unique(y)
    except TypeError as error:
        kind = type(y[0]).__name__
        raise TypeError(
            f"y holds labels of type {kind}, which have no order: {error}. Use strings or numbers."
        ) from error
    if not isinstance(labels[0], str):
        kind = type(labels[0]).__name__
        raise TypeError(f"y must hold strings, numbers or booleans, not {kind}: use strings.")
    for label in labels:
        try:
            str(label).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The label {label!r} is no text: perhaps a folder's name that is not in UTF-8. "
                "Decode it, os.fsencode(label).decode(encoding)."
            ) from error


def _as_column(values: Any, warn: bool = False) -> np.ndarray:
    """Return values as an array of one dimension, whose items keep their type."""
    return _as_they_are(column_or_1d(_without_extension(values), warn=warn), values)


def _as_they_are(column: np.ndarray, given: Any) -> np.ndarray:
    """Return the items of a list as they were given, where numpy made text of all of them."""
    if column.dtype.kind != "U" or not isinstance(given, list | tuple):
        return column
    flat = [v[0] if isinstance(v, list | tuple | np.ndarray) else v for v in given]
    return pd.Series(flat, dtype=object).to_numpy()


def _without_extension(y: Any) -> Any:
    """Return pandas' nullable integers and booleans, and its categories, as numpy's types.

    Nullable ones with missing values stay as they are. A table of one column becomes one (n, 1).
    """
    if isinstance(y, pd.DataFrame) and y.shape[1] == 1:
        return np.asarray(_without_extension(y.iloc[:, 0]))[:, None]
    if isinstance(getattr(y, "dtype", None), pd.CategoricalDtype):
        return np.asarray(y)  # scikit-learn makes floats of booleans
    dtype = getattr(getattr(y, "dtype", None), "numpy_dtype", None)
    return y if dtype is None or pd.isna(y).any() else y.to_numpy(dtype)


def read_groups(groups: Any, n: int) -> np.ndarray | None:
    """Return the group of each of n images as a number, or None where none are given."""
    if groups is None:
        return None
    try:
        groups = _as_column(groups)
    except ValueError as error:
        raise ValueError(f"groups must hold one entry for each image: {error}") from error
    if len(groups) != n:
        raise ValueError(f"X has {n} images and groups {len(groups)} entries; as many are needed.")
    if pd.isna(groups).any():
        raise ValueError("groups must name the group of every image; some are missing.")
    return pd.factorize(groups)[0]


def checked_weights(sample_weight: Any, n: int) -> np.ndarray | None:
    """Return the weights of n images, finite numbers >= 0, or None where none are given."""
    if sample_weight is None:
        return None
    return _check_sample_weight(sample_weight, np.empty((n, 1)), ensure_non_negative=True)


def check_no_class_is_left_out(weight: np.ndarray, codes: np.ndarray, classes: np.ndarray) -> None:
    """Raise ValueError where all images (n,) of a class weigh 0."""
    gone = np.setdiff1d(codes, codes[weight > 0])
    if len(gone):
        raise ValueError(f"sample_weight is 0 for the whole of class {classes[gone].tolist()}.")


def check_single_precision(weight: np.ndarray | None) -> None:
    """Raise ValueError where a weight above 0 is 0 or infinite in float32, which losses are in."""
    if weight is None:
        return
    with np.errstate(over="ignore"):
        single = weight.astype(np.float32)
    beyond = weight[~np.isfinite(single) | ((single == 0) & (weight != 0))]
    if len(beyond):
        raise ValueError(
            f"sample_weight times class_weight is {beyond[0]:g}, beyond the numbers of float32. "
            "Multiply all weights by a number."
        )


def class_weights(spec: Any, codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the weight of each image (n,) by its class: "balanced", or a dict by label.

    `codes` (n,) are indices into `classes`. Labels that a dict leaves out have weight 1.
    """
    if isinstance(spec, str):
        return compute_sample_weight(spec, codes)
    labels = classes.tolist()
    unknown = [label for label in spec if label not in labels]
    if unknown:
        raise ValueError(f"class_weight names labels that y does not have: {unknown}.")
    weights = np.array([spec.get(label, 1.0) for label in labels], dtype=float)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(
            f"class_weight must hold finite weights > 0; got {spec!r}. To do without a class, "
            "leave its images out."
        )
    return weights[codes]


def check_classes(classes: Any, y: Any) -> None:
    """Raise ValueError where the classes that `partial_fit` is told of are not those of y."""
    told, known = (set(flat_labels(labels, object).tolist()) for labels in (classes, y))
    if told != known:
        raise ValueError(
            "classes must be those of y in the first call, since each needs images that prototypes "
            f"are parts of: only in classes are {sorted(told - known, key=str)}, only in "
            f"y {sorted(known - told, key=str)}."
        )


def flat_labels(labels: Any, dtype: DTypeLike | None = None) -> np.ndarray:
    """Return labels as an array of one dimension: of a column, a set, or a single one too."""
    return np.ravel(np.asarray(list(labels) if isinstance(labels, Set) else labels, dtype))


def encode(y: np.ndarray, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the class labels, sorted, and y as indices into them.

    Given `classes`, from an earlier fit, y may hold no others.
    """
    labels, codes = np.unique(y, return_inverse=True)
    if classes is None:
        if len(labels) < 2:
            raise ValueError(
                f"y has one class only, {labels.tolist()[0]!r}; a classifier needs at least two."
            )
        return labels, codes
    unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(f"y has classes that the first fit did not see: {unknown}.")
    return classes, np.searchsorted(classes, labels)[codes]
