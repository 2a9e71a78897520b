"""Files that are written whole or not at all: whoever looks finds the old one or the new one."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

_CHECKSUM = 4  # bytes
_PART = 2**20


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give another name to write to, which takes the place of `file` once all is written."""
    temporary = file.with_name(f".{uuid4().hex}{file.suffix}")
    try:
        with errors_about(file, temporary):
            yield temporary
            os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def errors_about(target: Path, temporary: Path) -> Iterator[None]:
    """Have errors name what is written to, not the hidden name that it has till then."""
    try:
        yield
    except OSError as error:
        hidden = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not hidden:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """Refuse now what would fail only once all that is to be written is there."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file; {os.fspath(path)!r} is a folder.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {os.fspath(target.parent)!r} to write to.")
    return target


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, and wait until the disk has it."""
    with _synced(path) as file:
        file.write(data)


def write_checked(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file through a stream, and behind it a checksum, and wait until the disk has it."""
    with _synced(path) as file:
        stream = _Summed(file)
        write(stream)
        file.write(_as_bytes(stream.checksum))


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to, and wait at last until the disk has it."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def check(path: Path) -> None:
    """Raise ValueError where the checksum of `write_checked` is that of other bytes."""
    with open(path, "rb") as file:
        left, checksum = os.fstat(file.fileno()).st_size - _CHECKSUM, 0
        while left > 0 and (part := file.read(min(left, _PART))):
            checksum, left = zlib.crc32(part, checksum), left - len(part)
        if file.read() != _as_bytes(checksum):
            raise ValueError("the checksum is that of other bytes")


class _Summed:
    """A stream that keeps a checksum of what it writes to another."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def with_checksum(write: Callable[[BinaryIO], None]) -> memoryview:
    """Return what is written to a stream, and behind it a checksum."""
    stream = io.BytesIO()
    write(stream)
    stream.write(_as_bytes(zlib.crc32(stream.getbuffer())))
    return stream.getbuffer()


def without_checksum(data: bytes) -> memoryview:
    """Return what stands before the checksum, or raise ValueError where that is of other bytes."""
    whole = memoryview(data)
    written, checksum = whole[:-_CHECKSUM], whole[-_CHECKSUM:]
    if _as_bytes(zlib.crc32(written)) != checksum:
        raise ValueError("the checksum is that of other bytes")
    return written


def _as_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(_CHECKSUM, "little")
