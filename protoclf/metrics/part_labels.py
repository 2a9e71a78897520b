"""Labels of parts, such as those of CUB-200-2011 and of the drawn birds, in the model's input."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd

from protoclf.explanation import BOX
from protoclf.image_dataset import ImageDataset
from protoclf.images import names_column

POINT = ["x", "y"]


class PartLabels:
    """Where the parts of N images are, as points in pixels of the model input.

    Parameters
    ----------
    parts : DataFrame
        One row for each image and part, in pixels of the original image:

        - path : as in X; or, where X holds pixels, sample : the position in X
        - part : name; several rows of one image may share it, such as those of two eyes
        - x, y : a point; or x0, y0, x1, y1 : a box, whose middle is the point
        - visible : optional; rows where it is False, or 0, say that the part is not to be seen

        Rows of other paths are passed over.
    dataset : ImageDataset
        The N images.

    Attributes
    ----------
    names : ndarray of shape (K,)
        The parts, sorted.
    visible : ndarray of shape (N, K), bool
        Whether a part is to be seen in the model's input; not if `resize="crop"` cuts it off.

    Raises
    ------
    ValueError
        If columns or places are missing, an image has no row, or no part is to be seen at all.
    """

    def __init__(self, parts: pd.DataFrame, dataset: ImageDataset) -> None:
        rows = located(parts, dataset)
        xy = points(rows)  # (r, 2)
        sample = rows["sample"].to_numpy(np.int64)
        on_input = dataset.preprocessing.to_input(np.hstack([xy, xy]), dataset.sizes(sample))
        xy, side = on_input[:, :2], dataset.preprocessing.image_size
        seen = ((xy >= 0) & (xy <= side)).all(1)
        if not seen.any():
            raise ValueError("No part in parts is to be seen by the model in any image of X.")
        self.names, part = np.unique(rows["part"].to_numpy(str), return_inverse=True)
        sample, part, xy = sample[seen], part[seen], xy[seen]
        slot = pd.Series(sample).groupby(sample).cumcount().to_numpy(np.int64)
        width = int(slot.max()) + 1 if len(slot) else 1
        self._xy = np.full((len(dataset), width, 2), np.nan)
        self._part = np.zeros((len(dataset), width), np.int64)
        self._xy[sample, slot], self._part[sample, slot] = xy, part
        self.visible = np.zeros((len(dataset), len(self.names)), bool)
        self.visible[sample, part] = True

    def inside(self, boxes: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Return which parts of their images lie in boxes, borders included.

        Parameters
        ----------
        boxes : ndarray of shape (k, 4)
            Pixels of the model input.
        sample : ndarray of shape (k,), int
            The image of each.

        Returns
        -------
        ndarray of shape (k, K), bool
        """
        xy = self._xy[sample]  # (k, q, 2)
        hit = ((xy >= boxes[:, None, :2]) & (xy <= boxes[:, None, 2:])).all(2)  # (k, q)
        found = np.zeros((len(boxes), len(self.names)), bool)
        row, slot = np.nonzero(hit)
        found[row, self._part[sample][row, slot]] = True
        return found


def located(parts: pd.DataFrame, dataset: ImageDataset) -> pd.DataFrame:
    """Return the rows of `parts` that say where something is, with the position of their image.

    Raises
    ------
    ValueError
        If columns are missing, or an image has no row.
    """
    paths = dataset.images.paths
    key = "sample" if paths is None else "path"
    columns = list(getattr(parts, "columns", ()))  # what is no table has none
    known = set(columns)
    if not ({key, "part"} <= known and (set(POINT) <= known or set(BOX) <= known)):
        raise ValueError(
            f"parts must have the columns {key}, part, and either x, y or x0, y0, x1, y1; it has "
            f"{columns}."
        )
    if paths is None:
        images = pd.DataFrame({"sample": np.arange(len(dataset))})
        rows = images.merge(parts, on="sample")
    else:
        images = pd.DataFrame({"sample": np.arange(len(paths)), "path": names_column(paths)})
        # by numbers: pandas refuses to compare names that are no valid text
        number = {path: i for i, path in enumerate(dict.fromkeys(paths))}
        of_rows = [number.get(_text(path), -1) for path in parts["path"]]
        rows = images.assign(_image=[number[path] for path in paths]).merge(
            parts.drop(columns=["sample", "path"], errors="ignore").assign(_image=of_rows),
            on="_image",
        )
    bare = images[~images["sample"].isin(rows["sample"])]
    if len(bare):
        raise ValueError(
            f"parts has no row for {len(bare)} of {len(images)} images, such as {key} "
            f"{bare[key].tolist()[0]!r}. Name images as X does; where no part is to be seen, give "
            "a row with visible=False."
        )
    if "visible" in rows:
        if not rows["visible"].isin([True, False]).all():
            raise ValueError('"visible" in parts must be True or False, or 1 or 0.')
        rows = rows[rows["visible"].astype(bool)]
    return rows


def points(rows: pd.DataFrame) -> np.ndarray:
    """Return the points (r, 2) of rows, in pixels of the originals: x, y or the middle of boxes."""
    if set(POINT) <= set(rows):
        xy = rows[POINT].to_numpy(float)
    else:
        boxes = rows[BOX].to_numpy(float)
        xy = (boxes[:, :2] + boxes[:, 2:]) / 2
    if not np.isfinite(xy).all():
        raise ValueError("parts has rows without a place; mark them by visible=False.")
    return xy


def _text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path
