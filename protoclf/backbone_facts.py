"""What is found out about a backbone by running it, once for each backbone and process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from protoclf.acceleration import takes_channels_last
from protoclf.fingerprints import state_digest, state_of, structure_digest
from protoclf.folding import Folds, find_evaluation_folds, find_folds
from protoclf.micro_batches import images_stay_apart
from protoclf.receptive_field import BackboneGeometry, measure

_KEPT = 16

_known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

Found = TypeVar("Found")


@dataclass(frozen=True)
class BackboneFacts:
    """Facts of a backbone at one size of the images.

    Attributes
    ----------
    geometry : BackboneGeometry
    channels_last : bool
        Whether it runs on images whose channels come last in memory.
    """

    geometry: BackboneGeometry
    channels_last: bool


def facts_of(backbone: nn.Module, image_size: int) -> BackboneFacts:
    """Return the facts of a backbone; those of the last few are remembered."""
    return _once(_measured, backbone, image_size)


def folds_of(backbone: nn.Module, image_size: int) -> Folds:
    """Return what `find_folds` finds; of the last few backbones it is remembered."""
    return _once(find_folds, backbone, image_size)


def evaluation_folds_of(backbone: nn.Module, image_size: int) -> Folds:
    """Return what `find_evaluation_folds` finds; of the last few backbones it is remembered."""
    return _once(find_evaluation_folds, backbone, image_size)


def takes_micro_batches(backbone: nn.Module, image_size: int) -> bool:
    """Return what `images_stay_apart` finds; of the last few backbones it is remembered."""
    return _once(images_stay_apart, backbone, image_size)


def _measured(backbone: nn.Module, image_size: int) -> BackboneFacts:
    geometry = measure(backbone, image_size)
    return BackboneFacts(geometry, takes_channels_last(backbone, image_size))


def _once(find: Callable[[nn.Module, int], Found], backbone: nn.Module, image_size: int) -> Found:
    """Find something out, where it is not known already.

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
