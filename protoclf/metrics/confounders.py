"""Prototypes that may look at something else than the object: signs of it, never a verdict.

After what Bontempelli et al., "Concept-level Debugging of Part-Prototype Networks", ICLR 2023, ask
a person to look for. N images, m prototypes, H x W places of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score

from protoclf.features import distance_batches
from protoclf.image_dataset import ImageDataset
from protoclf.metrics.masks import Masks, check_number, cover, mask_of, on_input
from protoclf.metrics.streams import image_batches, latents_of, opened_with_labels
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


_FEWEST = 3  # images of a class, of which some can be said to show a prototype at one place


class Sign(NamedTuple):
    """A measure of a prototype that is suspicious beyond a threshold.

    Attributes
    ----------
    threshold : float
    above : bool
        Whether values from the threshold up are suspicious, or those down from it.
    reason : str
        What it then looks like, with the value.
    """

    threshold: float
    above: bool
    reason: str


SIGNS: dict[str, Sign] = {
    "kept": Sign(0.8, True, "keeps {:.0%} of its similarity when the object is covered"),
    "same_place": Sign(0.8, True, "is at the same place in {:.0%} of the images of its class"),
    "separation": Sign(0.6, False, "fires alike across classes (AUC {:.2f})"),
    "validation_drop": Sign(0.2, True, "loses {:.0%} of its similarity on validation images"),
}
"""The signs that `find_confounders` looks for."""


def find_confounders(
    clf: ProtoPNetClassifier,
    X: Any,
    y: ArrayLike,
    *,
    masks: Masks | None = None,
    X_valid: Any = None,
    y_valid: ArrayLike | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Return a table of the prototypes, those first that seem to look at something else.

    It ranks prototypes by signs that they do not look at the object, and gives reasons. Look at
    the prototypes before you `remove` or `forbid` them: a bird's nest is always in the same place
    as the bird, and so may be its best part.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X, y : images and labels
        As a rule the training images.
    masks : sequence of n arrays (height, width), optional
        For each image of X, in its own pixels, an array that is not 0 where the object is, as in
        `protoclf.metrics.pointing`. `PartMasks` makes them from boxes.
    X_valid, y_valid : images and labels, optional
        Images from elsewhere, without what is peculiar to the training images.
    thresholds : mapping of str to float, optional
        Thresholds from which a sign counts, in place of those in `SIGNS`.

    Returns
    -------
    DataFrame
        One row for each prototype, those with most signs first, and among these the largest
        weights:

        - prototype, class, source, weight : as in `prototypes_`
        - kept : when the object is covered with the image's mean colour, the mean share of the
          similarity to images of its class that is left, from 0 to 1. It is a sign from 0.8 on.
          Images whose object the model does not see, or without similarity, do not count. Missing
          if none counts, and without masks
        - same_place : share of the images of its class in which it is found within one cell of
          where it is found in one of them, the largest there is. It is a sign from 0.8 on. Missing
          if maps are not larger than 3 x 3, and for classes with fewer than 3 images
        - separation : probability that an image of its class is more similar to it than an image
          of another class (area under the ROC curve). It is a sign up to 0.6
        - validation_drop : share of its median similarity to images of its class that is lost on
          the validation images of the class. It is a sign from 0.2 on. Missing without these
          images, and if the median is not above 0
        - signs : number of signs
        - reasons : the signs in words; empty without signs

    Raises
    ------
    ValueError
        If X has no image of a class or of one class alone, numbers of images and masks differ,
        X_valid comes without y_valid, or a threshold is no number or
        has no such sign.

    Notes
    -----
    In shares of similarity, negative similarities (of cosines) count as 0.
    """
    limits = _thresholds(thresholds)
    X_valid, y_valid = unpacked(X_valid, y_valid)
    if (X_valid is None) != (y_valid is None):
        raise ValueError("X_valid and y_valid go together: give both, or neither.")
    dataset, codes = opened_with_labels(clf, X, y)
    owner = clf.module_.owner.cpu().numpy()  # (m,)
    own = codes[:, None] == owner  # (N, m)
    _check_classes(clf, own, owner)
    g, cell = _activations(clf, dataset)
    values = {
        "kept": np.full(len(owner), np.nan),
        "same_place": _same_place(clf, cell, own),
        "separation": np.array([roc_auc_score(own[:, j], g[:, j]) for j in range(len(owner))]),
        "validation_drop": np.full(len(owner), np.nan),
    }
    if masks is not None:
        check_number(masks, dataset)
        covered, objects = _covered_activations(clf, dataset, masks)
        values["kept"] = _kept(g, covered, own & objects[:, None])
    if X_valid is not None:
        valid, codes = opened_with_labels(clf, X_valid, y_valid)
        own_valid = codes[:, None] == owner
        values["validation_drop"] = _drop(g, own, _activations(clf, valid)[0], own_valid)
    table = clf.prototypes_[["prototype", "class", "source", "weight"]].reset_index(drop=True)
    return _ranked(table.assign(**values), limits)


