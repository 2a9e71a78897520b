"""Whether the nearest patches of a prototype show one labelled part.

Nauta et al., "PIP-Net: Patch-Based Intuitive Prototypes for Interpretable Image Classification",
CVPR 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from protoclf.explanation import BOX
from protoclf.metrics.part_labels import PartLabels
from protoclf.metrics.streams import opened
from protoclf.nearest_patches import nearest_patches
from protoclf.rules import COUNT, PERCENTILE, REGION

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def part_purity(
    clf: ProtoPNetClassifier,
    X: Any,
    parts: pd.DataFrame,
    *,
    k: int = 10,
    region: float | str = 32 / 224,
    visible_only: bool = False,
    percentile: float = 95,
) -> pd.DataFrame:
    """Return the largest share of each prototype's nearest patches that show one and the same part.

    Of the k images that are most similar to a prototype, whatever their class, each has its most
    similar patch. A patch shows a part whose point lies in it. The purity of a prototype is the
    share of its patches that show the part which most of them show, from 0 to 1, where 1 is best;
    the score is the mean.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`; the training images in the paper.
    parts : DataFrame
        Where parts are: see `protoclf.metrics.PartLabels`. Left and right parts have one name in
        the paper.
    k : int, default=10
    region : float or "box", default=32 / 224
        A patch: a square whose side is that share of the input's side (32 of 224 pixels in the
        paper), at the place of the most similar cell and whole inside the input; or the box of
        `explain`.
    visible_only : bool, default=False
        Divide by the number of patches in whose images the part is to be seen, in place of k.
    percentile : float, default=95
        Of the box.

    Returns
    -------
    DataFrame
        One row for each prototype: prototype, class, n_images (k, or fewer where X holds fewer),
        part, and purity; with `visible_only` missing where no part is to be seen in these images.

    Notes
    -----
    Nauta et al., CVPR 2023. Their code divides by the images in which the part is to be
    seen (`visible_only=True` here), so that a part seen once, and hit once, makes a prototype
    pure; leaves out prototypes without weight; and rounds the place of a patch to pixels.
    """
    COUNT.check(k=k)
    REGION.check(region=region)
    PERCENTILE.check(percentile=percentile)
    dataset = opened(clf, X)
    labels = PartLabels(parts, dataset)
    table = nearest_patches(clf, X, k, percentile=percentile)
    sample, j = table["sample"].to_numpy(np.int64), table["prototype"].to_numpy(np.int64)
    if isinstance(region, str):
        boxes = dataset.preprocessing.to_input(table[BOX].to_numpy(float), dataset.sizes(sample))
    else:
        boxes = _squares_of_cells(clf, table, region)
    hits = np.zeros((clf.n_prototypes_, len(labels.names)))
    n = np.zeros_like(hits)
    np.add.at(hits, j, labels.inside(boxes, sample))
    np.add.at(n, j, labels.visible[sample] if visible_only else 1)
    share = np.divide(hits, n, out=np.zeros_like(hits), where=n > 0)
    best = np.where((n > 0).any(1), share.max(1), np.nan)
    result = clf.prototypes_[["prototype", "class"]].copy()
    result["n_images"] = np.bincount(j, minlength=len(result))
    result["part"] = pd.Series(labels.names[share.argmax(1)], dtype=object).where(best > 0)
    return result.assign(purity=best)


def _squares_of_cells(clf: ProtoPNetClassifier, table: pd.DataFrame, share: float) -> np.ndarray:
    """Return squares (k, 4): at the first cell the first that fits the input, at the last the last.

    In pixels of the model input, by `row` and `col` of the table.
    """
    geometry, (rows, cols) = clf.geometry_, clf.module_.prototype_size
    side = clf.preprocessing_.image_size
    steps = np.array([geometry.width - cols, geometry.height - rows])  # (2,), x and y
    cell = table[["col", "row"]].to_numpy(float)  # (k, 2)
    place = np.divide(cell, steps, out=np.full_like(cell, 0.5), where=steps > 0)
    start = place * (1 - share) * side
    return np.concatenate([start, start + share * side], axis=1)
