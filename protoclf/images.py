"""X, validated: what the user calls X, paths or pixels, as images to be decoded on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import PIL.Image
import torch
from numpy.typing import ArrayLike
from scipy import sparse

from protoclf.file_digests import known_digest
from protoclf.image_errors import SHOWN, Failure, ImageError, reading_error
from protoclf.picture import (
    Stored,
    digest,
    float_problem,
    orientation_of,
    read_picture,
    reason_for,
    upright,
    upright_size,
)
from protoclf.torch_datasets import unpacked

T = TypeVar("T")


class Images:
    """X, validated: n images, decoded one by one on request.

    Parameters
    ----------
    X : sequence of n images
        Paths (str or os.PathLike) in a list, tuple, array of shape (n,) or (n, 1), Series or
        one-column DataFrame; or pixels: an array (n, H, W, 3) or (n, H, W), a list of such
        arrays (H, W, 3) or (H, W) of any sizes, or a list of PIL images. Arrays are uint8, or
        floats in [0, 1]. Or a torch Dataset of pairs (image, label): see `unpacked`.

    Attributes
    ----------
    paths : list of str, or None
        The paths as given; None where X holds pixels.
    positions : ndarray of shape (n,), int64
        The position of each image in X; other than 0..n-1 after `take`. Errors name these.
    """

    def __init__(self, X: Any) -> None:
        self._items, self.paths = _validated(unpacked(X, None)[0])
        self.positions = np.arange(len(self._items))

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: ArrayLike) -> Images:
        """Return a subset that shares the pixels; `indices` are integers or a boolean mask."""
        subset = object.__new__(type(self))
        subset._items = self._items
        subset.positions = self.positions[as_index(indices)]
        subset.paths = None
        if self.paths is not None:
            subset.paths = [self._items[position] for position in subset.positions]
        return subset

    def name(self, i: int) -> str:
        """Return what messages call image i: its path, or its position."""
        return f"{int(self.positions[i])}" if self.paths is None else repr(self.paths[i])

    def open(self, i: int) -> PIL.Image.Image:
        """Return image i at its full size, RGB and upright.

        Raises
        ------
        ImageError
            If the image cannot be read; names its position in X and its path.
        """
        stored = self.read(i)
        return upright(stored.rgb, stored.orientation)

    def read(self, i: int, side: int | None = None) -> Stored:
        """Decode image i; a `side` allows a JPEG's shorter side to shrink to twice of that."""
        return self._tell(i, partial(read_picture, side=side))

    def size(self, i: int) -> tuple[int, int]:
        """Return width and height of image i, upright; a JPEG is not decoded for it."""
        return self._tell(i, upright_size)

    def digest(self, i: int) -> str:
        """Return a digest of what image i is: its file's bytes, or its pixels."""
        return self._tell(i, digest)

    def known_digest(self, i: int) -> str | None:
        """Return the digest of image i where its file need not be read for it, or None."""
        return None if self.paths is None else known_digest(self.paths[i])

    def _tell(self, i: int, question: Callable[[Any], T]) -> T:
        position = int(self.positions[i])
        try:
            return question(self._items[position])
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything in a decoder
            path = None if self.paths is None else self.paths[i]
            raise reading_error([Failure(position, path, reason_for(error))]) from error


def conflicting_labels(images: Images, y: ArrayLike) -> None:
    """Raise ImageError if one file stands in X twice with different labels, by whatever path."""
    if images.paths is None:
        return
    labels = np.asarray(y)
    first: dict[Any, int] = {}
    conflicts = []
    for i, path in enumerate(images.paths):
        j = first.setdefault(_identity(path), i)
        if labels[i] != labels[j]:
            conflicts.append(
                f"{path!r} is {labels.item(j)!r} at position {images.positions[j]} "
                f"and {labels.item(i)!r} at position {images.positions[i]}"
            )
    if conflicts:
        raise ImageError(
            f"{len(conflicts)} image(s) of X have two labels:\n  "
            + "\n  ".join(conflicts[:SHOWN])
            + "\nKeep one label for each image, or leave the image out of X and y."
        )


def repeated_files(images: Images) -> np.ndarray | None:
    """Return which file each of n images is, as a number; None where none stands in X twice."""
    if images.paths is None:
        return None
    files = pd.factorize(pd.Series(map(_identity, images.paths), dtype=object))[0]
    return files if files.max() + 1 < len(files) else None


def _identity(path: str) -> Any:
    """Return what two paths to the same file have in common."""
    with suppress(OSError, ValueError):  # reading it says what is wrong
        found = os.stat(path)
        if found.st_ino:  # some file systems have none
            return found.st_dev, found.st_ino
    return os.path.normcase(os.path.abspath(path))


