"""Room for what a fit computes once and reads often: decoded images and backbone features."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

MEMORY_BUDGET = 2 * 2**30
"""Bytes that one such tensor may take in memory (2 GiB); a larger one is mapped to a file."""


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> torch.Tensor:
    """Return an uninitialised tensor, on `device` if it fits the budget.

    A larger one is on the CPU and mapped to a temporary file, which goes with the tensor; in
    `folder`, or where the system keeps temporary files.
    """
    if math.prod(shape) * dtype.itemsize <= MEMORY_BUDGET:
        return torch.empty(shape, dtype=dtype, device=device)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    bytes_ = (*shape[:-1], shape[-1] * dtype.itemsize)
    with tempfile.TemporaryFile(prefix="protoclf-", dir=folder) as file:  # the mapping keeps it
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=bytes_)).view(dtype)
