"""Which part of a fit a process computes, where several of them fit one classifier together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class OneProcess:
    """The process of an ordinary fit, which computes everything.

    Attributes
    ----------
    is_first : bool
        Whether it is the one that shows progress.
    count : int
        How many processes there are.
    """

    is_first = True
    count = 1

    def own_rows(self, n: int, batch_size: int) -> Sequence[int]:
        """Return the positions, of n, that this process computes: batches in a row."""
        return range(n)

    def in_order(self, rows: Tensor, n: int) -> Tensor:
        """Return the rows (n, ...) of all processes, each of which passes its own."""
        return rows

    def own_seed(self, seed: int) -> int:
        """Return the seed of this process's random transforms, of one that all share."""
        return seed

    def agreed(self, value: Any) -> Any:
        """Return the first process's value."""
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order."""
        return [value]

    def synchronize(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
