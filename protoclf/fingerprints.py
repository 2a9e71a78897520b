"""Digests of what results depend on: the code and the state of modules, and this package's code.

Two things of the same digest compute the same, in whatever process, as far as Python can tell: of
functions and classes the code counts, and that of the functions which they call by name; of torch
and other libraries the version. What C code holds is not seen, nor what is looked up by a string.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import scipy
import sklearn
import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = {*vars(nn.Module()), "training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_LIBRARIES = {
    *(sys.stdlib_module_names - {"builtins"}),  # where `exec` puts what it defines, too
    *("PIL", "numpy", "pandas", "scipy", "sklearn", "skorch", "torch", "torchvision"),
}
"""Known by their versions."""

_CACHED = type(functools.cache(id))
_PLAIN = (
    *(type(None), str, bool, int, float, complex, bytes, bytearray, slice, range, numpy.generic),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_DEPTH = 6


def module_digest(module: nn.Module) -> str:
    """Return a digest of a module: its structure, source code, attributes, hooks and weights."""
    return structure_digest(module) + state_digest(state_of(module))


def structure_digest(module: nn.Module) -> str:
    """Return a digest of all of a module but its weights and buffers."""
    return _Describer(hidden=True).structure(module)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's state dict, and the buffers that it leaves out."""
    return module.state_dict() | dict(module.named_buffers(remove_duplicate=False))


