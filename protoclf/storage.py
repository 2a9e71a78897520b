"""Room for what a fit computes once and reads often: decoded images and backbone features."""

from __future__ import annotations

import math
import tempfile

import numpy as np
import torch

MEMORY_BUDGET = 2 * 2**30
"""Bytes that one such tensor may take in memory (2 GiB); a larger one is mapped to a file."""


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return an uninitialised tensor, on `device` if it fits the budget.

    A larger one is on the CPU and mapped to a temporary file, which goes with the tensor.
    """
    if math.prod(shape) * dtype.itemsize <= MEMORY_BUDGET:
        return torch.empty(shape, dtype=dtype, device=device)
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryFile(prefix="protoclf-") as file:  # the mapping keeps it alive
        return torch.from_numpy(np.memmap(file, dtype=name, mode="w+", shape=shape))
