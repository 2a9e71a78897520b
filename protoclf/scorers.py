"""Scorers for scikit-learn's searches beside accuracy: how small the explanations are."""

from __future__ import annotations

from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted


def n_prototypes_scorer(estimator: Any, X: Any = None, y: Any = None) -> float:
    """Return minus the number of prototypes that any class makes use of.

    For ``scoring=`` of scikit-learn's searches, where more is better.

    Parameters
    ----------
    estimator : ProtoPNetClassifier, or a Pipeline that ends in one
        Fitted.
    X, y
        Not used.

    Returns
    -------
    float
        At most 0.
    """
    clf = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    check_is_fitted(clf)
    return -float((clf.coef_ != 0).any(0).sum())
