"""Files of training images: whether they change in a fit, and found and known again after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.messages import first_few, working_folder


class SourceFile(NamedTuple):
    """A training image as the fit saw it.

    Attributes
    ----------
    path : str
        As X had it.
    place : str or None
        The absolute path at that time; None after loading.
    digest : str or None
        Of the file's bytes; None where it is not known.
    """

    path: str
    place: str | None = None
    digest: str | None = None

    def opened(self, prototype: int) -> np.ndarray:
        """Return the picture (H, W, 3), uint8, for a prototype that is a part of it.

        Raises
        ------
        ImageError
            If it is not there, cannot be read, or is another than the fit saw.
        """
        problem = f"is not there (looked for from {working_folder()})"
        places = dict.fromkeys(place for place in (self.path, self.place) if place is not None)
        for place in filter(os.path.exists, places):
            image = Images([place])
            try:
                if self.digest in (None, image.digest(0)):
                    return np.asarray(image.open(0))
            except ImageError as error:
                problem = f"cannot be read: {error.failures[0].reason}"
            else:
                problem = "is another file than the fit saw"
        raise ImageError(
            f"The training image {self.path!r}, which prototype {prototype} is a part of, "
            f"{problem}. Predictions and sheets do without it; to see it, put it back. "
            "`save(folder, thumbnails=512)` keeps small pictures with a model."
        )


def stamps(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return size and time of the last change of each file; None where there is none."""
    return [_stamp(path) for path in paths]


def changes_since(paths: Sequence[str], before: Sequence[tuple[int, int] | None]) -> str:
    """Say which files are gone, or others, since `stamps` looked at them; or nothing."""
    found = []
    for path, then in zip(paths, before, strict=True):
        now = _stamp(path)
        if now != then:
            found.append(f"{path!r} {'is gone' if now is None else 'was changed'}")
    return first_few(found) if found else ""


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
