"""One picture: from a file, a PIL image or an array to RGB, and what is wrong where that fails.

Any format and colour mode that Pillow knows becomes RGB of 8 bits, transparency on white. Large
JPEGs may be decoded at a reduced scale; pixels are turned upright last, where they are fewest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from PIL import ExifTags

from protoclf.file_digests import file_digest
from protoclf.messages import working_folder

_FLOAT_DUST = 1e-6  # of intensities
_JPEG = ("JPEG", "MPO")

_T = PIL.Image.Transpose
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange width and height


class Stored(NamedTuple):
    """An image as its file stores it."""

    rgb: PIL.Image.Image
    scale: float  # pixels of `rgb` per pixel of the file; < 1 if decoded at a reduced scale
    orientation: int  # EXIF
    size: tuple[int, int]  # width and height at full scale, upright


class Unreadable(Exception):
    """An image cannot be used, for the reason given."""


def read_picture(item: Any, side: int | None) -> Stored:
    """Decode a path, PIL image or array; a `side` lets a JPEG's shorter side shrink to 2 * side."""
    if isinstance(item, str):
        with open_file(item) as image:
            return _stored(image, *_draft(image, side))
    if isinstance(item, PIL.Image.Image):
        return _stored(item, None, 1.0)
    image = PIL.Image.fromarray(_as_uint8(item))
    return Stored(to_rgb(image), 1.0, 1, image.size)


def open_file(path: str) -> PIL.Image.Image:
    """Read the header of an image file, within Pillow's limit on the number of pixels."""
    _check_regular(path)
    image = PIL.Image.open(path)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise PIL.Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def upright_size(item: Any) -> tuple[int, int]:
    """Return width and height of a path, PIL image or array, upright; a JPEG is not decoded."""
    if isinstance(item, str):
        with open_file(item) as image:
            if image.format not in _JPEG:
                image.load()  # before its orientation, as in `_stored`
            return upright_size(image)
    if not isinstance(item, PIL.Image.Image):
        return item.shape[1], item.shape[0]
    width, height = item.size
    return (height, width) if orientation_of(item) in SIDEWAYS else (width, height)


def digest(item: Any) -> str:
    """Return a digest of a path's file, or of the pixels of a PIL image or an array."""
    if isinstance(item, str):
        return file_digest(item, _check_regular(item))  # to read from others may take for ever
    kind: tuple = ()
    if isinstance(item, PIL.Image.Image):
        palette, transparency = item.getpalette("RGBA"), item.info.get("transparency")
        kind = (item.mode, orientation_of(item), palette, transparency)
        item = np.asarray(item)
    described = repr((kind, item.shape, str(item.dtype))).encode()
    return hashlib.blake2b(described + item.tobytes(), digest_size=20).hexdigest()


def _check_regular(path: str) -> os.stat_result:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        directory = stat.S_ISDIR(status.st_mode)
        raise Unreadable("is a directory, not a file" if directory else "is not a regular file")
    if status.st_size == 0:
        raise Unreadable("the file is empty")
    return status


def _draft(image: PIL.Image.Image, side: int | None) -> tuple[tuple[int, int] | None, float]:
    """Let a JPEG decode at 1/2, 1/4 or 1/8, its shorter side still at least 2 * side.

    Returns the full size and the scale. A reduced pixel k covers the pixels [k/scale, (k+1)/scale)
    of the file, so that boxes are scaled exactly.
    """
    shrink = 0 if side is None else min(image.size) // (2 * side)
    if shrink < 2 or image.format not in _JPEG:
        return None, 1.0
    factor = min(8, 1 << (shrink.bit_length() - 1))
    width, height = image.size
    drafted = image.draft(None, (width // factor, height // factor))
    return (width, height), 1.0 if drafted is None else drafted[1][2] / width


def _stored(image: PIL.Image.Image, size: tuple[int, int] | None, scale: float) -> Stored:
    image.load()  # before its orientation: TIFF turns itself, and PNG may keep it at the end
    orientation = orientation_of(image)
    width, height = size or image.size
    if orientation in SIDEWAYS:
        width, height = height, width
    return Stored(to_rgb(image), scale, orientation, (width, height))


def orientation_of(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none to go by."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data; the pixels are still good
        return 1
    return value if value in _UPRIGHT else 1


def upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """Turn a picture that is stored in an EXIF orientation."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any mode to RGB: deep greys scaled to 8 bit, transparency on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = PIL.Image.fromarray(_grey(image))
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise Unreadable(f"colour mode {image.mode}; save the image as RGB") from error


def _grey(image: PIL.Image.Image) -> np.ndarray:
    """Return a greyscale image of 16 or 32 bits as uint8 (H, W)."""
    values = np.asarray(image)
    if image.mode == "F":
        problem = float_problem(values.min(), values.max())
        if problem:
            raise Unreadable(problem)
        return _as_uint8(values)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable("32-bit pixels beyond 0..65535; save the image with 8 or 16 bits")
    if image.mode == "I" and values.max() <= 255 and values.any():
        raise Unreadable("32-bit pixels that reach 255 at most; save the image with 8 bits")
    grey = np.rint(values / 257).astype(np.uint8)
    transparent = image.info.get("transparency")  # one grey of all 16 bits, in a PNG
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _as_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    return np.rint(np.clip(values, 0, 1).astype(np.float32) * 255).astype(np.uint8)


def reason_for(error: Exception) -> str:
    """Say what is wrong with an image, and what to do where that is not plain."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _why_missing(str(error.filename))
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image, or of a format that Pillow does not know"
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return (
            f"too large ({error}); the limit is PIL.Image.MAX_IMAGE_PIXELS = "
            f"{PIL.Image.MAX_IMAGE_PIXELS}: set it higher, or to None, if you trust the file"
        )
    if isinstance(error, OSError) and error.errno is not None:  # the system's; Pillow's have none
        return f"cannot be read ({error.strerror})"
    return f"truncated or damaged ({type(error).__name__}: {error})"


def _why_missing(path: str) -> str:
    if "://" in path:
        return "no such file; X takes paths of files, so download it first"
    if path.startswith("~"):
        return "no such file; os.path.expanduser(path) says what ~ stands for"
    return f"no such file (relative paths start at {working_folder()})"


def float_problem(low: float, high: float) -> str | None:
    """Say what is wrong with float pixels that reach from `low` to `high`."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return "holds NaN or infinite pixels"
    if low >= -_FLOAT_DUST and high <= 1 + _FLOAT_DUST:
        return None
    mend = "if they are in [-1, 1], use (X + 1) / 2" if low < 0 else "if 0..255, divide by 255"
    return f"float pixels must be in [0, 1]; these reach from {low:g} to {high:g}: {mend}"
