"""Stratified folds of the training images, for what each image is to be seen by as a new one."""

from __future__ import annotations

from warnings import catch_warnings, filterwarnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

Splits = list[tuple[np.ndarray, np.ndarray]]


def stratified_splits(
    y: np.ndarray,
    folds: int,
    seed: int,
    groups: np.ndarray | None,
    each_class_in_all: bool = True,
) -> Splits:
    """Return stratified folds, (train, test) indices each; none where there are not two.

    Images of one of the `groups` (N,) stay in one fold. A class with a single image, or a single
    group, says nothing of what never saw the class: it is in the training part of each fold, unless
    another image of its group is held out. Where each class is to be held out in all folds, other
    classes of few images lower the number of folds.
    """
    _, together = np.unique(range(len(y)) if groups is None else groups, return_inverse=True)
    n_groups = np.bincount(np.unique(np.stack([y, together]), axis=1)[0])  # (C,)
    several = np.flatnonzero(n_groups[y] > 1)
    if not len(several):
        return []
    images = np.bincount(y)[n_groups > 1]
    folds = min(folds, int(images.min() if each_class_in_all else images.max()))
    folds = min(folds, len(np.unique(together[several])))
    if folds < 2:
        return []
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    known = several, y[several], None if groups is None else groups[several]
    with catch_warnings():
        filterwarnings("ignore", "The least populated class", UserWarning)
        parts = list(kind(folds, shuffle=True, random_state=seed).split(*known))
    held_out = [np.isin(together, together[several[test]]) for _, test in parts]
    return [(np.flatnonzero(~out), np.flatnonzero(out)) for out in held_out]