def skipped_images(failures: Iterable[Failure], y: np.ndarray, good: np.ndarray) -> pd.DataFrame:
    """Return what is left out, as a table, unless all images of a class are.

    `y` (n,) are the labels of all images, and `good` the positions of those that are left.
    """
    failures = sorted(failures)
    table = pd.DataFrame(
        {
            "position": [failure.position for failure in failures],
            "path": names_column(failure.path for failure in failures),
            "reason": [failure.reason for failure in failures],
        }
    )
    gone = sorted({*y.tolist()} - {*y[good].tolist()})
    if gone:
        error = reading_error(failures)
        raise ImageError(f"No image is left of {gone}. {error}", error.failures)
    return table


def names_column(names: Iterable[Any]) -> pd.Series:
    """Return names of files as a column; of objects if one is not UTF-8, as text has to be."""
    names = list(names)
    try:
        return pd.Series(names, dtype=None if names else str)
    except UnicodeEncodeError:
        return pd.Series(names, dtype=object)


def as_index(indices: ArrayLike) -> np.ndarray:
    """Return positions as int64, from integers or a boolean mask."""
    index = np.asarray(indices)
    return np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)


# ---- what X may be ------------------------------------------------------------------------


def _validated(X: Any) -> tuple[Any, list[str] | None]:
    """Return (items, paths): items[i] is a str, a PIL image, or an array (H, W[, 3])."""
    if isinstance(X, str | os.PathLike) and os.path.isdir(X):
        raise ImageError(
            f"X is a folder, {os.fspath(X)!r}. protoclf.datasets.load_folder(folder) returns X and "
            "y of one that holds a folder for each class."
        )
    if isinstance(X, str | bytes | os.PathLike | PIL.Image.Image):
        what = "image" if isinstance(X, PIL.Image.Image) else f"path, {os.fspath(X)!r}"
        raise ImageError(f"X is a single {what}; put it in a list: [X].")
    if sparse.issparse(X):
        raise ImageError(
            "X is a sparse matrix; sparse data is not supported. Expected images: paths, or an "
            "array (n, H, W, 3)."
        )
    if isinstance(X, list | tuple):
        return _from_list(list(X))
    return _from_array(_to_array(X))


