"""How far a mean can be trusted: percentile intervals by the bootstrap.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from protoclf.rules import COUNT, SEED, SHARE

_BLOCK = 2**22  # numbers at a time


def bootstrap_interval(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: int = 0,
) -> tuple[float, float]:
    """Return the interval of a mean by the bootstrap: from the means of resampled values.

    Parameters
    ----------
    values : array-like of shape (n,)
        One value for each image, prototype or box; missing values are left out.
    groups : array-like of shape (n,), optional
        Values of the same group are drawn together, such as all boxes of one image. By default
        each value is drawn by itself.
    level : float, default=0.95
        Share of the means that lies in the interval.
    n_resamples : int, default=1000
        Number of resamples. Each draws as many groups as there are, with replacement.
    random_state : int, default=0

    Returns
    -------
    low, high : float
        Percentiles ``50 (1 - level)`` and ``50 (1 + level)`` of the means of the resamples; NaN
        where fewer than two groups have values.

    Raises
    ------
    ValueError
        If a value is infinite, or the group of one is missing.

    Notes
    -----
    The interval says how much the mean would differ for other images (or prototypes) of the same
    kind, given the classifier. It says nothing about training it again, with another seed.
    """
    SHARE.check(level=level)
    COUNT.check(n_resamples=n_resamples)
    SEED.check(random_state=random_state)
    column = pd.Series(np.asarray(values, dtype=float))
    by = np.arange(len(column)) if groups is None else np.asarray(groups)
    if np.isinf(column).any() or pd.isna(by).any():
        raise ValueError("values must be finite or missing, and the group of each be known.")
    sums = column.groupby(by).agg(["sum", "count"]).to_numpy(float)  # (k, 2)
    sums = sums[sums[:, 1] > 0]
    k = len(sums)
    if k < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(random_state)
    totals = np.empty((n_resamples, 2))
    size = max(1, _BLOCK // k)
    for start in range(0, n_resamples, size):
        block = totals[start : start + size]
        times = rng.multinomial(k, np.full(k, 1 / k), size=len(block))  # (b, k), how often drawn
        block[:] = times @ sums
    means = totals[:, 0] / totals[:, 1]
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
