"""The geometry between original pixels and model input: one affine map, exact both ways.

Boxes that an explanation draws go back through the same map that the pixels came.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike

from protoclf.picture import SIDEWAYS, Stored, to_rgb, upright

_FLOAT_DUST = 1e-6  # of pixels


@dataclass(frozen=True)
class Preprocessing:
    """Resize an image to the model's input, and map boxes there and back.

    Parameters
    ----------
    image_size : int
        Side S of the square model input, in pixels.
    resize : {"crop", "squash"}
        "crop" shows the centred square on the shorter side, "squash" the whole image.

    Notes
    -----
    Both are one affine map, without rounding: with (x0, x1) the shown part of an original,
    ``x_original = x0 + x_input * (x1 - x0) / S``, and alike for y. Pixel k covers [k, k + 1).
    """

    image_size: int
    resize: str = "crop"

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize must be 'crop' or 'squash'; got {self.resize!r}.")
        try:
            size = 0 if isinstance(self.image_size, bool) else operator.index(self.image_size)
        except TypeError:
            size = 0
        if size < 1:
            raise ValueError(f"image_size must be an integer >= 1; got {self.image_size!r}.")
        object.__setattr__(self, "image_size", size)

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the model input of an upright image: uint8 of shape (3, S, S)."""
        return self.apply(Stored(to_rgb(image), 1.0, 1, image.size))

    def apply(self, stored: Stored) -> np.ndarray:
        """Resize as stored and turn the small result: the shown part is symmetric."""
        width, height = stored.size
        if stored.orientation in SIDEWAYS:
            width, height = height, width
        box = self.region((width, height)) * stored.scale
        image = stored.rgb.resize(
            (self.image_size, self.image_size),
            PIL.Image.Resampling.BILINEAR,
            box=tuple(box.tolist()),
            reducing_gap=3.0,
        )
        return np.asarray(upright(image, stored.orientation)).transpose(2, 0, 1)  # (3, S, S)

    def region(self, sizes: ArrayLike) -> np.ndarray:
        """Return the part of each original that the model input shows.

        Parameters
        ----------
        sizes : array-like of shape (n, 2)
            Width and height of the originals, upright, in pixels.

        Returns
        -------
        boxes : ndarray of shape (n, 4), float
            x0, y0, x1, y1 in pixels of the originals.
        """
        sizes = np.asarray(sizes, dtype=float)
        shown = sizes if self.resize == "squash" else np.repeat(sizes.min(-1)[..., None], 2, -1)
        start = (sizes - shown) / 2  # (n, 2)
        return np.concatenate([start, start + shown], axis=-1)  # (n, 4)

    def to_original(self, boxes: ArrayLike, sizes: ArrayLike) -> np.ndarray:
        """Map boxes from the model input to the originals, exactly.

        Parameters
        ----------
        boxes : array-like of shape (n, 4)
            x0, y0, x1, y1 in pixels of the model input, half-open.
        sizes : array-like of shape (n, 2), or (2,) for all
            Width and height of the originals, upright, in pixels.

        Returns
        -------
        boxes : ndarray of shape (n, 4), float
            The same in pixels of the originals.
        """
        start, scale = self._affine(sizes)
        return np.asarray(boxes, dtype=float) * scale + start  # (n, 4)

    def to_input(self, boxes: ArrayLike, sizes: ArrayLike) -> np.ndarray:
        """Map boxes from the originals to the model input: the inverse of `to_original`."""
        start, scale = self._affine(sizes)
        return (np.asarray(boxes, dtype=float) - start) / scale  # (n, 4)

    def to_original_pixels(self, boxes: ArrayLike, sizes: ArrayLike) -> np.ndarray:
        """Map boxes from the model input to whole pixels of the originals that contain them.

        Parameters and shapes are those of `to_original`. The boxes that come back are int64,
        half-open, inside the original, and at least one pixel wide and high.
        """
        exact = self.to_original(boxes, sizes)
        last = np.asarray(sizes, dtype=np.int64)  # exclusive
        start = np.floor(exact[..., :2] + _FLOAT_DUST).astype(np.int64).clip(0, last - 1)
        stop = np.ceil(exact[..., 2:] - _FLOAT_DUST).astype(np.int64).clip(start + 1, last)
        return np.concatenate([start, stop], axis=-1)  # (n, 4)

    def _affine(self, sizes: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return start and scale, each (n, 4), of x_original = start + scale * x_input."""
        region = self.region(sizes)
        start, stop = region[..., :2], region[..., 2:]
        scale = (stop - start) / self.image_size
        return np.concatenate([start, start], -1), np.concatenate([scale, scale], -1)
