"""Masks of images and of the model input, and what covering by them leaves of an image."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from protoclf.image_dataset import ImageDataset


class Masks(Protocol):
    """A list of arrays (height, width), or what reads each only when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


def check_number(masks: Masks, dataset: ImageDataset) -> None:
    """Raise ValueError unless there are as many masks as images."""
    if len(masks) != len(dataset):
        raise ValueError(f"X has {len(dataset)} images and masks {len(masks)}; as many are needed.")


def mask_of(masks: Masks, dataset: ImageDataset, i: int) -> np.ndarray:
    """Return mask i as bool (height, width), of the size of its image."""
    mask = np.asarray(masks[i])
    width, height = dataset.sizes([i])[0].tolist()
    if mask.shape != (height, width):
        raise ValueError(
            f"The mask of image {i} has shape {mask.shape}; the image is {width} pixels wide and "
            f"{height} high, so that ({height}, {width}) is needed."
        )
    return mask != 0


def shown(dataset: ImageDataset, i: int, mask: np.ndarray) -> np.ndarray:
    """Return the part of a mask that the model sees, to the nearest pixel."""
    region = dataset.preprocessing.region(dataset.sizes([i]))[0]
    x0, y0, x1, y1 = np.floor(region + 0.5).astype(int)  # rounding to even might take a side away
    return mask[y0:y1, x0:x1]


def on_input(dataset: ImageDataset, i: int, mask: np.ndarray) -> np.ndarray:
    """Return a mask of image i as the model sees it, (S, S): the nearest pixel of the original."""
    side, (width, height) = dataset.preprocessing.image_size, dataset.sizes([i])[0].tolist()
    x0, y0, x1, y1 = dataset.preprocessing.region(dataset.sizes([i]))[0].tolist()
    share = (np.arange(side) + 0.5) / side  # of the region, at the middles of the input's pixels
    rows = np.floor(y0 + share * (y1 - y0)).astype(int).clip(0, height - 1)
    cols = np.floor(x0 + share * (x1 - x0)).astype(int).clip(0, width - 1)
    return mask[np.ix_(rows, cols)]


def cover(image: Tensor, masks: Tensor) -> Tensor:
    """Cover parts of an image with its mean colour, as the deletion metrics do.

    Parameters
    ----------
    image : Tensor of shape (3, S, S)
    masks : bool Tensor of shape (k, S, S)
        True where the image is to be covered.

    Returns
    -------
    Tensor of shape (k, 3, S, S)
        A copy of the image for each mask.
    """
    mean = image.float().mean((1, 2)).round().to(image.dtype)  # (3,)
    return torch.where(masks[:, None], mean[:, None, None], image)
