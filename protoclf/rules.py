"""Rules for parameters: what a value may be, as code and in words; the error names both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and what is, in words."""


def integer(least: int) -> Rule:
    """Return the rule of ints, Python's or numpy's, that are at least so large."""

    def holds(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    return holds, f"an int >= {least}"


def one_of(*options: Any) -> Rule:
    """Return the rule of these strings, and None where it is among them."""
    names = ", ".join(map(repr, options))
    return lambda value: isinstance(value, str | None) and value in options, f"one of {names}"


def either(*words: str, rule: Rule) -> Rule:
    """Return the rule of some words, or of what another rule allows."""

    def holds(value: Any) -> bool:
        return value in words if isinstance(value, str) else rule[0](value)

    names = ", ".join(f'"{word}"' for word in words)
    return holds, f"{names} or {rule[1]}"


def optional(rule: Rule) -> Rule:
    """Return the rule of None, or of what another rule allows."""
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or None"


def check_rules(params: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ValueError that names the parameter, what is allowed and what was given."""
    for name, (holds, allowed) in rules.items():
        if not holds(params[name]):
            raise ValueError(f"{name} must be {allowed}; got {params[name]!r}.")


def _is_non_negative(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < np.inf


def _is_percentile(value: Any) -> bool:
    return isinstance(value, Real) and (value == 0 or 1 <= float(value) < 100)


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def _is_region(value: Any) -> bool:
    return value == "box" if isinstance(value, str) else _is_share(value)


def _is_quality(value: Any) -> bool:
    return COUNT[0](value) and value <= 95


COUNT: Rule = integer(1)
SEED: Rule = integer(0)
NON_NEGATIVE: Rule = (_is_non_negative, "a finite number >= 0")
PERCENTILE: Rule = (_is_percentile, "0, or a number >= 1 and < 100 (95, not 0.95)")
SHARE: Rule = (_is_share, "a number > 0 and <= 1")
QUALITY: Rule = (_is_quality, "an int from 1 to 95")
REGION: Rule = (_is_region, '"box", or a number > 0 and <= 1, a share of the side of the input')
