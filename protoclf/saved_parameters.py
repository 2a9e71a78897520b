"""The parameters of a classifier, as JSON holds them: plain values, and optimizers by name."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from protoclf.model_files import encode, refusal
from protoclf.parameters import defaults_of
from protoclf.rules import integer

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_NOT_SAVED = ("accelerator", "backbone", "device")
_OF_THE_MACHINE = (  # compilers, paths, rights to unpickle
    *("checkpoint", "compile", "memory", "torch_load_kwargs"),
)
_CLASSES = ("iterator_train", "iterator_valid")
_MOST_WORKERS = 256  # processes that a file may ask for
_OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
}


def parameters_to_json(clf: ProtoPNetClassifier) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters that JSON can hold, and the names of others that were set.

    A parameter that is left out takes those nested in it along. What belongs to the machine is not
    named.
    """
    defaults = defaults_of(type(clf))
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in sorted(clf.get_params(deep=False).items()):
        if name in _NOT_SAVED:
            continue
        try:
            if name.partition("__")[0] in left_out:
                raise TypeError("it belongs to what is left out")
            kept[name] = _encoded(name, value)
        except TypeError:
            if name not in defaults or value is not defaults[name]:
                left_out.append(name)
    of_the_machine = (*_OF_THE_MACHINE, *_CLASSES)
    return kept, [name for name in left_out if name.partition("__")[0] not in of_the_machine]


def _encoded(name: str, value: Any) -> Any:
    if not _may_be_kept(name):
        raise TypeError(f"{name} is not saved")
    if name != "optimizer":
        return encode(value)
    for known, kind in _OPTIMIZERS.items():
        if value is kind:
            return known
    raise TypeError(f"{value} is no optimizer of torch.optim")


def _may_be_kept(name: str) -> bool:
    return name.partition("__")[0] not in _OF_THE_MACHINE and name not in _CLASSES


def checked_parameters(decoded: dict[Any, Any], file: Path) -> dict[str, Any]:
    """Return parameters to build a classifier with, of what a file names."""
    parameters = dict(decoded)
    for name, value in decoded.items():
        if type(name) is not str or name in _NOT_SAVED:
            raise refusal(file, f"has {name!r} among its parameters.")
        if not _may_be_kept(name):
            raise refusal(file, f"sets the parameter {name!r}, which no file may.")
        component, nested, own = name.partition("__")
        if nested and component.startswith("iterator") and not _is_option(own, value):
            raise refusal(file, f"sets {name!r} to what no file may.")
        if name.endswith("__num_workers") and not integer(0, _MOST_WORKERS).holds(value):
            raise refusal(file, f"asks for more than {_MOST_WORKERS} processes, {name!r}.")
        if name.endswith("__timeout") and value and not decoded.get(f"{component}__num_workers"):
            raise refusal(file, f"sets {name!r}, for processes that it does not ask for.")
        if type(value) is int and abs(value) > sys.maxsize:
            raise refusal(file, f"sets {name!r} to an integer out of all range.")
        if name == "optimizer":
            if type(value) is not str or value not in _OPTIMIZERS:
                raise refusal(file, "names an optimizer that torch.optim does not have.")
            parameters[name] = _OPTIMIZERS[value]
    return parameters


def _is_option(name: str, value: Any) -> bool:
    """Whether a loader can take the value for one of its plain options."""
    if name in ("pin_memory", "persistent_workers", "drop_last"):
        return type(value) is bool
    if name in ("batch_size", "num_workers", "prefetch_factor", "timeout"):
        return type(value) is int and value >= (name == "batch_size")
    return False
