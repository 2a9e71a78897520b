"""Class labels of any kind, written to JSON and read back with their type."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from protoclf.model_files import Record, refusal
from protoclf.rules import Rule, integer

_MOST_LABEL = 10_000  # characters
_MOST_BYTES = 2**26  # of an array of strings
_NUMBERS = {
    **{f"int{n}": int for n in (8, 16, 32, 64)},
    **{f"uint{n}": int for n in (8, 16, 32, 64)},
    **{f"float{n}": float for n in (16, 32, 64)},
    "bool": bool,
}


def labels_to_json(labels: np.ndarray) -> dict[str, Any]:
    """Return labels (C,) as an object {"type", "width", "labels"}."""
    kind, width = labels.dtype.name, 0
    if labels.dtype.kind == "U":
        kind, width = "str", labels.dtype.itemsize // 4
    values = [str(v) if isinstance(v, str) else v for v in labels.tolist()]
    strings = all(type(label) is str for label in values)
    if strings and max(map(len, values)) > _MOST_LABEL:
        raise ValueError(f"Labels of more than {_MOST_LABEL} characters cannot be saved.")
    if kind not in _NUMBERS and not (strings and kind in ("str", "object")):
        raise ValueError(f"Labels of type {labels.dtype} cannot be saved: {values[:3]}.")
    return {"type": kind, "width": width, "labels": values}


def labels_from_json(record: Record) -> np.ndarray:
    """Return the labels (C,) that `labels_to_json` wrote: sorted, no two the same."""
    known = (*_NUMBERS, "str", "object")
    kind = record.take("type", Rule(lambda value: value in known, f"one of {', '.join(known)}"))
    width = record.take("width", integer(0, _MOST_LABEL))
    values = record.take("labels", Rule(lambda value: isinstance(value, list), "a list"))
    record.finish()
    item = _NUMBERS.get(kind, str)
    if len(values) < 2 or not all(type(value) is item for value in values):
        raise refusal(record.file, f"has class labels that are not all {kind}, or only one.")
    if kind == "str" and (
        any(len(value) > width for value in values) or 4 * width * len(values) > _MOST_BYTES
    ):
        raise refusal(record.file, "has class labels longer than it says, or too long.")
    try:
        labels = np.array(values, dtype=f"<U{width}" if kind == "str" else kind)
    except (OverflowError, ValueError) as error:
        raise refusal(record.file, f"has class labels that are no {kind}: {error}") from error
    if labels.tolist() != values or any(a >= b for a, b in itertools.pairwise(values)):
        raise refusal(record.file, "has class labels twice, out of order, or out of range.")
    return labels
