"""Whether files stay as they are while something takes long."""

from __future__ import annotations

import os
from collections.abc import Sequence

from protoclf.messages import first_few


def stamps(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return size and time of the last change of each file; None where there is none."""
    return [_stamp(path) for path in paths]


def changes_since(paths: Sequence[str], before: Sequence[tuple[int, int] | None]) -> str:
    """Say which files are gone, or others, since `stamps` looked at them; or nothing."""
    found = []
    for path, then in zip(paths, before, strict=True):
        now = _stamp(path)
        if now != then:
            found.append(f"{path!r} {'is gone' if now is None else 'was changed'}")
    return first_few(found) if found else ""


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
