"""Training images of a saved model: small pictures that are enlarged when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from protoclf.decoding import in_threads
from protoclf.files import write_bytes
from protoclf.model_files import THUMBNAILS, read_bytes, refusal
from protoclf.rules import Rule, integer, optional

MOST_SIDE = 4096  # pixels


_SIDE = integer(1, MOST_SIDE)
THUMBNAILS_RULE = Rule(optional(_SIDE).holds, f"None, or {_SIDE.allowed}")
_QUALITY = 90  # of JPEG


class KeptPicture(NamedTuple):
    """A small picture as a JPEG, and the width and height of the image that it was made of."""

    data: bytes
    size: tuple[int, int]

    def enlarged(self) -> np.ndarray:
        """Return the picture at its first size, (H, W, 3): boxes in its pixels stay right."""
        with PIL.Image.open(io.BytesIO(self.data), formats=("JPEG",)) as small:
            return np.asarray(small.resize(self.size, PIL.Image.Resampling.BICUBIC))


class Thumbnails(Mapping[int, np.ndarray]):
    """Images (H, W, 3), uint8, of which only thumbnails are in memory.

    Their longer sides have `side` pixels, at most.
    """

    def __init__(self, side: int, pictures: dict[int, KeptPicture]) -> None:
        self.side = side
        self.pictures = pictures

    def facts(self) -> dict[str, Any]:
        """Return what `read_thumbnails` needs to know, for JSON."""
        sizes = [[index, *picture.size] for index, picture in self.pictures.items()]
        return {"side": self.side, "sizes": sizes}

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pictures[index].enlarged()

    def __contains__(self, index: object) -> bool:
        return index in self.pictures

    def __iter__(self) -> Iterator[int]:
        return iter(self.pictures)

    def __len__(self) -> int:
        return len(self.pictures)


def sources_among(
    images: Mapping[int, np.ndarray], indices: Container[int]
) -> Mapping[int, np.ndarray]:
    """Return the images of these indices, in the form that they have."""
    if isinstance(images, Thumbnails):
        return Thumbnails(images.side, {i: v for i, v in images.pictures.items() if i in indices})
    return {i: v for i, v in images.items() if i in indices}


def kept_picture(pixels: np.ndarray, side: int) -> KeptPicture:
    """Return an image (H, W, 3), uint8, with at most `side` pixels on its longer side."""
    image = PIL.Image.fromarray(pixels)
    small = image.resize(_reduced(image.size, side), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return KeptPicture(buffer.getvalue(), image.size)


def write_thumbnails(folder: Path, thumbnails: Thumbnails) -> None:
    """Write each to a file named by its index."""
    (folder / THUMBNAILS).mkdir()
    for index, picture in thumbnails.pictures.items():
        write_bytes(_file(folder, index), picture.data)


def read_thumbnails(folder: Path, side: int, sizes: dict[int, tuple[int, int]]) -> Thumbnails:
    """Read the thumbnails of images of these sizes; each is decoded once, to check it."""
    if (folder / THUMBNAILS).is_symlink():
        raise refusal(folder / THUMBNAILS, "is a link.")
    most = PIL.Image.MAX_IMAGE_PIXELS
    indices = list(sizes)

    def read(i: int) -> KeptPicture:
        index = indices[i]
        file, (width, height) = _file(folder, index), sizes[index]
        if most is not None and width * height > most:
            limit = f"PIL.Image.MAX_IMAGE_PIXELS = {most}: raise it if you trust the file"
            raise refusal(file, f"is of an image of {width} x {height} pixels; more than {limit}.")
        return _read(file, side, (width, height))

    pictures = in_threads(read, len(indices))
    return Thumbnails(side, dict(zip(indices, pictures, strict=True)))


def _read(file: Path, side: int, size: tuple[int, int]) -> KeptPicture:
    width, height = _reduced(size, side)
    data = read_bytes(file, 4 * width * height + 2**16)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as small:
            found = small.size if small.mode == "RGB" else None
            if found == (width, height):
                small.load()
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise refusal(file, f"is no JPEG that can be read: {error}") from error
    if found != (width, height):
        raise refusal(file, f"is not in RGB, {width} x {height} pixels, as a thumbnail must be.")
    return KeptPicture(data, size)


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    width, height = (max(1, round(scale * pixels)) for pixels in size)
    return width, height


def _file(folder: Path, index: int) -> Path:
    return folder / THUMBNAILS / f"{index}.jpg"
