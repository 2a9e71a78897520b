"""Digests of files, which are read once for as long as the file system says that they stay.

A search looks at all of its images in each of its fits, to see that they are what they were.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

_SETTLED = 2 * 10**9  # nanoseconds: no file system has coarser times
_MOST_KNOWN = 2**16  # files, about 400 bytes each

_Stamp = tuple[int, ...]

_known: dict[str, tuple[_Stamp, str]] = {}


def known_digest(path: str) -> str | None:
    """Return the digest of a file that need not be read for it, or None."""
    try:
        return _remembered(path, _stamp(os.stat(path))) if path in _known else None
    except (OSError, ValueError):
        return None


def file_digest(path: str, status: os.stat_result) -> str:
    """Return a digest of what a file holds; `status` is what `os.stat` says of it now.

    A file that was read before is not read again while its times, its size and its inode are the
    same. A file that changed in the last two seconds is read each time: it could change again
    without other times. On Windows every file is read each time, as programs can set all times.

    A change that leaves all times as they are is not seen. That can be one through shared memory
    that was written to before, or one on a network disk whose times are cached here, or lag by more
    than two seconds.
    """
    stamp = _stamp(status)
    remembered = _remembered(path, stamp)
    if remembered is not None:
        return remembered
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=20).hexdigest()
    room = path in _known or len(_known) < _MOST_KNOWN  # another scan finds the first again
    if settled and room and os.name != "nt":
        _known[path] = stamp, digest
    return digest


def _remembered(path: str, stamp: _Stamp) -> str | None:
    then, digest = _known.get(path, (None, None))
    return digest if then == stamp else None


def _stamp(status: os.stat_result) -> _Stamp:
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times
