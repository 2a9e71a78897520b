"""What a network is made of, without its weights: layers, names, types and shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from protoclf.network import ProtoPNet

Kind = tuple[str, tuple[Any, ...]]
"""Type and shape of a tensor; None is any length but 0."""

_PART = 2**18  # numbers


def layers_of(module: nn.Module) -> dict[str, str]:
    """Return the name of each layer's class."""
    return {name: type(layer).__name__ for name, layer in module.named_modules()}


def kinds_of(module: nn.Module) -> dict[str, Kind]:
    """Return types and shapes of what a module's state holds."""
    state = module.state_dict().items()
    return {name: kind_of(tensor) for name, tensor in state if isinstance(tensor, Tensor)}


def kind_of(tensor: Tensor) -> Kind:
    """Return type and shape of a tensor."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def probe(module: ProtoPNet, image_size: int) -> Tensor:
    """Return what the backbone makes of a fixed pattern, averaged over cells: (channels,)."""
    pattern = _pattern(3 * image_size**2).view(1, 3, image_size, image_size)
    features = module.eval().backbone(pattern.to(module.prototypes.device))
    return features.float().mean(dim=(2, 3))[0].nan_to_num().cpu()


def _pattern(length: int) -> Tensor:
    """Return numbers from -1 to 1, made in parts: in float64 they take twice their memory."""
    pattern, start = torch.empty(length), 0
    for part in pattern.split(_PART):
        steps = torch.arange(start, start + len(part), dtype=torch.float64) * 0.6180339887498949
        part.copy_(2 * (steps % 1) - 1)
        start += len(part)
    return pattern
