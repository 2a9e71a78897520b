"""`ProtoPNetEnsemble`: several ProtoPNets that add up their logits, and one sheet over all of them.

Chen et al., NeurIPS 2019, section 2.5. Last layers have no bias, so that a sum of the members'
logits is itself a sum of contributions: those of the prototypes of all members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin, MetaEstimatorMixin, TransformerMixin, clone
from sklearn.ensemble import VotingClassifier
from sklearn.utils import Bunch, _safe_indexing
from sklearn.utils.metaestimators import _BaseComposition
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted

from protoclf.augmentation import augmentation_of
from protoclf.classifier import ProtoPNetClassifier
from protoclf.decoding import check_files
from protoclf.explanation import (
    check_options,
    chosen_classes,
    with_rest_named,
    with_sum_of_rest,
    without_answer,
)
from protoclf.fitted import checked_prototype
from protoclf.images import Images
from protoclf.labels import Targets, read_targets
from protoclf.logits import LogitsMixin, probabilities
from protoclf.parameters import (
    check_enough_images,
    check_parameters,
    normalization,
    prototype_counts,
    refuse_unknown_of_members,
)
from protoclf.torch_datasets import unpacked

_FITTED = ("estimators_", "named_estimators_", "classes_")


class ProtoPNetEnsemble(
    LogitsMixin, ClassifierMixin, TransformerMixin, MetaEstimatorMixin, _BaseComposition
):
    """A classifier that adds up the logits of several ProtoPNets, with one sheet over all of them.

    The members can differ in any parameter of `ProtoPNetClassifier`. An ensemble is worth it if
    they err on different images, as with different backbones. Chen et al., "This Looks Like That:
    Deep Learning for Interpretable Image Recognition", NeurIPS 2019, section 2.5.

    Parameters
    ----------
    estimators : list of (str, ProtoPNetClassifier)
        The members and their names. They are cloned, and never changed. Their parameters are set
        by nested names, such as ``set_params(first__lr=1e-3)``. Two members with the same
        parameters, and the same int as `random_state`, are the same model twice.
    n_jobs : int or None, default=None
        Number of members that are fitted at the same time, each in its own process, as in joblib.
        On a GPU they share its memory.
    verbose : int, default=1
        0 prints nothing. Each member has its own `verbose`.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
        The labels of y, sorted.
    estimators_ : list of ProtoPNetClassifier
        The fitted members.
    named_estimators_ : sklearn.utils.Bunch
        The fitted members, by their names.
    n_prototypes_ : int
        Number of prototypes of all members together.
    prototypes_ : DataFrame
        One row for each prototype: the members' tables, with `member` and `member_prototype`, the
        number of the prototype in that member.
    coef_ : ndarray of shape (C, m)
        The members' last layers, side by side.

    Examples
    --------
    >>> from protoclf import ProtoPNetClassifier, ProtoPNetEnsemble
    >>> from protoclf.datasets import make_birds
    >>> import tempfile
    >>> paths, labels, _ = make_birds(tempfile.mkdtemp(), n_per_class=4, image_size=64)
    >>> small = ProtoPNetClassifier("small_cnn", image_size=32, prototypes_per_class=2,
    ...                             joint_epochs=1, random_state=0, verbose=0)
    >>> large = ProtoPNetClassifier("small_cnn", image_size=64, prototypes_per_class=2,
    ...                             joint_epochs=1, random_state=1, verbose=0)
    >>> ensemble = ProtoPNetEnsemble([("small", small), ("large", large)], verbose=0)
    >>> sheet = ensemble.fit(paths, labels).explain(paths[:1])
    >>> bool(abs(sheet["contribution"].sum() - sheet["logit"].iloc[0]) < 1e-4)
    True
    """

    estimators_: list[ProtoPNetClassifier]
    named_estimators_: dict[str, ProtoPNetClassifier]
    classes_: np.ndarray

    def __init__(
        self,
        estimators: list[tuple[str, ProtoPNetClassifier]],
        *,
        n_jobs: int | None = None,
        verbose: int = 1,
    ) -> None:
        self.estimators = estimators
        self.n_jobs = n_jobs
        self.verbose = verbose

    @classmethod
    def of_fitted(
        cls, members: list[tuple[str, ProtoPNetClassifier]], **parameters: Any
    ) -> ProtoPNetEnsemble:
        """Return an ensemble of classifiers that are already fitted, such as loaded ones.

        Parameters
        ----------
        members : list of (str, ProtoPNetClassifier)
            Names and fitted classifiers, all with the same classes. They are not copied.
        **parameters
            Parameters of the ensemble.

        Raises
        ------
        ValueError
            If members do not know the same classes.
        NotFittedError
            If one is not fitted.
        """
        ensemble = cls(list(members), **parameters)
        for name, member in ensemble._checked_members():
            check_is_fitted(member)
            first = members[0][1].classes_
            kinds = {labels.dtype.kind.replace("O", "U") for labels in (first, member.classes_)}
            if not np.array_equal(member.classes_, first) or (len(kinds) > 1 and "b" in kinds):
                raise ValueError(
                    f"Members must have the same classes: {members[0][0]!r} has "
                    f"{members[0][1].classes_.tolist()}, {name!r} {member.classes_.tolist()}."
                )
        ensemble.classes_ = members[0][1].classes_
        ensemble.estimators_ = [member for _, member in members]
        ensemble.named_estimators_ = _named(members)
        return ensemble

    # Fitting ------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ):
        """Fit a clone of each member to the same images, and return the ensemble.

        Parameters
        ----------
        X, y, sample_weight, groups
            As in `ProtoPNetClassifier.fit`.

        Returns
        -------
        self

        Raises
        ------
        ImageError
            If an image cannot be used. Missing files and files that are no images are found before
            any member is trained.
        ValueError
            If y, sample_weight, groups, or a parameter of the ensemble or of a member, cannot be
            used. It is raised before any member is trained, except for a member's backbone and
            what depends on it.
        """
        members = self._checked_members()
        X, y = unpacked(X, y)
        y, classes = self._checked_data(X, y, sample_weight, groups, members)
        for name in _FITTED:  # an interrupted fit cannot be taken for an earlier one
            self.__dict__.pop(name, None)
        parallel = Parallel(n_jobs=self.n_jobs, return_as="generator")  # as members are done
        fits = parallel(delayed(clone(m).fit)(X, y, sample_weight, groups) for _, m in members)
        fitted = {}
        for (name, _), member in zip(members, fits, strict=True):
            fitted[name] = member
            if self.verbose:
                print(f"Member {name!r} is fitted, {len(fitted)} of {len(members)}.", flush=True)
        self.classes_ = classes
        self.named_estimators_ = _named(fitted.items())
        self.estimators_ = list(fitted.values())
        return self

    def _checked_members(self) -> list[tuple[str, ProtoPNetClassifier]]:
        expected = "estimators must be a list of one or more pairs (name, ProtoPNetClassifier)"
        if not isinstance(self.estimators, list) or not self.estimators:
            raise ValueError(f"{expected}; got {self.estimators!r}.")
        for position, item in enumerate(self.estimators):
            if not _is_member(item):
                raise ValueError(f"{expected}; at position {position} it has {item!r}.")
        self._validate_names([name for name, _ in self.estimators])
        return self.estimators

    def _checked_data(
        self, X: Any, y: Any, sample_weight: Any, groups: Any, members: list
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check whatever can be checked before a member is trained; return y and its classes."""
        images = Images(X)
        given = read_targets(images, y, sample_weight, groups)
        counting = given.of(given.counting())
        for name, member in members:
            try:
                _check_member(member, counting)
            except (TypeError, ValueError) as error:
                raise type(error)(f"Member {name!r}: {error}") from error
        if any(member.on_bad_image == "raise" for _, member in members):
            check_files(images, show=bool(self.verbose))
        return given.y, given.classes

    # Using it -----------------------------------------------------------------------------------

    @property
    def n_prototypes_(self) -> int:
        """Number m of prototypes of all members together."""
        return sum(member.n_prototypes_ for _, member, _ in self._members())

    @property
    def coef_(self) -> np.ndarray:
        """The members' last layers side by side, (C, m); logits are ``transform(X) @ coef_.T``."""
        return np.concatenate([member.coef_ for _, member, _ in self._members()], axis=1)

    @property
    def prototypes_(self) -> pd.DataFrame:
        """One row for each prototype: the members' tables, one after the other.

        - prototype : its number in the ensemble, which counts on from member to member
        - member, member_prototype : name of the member, and the prototype's number in it
        - the other columns are those of `ProtoPNetClassifier.prototypes_`
        """
        tables = []
        for name, member, first in self._members():
            table = member.prototypes_.copy()
            table.insert(1, "member", name)
            table.insert(2, "member_prototype", table["prototype"])
            tables.append(table.assign(prototype=table["prototype"] + first))
        return pd.concat(tables, ignore_index=True)

    def transform(self, X: Any) -> np.ndarray:
        """Return the similarity of each image to each prototype of all members, (n, m)."""
        return np.concatenate([member.transform(X) for _, member, _ in self._members()], axis=1)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns of `transform`, (m,); numbers as in `prototypes_`."""
        rows = self.prototypes_[["member", "prototype", "class"]].values
        return np.asarray([f"{name}__prototype{i} ({c})" for name, i, c in rows], dtype=object)

    def explain(
        self,
        X: Any,
        classes: str | ArrayLike = "predicted",
        top: int | None = None,
        *,
        attribution: str = "upsampled",
        percentile: float = 95,
    ) -> pd.DataFrame:
        """Return scoring sheets over all members: what each prototype adds to an image's logits.

        Each member runs over the images twice: for the logits, which decide the classes to
        explain, and for its sheet. With `memory`, a frozen backbone runs once.

        Parameters
        ----------
        X, classes, top, attribution, percentile
            As in `ProtoPNetClassifier.explain`. The predicted class and its rival are those of
            the ensemble, and `top` counts the prototypes of all members together.

        Returns
        -------
        DataFrame
            The columns of `ProtoPNetClassifier.explain` and, behind `path`, `member`. Here

            - is_predicted, logit, probability : are the ensemble's
            - member : name of the member that compared the image with this prototype
            - rank : is among the contributions of all members
            - prototype : is the number in the ensemble's `prototypes_`; no two members share one
            - row, col : are cells of the member's own latent map

            The contributions of a sample and class sum to the ensemble's logit, except for float32
            rounding.
        """
        check_is_fitted(self)
        check_options(top, attribution, percentile)
        asked = self.estimators_[0]._class_indices(classes)
        X, _ = unpacked(X, None)
        logits = self._logits(X)  # (n, C)
        sheets = []
        for codes, samples in _alike(chosen_classes(torch.from_numpy(logits), asked).numpy()):
            images = _safe_indexing(X, samples)
            for name, member, first in self._members():
                sheet = member.explain(
                    images,
                    self.classes_[codes],
                    top,
                    attribution=attribution,
                    percentile=percentile,
                )
                sheet["sample"] = samples[sheet["sample"]]
                sheet["prototype"] += first
                sheet.insert(2, "member", name)
                sheets.append(sheet)
        sheet = self._ranked(pd.concat(sheets, ignore_index=True), logits)
        if top is not None:
            sheet = with_rest_named(with_sum_of_rest(sheet, top), top)
        return without_answer(sheet, np.flatnonzero(np.isnan(logits[:, 0])).tolist())

    def _ranked(self, sheet: pd.DataFrame, logits: np.ndarray) -> pd.DataFrame:
        """Give the rows of all members the ensemble's logits (n, C), and its order.

        What the members summed up in "(rest)" comes last. Where there is such a row, the member
        has `top` others, so that it will be summed up here too.
        """
        sample = sheet["sample"].to_numpy()
        codes = {label: code for code, label in enumerate(self.classes_.tolist())}
        code = sheet["class"].map(codes).fillna(0).to_numpy(np.int64)  # 0 without an answer
        sheet["is_predicted"] = logits.argmax(1)[sample] == code
        sheet["logit"] = logits[sample, code].astype(float)
        sheet["probability"] = probabilities(logits)[sample, code].astype(float)
        rest = sheet["prototype"].isna().to_numpy()
        order = np.lexsort((-sheet["contribution"], rest, code, -sheet["logit"], sample))
        sheet = sheet.iloc[order].reset_index(drop=True)
        group = sheet.groupby(["sample", "class"], sort=False, dropna=False)
        return sheet.assign(rank=group.cumcount() + 1)

    def source_image(self, prototype: int, member: str | None = None) -> np.ndarray:
        """Return the training image (H, W, 3), uint8, that a prototype is a part of.

        Parameters
        ----------
        prototype : int
            Its number in `prototypes_`; with a `member` its number in the member's own table.
        member : str, optional
            The member's name.
        """
        if member is None:
            table = self.prototypes_
            row = table.iloc[checked_prototype(prototype, len(table))]
            prototype, member = int(row["member_prototype"]), row["member"]
        check_is_fitted(self)
        if member not in self.named_estimators_:
            raise ValueError(
                f"member must be one of {list(self.named_estimators_)}; got {member!r}."
            )
        return self.named_estimators_[member].source_image(prototype)

    def _members(self) -> Iterator[tuple[str, ProtoPNetClassifier, int]]:
        """Yield each fitted member with its name and the number of its first prototype."""
        check_is_fitted(self)
        first = 0
        for name, member in self.named_estimators_.items():
            yield name, member, first
            first += member.n_prototypes_

    def _logits(self, X: Any) -> np.ndarray:
        return np.sum([member._logits(X) for _, member, _ in self._members()], axis=0)  # (n, C)

    # The estimator contract ---------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters; with `deep`, the members and theirs by nested names too."""
        return self._get_params("estimators", deep=deep)

    def set_params(self, **params: Any):
        """Set parameters; a member by its name, its parameters by nested ones."""
        members = params.get("estimators", self.estimators)
        pairs = members if isinstance(members, list) else []  # `fit` checks what they are
        names = [item[0] for item in pairs if isinstance(item, tuple | list) and len(item) == 2]
        refuse_unknown_of_members(params, self, names)
        return self._set_params("estimators", **params)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "estimators_")

    def _sk_visual_block_(self):
        """Draw the members side by side, as scikit-learn draws its own ensembles."""
        return VotingClassifier(self.estimators)._sk_visual_block_()


def _named(members: Iterable[tuple[str, ProtoPNetClassifier]]) -> Bunch:
    named = Bunch()
    named.update(members)  # a member may have any name
    return named


def _is_member(item: Any) -> bool:
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    name, member = item
    return isinstance(name, str) and name != "" and isinstance(member, ProtoPNetClassifier)


def _check_member(member: ProtoPNetClassifier, given: Targets) -> None:
    """Raise now what the member's fit would raise, which may be after the fits of others."""
    check_parameters(vars(member))
    normalization(member.normalization)
    member.weights_of(given.codes, given.classes, given.weight)
    augmentation_of(member.augmentation)
    counts = prototype_counts(member.prototypes_per_class, given.classes)
    one_an_image = member.distinct == "images" or member.prototype_size == "full"
    if one_an_image and member.prototypes_per_class != "auto":
        check_enough_images(counts, given.codes, given.classes, 1)


def _alike(chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each set of classes (c,) that stands in rows of `chosen` (n, c), and those rows."""
    sets, which = np.unique(np.sort(chosen, axis=1), axis=0, return_inverse=True)
    for i, codes in enumerate(sets):
        yield codes, np.flatnonzero(which.reshape(-1) == i)
