"""How the penalty of the last layer trades accuracy for sparsity: its path, and its choice.

A solve is cheap beside the backbone, so that the whole path costs little: each penalty starts from
the solution for the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.activations import Activations, share_of_many
from protoclf.rules import NON_NEGATIVE, Rule, integer
from protoclf.self_matches import are_self_matches
from protoclf.splits import Splits, stratified_splits

PENALTIES = tuple(float(f"{p:.1e}") for p in np.geomspace(1e-2, 1e-4, 9))
"""What `lambda_l1="cv"` chooses from, for activations of at most 1 and up to ten classes."""

_AUTO = {
    "given": {"lambda_l1": 2e-4, "lambda_l2": 1e-3},
    "given, with discriminants": {"lambda_l1": 4e-4, "lambda_l2": 1e-3},
    "trained": {"lambda_l1": 5e-4, "lambda_l2": 0.0},
}
"""Of the last layer over features of three kinds.

Features that were trained for the classes are told apart by few prototypes; what else the squared
penalty keeps makes sheets longer there, and predictions no better.
"""

FOLDS = Rule(lambda value: integer(0).holds(value) and value != 1, "0 or an int >= 2")
PENALTY_LIST = Rule(
    lambda v: isinstance(v, list) and len(v) > 0 and all(map(NON_NEGATIVE.holds, v)),
    "a list of one or more finite numbers >= 0",
)

_TOLERANCE = 0.01  # of held-out solves, as a share of the smallest penalty


def auto_penalty(name: str, value: float | str, features: str, n_classes: int) -> Any:
    """Return the value of `lambda_l1` or `lambda_l2`; where it is "auto", one for the features.

    These are "given" by the backbone, "given, with discriminants", or "trained".

    That of `lambda_l1` falls with the root of the number of classes: less than their share of the
    images does, for the sake of short sheets.
    """
    if value != "auto":
        return value
    return _AUTO[features][name] * (share_of_many(n_classes) ** 0.5 if name == "lambda_l1" else 1)


def penalties_to_try(
    activations: Activations, source: Tensor | None = None, groups: np.ndarray | None = None
) -> list[float]:
    """Return what `lambda_l1="cv"` chooses from, and `last_layer_path` shows by default.

    They are in proportion to the largest activation. A prototype's match with its own image does
    not count, nor one with another image of the same group, if there are `groups` (N,). `source`
    (m,) is the image of each prototype; by default the most similar one.
    """
    g = activations.g
    source = g.argmax(0) if source is None else source.to(g.device)
    alike = None if groups is None else torch.from_numpy(groups).to(g.device)
    others = g.masked_fill(are_self_matches(len(g), source, alike), -torch.inf).amax()
    largest = float(others if others > 0 else g.amax().clamp_min(1e-6))
    return [largest * share_of_many(activations.n_classes) * penalty for penalty in PENALTIES]


def penalty_path(
    activations: Activations,
    penalties: Sequence[float],
    folds: int,
    seed: int,
    groups: np.ndarray | None = None,
    lambda_l2: float = 0.0,
) -> pd.DataFrame:
    """Solve the last layer for each lambda_l1, on all images and by cross-validation.

    0 `folds` leave cross-validation out; see `stratified_splits` for fewer of them than asked for.

    Returns the table of `ProtoPNetClassifier.last_layer_path`.
    """
    penalties = sorted(penalties, reverse=True)
    splits = stratified_splits(activations.y.cpu().numpy(), folds, seed, groups)
    held_out = _held_out_scores(activations, penalties, splits, lambda_l2)  # (folds, penalties, 2)
    rows = []
    for i, result in enumerate(activations.solve(penalties, lambda_l2=lambda_l2)):
        weight = result.weight
        row = {
            "lambda_l1": penalties[i],
            "n_nonzero": int((weight != 0).sum()),
            "n_prototypes": int((weight != 0).any(0).sum()),
            "objective": result.objective,
            "train_accuracy": activations.scores(weight)[0],
        }
        for k, name in enumerate(("accuracy", "cross_entropy")):
            values = held_out[:, i, k]
            row[name] = values.mean() if len(values) else np.nan
            row[f"{name}_std"] = values.std() if len(values) else np.nan
        rows.append(row | {"weight": weight.cpu().numpy()})
    return pd.DataFrame(rows)


def _held_out_scores(
    activations: Activations, penalties: list[float], splits: Splits, lambda_l2: float
) -> np.ndarray:
    """Accuracy and cross-entropy of images left out, (folds, penalties, 2)."""
    scores, tol = [], _TOLERANCE * min((p for p in penalties if p > 0), default=PENALTIES[-1])
    for train, test in splits:
        results = activations.take(train).solve(penalties, tol, lambda_l2)
        left_out = activations.take(test)
        scores.append([left_out.scores(result.weight) for result in results])
    return np.array(scores).reshape(len(splits), len(penalties), 2)
