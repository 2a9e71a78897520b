"""What a fit depends on, in a few words each: two fits of the same key end in the same model."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protoclf.image_dataset import ImageDataset

_NO_MATTER = (
    *("accelerator", "checkpoint", "device", "memory", "tune_allocator", "verbose"),
    *("callbacks__print_log__sink", "iterator_train__num_workers", "iterator_valid__num_workers"),
)
"""Parameters that change how a fit runs, but not what it ends in."""

_DEPTH = 6


def fit_key(
    params: Mapping[str, Any],
    dataset: ImageDataset,
    classes: np.ndarray,
    groups: np.ndarray | None,
    network: nn.Module | None,
    concepts: Any = None,
) -> dict[str, str]:
    """Describe a fit.

    Parameters
    ----------
    params : mapping
        Parameters of the classifier.
    dataset : ImageDataset
        All images, with their classes and weights.
    classes : ndarray of shape (C,)
    groups : ndarray of shape (n,) or None
    network : nn.Module or None
        That which training goes on from; None where it begins.
    concepts : Concepts, optional
        What is forbidden or encouraged.

    Returns
    -------
    dict of str to str
        For each parameter and each part of the data: what it is, or a digest of it.
    """
    key = {name: described(value) for name, value in params.items() if name not in _NO_MATTER}
    weight = dataset.sample_weight
    return key | {
        "the images": _digest(dataset.digests(range(len(dataset)))),
        "y": _digest([repr(classes.tolist()), _bytes(dataset.y)]),
        "sample_weight": "None" if weight is None else _digest([_bytes(weight)]),
        "groups": described(groups),
        "the fitted network": described(network),
        "forbidden and encouraged patches": described(concepts),
        "the version of torch": str(torch.__version__),
    }


def changes(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say in what two keys differ, or nothing."""
    names = sorted({*there, *here}, key=[*here, *there].index)
    differing = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{n} was {_shown(there.get(n))}, is {_shown(here.get(n))}" for n in differing)


def described(value: Any, depth: int = 0) -> str:
    """Return what a value is, the same in another process: no address, but digests."""
    if value is None or isinstance(value, str | bool | int | float | np.generic | os.PathLike):
        return repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if isinstance(value, nn.Module):
        state = value.state_dict()
        return f"{value!r} {_digest([*state, *map(_bytes, state.values())])}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {_digest([_bytes(value)])}"
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {_digest([repr(value.tolist())])}"
    if isinstance(value, Mapping):
        return repr({str(k): described(v, depth + 1) for k, v in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return repr([described(v, depth + 1) for v in value])
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    parts = getattr(value, "__dict__", {}) if depth < _DEPTH else {}
    parts = {k: v for k, v in parts.items() if not k.startswith("_") and not k.endswith("_")}
    return f"{described(type(value))} {described(parts, depth + 1)}"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return (
        f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    )


def _digest(parts: list[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode() + b"\0")
    return digest.hexdigest()


def _shown(text: str | None) -> str:
    """Return a description, short enough for a message."""
    if text is None:
        return "not there"
    return text if len(text) <= 40 else f"{text[:37]}..."
