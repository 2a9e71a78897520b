"""Images and labels out of a data set of torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import PIL.ImageFile
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader

from protoclf.image_errors import ImageError


def unpacked(X: Any, y: Any) -> tuple[Any, Any]:
    """Return X and y as they are, or as a torch Dataset of pairs (image, label) holds them.

    Parameters
    ----------
    X : images, or a map-style Dataset
        Its images are what X may be a list of, or tensors (3, H, W), and are all held in memory.
        Those of a torchvision folder, or of a part of one, are read by their paths instead, unless
        it has transforms or a loader of the user's. A pandas Index becomes an array.
    y : array-like or None
        Labels in place of those of the Dataset.

    Raises
    ------
    ImageError
        If the Dataset has no length, its items are no pairs, or a label is more than one number.
    """
    if isinstance(X, pd.Index):  # of which scikit-learn takes no rows
        return X.to_numpy(), y
    if not isinstance(X, Dataset):
        return X, y
    if isinstance(X, IterableDataset) or not hasattr(X, "__len__"):
        raise ImageError(
            "X must be a map-style Dataset, whose length is known; got an iterable one."
        )
    pairs = _of_folder(X)
    if pairs is None:
        pairs = _taken_out(X)
    images = [image for image, _ in pairs]
    return images, [_single(pair[1]) for pair in pairs] if y is None else y


def _of_folder(X: Any) -> list[tuple[str, Any]] | None:
    """Return paths and labels of a folder that torchvision only decodes, or of a part of one."""
    folder, rows = X, list(range(len(X)))
    while _is_a(Subset, folder, "__getitem__", "__getitems__"):
        folder, rows = folder.dataset, [folder.indices[i] for i in rows]
    if not _is_a(DatasetFolder, folder, "__getitem__"):
        return None
    if folder.transform or folder.target_transform or folder.loader is not default_loader:
        return None
    return [folder.samples[i] for i in rows]


def _is_a(kind: type, dataset: Any, *methods: str) -> bool:
    """Return whether a data set is of a kind, and its class overrides none of these methods."""
    redefined = (getattr(type(dataset), m, None) is not getattr(kind, m, None) for m in methods)
    return isinstance(dataset, kind) and not any(redefined)


def _taken_out(X: Any) -> list[tuple[Any, Any]]:
    """Return all pairs, each image in memory of its own."""
    pairs = []
    places: set[int] = set()
    for image, label in _pairs(X):
        if isinstance(image, np.ndarray):
            if image.ctypes.data in places:  # a buffer is filled anew, or an image stands twice
                return [(copy.copy(image), label) for image, label in _pairs(X)]
            places.add(image.ctypes.data)
        pairs.append((image, label))
    return pairs


def _pairs(X: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each image, in a form that `Images` takes, and its label."""
    for i in range(len(X)):
        yield _pair(X[i], i)


def _pair(pair: Any, i: int) -> tuple[Any, Any]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ImageError(f"X must be a Dataset of pairs (image, label); X[{i}] is none.")
    image, label = pair
    if isinstance(image, PIL.ImageFile.ImageFile):  # its file stays open until it is read
        with suppress(Exception):  # `Images` says what is wrong, and of which image
            image.load()
    return _pixels(image) if isinstance(image, Tensor) else image, label


def _single(label: Any) -> Any:
    if not isinstance(label, Tensor):
        return label
    if label.numel() != 1:
        raise ImageError(
            f"Labels in a Dataset must be single ones; one has the shape {tuple(label.shape)}. "
            "Give a y of your own."
        )
    return label.item()


def _pixels(image: Tensor) -> np.ndarray:
    """Return an image (3, H, W) or (H, W) as (H, W, 3) or (H, W)."""
    array = image.detach().cpu()
    return (array.permute(1, 2, 0) if array.ndim == 3 else array).numpy()
