"""Tensors that were read or computed a short while ago, within a budget of memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable

from torch import Tensor

RECENT_BUDGET = 2**28
"""Bytes that a process keeps beside what lies under `memory` (256 MiB)."""


_OVERHEAD = 2**10  # of an entry, about


class Recent:
    """Tensors by key, as many as the budget holds.

    A search reads the same images round and round. To drop the least recently used one would be to
    drop the one that is read next. So where not all have room, those to go are drawn at random, and
    a share of them stays.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self._keys: list[Hashable] = []
        self._size = 0
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the tensor of a key, or None."""
        return self._tensors.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, which nobody may change from now on."""
        with self._lock:
            size = _size(tensor)
            if key in self._tensors or size > RECENT_BUDGET:
                return
            while self._size + size > RECENT_BUDGET:
                self._drop()
            self._tensors[key] = tensor
            self._keys.append(key)
            self._size += size

    def clear(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._tensors.clear()
            self._keys.clear()
            self._size = 0

    def _drop(self) -> None:
        place = self._random.randrange(len(self._keys))
        self._keys[place], self._keys[-1] = self._keys[-1], self._keys[place]
        self._size -= _size(self._tensors.pop(self._keys.pop()))


def _size(tensor: Tensor) -> int:
    return tensor.nbytes + _OVERHEAD


recent_tensors = Recent()
"""What this process has read or found under `memory`, by what it is of."""
