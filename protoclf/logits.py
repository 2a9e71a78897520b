"""What all classifiers of images make of their logits."""

from __future__ import annotations

from typing import Any
from warnings import warn

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from protoclf.images import Images
from protoclf.labels import read_labels
from protoclf.torch_datasets import unpacked


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits (n, C), in their own precision."""
    return torch.from_numpy(logits).softmax(1).numpy()


def ranking(logits: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return classes (C,) by their logits (C,); of equal ones those first that a sheet shows."""
    return np.lexsort((~shown, -logits))


class LogitsMixin:
    """Predictions of a classifier of images whose `_logits` are (n, C), for its `classes_`."""

    classes_: np.ndarray

    def _logits(self, X: Any) -> np.ndarray:
        raise NotImplementedError

    def predict(self, X: Any) -> np.ndarray:
        """Return the predicted class label of each image, (n,); None for one that was skipped."""
        logits = self._logits(X)
        labels = self.classes_[logits.argmax(1)]
        missing = np.isnan(logits[:, 0])
        if missing.any():
            labels = labels.astype(object)
            labels[missing] = None
        return labels

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy on images X with labels y.

        With ``on_bad_image="skip"``, images that cannot be read do not count. It then warns, and
        raises ValueError if no image is left. Without y, X is a torch Dataset that holds the labels
        too. Labels and weights are checked before an image is read.
        """
        X, y = unpacked(X, y)
        check_is_fitted(self)
        y, weight = read_labels(y, len(Images(X))), sample_weight
        accuracy_score(y, np.resize(self.classes_, len(y)), sample_weight=weight)  # or its errors
        answers = self.predict(X)
        known = np.array([answer is not None for answer in answers])
        if not known.all():
            if not known.any():
                raise ValueError(f"None of the {len(known)} images can be read: there is no score.")
            left_out = f"{(~known).sum()} of {len(known)} images, which cannot be read"
            warn(f"The score leaves out {left_out}.", UserWarning, stacklevel=2)
            answers = answers[known].astype(self.classes_.dtype)
            y, weight = y[known], None if weight is None else np.asarray(weight)[known]
        return float(accuracy_score(y, answers, sample_weight=weight))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, (n, C): the softmax of the logits."""
        return probabilities(self._logits(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithm of `predict_proba`, (n, C); -inf where a probability rounds to 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits of each image, (n, C).

        For two classes, as everywhere in scikit-learn, it is the logit of the second class minus
        the logit of the first, (n,).
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