def _to_array(X: Any) -> np.ndarray:
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        return (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    if hasattr(X, "columns") and len(X.columns) != 1:
        raise ImageError(
            f"Expected images: a DataFrame with one column of paths; X has {len(X.columns)} "
            f"columns, {list(X.columns)}. Select the one that holds the paths."
        )
    if hasattr(X, "to_numpy"):
        return np.asarray(X)  # to_numpy of pyarrow does not copy, unless told to
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise ImageError(
        f"X must be a list of paths, or one of the other forms of images; got "
        f"{type(X).__name__}. Make it a list: list(X)."
    )


def _from_array(X: np.ndarray) -> tuple[Any, list[str] | None]:
    if X.ndim == 0:
        raise ImageError(f"Expected images, got the single value {X.item()!r}. Put it in a list.")
    if len(X) == 0:
        raise _too_few("sample", X.shape)
    if X.dtype.kind not in "OUST":  # objects and strings
        return _check_array(X), None
    if X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    if X.ndim != 1:
        raise ImageError(
            f"Expected images: one path each, an array of shape (n,) or (n, 1), or pixels as "
            f"uint8 or float; got shape {X.shape} of dtype {X.dtype}. Reshape your data: "
            "of a table, give the column of paths, X[:, 0]."
        )
    return _from_list(list(X))


def _from_list(items: list[Any]) -> tuple[Any, list[str] | None]:
    if not items:
        raise _too_few("sample", (0,))
    if all(isinstance(x, tuple) and len(x) == 2 and np.ndim(x[1]) == 0 for x in items):
        raise ImageError(
            "Expected images; X holds pairs, as searches and cross-validations make them of a "
            "torch Dataset. Give them images and labels: [path for path, _ in folder.samples] and "
            "folder.targets of a torchvision folder."
        )
    kinds = [_kind(item) for item in items]
    if kinds[0] == "numbers" and all(kind == "numbers" for kind in kinds):
        return _from_array(_nested(items))
    for position, (item, kind) in enumerate(zip(items, kinds, strict=True)):
        if kind == "missing":
            raise ImageError(
                f"X holds no image at position {position} but {item!r}. Leave out missing ones."
            )
        if kind is None or kind == "numbers":
            raise ImageError(
                f"Expected images: paths (str or os.PathLike), PIL images or arrays; X holds "
                f"{_type_name(item)} at position {position}."
            )
        if kind != kinds[0]:
            raise ImageError(
                f"X mixes types: {_type_name(items[0])} at position 0 and {_type_name(item)} at "
                f"position {position}. Give all images in one form."
            )
    if kinds[0] == "path":
        paths = [str(os.fspath(item)) for item in items]
        return paths, paths
    prepare = _prepared_pil if kinds[0] == "image" else _prepared_array
    return [prepare(item, position) for position, item in enumerate(items)], None


def _kind(item: Any) -> str | None:
    if isinstance(item, str):
        return "path"
    if isinstance(item, os.PathLike):
        return "path" if isinstance(os.fspath(item), str) else None
    if isinstance(item, PIL.Image.Image):
        return "image"
    if isinstance(item, np.ndarray | torch.Tensor) and item.ndim >= 2:
        return "array"
    if pd.api.types.is_scalar(item) and pd.isna(item):
        return "missing"
    if isinstance(
        item, list | tuple | np.ndarray | torch.Tensor | int | float | complex | np.number
    ):
        return "numbers"
    return None


def _type_name(item: Any) -> str:
    return "a path" if _kind(item) == "path" else f"an object of type {type(item).__name__}"


def _nested(items: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(items)
    except ValueError:
        array = None
    if array is None or (array.dtype == object and array.ndim == 1):
        raise ImageError(
            "Expected images, got numbers or lists of unequal lengths. Give each image as an array."
        )
    return array


def _prepared_pil(image: PIL.Image.Image, position: int) -> PIL.Image.Image:
    """Load pixels and EXIF data now: threads must not do so at the same time."""
    try:
        image.load()
        orientation_of(image)
    except Exception as error:
        raise reading_error([Failure(position, None, reason_for(error))]) from error
    return image


def _prepared_array(item: Any, position: int) -> np.ndarray:
    array = _to_array(item)
    _check_array(array[None], position)
    return array


def _check_array(X: np.ndarray, first: int = 0) -> np.ndarray:
    """Check pixels (n, H, W, 3) or (n, H, W); `first` is the position of X[0]."""
    if X.dtype.kind == "c":
        raise ImageError(f"Complex data not supported: X has dtype {X.dtype}.")
    if X.ndim == 2 and X.shape[1] == 0:
        raise _too_few("feature", X.shape)
    _check_shape(X.shape)
    if X.dtype != np.uint8 and X.dtype.kind != "f":
        raise ImageError(
            f"Pixels must be uint8 (0..255) or floats in [0, 1]; the array at position {first} "
            f"has dtype {X.dtype}. Convert values of 0..255, X.astype('uint8'), or scale others to "
            "floats, such as X / 65535 for 16 bits."
        )
    rows = max(1, (1 << 24) // X[0].size)
    for start in range(0, len(X) if X.dtype.kind == "f" else 0, rows):
        _check_floats(X[start : start + rows], first + start)
    return X


def _check_shape(shape: tuple[int, ...]) -> None:
    expected = f"Expected images, an array (n, H, W, 3) or (n, H, W); got shape {shape}. "
    if len(shape) < 3:
        raise ImageError(
            expected + "Reshape your data: rows of a table are not images, X.reshape(-1, H, W) "
            "turns rows of pixels into images."
        )
    if 0 in shape:
        raise ImageError(expected + "These images have no pixels.")
    if len(shape) == 3 and shape[-1] == 3:
        raise ImageError(expected + "If this is one image in colour, put it in a list: [X].")
    if len(shape) == 4 and shape[-1] != 3:
        hints = {1: "Take the only channel: X[..., 0].", 4: "Leave out alpha: X[..., :3]."}
        hint = hints.get(shape[-1], "Channels come last.")
        if shape[1] == 3:
            hint = "Channels come last: X.transpose(0, 2, 3, 1), or permute for a tensor."
        raise ImageError(expected + hint)
    if len(shape) > 4:
        raise ImageError(expected + "Reshape your data.")


def _check_floats(X: np.ndarray, first: int) -> None:
    """Check that floats (n, H, W[, 3]) are in [0, 1]; `first` is the position of X[0]."""
    flat = X.reshape(len(X), -1)
    low, high = flat.min(axis=1), flat.max(axis=1)  # (n,), NaN where a pixel is
    for i, problem in enumerate(map(float_problem, low, high)):
        if problem:
            raise ImageError(f"Image at position {first + i} of X: {problem}.")


def _too_few(what: str, shape: tuple[int, ...]) -> ImageError:
    return ImageError(
        f"Found array with 0 {what}(s) (shape={shape}) while a minimum of 1 is required."
    )
