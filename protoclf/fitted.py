"""What functions beside the classifier's own methods ask of a classifier, and of its tables."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from protoclf.messages import first_quoted


def check_classifier(clf: Any) -> None:
    """Raise an error unless `clf` is one fitted ProtoPNet."""
    check_is_fitted(clf)
    if not hasattr(clf, "module_"):
        raise TypeError(
            f"This takes a ProtoPNetClassifier; got {type(clf).__name__}. Take the last step of "
            "a pipeline, pipeline[-1], best_estimator_ of a search, and the members of an "
            "ensemble, ensemble.estimators_."
        )


def check_columns(name: str, table: Any, columns: Iterable[str], what: str) -> None:
    """Raise ValueError for a table that lacks some of the columns; `what` says what it must be."""
    known = getattr(table, "columns", ())  # a classifier, as other functions take first, has none
    missing = [column for column in columns if column not in known]
    if missing:
        raise ValueError(f"{name} must be {what}; it lacks the columns {missing}.")


def check_editable(clf: Any) -> None:
    """Raise an error unless a copy of `clf` may be changed: what is frozen shows its attributes."""
    check_classifier(clf)
    if isinstance(clf, FrozenEstimator):
        raise TypeError("A FrozenEstimator stays as it is; edit the one in it, frozen.estimator.")


def checked_prototype(prototype: Any, m: int) -> int:
    """Return the number of one of m prototypes; anything else is an IndexError."""
    try:
        number = operator.index(prototype)
    except TypeError:  # such as what is missing in a "(rest)" row of a sheet
        number = -1
    if not 0 <= number < m:
        raise IndexError(f"prototype must be from 0 to {m - 1}; got {prototype!r}.")
    return number


def known_prototypes(
    name: str,
    ids: ArrayLike,
    known: Iterable[int],
    where: str = "the classifier",
    may_be_none: bool = False,
) -> list[int]:
    """Return ids of prototypes, each once; ValueError for others than the known, or for none.

    Messages say the `name` of the parameter that holds them, and `where` they are known.
    """
    given, known = np.atleast_1d(np.asarray(ids)).ravel(), set(known)
    must = f"{name} must name prototypes that {where} has, from {min(known)} to {max(known)}"
    if given.dtype == bool:
        raise ValueError(f"{must}; of a mask, np.flatnonzero(mask) gives them.")
    values: list[Any] = given.tolist()
    unknown = [j for j in values if type(j) is not int or j not in known]
    if not (values or may_be_none):
        raise ValueError(f"{must}; got none.")
    if unknown:
        raise ValueError(f"{must}; got {first_quoted(unknown)}.")
    return list(dict.fromkeys(values))
