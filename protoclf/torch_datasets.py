"""Images and labels out of a data set of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from protoclf.image_errors import ImageError


def unpacked(X: Any, y: Any) -> tuple[Any, Any]:
    """Return X and y as they are, or as a torch Dataset of pairs (image, label) holds them.

    Parameters
    ----------
    X : images, or a map-style Dataset
        Images in it are what X may be a list of, or tensors (3, H, W); they are all held in memory,
        other than those of a torchvision folder without transform, or of a part of one, which are
        read by their paths.
    y : array-like or None
        Labels in place of those of the Dataset.

    Raises
    ------
    ImageError
        If the Dataset has no length, or its items are no pairs.
    """
    if not isinstance(X, Dataset):
        return X, y
    if isinstance(X, IterableDataset) or not hasattr(X, "__len__"):
        raise ImageError(
            "X must be a map-style Dataset, whose length is known; got an iterable one."
        )
    folder: Any = X
    rows = list(range(len(X)))
    while isinstance(folder, Subset):
        folder, rows = folder.dataset, [folder.indices[i] for i in rows]
    if hasattr(folder, "samples") and getattr(folder, "transforms", None) is None:
        pairs = [tuple(folder.samples[i]) for i in rows]
    else:
        pairs = [X[i] for i in range(len(X))]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ImageError("X must be a Dataset of pairs (image, label).")
    images = [_pixels(image) if isinstance(image, Tensor) else image for image, _ in pairs]
    labels = [label.item() if isinstance(label, Tensor) else label for _, label in pairs]
    return images, labels if y is None else y


def _pixels(image: Tensor) -> np.ndarray:
    """Return an image (3, H, W) or (H, W) as (H, W, 3) or (H, W)."""
    array = image.detach().cpu()
    return (array.permute(1, 2, 0) if array.ndim == 3 else array).numpy()
