"""Whether sheets point at the object: boxes against masks of it.

Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018 (the pointing game); for
prototypes Xu-Darme et al., "Sanity checks for patch visualisation in prototype-based image
classification", CVPR workshops 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from protoclf.explanation import BOX, check_options
from protoclf.image_dataset import ImageDataset
from protoclf.metrics.masks import Masks, check_number, mask_of, shown
from protoclf.metrics.part_labels import located
from protoclf.metrics.streams import opened, paths_of, sheet_of

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def pointing(
    clf: ProtoPNetClassifier,
    X: Any,
    masks: Masks,
    *,
    top: int = 3,
    attribution: str = "upsampled",
    percentile: float = 95,
) -> pd.DataFrame:
    """Return the share of each box of the scoring sheets that lies on the object.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    masks : sequence of n arrays (height, width)
        For each image, in its own pixels, an array that is not 0 where the object is. The masks are
        used one after the other, so a sequence may read each from its file.
    top : int, default=3
        Number of boxes of each image: those of the highest positive contributions to the predicted
        class.
    attribution, percentile
        How boxes are found: as in `ProtoPNetClassifier.explain`.

    Returns
    -------
    DataFrame
        One row for each box:

        - sample, path, class, prototype, contribution : from the sheet
        - inside : share of the box that lies in the mask, from 0 to 1, where 1 is best; its mean is
          the score. Missing, as is `hit`, where the model sees nothing of the object
        - hit : 1 if the middle of the most similar patch lies in the mask, else 0: the pointing
          game, without its tolerance of 15 pixels
        - object_share : share of the mask in what the model sees. Random places have this `inside`
          and `hit` on average, except for boxes that end at the border

    Notes
    -----
    Xu-Darme et al. take the highest tenth of the map in place of a box. QuanProto's background
    overlap is ``1 - inside`` of masks of maps.
    """
    dataset, sheet = _boxes(clf, X, masks, top, attribution, percentile)
    middles = _middles(clf, dataset, sheet)
    values = np.full((len(sheet), 3), np.nan)
    samples: Any = sheet.groupby("sample")
    for i, rows in samples:
        mask = mask_of(masks, dataset, int(i))
        values[rows.index, 2] = share = shown(dataset, int(i), mask).mean()
        if share:
            boxes = rows[BOX].to_numpy(np.int64)
            inside = [mask[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes.tolist()]
            x, y = middles[rows.index].T.astype(np.int64)
            values[rows.index, :2] = np.stack([inside, mask[y, x]], axis=1)
    about = ["sample", "path", "class", "prototype", "contribution"]
    names = ("inside", "hit", "object_share")
    return sheet[about].assign(**dict(zip(names, values.T, strict=True)))


def object_coverage(
    clf: ProtoPNetClassifier,
    X: Any,
    masks: Masks,
    *,
    top: int = 3,
    attribution: str = "upsampled",
    percentile: float = 95,
) -> pd.DataFrame:
    """Return the share of the object that the boxes of each scoring sheet cover together.

    Parameters
    ----------
    clf, X, masks, top, attribution, percentile
        As in `pointing`.

    Returns
    -------
    DataFrame
        One row for each image:

        - sample, path
        - coverage : share of the object, as far as the model sees it, that lies in any of the
          boxes, from 0 to 1; missing where the model sees none of it. The score is the mean. Large
          boxes cover much: read it beside `boxes_share`
        - boxes_share : share of what the model sees that lies in any of the boxes. For an object
          at a random place, the coverage is this on average

    Notes
    -----
    QuanProto's object overlap is that of one prototype at a time.
    """
    dataset, sheet = _boxes(clf, X, masks, top, attribution, percentile)
    boxes_of: Any = dict(iter(sheet.groupby("sample")))
    values = np.full((len(dataset), 2), np.nan)
    for i in range(len(dataset)):
        mask = mask_of(masks, dataset, i)
        covered = np.zeros_like(mask)
        if i in boxes_of:
            for x0, y0, x1, y1 in boxes_of[i][BOX].to_numpy(np.int64).tolist():
                covered[y0:y1, x0:x1] = True
        mask, covered = shown(dataset, i, mask), shown(dataset, i, covered)
        values[i] = covered[mask].mean() if mask.any() else np.nan, covered.mean()
    table = pd.DataFrame({"sample": np.arange(len(dataset)), "path": paths_of(dataset)})
    return table.assign(coverage=values[:, 0], boxes_share=values[:, 1])


class PartMasks:
    """Masks of objects from the boxes of their parts: for each image, all that lies in any box.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    parts : DataFrame
        As in `protoclf.metrics.PartLabels`, with boxes.
    """

    def __init__(self, clf: ProtoPNetClassifier, X: Any, parts: pd.DataFrame) -> None:
        self._dataset = opened(clf, X)
        rows = located(parts, self._dataset)
        if not set(BOX) <= set(rows):
            raise ValueError("parts has points alone: masks of objects need boxes, or pass masks.")
        if not np.isfinite(rows[BOX].to_numpy(float)).all():
            raise ValueError(
                "parts has rows without a box; leave them out, mark them by visible=False, or pass "
                "masks."
            )
        boxes: Any = rows.groupby("sample")
        self._boxes = {int(i): group[BOX].to_numpy(float) for i, group in boxes}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int, /) -> np.ndarray:
        width, height = self._dataset.sizes([i])[0]
        mask = np.zeros((height, width), bool)
        for x0, y0, x1, y1 in self._boxes.get(i, np.empty((0, 4))).round().astype(int).clip(0):
            mask[y0:y1, x0:x1] = True
        return mask


def _boxes(
    clf: ProtoPNetClassifier, X: Any, masks: Masks, top: int, attribution: str, percentile: float
) -> tuple[ImageDataset, pd.DataFrame]:
    """Return the images, as many as masks, and the rows of their sheets that speak for a class."""
    check_options(top, attribution, percentile)
    dataset = opened(clf, X)
    check_number(masks, dataset)
    sheet = sheet_of(clf, X, top=top, attribution=attribution, percentile=percentile)
    named = sheet["prototype"].notna() & (sheet["contribution"] > 0)
    return dataset, sheet[named].reset_index(drop=True)


def _middles(clf: ProtoPNetClassifier, dataset: ImageDataset, sheet: pd.DataFrame) -> np.ndarray:
    """Return the middles (k, 2) of the most similar patches, in pixels of the originals."""
    geometry, (rows, cols) = clf.geometry_, clf.module_.prototype_size
    cell = sheet[["col", "row"]].to_numpy(float) + np.array([cols, rows]) / 2  # (k, 2)
    on_input = cell / [geometry.width, geometry.height] * clf.preprocessing_.image_size
    sizes = dataset.sizes(sheet["sample"].to_numpy(np.int64))
    points = dataset.preprocessing.to_original(np.hstack([on_input, on_input]), sizes)[:, :2]
    return np.minimum(points, sizes - 1)
