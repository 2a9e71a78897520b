"""Backbone features kept between fits, under the parameter `memory`.

A feature map is looked up by what its image file holds, by the preprocessing and by the backbone
itself: weights, structure and source code. Nothing that is found can be out of date.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageFile
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Subset

from protoclf.array_store import ArrayStore
from protoclf.decoding import in_threads
from protoclf.fingerprints import module_digest, state_digest
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import Batches, ImageDataset, in_whole
from protoclf.network import ProtoPNet
from protoclf.recent import recent_tensors

_FORMAT = "2"


class FeatureCache:
    """Features of single images (C, h, w), by the backbone as it is now, in an `ArrayStore`."""

    def __init__(self, folder: Path, module: ProtoPNet, preprocessing: Preprocessing) -> None:
        self.store = ArrayStore(folder / "features" / fingerprint(module, preprocessing))

    def read(self, key: str) -> Tensor | None:
        """Return the features (C, h, w) of an image, or None."""
        place = self.store.folder, key
        features = recent_tensors.get(place)
        if features is None:
            features = self._stored(key)
            if features is not None:
                recent_tensors.put(place, features)
        return features

    def _stored(self, key: str) -> Tensor | None:
        stored = self.store.get(key)
        if stored is None:
            return None
        if stored.dtype == np.uint16:  # bfloat16, which numpy does not have
            features = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        else:
            features = torch.from_numpy(stored)
        return features.permute(2, 0, 1)  # (C, h, w)

    def write(self, keys: list[str], features: Tensor) -> None:
        """Keep features (n, C, h, w) in the precision that they have; those with a key."""
        rows = features.permute(0, 2, 3, 1).contiguous().cpu()  # (n, h, w, C)
        if rows.dtype == torch.bfloat16:
            arrays = rows.view(torch.int16).numpy().view(np.uint16)
        else:
            arrays = rows.numpy()
        kept = [i for i, key in enumerate(keys) if key]
        in_threads(lambda k: self.store.put(keys[kept[k]], arrays[kept[k]]), len(kept))


class CachedImages(Batches):
    """Batches of an image data set, with features in place of the images that have them cached.

    The inputs of a batch of n images are those of the data set, and

    - images (k, 3, S, S) : only the images without cached features
    - missing (k,) : which of the batch these are
    - keys, k str : where their features are to be kept. An empty key says not to: the image may
      have changed since its digest was taken
    - cached, n - k tensors (C, h, w) : the features of the other images
    - digests, n str
    """

    def __init__(self, dataset: ImageDataset | Subset, cache: FeatureCache) -> None:
        self.dataset = dataset
        self.cache = cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> tuple[dict[str, Any], Tensor]:
        """Return a whole batch; only images without features are decoded."""
        whole, index = in_whole(self.dataset, indices)
        keys = whole.digests(index, readable_alone=True)  # unreadable: cannot be decoded either
        found = in_threads(lambda i: self.cache.read(keys[i]) if keys[i] else None, len(index))
        missing = np.array([i for i, features in enumerate(found) if features is None], np.int64)
        others, y = whole.without_images(index)
        images = whole.decoded(index[missing])
        for i in missing[~whole.unchanged(index[missing])]:
            keys[i] = ""
        inputs: dict[str, Any] = {
            "images": images,
            "missing": torch.from_numpy(missing),
            "keys": [keys[i] for i in missing],
            "cached": [features for features in found if features is not None],
            "digests": keys,
        }
        return inputs | others, y


def fingerprint(module: ProtoPNet, preprocessing: Preprocessing) -> str:
    """Return a digest of all that the features of an image depend on, but for the image."""
    versions = (_FORMAT, torch.__version__, torchvision.__version__, PIL.__version__)
    settings = (
        *(preprocessing, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        *(module.half_precision, module.prototypes.device.type),
    )
    scale = state_digest({"mean": module.mean, "std": module.std})
    parts = repr((versions, settings, module_digest(module.backbone), scale))
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
