"""The files of a saved model: read within bounds and never run, written whole or not at all.

JSON is read strictly: no duplicate keys, no NaN, no depth or length without limit. What JSON does
not know is a JSON object of one key: {"$tuple": [...]}, {"$dict": [[key, value], ...]},
{"$float": "nan"}, {"$path": "..."}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import safetensors.torch
from torch import Tensor

from protoclf.files import errors_about, write_bytes
from protoclf.rules import Rule

FORMAT = "protoclf model"
MODEL, TENSORS, THUMBNAILS = "model.json", "tensors.safetensors", "thumbnails"

MOST_JSON = 64 * 2**20  # bytes
_MOST_HEADER = 16 * 2**20  # bytes of names, types and shapes of the tensors
_MOST_DIGITS = 100  # of an integer
_DEEPEST = 32  # levels of a value
_MOST_READINGS = 10  # of a folder that others replace meanwhile
_UNKNOWN_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

OBJECT = Rule(lambda value: isinstance(value, dict), "an object")

T = TypeVar("T")


class ModelFileError(ValueError):
    """A saved model cannot be loaded; the message names the file and what is wrong with it."""


def refusal(file: str | os.PathLike[str], problem: str) -> ModelFileError:
    """Return the error that names a file and what is wrong with it."""
    return ModelFileError(f"{os.fspath(file)!r} {problem}")


# Reading ----------------------------------------------------------------------------------------


def file_size(path: Path) -> int:
    """Return the bytes of a regular file, or refuse: nothing is followed, nothing can block."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise refusal(path, "is not there." if missing else f"cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise refusal(path, "is no regular file, but a link, a folder or a device.")
    return status.st_size


