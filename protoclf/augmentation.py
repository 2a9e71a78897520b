"""Random transforms of training images, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from protoclf.image_dataset import Batch, Batches, ImageDataset

Augmentation = Callable[[Tensor], Tensor]
"""Maps a batch of images (n, 3, S, S), in 0..255, to another of the same shape."""

_LEAST_AREA = 0.75  # of the image
_WIDEST = 1 / 0.9  # width to height
_CONTRAST = 0.2
_GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601


class AugmentedDataset(Batches):
    """The batches of another data set, each image randomly transformed anew, on a device."""

    def __init__(
        self,
        dataset: ImageDataset | Subset,
        augmentation: Augmentation,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.device = device
        self.takes_no_workers = torch.device(device).type != "cpu"  # they have no part in a GPU

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch, as the other data set does."""
        inputs, y = self.dataset.__getitems__(indices)
        images = inputs["images"].to(self.device, non_blocking=True)
        return inputs | {"images": self.augmentation(images)}, y


def augmentation_of(spec: Any) -> Augmentation | None:
    """Return the augmentation of batches that `spec` names.

    None, "default" (see `augment_mildly`), or a callable for single uint8 images (3, S, S).
    """
    if spec is None:
        return None
    if isinstance(spec, str) and spec == "default":
        return augment_mildly
    if callable(spec) and not isinstance(spec, type):
        return ForEachImage(spec)
    raise TypeError(
        "augmentation must be None, 'default', or a callable that maps a uint8 tensor "
        f"(3, S, S) to another; got {spec!r}."
    )


def augment_mildly(images: Tensor) -> Tensor:
    """Show a random part of 75 to 100 % of each image's area, flipped or not, its light changed.

    Brightness and contrast change by up to a fifth. Float images (n, 3, S, S), in 0..255.
    """
    n, _, _, side = images.shape
    crops = _crops(n, side)
    flips = _flips(n)
    brightness, contrast = torch.rand(2, n).to(images.device)
    result = torch.empty(images.shape, device=images.device)
    for i, ((y, x, h, w), flip) in enumerate(zip(crops, flips, strict=True)):
        part = images[i : i + 1, :, y : y + h, x : x + w].float()
        part = F.interpolate(part, (side, side), mode="bilinear")[0]  # (3, S, S)
        result[i] = part.flip(2) if flip else part
    result.mul_(_factor(brightness)).clamp_(0, 255)
    grey = torch.einsum("nchw,c->n", result, result.new_tensor(_GREY)) / side**2
    return (
        result.sub_(grey[:, None, None, None])
        .mul_(_factor(contrast))
        .add_(grey[:, None, None, None])
        .clamp_(0, 255)
    )


def _factor(uniform: Tensor) -> Tensor:
    """Turn numbers (n,) in [0, 1) into factors (n, 1, 1, 1) around 1."""
    return (1 + _CONTRAST * (2 * uniform - 1))[:, None, None, None]


def _flips(n: int) -> list[bool]:
    """Draw which of n images are mirrored."""
    return (torch.rand(n) >= 0.5).tolist()


def _crops(n: int, side: int) -> list[list[int]]:
    """Draw n rectangles inside the image: y, x, height and width in pixels, (n, 4)."""
    area, ratio, down, right = torch.rand(4, n)
    area = side**2 * (_LEAST_AREA + (1 - _LEAST_AREA) * area)
    ratio = torch.exp((2 * ratio - 1) * math.log(_WIDEST))
    width = (area * ratio).sqrt().round().clamp(1, side)
    height = (area / ratio).sqrt().round().clamp(1, side)
    y = (down * (side - height + 1)).floor()
    x = (right * (side - width + 1)).floor()
    return torch.stack([y, x, height, width], dim=1).long().tolist()


class ForEachImage:
    """A user's random transform of one uint8 image (3, S, S), for each image of a batch."""

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        """Return the transformed batch (n, 3, S, S), uint8."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Tensor) -> Tensor:
        result = self.transform(image)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"augmentation must return a tensor; got {type(result).__name__}. Leave out "
                "conversions to PIL images or arrays."
            )
        if result.dtype != torch.uint8 or result.shape != image.shape:
            raise ValueError(
                f"augmentation must return uint8 of shape {tuple(image.shape)}; got "
                f"{result.dtype} of shape {tuple(result.shape)}. Leave out conversion to float "
                "and normalization, and resize to image_size at the end."
            )
        return result
