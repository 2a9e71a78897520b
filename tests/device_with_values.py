"""A device that is not the CPU and has values, for tests without a GPU.

Tensors on the device "meta" that carry one on the CPU: whole fits run, through all that depends on
values, and an operation that would fail on a GPU fails here, such as one on tensors of two devices,
one that draws from the CPU's generator, or one that torch.use_deterministic_algorithms refuses.
Code for "cuda" alone is not run, nor autocast.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from protoclf import (
    ProtoPNetClassifier,
    net,
    parameters,
    prototype_layer,
    stages,
    torch_settings,
)
from protoclf.rules import Rule

NAME = "meta"

_OWN_OPERATORS = {
    "protoclf.min_distances.default": prototype_layer._min_distances,
    "protoclf.min_distances_grad_z.default": prototype_layer._grad_z,
    "protoclf.min_distances_grad_prototypes.default": prototype_layer._grad_prototypes,
}
_has_float64 = True
_OF_TWO_DEVICES = ("aten.copy_", "aten._to_copy", "aten._has_compatible", "aten.index.Tensor")
_NOT_DETERMINISTIC = ("aten.kthvalue", "aten.nanmedian", "aten.median", "aten.histc")  # on CUDA
_NOT_ON_APPLES = ("aten.linalg_qr", "aten.cholesky_solve", "aten._cholesky_solve")  # or of late
_WRITING_BY_INDEX = ("aten.index_put", "aten._index_put")


class OnDevice(torch.Tensor):
    """A tensor on that device, with its values in `values`."""

    values: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=NAME,
        )
        wrapper.values = values
        return wrapper

    def __init__(self, values: torch.Tensor) -> None:
        pass

    def __repr__(self) -> str:
        return f"OnDevice({self.values!r})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    def __reduce_ex__(self, protocol: int) -> Any:  # what is saved is read back on the CPU
        return self.values.detach().clone().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.values.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _with_tensors(index: Any) -> Any:
    """Replace lists, of which torch would make tensors on "meta", without values."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_with_tensors, index)) if isinstance(index, tuple) else index


class _Device(TorchDispatchMode):
    """What is made on the device while this is on is an `OnDevice`."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _run(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = str(operator)
    if name in _OWN_OPERATORS:
        with _Device(), torch.no_grad():
            return _OWN_OPERATORS[name](*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    here = [t for t in tensors if not isinstance(t, OnDevice)]
    if there:
        _check_devices(name, args, here)
        if name.startswith(_NOT_DETERMINISTIC):
            raise RuntimeError(f"{name} has no deterministic form on CUDA")
        if name.startswith(_NOT_ON_APPLES) and not _has_float64:
            raise NotImplementedError(f"{name} on a device that is like Apple's")
    target = kwargs.get("device")
    result_is_there = bool(there) if target is None else _is_there(target)
    if kwargs.get("generator") is not None and (there or result_is_there):
        raise RuntimeError(f"{name} draws from the CPU's generator for a tensor on the device")
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    wrapped = {id(t.values): t for t in there}
    args, kwargs = tree_map(lambda t: t.values if isinstance(t, OnDevice) else t, (args, kwargs))

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if target is None and id(value) in wrapped:  # written in place
            return wrapped[id(value)]
        if target is None and any(value is t for t in here):
            return value
        if result_is_there and value.dtype == torch.float64 and not _has_float64:
            raise RuntimeError(f"{name} makes float64 on a device without it")
        return OnDevice(value) if result_is_there else value

    return tree_map(placed, operator(*args, **kwargs))


def _check_devices(name: str, args: tuple, here: list[torch.Tensor]) -> None:
    """Raise what a GPU would; numbers without dimensions and indices may come from the CPU."""
    if name.startswith(_WRITING_BY_INDEX):
        same = isinstance(args[0], OnDevice) and (isinstance(args[2], OnDevice) or not args[2].ndim)
    elif name.startswith("aten.index.Tensor"):
        same = isinstance(args[0], OnDevice)
    else:
        same = name.startswith(_OF_TWO_DEVICES) or not any(t.ndim for t in here)
    if not same:
        raise RuntimeError(f"{name} of tensors on two devices")


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


@contextmanager
def device_with_values(float64: bool = True) -> Iterator[str]:
    """Have the device for a while; yields its name. Apple's has no `float64`."""
    tensor, as_tensor, new_tensor = torch.tensor, torch.as_tensor, torch.Tensor.new_tensor

    def made(make: Callable) -> Callable:
        def of_data(data: Any, dtype: Any = None, device: Any = None, **more: Any) -> Any:
            if isinstance(data, OnDevice) or not _is_there(device):
                return make(data, dtype=dtype, device=device, **more)
            return OnDevice(make(data, dtype=dtype, **more))

        return of_data

    def like(own: torch.Tensor, data: Any, dtype: Any = None, device: Any = None, **more: Any):
        if isinstance(own, OnDevice) and device is None:
            return OnDevice(tensor(data, dtype=dtype or own.dtype, **more))
        return new_tensor(own, data, dtype=dtype, device=device, **more)

    def copied(clf: ProtoPNetClassifier, memo: dict) -> ProtoPNetClassifier:
        other = memo[id(clf)] = object.__new__(type(clf))  # skorch's pickling knows no such tensor
        other.__dict__ = copy.deepcopy(clf.__dict__, memo)
        return other

    measured = net.shape_and_layout

    def without_modes(*args: Any) -> Any:
        with _disable_current_modes():
            return measured(*args)

    with pytest.MonkeyPatch.context() as patch, _Device():
        if not float64:
            patch.setattr(sys.modules[__name__], "_has_float64", False)
            for module in (torch_settings, prototype_layer, stages):
                patch.setattr(module, "widest_float", lambda device: torch.float32)
        patch.setattr(torch, "tensor", made(tensor))
        patch.setattr(torch, "as_tensor", made(as_tensor))
        patch.setattr(torch.Tensor, "new_tensor", like)
        patch.setattr(net, "shape_and_layout", without_modes)
        patch.setitem(parameters.RULES, "device", Rule(lambda device: True, "any"))
        patch.setattr(ProtoPNetClassifier, "__deepcopy__", copied, raising=False)
        yield NAME
    _device_constructors.cache_clear()  # of torch, which may have noted those made here
