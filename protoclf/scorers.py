"""Scorers for scikit-learn's searches beside accuracy: how good the explanations are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sklearn.pipeline import Pipeline

from protoclf.metrics.catalogue import METRICS
from protoclf.metrics.prototype_metrics import global_size
from protoclf.metrics.report_table import score
from protoclf.rules import COUNT, SEED


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
    return -float(global_size(_classifier(estimator)))


@dataclass(frozen=True)
class MetricScorer:
    """A metric of interpretability as a scorer: more is better.

    For ``scoring=`` of scikit-learn's searches and cross-validations. It can be pickled.

    Parameters
    ----------
    name : str
        A row of `protoclf.metrics.interpretability_report` that needs neither parts nor masks, such
        as "sparsity". Where lower values are better, the score is minus the value.
    n_perturbed : int, default=100
        As in `protoclf.metrics.interpretability_report`.
    random_state : int, default=0

    Examples
    --------
    >>> from protoclf.scorers import MetricScorer
    >>> scoring = {"accuracy": "accuracy", "few": MetricScorer("sparsity")}
    """

    name: str
    n_perturbed: int = 100
    random_state: int = 0

    def __post_init__(self) -> None:
        COUNT.check(n_perturbed=self.n_perturbed)
        SEED.check(random_state=self.random_state)
        names = [row.name for metric in METRICS if not metric.needs for row in metric.rows]
        if self.name not in names:
            raise ValueError(f"name must be one of {names}; got {self.name!r}.")

    def __call__(self, estimator: Any, X: Any, y: Any) -> float:
        """Return the score of a fitted ProtoPNetClassifier, or of a Pipeline that ends in one."""
        clf = _classifier(estimator)
        if clf is not estimator and len(estimator) > 1:
            X = estimator[:-1].transform(X)  # what the classifier is shown
        return score(clf, X, y, self.name, self.n_perturbed, self.random_state)


def _classifier(estimator: Any) -> Any:
    return estimator[-1] if isinstance(estimator, Pipeline) else estimator
