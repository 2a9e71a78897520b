"""What is wrong with X, or with images in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHOWN = 5  # failures spelled out in one error


class Failure(NamedTuple):
    """One image that cannot be used."""

    position: int
    path: str | None
    reason: str


class ImageError(ValueError):
    """X, or an image in it, cannot be used.

    Attributes
    ----------
    failures : list of Failure
        Every image that failed, as (position in X, path or None, reason); empty where X as a
        whole is wrong.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)


def reading_error(failures: list[Failure]) -> ImageError:
    """Return one error that names what failed, the first few spelled out."""
    lines = [
        f"position {f.position}" + ("" if f.path is None else f", {f.path!r}") + f": {f.reason}"
        for f in failures[:SHOWN]
    ]
    more = len(failures) - len(lines)
    if more:
        lines.append(f"and {more} more")
    return ImageError(
        f"{len(failures)} image(s) of X cannot be read:\n  "
        + "\n  ".join(lines)
        + "\nReplace these images, or leave them out of X (and their labels out of y).",
        failures,
    )
