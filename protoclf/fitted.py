"""What functions beside the classifier's own methods ask of the classifier that they are given."""

from __future__ import annotations

from typing import Any

from sklearn.utils.validation import check_is_fitted


def check_classifier(clf: Any) -> None:
    """Raise an error unless `clf` is one fitted ProtoPNet."""
    check_is_fitted(clf)
    if not hasattr(clf, "module_"):
        raise TypeError(
            f"This takes a ProtoPNetClassifier; got {type(clf).__name__}. Take the last step of "
            "a pipeline, pipeline[-1], and the members of an ensemble, ensemble.estimators_."
        )
