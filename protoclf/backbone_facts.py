"""What is found out about a backbone by running it, once for each backbone and process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from protoclf.acceleration import takes_channels_last
from protoclf.fingerprints import state_digest, state_of, structure_digest
from protoclf.receptive_field import BackboneGeometry, measure

_KEPT = 16

_known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

Found = TypeVar("Found")


def shape_and_layout(backbone: nn.Module, image_size: int) -> tuple[BackboneGeometry, bool]:
    """Return the geometry of the feature map, and whether channels may come last in memory."""
    return measure(backbone, image_size), takes_channels_last(backbone, image_size)


def found_once(
    find: Callable[[nn.Module, int], Found], backbone: nn.Module, image_size: int
) -> Found:
    """Return what a function finds out, where it is not known of one of the last few backbones.

    A search builds the same backbone for each candidate: its digest costs far less than to run
    it, even without numbers. Weights do not matter, but for their shapes.
    """
    state = state_of(backbone)
    weights = {name: value for name, value in state.items() if _is_weight(value)}
    shapes = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items())
    others = {name: value for name, value in state.items() if name not in weights}
    key = find, structure_digest(backbone), shapes, state_digest(others), image_size
    found = _known.pop(key, None)  # to put it last, which another thread may just be doing
    if found is None:
        found = find(backbone, image_size)
    _known[key] = found
    while len(_known) > _KEPT:
        _known.popitem(last=False)
    return found


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
