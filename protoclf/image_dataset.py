"""Batches of images for a torch DataLoader."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, Subset, default_collate

from protoclf.decoding import check_files, decode, in_threads
from protoclf.geometry import Preprocessing
from protoclf.image_errors import Failure, ImageError
from protoclf.images import Images, as_index
from protoclf.storage import allocate

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

_passed: set[str] = set()
"""Digests of files that this process found to be images, about 100 bytes each."""

_MOST_PASSED = 2**18


class Batches(Dataset):
    """A data set of whole batches: a loader asks for all rows of one at once.

    Attributes
    ----------
    takes_no_workers : bool
        Whether loader workers could not help.
    """

    takes_no_workers: bool = False

    def __getitems__(self, indices: Any) -> Batch:
        """Return a whole batch."""
        raise NotImplementedError


class ImageDataset(Batches):
    """Batches of uint8 images for a torch DataLoader: (inputs, target).

    Parameters
    ----------
    images : Images
    preprocessing : Preprocessing
    y : array-like of shape (n,), int, optional
        Class indices; zeros by default.
    sample_weight : array-like of shape (n,), float, optional
    on_bad_image : {"raise", "skip"}, default="raise"
        Whether an image that cannot be read raises ImageError, or is black and noted.

    Attributes
    ----------
    failures : dict of int to Failure
        The images that could not be read so far, by their place in the data set.
    pixels : torch.Tensor of shape (k, 3, S, S), uint8, or None
        All images, once `keep` has decoded them. The data sets of some of them share theirs.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        on_bad_image: str = "raise",
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.y = _column("y", np.zeros(len(images)) if y is None else y, len(images), torch.int64)
        self.sample_weight = None
        if sample_weight is not None:
            self.sample_weight = _column("sample_weight", sample_weight, len(images), torch.float32)
        self.on_bad_image = on_bad_image
        self.failures: dict[int, Failure] = {}
        self.pixels: torch.Tensor | None = None
        self._rows = np.arange(len(images))  # of the images in `pixels`
        self._sizes = np.zeros((len(images), 2), dtype=np.int64)  # 0 where not known yet
        self._digests = np.full(len(images), "", dtype=object)
        self._decoded_digests = self._digests  # of the images in `pixels`, from before

    def keep(self, show: bool = True, folder: Path | None = None) -> ImageDataset:
        """Decode all images now and keep them (3 S^2 bytes each); otherwise batch by batch.

        `show` is that of `decode`. Beyond the memory budget the images are mapped to a file in
        `folder`. Where there is a folder, results may be kept in it for other fits, so that the
        digests of the images are taken before they are decoded. Returns the data set itself.
        """
        if self.pixels is None:
            if folder is not None:
                self.digests(range(len(self)), readable_alone=True)
                self._decoded_digests = self._digests.copy()
            side = self.preprocessing.image_size
            out = allocate((len(self), 3, side, side), torch.uint8, folder=folder)
            self.pixels, self._sizes = self._decode(np.arange(len(self)), out, show)
        return self

    def _decode(
        self, index: np.ndarray, out: torch.Tensor | None, show: bool
    ) -> tuple[torch.Tensor, np.ndarray]:
        failures: list[Failure] = []
        decoded = decode(
            *(self.images, self.preprocessing, index, out, show),
            failures=failures if self.on_bad_image == "skip" else None,
        )
        if failures:
            place = dict(zip(self.images.positions[index].tolist(), index.tolist(), strict=True))
            self.failures |= {place[failure.position]: failure for failure in failures}
        return decoded

    def failed(self, index: ArrayLike) -> np.ndarray:
        """Return whether images could not be read, as far as they were tried: (n,) bool."""
        return np.isin(np.asarray(index), list(self.failures))

    def of(self, index: np.ndarray, y: ArrayLike, sample_weight: ArrayLike | None) -> ImageDataset:
        """Return the data set of some images, decoded as far as they are here."""
        part = ImageDataset(*(self.images.take(index), self.preprocessing, y, sample_weight))
        part._sizes, part._digests = self._sizes[index], self._digests[index]
        part.pixels, part._rows = self.pixels, self._rows[index]
        part._decoded_digests = self._decoded_digests
        return part

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Batch:
        inputs, target = self.__getitems__([i])
        return {name: value[0] for name, value in inputs.items()}, target[0]

    def __getitems__(self, indices: ArrayLike) -> Batch:
        """Return a whole batch: {"images": (n, 3, S, S), "index": (n,)[, "sample_weight"]}, y (n,).

        "index" says which images these are, "sample_weight" (n,) what they weigh.
        """
        index = as_index(indices)
        inputs, y = self.without_images(index)
        return inputs | {"images": self.decoded(index)}, y

    def without_images(self, index: np.ndarray) -> Batch:
        """Return what a batch holds beside the images."""
        inputs = {"index": torch.from_numpy(index)}
        if self.sample_weight is not None:
            inputs["sample_weight"] = self.sample_weight[index]
        return inputs, self.y[index]

    def decoded(self, index: np.ndarray) -> torch.Tensor:
        """Return images (n, 3, S, S)."""
        if self.pixels is not None:
            return self.pixels[self._rows[index]]
        pixels, self._sizes[index] = self._decode(index, None, False)
        return pixels

    def sizes(self, index: ArrayLike) -> np.ndarray:
        """Return width and height of originals (n, 2), in pixels; from the file if need be."""
        index = as_index(index)
        unknown = index[(self._sizes[index, 0] == 0) & ~self.failed(index)]
        for i in np.unique(unknown):
            self._sizes[i] = self.images.size(int(i))
        return self._sizes[index]

    def digests(self, index: ArrayLike, readable_alone: bool = False) -> list[str]:
        """Return digests of what n images held when first asked.

        An image that cannot be read raises ImageError. With `readable_alone` its digest is "".
        """
        places = as_index(index)
        for i in places.tolist():
            self._digests[i] = self._digests[i] or self.images.known_digest(i) or ""
        unknown = [i for i in places.tolist() if not self._digests[i]]
        passed_over = (ImageError,) if readable_alone else ()

        def look(k: int) -> None:
            with suppress(*passed_over):
                self._digests[unknown[k]] = self.images.digest(unknown[k])

        in_threads(look, len(unknown))
        return self._digests[places].tolist()

    def unchanged(self, index: np.ndarray) -> np.ndarray:
        """Return whether n images can be read, and hold what their digests say, (n,) bool.

        Images that `keep` decoded are compared with what they held before that.
        """
        same = ~self.failed(index)
        before = self._digests[index]
        if self.pixels is not None:
            before = self._decoded_digests[self._rows[index]]

        def look(k: int) -> None:
            try:
                same[k] &= self.images.digest(int(index[k])) == before[k]
            except ImageError:
                same[k] = False

        in_threads(look, len(index))
        return same

    def check(self, show: bool = True) -> None:
        """Check every file as `check_files` does, but for those with contents that passed before.

        Files are read for their digests, which are kept.
        """
        try:
            digests = self.digests(range(len(self)))
        except ImageError:  # one of several, perhaps
            digests = []
        if not digests or not _passed.issuperset(digests):
            check_files(self.images, show=show)
            if len(_passed) > _MOST_PASSED:
                _passed.clear()
            _passed.update(digests)

    @staticmethod
    def collate(batch: Any) -> Any:
        """Pass a batch of `__getitems__` on as it is; stack a list of single items."""
        return default_collate(batch) if isinstance(batch, list) else batch


def in_whole(dataset: Any, indices: ArrayLike | None = None) -> tuple[ImageDataset, np.ndarray]:
    """Return the data set of all images, and where in it those of a subset are.

    `indices` are places in the subset; all by default.
    """
    index = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    while isinstance(dataset, Subset):
        index = np.asarray(dataset.indices)[index]
        dataset = dataset.dataset
    return dataset, index


def is_batches(X: Any) -> bool:
    """Return whether X is a data set of ours, or a part of one: of whole batches, not of images."""
    while isinstance(X, Subset):
        X = X.dataset
    return isinstance(X, Batches)


def _column(name: str, values: ArrayLike, n: int, dtype: torch.dtype) -> torch.Tensor:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one for each image; got {array.shape}.")
    return torch.tensor(array, dtype=dtype)
