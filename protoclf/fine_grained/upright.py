"""Annotations of photos that EXIF data turns, in pixels of the photos as they are looked at.

Annotations count the pixels of the file as it is stored, as the tools did that they were made with.
Everything else here looks at photos upright, and so annotations are turned with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from protoclf.decoding import check_files, in_threads
from protoclf.explanation import BOX
from protoclf.images import Images
from protoclf.picture import open_file, orientation_of

_TURNS = {  # EXIF orientation -> what makes upright x, y of stored x, y, up to the photo's size
    1: [[1, 0], [0, 1]],
    2: [[-1, 0], [0, 1]],
    3: [[-1, 0], [0, -1]],
    4: [[1, 0], [0, -1]],
    5: [[0, 1], [1, 0]],
    6: [[0, -1], [1, 0]],
    7: [[0, -1], [-1, 0]],
    8: [[0, 1], [-1, 0]],
}


def upright(images: pd.DataFrame) -> pd.DataFrame:
    """Return a table of images with its boxes turned: see `Turns`."""
    return Turns(images["path"].tolist()).table(images)


class Turns:
    """How n photos are turned upright.

    Parameters
    ----------
    paths : list of str
        The photos; only their headers are read.

    Raises
    ------
    ImageError
        If one is missing or no image.
    """

    def __init__(self, paths: list[str]) -> None:
        check_files(Images(paths))

        def header(i: int) -> tuple[int, tuple[int, int]]:
            with open_file(paths[i]) as image:
                return orientation_of(image), image.size

        headers = in_threads(header, len(paths))
        self._turn = np.array([_TURNS[orientation] for orientation, _ in headers])  # (n, 2, 2)
        self._size = np.array([size for _, size in headers])[:, :, None]  # (n, 2, 1)

    def table(self, images: pd.DataFrame) -> pd.DataFrame:
        """Return the table of these photos with its boxes turned."""
        boxes = self.boxes(images[BOX].to_numpy(np.int64))
        return images.assign(**dict(zip(BOX, boxes.T, strict=True)))

    def boxes(self, boxes: np.ndarray, row: Any = slice(None)) -> np.ndarray:
        """Return half-open boxes (k, 4), turned; `row` is the photo of each."""
        turn, size = self._turn[row], self._size[row]
        corners = boxes.reshape(-1, 2, 2).swapaxes(1, 2)  # (k, 2, 2): x or y, first or last
        corners = turn @ corners + (-turn).clip(0) @ size
        return np.hstack([corners.min(2), corners.max(2)])  # (k, 4)

    def points(self, xy: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return points (k, 2), each the name of a pixel, turned; `row` is the photo of each."""
        return self.boxes(np.hstack([xy, xy + 1]), row)[:, :2]
