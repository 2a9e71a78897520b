"""The patches of any images that are nearest to each prototype.

Chen et al., NeurIPS 2019, section 2.4 ("global analysis") and supplement (pruning).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from protoclf.attribution import input_boxes
from protoclf.concepts import Concepts
from protoclf.explanation import BOX
from protoclf.features import FeatureDataset, latent_batches
from protoclf.fitted import check_classifier, check_columns
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images, names_column
from protoclf.labels import read_labels
from protoclf.localization import activation_boxes, pair_maps
from protoclf.progress import with_bar
from protoclf.rules import COUNT, PERCENTILE

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


@torch.no_grad()
def nearest_patches(
    clf: ProtoPNetClassifier,
    X: Any,
    k: int = 10,
    y: ArrayLike | None = None,
    *,
    percentile: float = 95,
) -> pd.DataFrame:
    """Return, for each prototype, the k images with the most similar patches, and their boxes.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`: the training images, or any others.
    k : int, default=10
        Number of images for each prototype, each with its most similar patch; fewer if X has fewer.
    y : array-like of shape (n,), optional
        Labels of the images, for the column `label`.
    percentile : float, default=95
        As in `ProtoPNetClassifier.explain`.

    Returns
    -------
    DataFrame
        One row for each prototype and rank:

        - prototype, class : the prototype and the class that owns it
        - rank : 1 is the most similar; of equally similar images, the first in X comes first
        - sample, path : position in X, and the path where X holds paths
        - label : of the image, where y is given; otherwise missing
        - similarity : g_j
        - row, col : the latent cell (of a larger patch, the upper left one)
        - x0, y0, x1, y1 : box of the high activation, in pixels of the original image

    Notes
    -----
    Images stream through the network in one pass: memory grows with prototypes x k, not with the
    number of images.
    """
    COUNT.check(k=k)
    PERCENTILE.check(percentile=percentile)
    check_classifier(clf)
    owners = clf.prototypes_
    images = Images(X)
    labels = None if y is None else read_labels(y, len(images))
    dataset = ImageDataset(images, clf.preprocessing_)
    clf.prepare_processor()
    best = best_patches(clf, dataset, k)
    m, k = best.sample.shape
    shown = best.sample.flatten()
    on_input = activation_boxes(best.maps.flatten(0, 1), clf.preprocessing_.image_size, percentile)
    boxes = dataset.preprocessing.to_original_pixels(on_input.cpu().numpy(), dataset.sizes(shown))
    prototype = np.repeat(np.arange(m), k)
    return pd.DataFrame(
        {
            "prototype": prototype,
            "class": owners["class"].to_numpy()[prototype],
            "rank": np.tile(np.arange(1, k + 1), m),
            "sample": shown,
            "path": None if images.paths is None else names_column(images.paths[i] for i in shown),
            "label": None if labels is None else labels[shown],
            "similarity": best.similarity.flatten().astype(float),
            "row": best.row.flatten(),
            "col": best.col.flatten(),
            **dict(zip(BOX, boxes.T, strict=True)),
        }
    )


def purity(table: pd.DataFrame) -> pd.Series:
    """Return the share of each prototype's nearest images that are of its own class.

    Parameters
    ----------
    table : DataFrame
        From `nearest_patches`, with y given.

    Returns
    -------
    Series
        By prototype, between 0 and 1; at most n / k for a class of n < k images.

    Raises
    ------
    ValueError
        If the table lacks columns, or an image a label.
    """
    what = "one of nearest patches, as from nearest_patches(clf, X, y=y)"
    check_columns("table", table, ["prototype", "class", "label"], what)
    if table["label"].isna().any():
        raise ValueError("purity needs labels: call nearest_patches with y.")
    own = table["label"] == table["class"]
    return own.groupby(table["prototype"]).mean().rename("purity")


class BestPatches(NamedTuple):
    """The patches that are most similar to each of the m prototypes, k from different images.

    Attributes
    ----------
    similarity : ndarray of shape (m, k)
        The highest first.
    sample : ndarray of shape (m, k), int64
        Positions of the images in the data set.
    row, col : ndarray of shape (m, k), int64
    maps : Tensor of shape (m, k, H, W)
        Similarities of the cells.
    """

    similarity: np.ndarray
    sample: np.ndarray
    row: np.ndarray
    col: np.ndarray
    maps: torch.Tensor


@torch.no_grad()
def best_patches(
    clf: ProtoPNetClassifier,
    dataset: ImageDataset | FeatureDataset,
    k: int,
    own_class: bool = False,
) -> BestPatches:
    """Search images, or features, in one pass; with `own_class`, prefer a prototype's class."""
    module, best = clf.module_, None
    for rows, z in latent_batches(clf, dataset, progress=bool(clf.verbose)):
        others = (dataset.y[rows].to(z.device)[:, None] != module.owner) & own_class  # (n, m)
        best = _merged(best, _best_of_batch(module, z, others, rows.start, k), k)
    assert best is not None, "X has at least one image"
    similarity, sample, cell, maps = best  # (m, k), (m, k), (m, k), (m, k, H, W)
    width = maps.shape[3] - module.prototype_size[1] + 1
    row, col = np.divmod(cell.cpu().numpy(), width)
    return BestPatches(similarity.cpu().numpy(), sample.cpu().numpy(), row, col, maps)


Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Similarities, samples and cells (m, k) of the most similar patches, and maps (m, k, H, W)."""


def _best_of_batch(module: Any, z: torch.Tensor, others: torch.Tensor, first: int, k: int) -> Best:
    distance, cell = module.nearest(z)  # (n, m)
    g = module.activations(distance.masked_fill(others, torch.finfo(distance.dtype).max))
    order = g.argsort(dim=0, descending=True, stable=True)[:k].T  # (m, k)
    sample, prototype = order.flatten(), torch.arange(len(order)).repeat_interleave(order.shape[1])
    prototype = prototype.to(sample.device)
    by_sample = sample.argsort(stable=True)
    maps = pair_maps(module, z, sample[by_sample], prototype[by_sample])
    maps = maps[by_sample.argsort()].unflatten(0, tuple(order.shape))  # (m, k, H, W)
    return g.T.gather(1, order), order + first, cell.T.gather(1, order), maps


def _merged(best: Best | None, new: Best, k: int) -> Best:
    if best is None:
        return new
    g, sample, cell, maps = (torch.cat(pair, dim=1) for pair in zip(best, new, strict=True))
    order = g.argsort(dim=1, descending=True, stable=True)[:, :k]  # earlier images first
    rows = torch.arange(len(g), device=g.device)[:, None]
    return g[rows, order], sample[rows, order], cell[rows, order], maps[rows, order]


def find_concepts(
    clf: ProtoPNetClassifier,
    dataset: ImageDataset,
    features: FeatureDataset,
    ids: Sequence[int],
    k: int,
    forbidden: bool,
    weight: float,
) -> Concepts:
    """Return what prototypes show in the k images of their classes that they are found in best.

    `features` are those of `dataset`.

    Boxes are those of the gradient: upsampled cells lie beside what they see, and a patch that
    does not hold what is meant would forbid something else.
    """
    best = best_patches(clf, features, k, own_class=True)
    owner, y = clf.module_.owner.cpu().numpy(), dataset.y.numpy()
    places: dict[tuple[int, int, int], int] = {}  # of a patch that several show, the first
    for j in ids:
        shown = y[best.sample[j]] == owner[j]
        if not shown.any():
            label = clf.classes_.tolist()[owner[j]]
            raise ValueError(f"X has no image of class {label!r}, which prototype {j} is of.")
        patch = np.stack([best.sample[j], best.row[j], best.col[j]], axis=1)[shown]
        for place in patch.tolist():
            places.setdefault(tuple(place), j)
    sample, row, col = torch.tensor(list(places), device="cpu").T
    pairs = list(zip(sample.tolist(), places.values(), strict=True))
    bar = with_bar(pairs, "boxes of patches", clf.verbose)
    boxes = [input_boxes(clf, dataset, i, np.array([j]), 95)[0] for i, j in bar]
    return Concepts(
        dataset.__getitems__(sample.numpy())[0]["images"].clone(),
        torch.from_numpy(np.stack(boxes)),
        row.clone(),
        col.clone(),
        dataset.y[sample],
        torch.full((len(sample),), forbidden, device="cpu"),
        torch.full((len(sample),), float(weight), device="cpu"),
    )
