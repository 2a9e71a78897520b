"""What makes a backbone fast on its processor: kept memory, memory layout, bfloat16."""

from __future__ import annotations

import copy
import ctypes
import functools
import math
import sys
from pathlib import Path

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_BLOCKS = 2**30, 2**25  # bytes; older versions of glibc take no more than the second
_KEPT_ANYWAY = 2**29  # bytes, which a process may keep: to have the kernel clear them costs time
_FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # flags of x86 processors


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory; return whether its C library could be told so.

    glibc returns large blocks to the kernel whenever a tensor is freed, and the kernel clears them
    page by page when the next one is made: for convolutions on a CPU most of the time goes there.
    Afterwards the process stays at the peak of what it used, until `return_freed_memory`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    keeps_large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS)
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and keeps_large)


def return_freed_memory() -> None:
    """Give what `keep_freed_memory` kept back to the kernel, where it is half a GiB or more.

    A search over a frozen backbone fits many times with little memory, the same each time.
    """
    if not (keep_freed_memory.cache_info().currsize and keep_freed_memory()):
        return
    if _freed_bytes() >= _KEPT_ANYWAY:
        ctypes.CDLL(None).malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_names, "fordblks", "keepcost")]


def _freed_bytes() -> float:
    """Return how many bytes the C library holds free.

    Memory that it has already given back to the kernel is counted too.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:  # before glibc 2.33
        return math.inf
    mallinfo2.restype = _MallInfo
    return mallinfo2().fordblks


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Return whether a device computes faster in bfloat16 than in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8
    return kind == "cpu" and not _FAST_BFLOAT16.isdisjoint(_cpu_flags())


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def takes_channels_last(backbone: nn.Module, image_size: int) -> bool:
    """Return whether a backbone runs on images whose channels come last in memory.

    A module that calls ``view`` on a feature map does not.
    """
    for device in ("meta", "cpu"):  # shapes are enough where every operation can do with them
        try:
            _run_channels_last(backbone, image_size, device)
        except Exception:  # whatever a user's module raises
            continue
        return True
    return False


@torch.no_grad()
def _run_channels_last(backbone: nn.Module, image_size: int, device: str) -> None:
    probe = copy.deepcopy(backbone).eval().to(device).to(memory_format=torch.channels_last)
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    probe(images.to(memory_format=torch.channels_last))
