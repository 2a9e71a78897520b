"""What messages, sheets and files say: lists of names, similarities, folder and version."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "none"


def first_quoted(values: Iterable[Any], most: int = 5) -> str:
    """Return the first values as Python writes them, and how many more there are."""
    return first_few([repr(value) for value in values], most)


def similarity_in_words(value: float) -> str:
    """Return a similarity with two digits, marked where it says that parts are not alike."""
    return f"unlike: {value:.2f}" if value < 0 else f"{value:.2f}"


def working_folder() -> str:
    """Return the folder that relative paths start at, which may be gone."""
    try:
        return repr(os.getcwd())
    except OSError:
        return "a folder that is gone"


def installed_version() -> str:
    """Return the version of protoclf that is installed."""
    try:
        return metadata.version("protoclf")
    except metadata.PackageNotFoundError:
        return "unknown"
