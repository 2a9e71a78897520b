"""What the parameters of the metrics may be."""

from __future__ import annotations

from numbers import Real
from typing import Any

from protoclf.parameters import DELETION_RULES, MERGE_RULES, NEAREST_RULES, Rule

COUNT = DELETION_RULES["top"]
NON_NEGATIVE = MERGE_RULES["max_distance"]
PERCENTILE = NEAREST_RULES["percentile"]


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def _is_region(value: Any) -> bool:
    return value == "box" if isinstance(value, str) else _is_share(value)


def _is_quality(value: Any) -> bool:
    return COUNT[0](value) and value <= 95


def _is_seed(value: Any) -> bool:
    return COUNT[0](value) or (value == 0 and not isinstance(value, (bool, float)))


SHARE: Rule = (_is_share, "a number > 0 and <= 1")
SEED: Rule = (_is_seed, "an int >= 0")
QUALITY: Rule = (_is_quality, "an int from 1 to 95")
REGION: Rule = (_is_region, '"box", or a number > 0 and <= 1, a share of the side of the input')
