"""Batches of images for a torch DataLoader, and their random augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, Subset, default_collate
from torchvision.transforms import v2

from protoclf.decoding import decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images, as_index
from protoclf.storage import allocate

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
Augmentation = Callable[[torch.Tensor], torch.Tensor]


class ImageDataset(Dataset):
    """Batches of uint8 images for a torch DataLoader: (inputs, target).

    Parameters
    ----------
    images : Images
    preprocessing : Preprocessing
    y : array-like of shape (n,), int, optional
        Class indices; zeros by default.
    sample_weight : array-like of shape (n,), float, optional
    keep : bool, default=False
        Decode all images now and keep them (3 S^2 bytes each); otherwise batch by batch.
    n_jobs, progress
        As in `decode`; a bar is shown for `keep` only.

    Attributes
    ----------
    pixels : torch.Tensor of shape (n, 3, S, S), uint8, or None
        All images where they are kept. A ``copy.copy`` of the dataset shares them.
    sizes : ndarray of shape (n, 2), int64, or None
        Width and height of the originals, where the images are kept.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        keep: bool = False,
        n_jobs: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.y = _column("y", np.zeros(len(images)) if y is None else y, len(images), torch.int64)
        self.sample_weight = None
        if sample_weight is not None:
            self.sample_weight = _column("sample_weight", sample_weight, len(images), torch.float32)
        self.n_jobs = n_jobs
        self.pixels: torch.Tensor | None = None
        self.sizes: np.ndarray | None = None
        if keep:
            side = preprocessing.image_size
            out = allocate((len(images), 3, side, side), torch.uint8)
            self.pixels, self.sizes = decode(
                images, preprocessing, out=out, n_jobs=n_jobs, progress=progress
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Batch:
        inputs, target = self.__getitems__([i])
        return {name: value[0] for name, value in inputs.items()}, target[0]

    def __getitems__(self, indices: ArrayLike) -> Batch:
        """Return a whole batch, as inputs and y (n,).

        The inputs are {"images": (n, 3, S, S), "size": (n, 2)[, "sample_weight": (n,)]}, with the
        width and height of the originals.
        """
        index = torch.from_numpy(as_index(indices))
        pixels, sizes = self._decoded(index)
        inputs = {"images": pixels, "size": torch.from_numpy(sizes)}
        if self.sample_weight is not None:
            inputs["sample_weight"] = self.sample_weight[index]
        return inputs, self.y[index]

    @staticmethod
    def collate(batch: Any) -> Any:
        """Pass a batch of `__getitems__` on as it is; stack a list of single items."""
        return default_collate(batch) if isinstance(batch, list) else batch

    def _decoded(self, index: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        if self.pixels is not None and self.sizes is not None:
            return self.pixels[index], self.sizes[index.numpy()]  # (n, 3, S, S), (n, 2)
        return decode(
            self.images, self.preprocessing, index.numpy(), n_jobs=self.n_jobs, progress=False
        )


class AugmentedDataset(Dataset):
    """The batches of another data set, each image randomly transformed anew.

    Parameters
    ----------
    dataset : ImageDataset, or a Subset of one
    augmentation : callable
        Random transform of one uint8 image (3, S, S) to another.
    """

    def __init__(self, dataset: ImageDataset | Subset, augmentation: Augmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch, as the other data set does."""
        inputs, y = self.dataset.__getitems__(indices)
        augmented = [_augment(self.augmentation, image) for image in inputs["images"]]
        return inputs | {"images": torch.stack(augmented)}, y


def augmentation_of(spec: Any, image_size: int) -> Augmentation | None:
    """Return the augmentation that `spec` names: None, "default", or a callable as it is.

    "default" is mild: a random part of 75 to 100 % of the area, a horizontal flip, brightness
    and contrast changed by up to a fifth.
    """
    if spec is None or (callable(spec) and not isinstance(spec, type)):
        return spec
    if not (isinstance(spec, str) and spec == "default"):
        raise TypeError(
            "augmentation must be None, 'default', or a callable that maps a uint8 tensor "
            f"(3, S, S) to another; got {spec!r}."
        )
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(0.75, 1.0), ratio=(0.9, 1 / 0.9)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ]
    )


def _augment(augmentation: Augmentation, image: torch.Tensor) -> torch.Tensor:
    result = augmentation(image)
    if not isinstance(result, torch.Tensor):
        raise TypeError(
            f"augmentation must return a tensor; got {type(result).__name__}. Leave out "
            "conversions to PIL images or arrays."
        )
    if result.dtype != torch.uint8 or result.shape != image.shape:
        raise ValueError(
            f"augmentation must return uint8 of shape {tuple(image.shape)}; got {result.dtype} "
            f"of shape {tuple(result.shape)}. Leave out conversion to float and normalization, "
            "and resize to image_size at the end."
        )
    return result


def _column(name: str, values: ArrayLike, n: int, dtype: torch.dtype) -> torch.Tensor:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one for each image; got {array.shape}.")
    return torch.tensor(array, dtype=dtype)
