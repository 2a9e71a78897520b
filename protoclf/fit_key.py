"""What a fit depends on, in a few words each: two fits of the same key end in the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from protoclf.fingerprints import code_digest, described, state_digest
from protoclf.image_dataset import ImageDataset

_NO_MATTER = (
    *("accelerator", "checkpoint", "device", "memory", "tune_allocator", "verbose"),
    "callbacks__print_log__sink",
)
"""Parameters that change how a fit runs, but not what it ends in."""


def fit_key(
    params: Mapping[str, Any],
    dataset: ImageDataset,
    classes: np.ndarray,
    groups: np.ndarray | None,
    network: nn.Module | None,
    concepts: Any = None,
) -> dict[str, str]:
    """Say of each parameter and of each part of the data what it is, or give a digest of it.

    `network` is that which training goes on from; None where it begins.
    """
    key = {name: described(value) for name, value in params.items() if name not in _NO_MATTER}
    return (
        key
        | data_key(dataset, classes, groups)
        | {
            "the fitted network": "None" if network is None else _weights_of(network),
            "forbidden and encouraged patches": described(concepts),
            "the version of torch": str(torch.__version__),
            "the version of protoclf": code_digest(),
        }
    )


def data_key(
    dataset: ImageDataset, classes: np.ndarray, groups: np.ndarray | None
) -> dict[str, str]:
    """Describe what a fit learns from, as `fit_key` does."""
    return {
        "the images": described(np.array(dataset.digests(range(len(dataset))))),
        "y": described([classes, dataset.y]),
        "sample_weight": described(dataset.sample_weight),
        "groups": described(groups),
    }


def _weights_of(network: nn.Module) -> str:  # attributes say how it runs on its processor
    return f"{network!r} {state_digest(network.state_dict())}"


def changes(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say in what two keys differ, or nothing."""
    names = sorted({*there, *here}, key=[*here, *there].index)
    differing = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{n} was {_shown(there.get(n))}, is {_shown(here.get(n))}" for n in differing)


def _shown(text: str | None) -> str:
    """Return a description, short enough for a message."""
    if text is None:
        return "not there"
    return text if len(text) <= 40 else f"{text[:37]}..."
