"""Arrays in a folder, by key: what several fits, in several processes, need not compute again."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from warnings import warn

import joblib
import numpy as np

from protoclf.files import replaced, with_checksum, without_checksum

T = TypeVar("T")


def folder_of(memory: Any) -> Path | None:
    """Return the folder that the parameter `memory` names: None, a path or a joblib.Memory."""
    location = memory.location if isinstance(memory, joblib.Memory) else memory
    return None if location is None else Path(location) / "protoclf-cache"  # no name of a package


class ArrayStore:
    """Arrays as .npy files, or several by name as .npz files, written whole or not at all.

    Any number of processes may read and write at the same time: who comes second writes the same.
    Behind what numpy writes stands a checksum: a file that cannot be read, or that holds something
    else than was written, counts as missing. Where nothing can be written, nothing is kept, with
    one warning.

    Parameters
    ----------
    folder : Path
        Made when the first array is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writable = True

    def get(self, key: str) -> np.ndarray | None:
        """Return the array of a key (hexadecimal digits), or None."""
        return _loaded(self._file(key), lambda array: array)

    def put(self, key: str, array: np.ndarray) -> None:
        """Keep an array."""
        self._put(self._file(key), lambda out: np.save(out, array, allow_pickle=False))

    def get_several(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the named arrays of a key, or None."""
        return _loaded(self._file(key, ".npz"), dict)

    def put_several(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep named arrays, all of them or none."""
        self._put(self._file(key, ".npz"), lambda out: np.savez(out, **dict[str, Any](arrays)))

    def _put(self, file: Path, write: Callable[[Any], None]) -> None:
        if not self._writable:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            data = with_checksum(write)
            with replaced(file) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            if isinstance(error, PermissionError) and os.path.exists(file):
                return  # Windows replaces no file that is open; another process has written it
            writable, self._writable = self._writable, False
            if writable:  # several threads write at the same time
                warn(f"memory: nothing more is kept in {self.folder} ({error}).", stacklevel=3)

    def _file(self, key: str, suffix: str = ".npy") -> Path:
        return self.folder / key[:2] / f"{key[2:]}{suffix}"


def _loaded(file: Path, of: Callable[[Any], T]) -> T | None:
    """Return what a file holds, or None where it is missing or damaged."""
    try:
        written = without_checksum(file.read_bytes())
        return of(np.load(io.BytesIO(written), allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
