"""What torch is set to around a computation, and what its devices allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_one_at_a_time = threading.RLock()


@contextmanager
def random_numbers_from(seed: int, device: torch.device) -> Iterator[None]:
    """Have torch draw from a seed, and afterwards go on as if nothing had been drawn.

    Threads share torch's random numbers, and would take one another's: they wait.
    """
    on_gpus = device.type == "cuda" or torch.cuda.is_initialized()  # all are given the seed
    with _one_at_a_time, torch.random.fork_rng(range(torch.cuda.device_count() * on_gpus)):
        torch.manual_seed(seed)
        yield


class OwnRandomNumbers(TorchFunctionMode):
    """Has weights of new layers drawn from a generator of their own.

    torch's may be a fit's, in another thread.
    """

    _DRAWING = frozenset({"kaiming_uniform_", "normal_", "rand", "uniform_"})

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu")

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self._DRAWING:
            kwargs = {**kwargs, "generator": self._generator}
        return function(*args, **kwargs)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise numbers that a device computes with: float64, but for Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


def with_algebra(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor where torch has float64 and all of linear algebra: for Apple's, on the CPU.

    Of its QR and Cholesky decompositions and solvers, torch's versions have none there, or slow
    ones that fail for many rows.
    """
    return x if widest_float(x.device) == torch.float64 else x.cpu()


def on_cpu_by_default() -> AbstractContextManager[object]:
    """Have torch make tensors on the CPU, where no device is named, whatever its default is."""
    elsewhere = torch.empty(0).device.type != "cpu"
    return torch.device("cpu") if elsewhere else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Have torch compute in the precision of what it is given, whatever is set around it.

    Weights that an autocast inside of it casts are cast anew each time: torch would keep them until
    the outermost one ends, through all steps of a fit.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False, cache_enabled=False)


def float32_matmul_precision() -> str:
    """Return torch's setting; "medium", the least, where there is one for each kind of device."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch.backends...fp32_precision was set
        return "medium"


class ShapesOnly(TorchFunctionMode):
    """Lets layers be built without memory for their weights, of which only shapes are asked."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones, torch.rand):
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)
