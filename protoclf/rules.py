"""Rules for parameters: what a value may be, as code and in words; the error names both."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np


class Rule(NamedTuple):
    """Whether a value is allowed, and what is, in words."""

    holds: Callable[[Any], bool]
    allowed: str

    def check(self, **given: Any) -> None:
        """Raise ValueError that names the parameter, what is allowed and what was given."""
        for name, value in given.items():
            if not self.holds(value):
                raise ValueError(f"{name} must be {self.allowed}; got {value!r}.")


def integer(least: int, most: int | None = None) -> Rule:
    """Return the rule of ints, Python's or numpy's, that are at least and at most so large."""

    def holds(value: Any) -> bool:
        if not isinstance(value, Integral) or isinstance(value, bool):
            return False
        return int(value) >= least and (most is None or int(value) <= most)

    return Rule(holds, f"an int >= {least}" if most is None else f"an int from {least} to {most}")


def one_of(*options: Any) -> Rule:
    """Return the rule of these strings, and None where it is among them."""
    names = ", ".join(map(repr, options))
    return Rule(lambda value: isinstance(value, str | None) and value in options, f"one of {names}")


def either(*words: str, rule: Rule) -> Rule:
    """Return the rule of some words, or of what another rule allows."""

    def holds(value: Any) -> bool:
        return value in words if isinstance(value, str) else rule.holds(value)

    names = ", ".join(f'"{word}"' for word in words)
    return Rule(holds, f"{names} or {rule.allowed}")


def optional(rule: Rule) -> Rule:
    """Return the rule of None, or of what another rule allows."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.allowed}, or None")


def _is_non_negative(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < np.inf


def _is_percentile(value: Any) -> bool:
    return isinstance(value, Real) and (value == 0 or 1 <= float(value) < 100)


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


COUNT = integer(1)
SEED = integer(0)
NON_NEGATIVE = Rule(_is_non_negative, "a finite number >= 0")
PERCENTILE = Rule(_is_percentile, "0, or a number >= 1 and < 100 (95, not 0.95)")
SHARE = Rule(_is_share, "a number > 0 and <= 1")
QUALITY = integer(1, 95)
REGION = Rule(
    either("box", rule=SHARE).holds,
    '"box", or a number > 0 and <= 1, a share of the side of the input',
)
ATTRIBUTION = one_of("upsampled", "gradient")
