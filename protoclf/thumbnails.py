"""Small pictures inside a page: as data URIs of bounded size."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import PIL.Image

_QUALITIES = (82, 70, 55, 40, 25)  # of JPEG, the first that keeps to the limit
_BYTES_PER_PIXEL = 0.3  # of a square thumbnail, at most
_LOSSLESS = 96  # pixels of the longer side up to which a PNG is small enough


class Thumbnail(NamedTuple):
    """A small picture as a data URI; width and height are those of the original, upright."""

    width: int
    height: int
    uri: str


def thumbnail_of(image: PIL.Image.Image, side: int) -> Thumbnail:
    """Return an image with at most `side` pixels on its longer side, without its metadata."""
    small = image.copy()
    small.info = {}  # comments and colour profiles, which Pillow would write
    small.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    kind, data = _encoded(small)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Thumbnail(*image.size, uri)


def _encoded(small: PIL.Image.Image) -> tuple[str, bytes]:
    """Return (kind, bytes): PNG where that is small, else JPEG within the limit."""
    if max(small.size) <= _LOSSLESS:
        return "png", _saved(small, format="PNG", optimize=True)
    limit = _BYTES_PER_PIXEL * max(small.size) ** 2
    for quality in _QUALITIES:
        data = _saved(small, format="JPEG", quality=quality, optimize=True)
        if len(data) <= limit:
            break
    return "jpeg", data


def _saved(image: PIL.Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
