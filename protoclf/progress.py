"""A bar on stderr for work that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def with_bar(items: Iterable[Any], what: str, show: Any, total: int | None = None) -> Iterable[Any]:
    """Return the items behind a bar, which appears after two seconds; where not to `show`, none."""
    return tqdm(items, what, total, delay=2, mininterval=1, leave=False, disable=not show)
