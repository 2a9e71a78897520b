"""Room for what a fit computes once and reads often: decoded images and backbone features."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

MEMORY_BUDGET = 2 * 2**30
"""Bytes that one such tensor may take in memory (2 GiB); a larger one is mapped to a file."""

_SHARE_OF_GPU = 4
"""Of a GPU's free memory one such tensor may take a quarter, if that is more."""

_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> torch.Tensor:
    """Return an uninitialised tensor, on `device` if it fits the budget.

    A larger one is on the CPU and mapped to a temporary file, which goes with the tensor; in
    `folder`, or where the system keeps temporary files.

    Raises
    ------
    OSError
        If the disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= _budget(torch.device(device)):
        return torch.empty(shape, dtype=dtype, device=device)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    bytes_ = (*shape[:-1], shape[-1] * dtype.itemsize)
    with tempfile.TemporaryFile(prefix="protoclf-", dir=folder) as file:  # the mapping keeps it
        _reserve(file.fileno(), size, folder)
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=bytes_)).view(dtype)


def _budget(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return MEMORY_BUDGET
    index = torch.cuda.current_device() if device.index is None else device.index  # torch 2.4
    free = torch.cuda.mem_get_info(index)[0]  # of the driver; what torch keeps of it is free too
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return max(MEMORY_BUDGET, free // _SHARE_OF_GPU)


def _reserve(file: int, size: int, folder: Path | None) -> None:
    """Take the room on the disk now: without it, a write to a mapped file kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in _NO_ROOM:  # not every file system can
            return
        place = folder or tempfile.gettempdir()
        raise OSError(
            error.errno,
            f"There is no room in {str(place)!r} for {size / 2**30:.1f} GiB of decoded images or "
            "features. Make room, or set memory= (or the environment variable TMPDIR) to a folder "
            "that has some",
        ) from error