def state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest of named tensors, and of what else a module has in its state dict."""
    digest = hashlib.sha256()  # processors have instructions for it
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            digest.update(f"{name} {_Describer(hidden=True).of(tensor)}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        values = (tensor.dequantize() if tensor.is_quantized else tensor).detach().cpu()
        if values.numel() == 1 or not values.is_contiguous():
            # of one number, what is called contiguous may have any stride
            values = values.clone(memory_format=torch.contiguous_format)
        digest.update(values.flatten().view(torch.uint8).numpy().data)
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


def described(value: Any) -> str:
    """Return a description of a value that is the same in every process: digests, no addresses.

    Attributes of objects whose names begin or end with an underscore are left out: those are what
    callbacks have learned.
    """
    return _Describer().of(value)


class _Describer:
    """Says what values are; of functions and classes that refer to one another, once.

    Parameters
    ----------
    hidden : bool, default=False
        Whether attributes count whose names begin or end with an underscore.
    """

    def __init__(self, hidden: bool = False) -> None:
        self.hidden = hidden
        self._known: dict[Any, str] = {}  # functions and classes; of open ones the name
        self._open: set[int] = set()  # what holds the value that is described now

    def of(self, value: Any, depth: int = 0) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, os.PathLike):
            return repr(os.fspath(value))
        if isinstance(value, Tensor):
            return f"tensor {tuple(value.shape)} {state_digest({'': value})}"
        if isinstance(value, numpy.ndarray):
            return f"array {value.shape} {_digest([repr(value.tolist())])}"
        if id(value) in self._open:
            return "one that holds this"
        self._open.add(id(value))
        try:
            return self._of_parts(value, depth)
        finally:
            self._open.remove(id(value))

    def structure(self, module: nn.Module) -> str:
        parts = [repr(module), self.of(list(_global_hooks()))]
        kinds = {type(layer) for layer in module.modules()}
        parts += [self.of(kind) for kind in sorted(kinds, key=_name)]
        for name, layer in module.named_modules():
            for attribute, value in _attributes(layer).items():
                parts.append(f"{name}.{attribute} {self.of(value)}")
        return _digest(parts)

    def _module(self, module: nn.Module) -> str:
        hidden, self.hidden = self.hidden, True
        structure, self.hidden = self.structure(module), hidden
        return f"{type(module).__name__} {structure} {state_digest(state_of(module))}"

    def _of_parts(self, value: Any, depth: int) -> str:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Mapping):
            return repr({str(k): self.of(v, depth + 1) for k, v in value.items()})
        if isinstance(value, set | frozenset):
            return repr(sorted(self.of(v, depth + 1) for v in value))
        if isinstance(value, list | tuple):
            return repr([self.of(v, depth + 1) for v in value])
        return self._code_of(value) or self._object(value, depth)

    def _object(self, value: Any, depth: int) -> str:
        if depth >= _DEPTH:
            return self.of(type(value))
        if not hasattr(value, "__dict__"):
            return f"{self.of(type(value))} {self.of(self._reduced(value), depth + 1)}"
        parts = vars(value)
        if not self.hidden:
            parts = {k: v for k, v in parts.items() if not (k.startswith("_") or k.endswith("_"))}
        return f"{self.of(type(value))} {self.of(parts, depth + 1)}"

    def _reduced(self, value: Any) -> Any:
        """Return what a pickle would hold of an object that has no attributes of its own."""
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:  # nothing is known: as an attribute of a module, it is like no other
            return (os.getpid(), id(value)) if self.hidden else None
        if isinstance(reduced, str):
            return reduced
        return [list(part) if isinstance(part, Iterator) else part for part in reduced]

    def _code_of(self, value: Any) -> str:
        """Describe a function or a class; nothing for another object."""
        if isinstance(value, functools.partial):
            return f"partial {self.of([value.func, value.args, value.keywords])}"
        if isinstance(value, _CACHED):
            return f"cached {self.of(value.__wrapped__)}"
        if inspect.ismethod(value):
            owner = value.__self__  # a module's own method is known by its class
            inside = "" if isinstance(owner, nn.Module) else self.of(owner, 1)
            return f"{self.of(value.__func__)} of {inside}"
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            return ""
        if _is_of_library(value):
            return _name(value)
        if value not in self._known:
            self._known[value] = _name(value)
            parts = self._class(value) if inspect.isclass(value) else self._function(value)
            self._known[value] = f"{value.__name__} {_digest([_name(value), *parts])}"
        return self._known[value]

    def _class(self, kind: type) -> Iterator[str]:
        for base in kind.__mro__:
            if not _is_of_library(base):
                yield _source(base)
                held = {k: v for k, v in vars(base).items() if not k.startswith("__")}
                yield self.of({k: v for k, v in held.items() if _is_data(v)})
                for function in _functions_of(base):
                    yield from self._function(function)

    def _function(self, function: Any) -> Iterator[str]:
        if not inspect.isfunction(function):
            return
        code = function.__code__
        yield _instructions(code)
        yield self.of([function.__defaults__, function.__kwdefaults__])
        for value in (*_held(function), *_used(code, function.__globals__)):
            # of any other object the type: a logger, say, knows all others of the process
            counts = _is_data(value) or (self.hidden and _is_configuration(value))
            yield self._code_of(value) or self.of(value if counts else type(value))


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_data, value))
    return isinstance(value, (*_PLAIN, Tensor, numpy.ndarray))


def _is_configuration(value: Any) -> bool:
    if isinstance(value, types.SimpleNamespace):
        return _is_data(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_data(getattr(value, field.name)) for field in dataclasses.fields(value))
    return False


def _name(of: Any) -> str:
    return f"{getattr(of, '__module__', None)}.{of.__qualname__}"


def _is_of_library(value: Any) -> bool:
    return _name(value).partition(".")[0] in _LIBRARIES


def _functions_of(kind: type) -> Iterator[Any]:
    """Yield the functions of a class, what decorators of the language wrap included."""
    for value in vars(kind).values():
        if isinstance(value, property):
            yield from (f for f in (value.fget, value.fset) if f is not None)
        else:
            yield getattr(value, "__func__", getattr(value, "func", value))


def _held(function: types.FunctionType) -> list[Any]:
    """Return what a function has from around it."""
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != types.CellType()]


def _used(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what a function refers to by name in its module, and in other modules that it names."""
    for name in code.co_names:
        value = names.get(name)
        if not isinstance(value, types.ModuleType):
            yield value
        elif value.__name__.partition(".")[0] not in _LIBRARIES:
            yield from (vars(value)[n] for n in code.co_names if n in vars(value))
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _used(constant, names)


@functools.cache
def _source(kind: type) -> str:
    """Return the source code of a class, if there is any: at a prompt there is none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__


def _instructions(code: types.CodeType) -> str:
    """Return the instructions of a function, and the constants and names that they use."""
    constants = [_instructions(c) if inspect.iscode(c) else _constant(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _global_hooks() -> Iterator[Any]:
    """Yield the hooks that torch calls around the pass of every module."""
    for hooks in (f"_global{name}" for name in _HOOKS):
        yield from getattr(nn.modules.module, hooks, {}).values()


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer holds beside parameters, buffers and layers; hooks, if it has any."""
    own = {name: v for name, v in vars(layer).items() if name not in _OF_EVERY_MODULE}
    hooks = {name: list(vars(layer).get(name, {}).values()) for name in _HOOKS}
    return own | {name: functions for name, functions in hooks.items() if functions}


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
