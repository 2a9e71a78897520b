"""What functions beside the classifier's own methods ask of the classifier that they are given."""

from __future__ import annotations

from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted


def check_classifier(clf: Any) -> None:
    """Raise an error unless `clf` is one fitted ProtoPNet."""
    check_is_fitted(clf)
    if not hasattr(clf, "module_"):
        raise TypeError(
            f"This takes a ProtoPNetClassifier; got {type(clf).__name__}. Take the last step of "
            "a pipeline, pipeline[-1], best_estimator_ of a search, and the members of an "
            "ensemble, ensemble.estimators_."
        )


def check_editable(clf: Any) -> None:
    """Raise an error unless a copy of `clf` may be changed: what is frozen shows its attributes."""
    check_classifier(clf)
    if isinstance(clf, FrozenEstimator):
        raise TypeError("A FrozenEstimator stays as it is; edit the one in it, frozen.estimator.")
