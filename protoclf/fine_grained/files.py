"""The files of a data set: found under the names that they go by, read, or named in an error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from protoclf.explanation import BOX

COLUMNS = ["path", "class", "split", *BOX]


def found(root: str | os.PathLike[str], *names: str) -> Path:
    """Return the first of these files or folders that is there."""
    for name in names:
        if (path := Path(root) / name).exists():
            return path
    wanted = " or ".join(f"'{name}'" for name in names)
    raise FileNotFoundError(f"There is no {wanted} in '{os.fspath(root)}'.")


def numbered(file: Path) -> dict[int, str]:
    """Return what a file of lines "number text" says of each number."""
    texts = {}
    for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        number, _, text = line.strip().partition(" ")
        if not number.isdigit() or not text:
            raise ValueError(f"'{file}', line {i}: expected a number and a text, got {line!r}.")
        texts[int(number)] = text
    return texts


def variable(file: Path, name: str) -> np.ndarray:
    """Return a cell array or a struct array (n,) of a Matlab file."""
    try:
        return np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"'{file}' is no Matlab file with the variable {name!r}.") from error
