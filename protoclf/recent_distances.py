"""Distances to prototypes that this process has found a short while ago, under `memory`.

Candidates of a search that differ in the last layer alone have them in common, and so have the
scores of one classifier.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from protoclf.feature_cache import FeatureCache
from protoclf.fingerprints import module_digest, state_digest
from protoclf.network import ProtoPNet
from protoclf.recent import recent_tensors
from protoclf.torch_settings import float32_matmul_precision

_FOUND = "distance", "cell"


class RecentDistances:
    """What `ProtoPNet.nearest` finds for batches of images, looked up by all that it depends on.

    That is the network as it is when this is made.
    """

    def __init__(self, features: FeatureCache, module: ProtoPNet) -> None:
        self._device = module.prototypes.device
        self._of = (
            *(features.store.folder, module_digest(module.add_on), module.similarity),
            state_digest({"prototypes": module.prototypes}),
            *(torch.get_num_threads(), float32_matmul_precision()),  # which rounding depends on
        )

    def get(self, digests: list[str]) -> tuple[Tensor, Tensor] | None:
        """Return distances (n, m) and cells (n, m) of a batch of images, or None."""
        key = self._key(digests)
        distance, cell = (recent_tensors.get((key, name)) for name in _FOUND)
        if distance is None or cell is None:
            return None
        return distance.to(self._device), cell.to(self._device)

    def put(self, digests: list[str], distance: Tensor, cell: Tensor) -> None:
        """Keep what was found for a batch, if all its images are known by digests."""
        if all(digests):
            key = self._key(digests)
            for name, values in zip(_FOUND, (distance, cell), strict=True):
                recent_tensors.put((key, name), values.cpu())

    def _key(self, digests: list[str]) -> bytes:
        return hashlib.blake2b(repr((self._of, digests)).encode(), digest_size=16).digest()
