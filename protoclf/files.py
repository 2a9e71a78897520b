"""Files that are written whole or not at all: whoever looks finds the old one or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give another name to write to, which takes the place of `file` once all is written."""
    temporary = file.with_name(f".{uuid4().hex}{file.suffix}")
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