def _thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    unknown = sorted(set(given or {}) - set(SIGNS))
    if unknown:
        raise ValueError(f"thresholds may have {', '.join(SIGNS)}; got {unknown}.")
    for name, value in (given or {}).items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"thresholds must be numbers; {name!r} is {value!r}.")
    return {name: sign.threshold for name, sign in SIGNS.items()} | dict(given or {})


def _check_classes(clf: ProtoPNetClassifier, own: np.ndarray, owner: np.ndarray) -> None:
    bare = clf.classes_[np.unique(owner[~own.any(0)])].tolist()
    if bare:
        raise ValueError(f"X has no image of {bare}, of which there are prototypes.")
    if own.all(0).any():
        raise ValueError("X has images of one class alone; what is alike across classes is unseen.")


@torch.no_grad()
def _activations(clf: ProtoPNetClassifier, dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Return g, and in which cell each prototype is found, both (N, m)."""
    parts, cells = [], []
    for _, distance, cell in distance_batches(clf, dataset, bool(clf.verbose)):
        parts.append(clf.module_.activations(distance).cpu())
        cells.append(cell.cpu())
    return torch.cat(parts).numpy(), torch.cat(cells).numpy()


@torch.no_grad()
def _covered_activations(
    clf: ProtoPNetClassifier, dataset: ImageDataset, masks: Masks
) -> tuple[np.ndarray, np.ndarray]:
    """Return g (N, m) of the images with their objects covered, and whether one is seen (N,)."""
    parts, objects = [], []
    for rows, images in image_batches(clf, dataset, "Images with the object covered"):
        covered = []
        for i, image in zip(range(rows.start, rows.stop), images.cpu(), strict=True):
            mask = torch.from_numpy(on_input(dataset, i, mask_of(masks, dataset, i)))
            objects.append(bool(mask.any()))
            covered.append(cover(image, mask[None]))
        distance, _ = clf.module_.nearest(latents_of(clf, torch.cat(covered)))
        parts.append(clf.module_.activations(distance).cpu())
    return torch.cat(parts).numpy(), np.array(objects)


def _kept(g: np.ndarray, covered: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return the mean share (m,) of similarities g (N, m) that is left, over marked images."""
    counted = marked & (g > 0)
    share = np.divide(covered, g, out=np.zeros_like(g), where=counted).clip(0, 1)
    n = counted.sum(0)
    return np.divide(share.sum(0), n, out=np.full(len(n), np.nan), where=n > 0)


def _same_place(clf: ProtoPNetClassifier, cell: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the largest share (m,) of cells (N, m) that lie within one cell of one of them."""
    height, width = clf.geometry_.n_patches(*clf.module_.prototype_size)
    if max(height, width) <= 3:  # any place is within one cell of the middle
        return np.full(cell.shape[1], np.nan)
    place = np.stack(np.divmod(cell, width), axis=2)  # (N, m, 2)
    shares = []
    for j in range(place.shape[1]):
        places, counts = np.unique(place[own[:, j], j], axis=0, return_counts=True)  # (u, 2), (u,)
        near = np.abs(places[:, None] - places).max(2) <= 1  # (u, u)
        n = counts.sum()
        shares.append((near @ counts).max() / n if n >= _FEWEST else np.nan)
    return np.array(shares)


def _drop(g: np.ndarray, own: np.ndarray, valid: np.ndarray, own_valid: np.ndarray) -> np.ndarray:
    """Return which share (m,) of the median similarity is missing; NaN where there is none."""
    drops = np.full(g.shape[1], np.nan)
    for j in np.flatnonzero(own_valid.any(0)):
        before = np.median(g[own[:, j], j])
        if before > 0:
            drops[j] = np.clip(1 - np.median(valid[own_valid[:, j], j]) / before, 0, 1)
    return drops


def _ranked(table: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Add how many signs there are, and which, and sort."""
    reasons: list[list[str]] = [[] for _ in range(len(table))]
    for name, sign in SIGNS.items():
        for i, value in enumerate(table[name]):
            beyond = value >= thresholds[name] if sign.above else value <= thresholds[name]
            if beyond:  # never of a missing value
                reasons[i].append(sign.reason.format(value))
    table = table.assign(signs=list(map(len, reasons)), reasons=list(map("; ".join, reasons)))
    table = table.sort_values(["signs", "weight"], ascending=False, kind="stable")
    return table.reset_index(drop=True)
