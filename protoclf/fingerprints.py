"""Digests of what results depend on: the code and the state of modules, and this package's code.

Two things of the same digest compute the same, in whatever process; where one cannot tell, the
digests differ.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy
import scipy
import sklearn
import torch
from torch import Tensor, nn

from protoclf.fit_key import described

_OF_EVERY_MODULE = {*vars(nn.Module()), "training"}


def module_digest(module: nn.Module) -> str:
    """Return a digest of a module: its structure, source code, attributes, hooks and weights."""
    return structure_digest(module) + state_digest(module.state_dict())


def structure_digest(module: nn.Module) -> str:
    """Return a digest of all of a module but its weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(module).encode())
    classes: set[Any] = {c for layer in module.modules() for c in type(layer).__mro__}
    for source in sorted(map(_source, classes)):
        digest.update(source)
    for name, layer in module.named_modules():
        for attribute, value in _attributes(layer).items():
            digest.update(f"{name}.{attribute} {_described(value)}".encode())
    return digest.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors."""
    digest = hashlib.sha256()  # processors have instructions for it
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's source code, and of the versions that it computes with."""
    digest = hashlib.blake2b(digest_size=16)
    versions = [library.__version__ for library in (torch, numpy, scipy, sklearn)]
    digest.update(repr(versions).encode())
    files = importlib.resources.files("protoclf").iterdir()
    for file in sorted((f for f in files if f.name.endswith(".py")), key=lambda f: f.name):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer holds beside parameters, buffers and layers; hooks, if it has any."""
    own = {name: v for name, v in vars(layer).items() if name not in _OF_EVERY_MODULE}
    hooks = {name: list(vars(layer).get(name, {}).values()) for name in _HOOKS}
    return own | {name: functions for name, functions in hooks.items() if functions}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _described(value: Any) -> str:
    """Return what `described` does, with the code of functions in place of their names."""
    if isinstance(value, list | tuple):
        return repr([_described(v) for v in value])
    if isinstance(value, functools.partial):
        return f"partial {_described([value.func, value.args, sorted(value.keywords.items())])}"
    if inspect.ismethod(value):
        owner = value.__self__  # a module's own method is known by its class
        inside = "" if isinstance(owner, nn.Module) else described(owner)
        return f"{_described(value.__func__)} of {inside}"
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [type(c).__name__ if isinstance(c, nn.Module) else described(c) for c in cells]
        return f"{value.__qualname__} {_code(value.__code__)!r} {held} {value.__defaults__}"
    return described(value)


@functools.cache
def _source(of: Any) -> bytes:
    """Source code of a class; torch's own are known by its version."""
    name = f"{of.__module__}.{of.__qualname__}".encode()
    if of.__module__.startswith(("torch.", "torchvision.")):
        return name
    try:
        return name + inspect.getsource(of).encode()
    except (OSError, TypeError):  # defined at a prompt
        functions = [f for f in vars(of).values() if inspect.isfunction(f)]
        return name + b"".join(_code(f.__code__) for f in functions)


def _code(code: types.CodeType) -> bytes:
    """Instructions of a function, and the constants and names that they use."""
    constants = [_code(c) if inspect.iscode(c) else repr(c).encode() for c in code.co_consts]
    return code.co_code + repr(code.co_names).encode() + b"".join(constants)