def read_bytes(path: Path, most: int) -> bytes:
    """Return what a file holds, at most so many bytes."""
    size = file_size(path)
    if size > most:
        raise refusal(path, f"has {size} bytes; at most {most} are read.")
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise refusal(path, f"cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    return _parsed(read_bytes(path, MOST_JSON), path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped to it: none is in memory yet."""
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise refusal(path, f"is cut off, or its header is no header ({length} bytes).")
            _parsed(file.read(length), path)  # no name twice
        return safetensors.torch.load_file(path)
    except ModelFileError:
        raise
    except Exception as error:  # whatever a damaged header makes a library raise
        raise refusal(path, f"holds no tensors that can be read: {error}") from error


def read_in_one(folder: Path, read: Callable[[], T]) -> T:
    """Return what is read of a folder; read it again where another took its place meanwhile."""
    for _ in range(_MOST_READINGS):
        before = _identity(folder)
        try:
            content = read()
        except ModelFileError:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return content
    raise refusal(folder, "is saved anew each time that it is read. Load it once that is over.")


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Return what tells a folder from another of its name, or None where there is none."""
    for pause in (0.01, 0):  # there is none, for a moment, while one is replaced
        try:
            status = os.stat(folder)
            return status.st_dev, status.st_ino, status.st_mtime_ns
        except (OSError, ValueError):
            time.sleep(pause)
    return None


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise refusal(path, "is nested too deeply.") from None
    except ValueError as error:
        raise refusal(path, f"is not the JSON that a model is saved as: {error}") from error
    if not isinstance(content, dict):
        raise refusal(path, f"holds a {type(content).__name__} where an object belongs.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {_short(name)} stands in it twice")
        fields[name] = value
    return fields


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


class Record:
    """An object of a JSON file: its fields are taken out one by one, each checked.

    Errors name the file, and the place in it.
    """

    def __init__(self, fields: dict[str, Any], file: Path, place: str = "") -> None:
        self._fields, self.file, self._place = dict(fields), file, place

    def take(self, name: str, rule: Rule) -> Any:
        """Return a field that holds to a rule, such as those of the parameters."""
        where = f"{self._place}.{name}" if self._place else name
        if name not in self._fields:
            raise refusal(self.file, f"lacks the field {where}.")
        value = self._fields.pop(name)
        if not rule.holds(value):
            raise refusal(self.file, f"has {_short(value)} as {where}; it must be {rule.allowed}.")
        return value

    def record(self, name: str) -> Record:
        """Return a field that is an object itself."""
        fields = self.take(name, OBJECT)
        return Record(fields, self.file, f"{self._place}.{name}" if self._place else name)

    def take_all(self, rules: Mapping[str, Rule]) -> dict[str, Any]:
        """Return the fields that these rules are for, and refuse others."""
        fields = {name: self.take(name, rule) for name, rule in rules.items()}
        self.finish()
        return fields

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        if self._fields:
            where = f" in {self._place}" if self._place else ""
            raise refusal(self.file, f"has fields too many{where}: {_short(list(self._fields))}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


# Values that JSON does not know -----------------------------------------------------------------


def encode(value: Any, depth: int = 0) -> Any:
    """Return a value in the types of JSON, or raise TypeError."""
    if isinstance(value, np.generic):
        value = value.item()
    if depth > _DEEPEST:
        raise TypeError("a value is nested too deeply for JSON")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if abs(value) >= 10 ** (_MOST_DIGITS - 1):
            raise TypeError("an integer is too long for JSON")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, np.ndarray):
        return encode(value.tolist(), depth)
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, depth + 1) for item in value]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, depth + 1)
    raise TypeError(f"an object of type {type(value).__name__} cannot be written as JSON")


def _encode_mapping(mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    if all(isinstance(key, str) and not key.startswith("$") for key in mapping):
        return {str(key): encode(item, depth) for key, item in mapping.items()}
    return {"$dict": [[encode(k, depth), encode(item, depth)] for k, item in mapping.items()]}


def decode(value: Any, depth: int = 0) -> Any:
    """Return the value that `encode` wrote, or raise ValueError."""
    if depth > _DEEPEST:
        raise ValueError("a value is nested too deeply")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: decode(item, depth + 1) for key, item in value.items()}
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "$tuple" and isinstance(content, list):
            return tuple(decode(content, depth))
        if kind == "$dict" and isinstance(content, list):
            return _decode_pairs(content, depth + 1)
        if kind == "$float" and isinstance(content, str) and content in _UNKNOWN_FLOATS:
            return _UNKNOWN_FLOATS[content]
        if kind == "$path" and isinstance(content, str):
            return Path(content)
    raise ValueError(f"nothing is written as {_short(value)}")


def _decode_pairs(pairs: list[Any], depth: int) -> dict[Any, Any]:
    decoded: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
            raise ValueError(f"{_short(pair)} is no pair of a key and a value")
        if pair[0] in decoded:
            raise ValueError(f"the key {_short(pair[0])} stands there twice")
        decoded[pair[0]] = decode(pair[1], depth)
    return decoded


# Writing ----------------------------------------------------------------------------------------


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return a JSON object, a line for each of its fields."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; those that share memory are written once each."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save({n: t.clone() for n, t in copies.items()}))


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to write to; it takes the place of `folder` once all is written."""
    target = Path(os.path.realpath(folder))
    _check_target(target, overwrite)
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with errors_about(target, temporary):
            temporary.mkdir()
            yield temporary
            _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write to.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise FileExistsError(f"{str(target)!r} is there already; overwrite=True replaces it.")
    foreign = _foreign(target)
    if foreign is not None:
        raise FileExistsError(
            f"{str(target)!r} is no saved model, or holds more than that (see {foreign!r}): it is "
            "not replaced. Choose another folder, or clear this one yourself."
        )
    if os.path.samefile(target, os.curdir):
        raise FileExistsError(
            f"{str(target)!r} is the working folder of this process: it is not replaced. Change "
            "to another folder first."
        )


def _foreign(target: Path) -> str | None:
    """Return the name of something that no save has written, or that describes no model."""
    if not target.is_dir():
        return target.name
    others = (entry.name for entry in target.rglob("*") if not _is_part(target, entry))
    foreign = next(others, None)
    if foreign is None and any(target.iterdir()) and not _is_model(target / MODEL):
        return MODEL
    return foreign


def _is_part(target: Path, entry: Path) -> bool:
    name, mode = entry.relative_to(target).as_posix(), os.lstat(entry).st_mode
    if name == THUMBNAILS:
        return stat.S_ISDIR(mode)
    known = name in (MODEL, TENSORS) or re.fullmatch(rf"{THUMBNAILS}/\d+\.jpg", name)
    return bool(known) and stat.S_ISREG(mode)


def _is_model(file: Path) -> bool:
    try:
        return read_json(file).get("format") == FORMAT
    except ModelFileError:
        return False


def _put_in_place(temporary: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return
    former = temporary.with_suffix(".old")
    try:
        os.rename(target, former)
        os.rename(temporary, target)
    finally:  # Ctrl-C may come behind either
        if os.path.lexists(target):
            _remove(former)
        else:
            os.rename(former, target)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # which may come in the middle
        shutil.rmtree(folder, ignore_errors=True)
        raise
