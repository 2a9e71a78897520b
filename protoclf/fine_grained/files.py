"""The files of a data set: found under the names that they go by, read, or named in an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.io import loadmat

from protoclf.explanation import BOX
from protoclf.messages import first_few

COLUMNS = ["path", "class", "split", *BOX]


def found(root: str | os.PathLike[str], *names: str) -> Path:
    """Return the first of these files or folders that is there."""
    for name in names:
        if (path := Path(root) / name).exists():
            return path
    wanted = " or ".join(f"'{name}'" for name in names)
    raise FileNotFoundError(f"There is no {wanted} in '{os.fspath(root)}'.")


def unexpected(file: Path, where: str, expected: str, got: Any) -> ValueError:
    """Return an error that says what a file should hold at some place, and what it holds."""
    return ValueError(
        f"'{file}', {where}: expected {expected}, got {got!r}. Take the file from its archive "
        "again, or mend it."
    )


def lines(file: Path) -> list[str]:
    """Return the lines of a text file."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        got = error.object[error.start : error.end]
        raise unexpected(file, f"byte {error.start}", "text in UTF-8", got) from error


def numbered(file: Path) -> dict[int, str]:
    """Return what a file of lines "number text" says of each number."""
    texts: dict[int, str] = {}
    for i, line in enumerate(lines(file), start=1):
        number, _, text = line.strip().partition(" ")
        if not number.isdecimal() or not text:
            raise unexpected(file, f"line {i}", "a number and a text", line)
        if int(number) in texts:
            raise unexpected(file, f"line {i}", "a number that is new", line)
        texts[int(number)] = text
    return texts


def numbers(file: Path, where: str, values: Sequence[Any], names: Sequence[str]) -> list[float]:
    """Return values, one for each name, as the numbers that they should be."""
    try:
        given = [float(value) for value in values]
    except (TypeError, ValueError):
        given = []
    if len(given) != len(names) or not (np.abs(given) < 2**31).all():  # nor is NaN
        raise unexpected(file, where, f"numbers for {', '.join(names)}", [*map(str, values)])
    return given


def looked_up(file: Path, texts: pd.Series, meanings: Mapping[str, str]) -> list[str]:
    """Return what the texts mean that a file says of images."""
    for image, text in texts.items():
        if text not in meanings:
            raise unexpected(file, f"image {image}", f"one of {first_few(list(meanings))}", text)
    return [meanings[text] for text in texts]


def name_after(mark: str, file: Path, where: str, text: str) -> str:
    """Return the name of a class that follows its number, with spaces."""
    name = text.partition(mark)[2].replace("_", " ")
    if not name:
        raise unexpected(file, where, f"a name after {mark!r}", text)
    return name


def variable(file: Path, name: str, *fields: str) -> np.ndarray:
    """Return a cell array (n,) of a Matlab file, or a struct array (n,) with these fields."""
    try:
        array = np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"'{file}' is no Matlab file with the variable {name!r}.") from error
    if not {*fields} <= {*(array.dtype.names or ())}:
        raise unexpected(file, name, f"the fields {', '.join(fields)}", array.dtype.names)
    return array
