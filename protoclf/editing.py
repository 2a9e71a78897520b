"""Removing prototypes from a fitted classifier, or teaching it what they should look at.

Every edit returns a new classifier and leaves the one that it was given as it is. Where prototypes
go, the last layer is solved again for those that stay, on activations that `fit` keeps: no image
is read, and the backbone does not run. `forbid` and `encourage` train. What was done is in the new
classifier's ``edits_``.

Prototypes are numbered anew after each removal; ``edits_`` names them as they were before it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from protoclf.activations import Activations
from protoclf.concepts import ForbiddenPatches
from protoclf.duplicates import distances_within_classes, repeated
from protoclf.explanation import EDIT_COLUMNS
from protoclf.features import FitData
from protoclf.fitted import check_editable, known_prototypes
from protoclf.images import Images
from protoclf.initialization import restart_prototypes
from protoclf.messages import first_quoted
from protoclf.nearest_patches import find_concepts
from protoclf.rules import COUNT, NON_NEGATIVE, integer, optional
from protoclf.stages import LastLayer, keep_prototypes
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def remove(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any = None,
    y: ArrayLike | None = None,
    *,
    reason: str | dict[int, str] = "",
) -> ProtoPNetClassifier:
    """Return a classifier without some prototypes, such as one that looks at the background.

    The last layer is solved again for those that stay.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    ids : array-like of int
        Prototypes to remove. At least one of each class must stay.
    X, y : images and labels, optional
        Images to solve the last layer on, in place of the activations of the training images: with
        the classifier's `class_weight`, with views of them as in `fit`, and with `self_matches` as
        "keep". They are needed for a classifier that does not hold those activations.
    reason : str or dict of int to str, default=""
        For the record: one text for all removed prototypes, or one for each, by its number.

    Returns
    -------
    ProtoPNetClassifier
        A new one, fitted; ``edits_`` has one more row for each removed prototype.

    Raises
    ------
    ValueError
        If an id is unknown, a class would be left without prototypes, or activations are missing.
    """
    check_editable(clf)
    known = range(clf.n_prototypes_)
    kept = sorted(set(known) - set(known_prototypes("ids", ids, known, may_be_none=True)))
    return _with_only(clf, kept, X, y, "remove", reason)


def keep(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any = None,
    y: ArrayLike | None = None,
    *,
    reason: str | dict[int, str] = "",
) -> ProtoPNetClassifier:
    """Return a classifier that has only these prototypes: the same as `remove` of all others.

    Parameters
    ----------
    clf : ProtoPNetClassifier
    ids : array-like of int
        Prototypes to keep: at least one of each class.
    X, y, reason
        As in `remove`. A dict of reasons has the numbers of removed prototypes.
    """
    return _with_only(clf, ids, X, y, "keep", reason)


def prune(
    clf: ProtoPNetClassifier,
    X: Any = None,
    y: ArrayLike | None = None,
    *,
    k: int = 6,
    t: int = 3,
    min_weight: float | None = None,
) -> ProtoPNetClassifier:
    """Return a classifier without the prototypes that do not stand for their class.

    Parameters
    ----------
    clf : ProtoPNetClassifier
    X, y
        As in `remove`. The nearest images are then among these.
    k, t : int, default=6, 3
        A prototype is removed if, of the k training images that are most similar to it, fewer than
        t are of its class: it then looks at something that other classes have too, such as
        background (Chen et al., NeurIPS 2019, supplement: pruning).
    min_weight : float, optional
        With it, the rule is another one: a prototype is removed if its weight for its own class is
        less than this.

    Notes
    -----
    The best prototype of each class stays, even if the rule would remove it. If a class has fewer
    than t images, all of them must be among the nearest.
    """
    check_editable(clf)
    COUNT.check(k=k, t=t)
    optional(NON_NEGATIVE).check(min_weight=min_weight)
    if t > k:
        raise ValueError(f"t must be at most k; got t={t} and k={k}.")
    table, activations = clf.prototypes_, activations_of(clf, X, y, views=False)
    if min_weight is not None:
        value, least = table["weight"].to_numpy(), min_weight
        text = f"weight {{:.3g}} < {min_weight:g}"
    else:
        images = activations.y.bincount(minlength=activations.n_classes)[activations.owner]  # (m,)
        value, least = own_among_nearest(activations, k), np.minimum(t, images.cpu().numpy())
        text = f"{{}} of the {k} nearest images are of its class, fewer than {t}"
    best = table.assign(value=value).groupby("class")["value"].idxmax()
    stays = (value >= least) | table.index.isin(best)
    reasons = {j: text.format(value[j]) for j in np.flatnonzero(~stays).tolist()}
    ids = np.flatnonzero(stays)
    return _with_only(clf, ids, X, y, "prune", reasons)


def merge_duplicates(
    clf: ProtoPNetClassifier,
    X: Any = None,
    y: ArrayLike | None = None,
    *,
    max_distance: float = 1e-6,
) -> ProtoPNetClassifier:
    """Return a classifier without the prototypes that repeat another one of their class.

    Parameters
    ----------
    clf : ProtoPNetClassifier
    X, y
        As in `remove`.
    max_distance : float, default=1e-6
        Two prototypes are the same up to this squared distance, as latents are compared. The
        default finds prototypes of one patch; a larger value also finds those of similar patches.
        The first of them stays, and takes over the weight when the last layer is solved.
    """
    check_editable(clf)
    NON_NEGATIVE.check(max_distance=max_distance)
    reasons: dict[int, str] = {}
    for mine, distance in distances_within_classes(clf.module_):
        first = repeated(distance, max_distance)
        for j in np.flatnonzero(first >= 0):
            reasons[int(mine[j])] = f"the same as prototype {mine[first[j]]}"
    stays = [j for j in range(clf.n_prototypes_) if j not in reasons]
    return _with_only(clf, stays, X, y, "merge", reasons)


def forbid(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any,
    y: ArrayLike,
    *,
    reason: str | dict[int, str] = "",
    k: int = 20,
    weight: float = 1.0,
    epochs: int | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
) -> ProtoPNetClassifier:
    """Return a classifier that was trained further, away from what these prototypes look at.

    `remove` only takes prototypes away. `forbid` starts them again at other patches, and keeps all
    prototypes of their classes from what they looked at. Joint training has a penalty on the
    similarity to it. The projection skips patches that look more like it than like the
    prototype. The last layer follows.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    ids : array-like of int
        Prototypes that show, in images of their classes, what the classifier must not look at.
    X, y : images and labels
        Images to train on, as in `partial_fit`: as a rule the training images.
    reason : str or dict of int to str, default=""
        For the record: one text for all of them, or one for each, by its number.
    k : int, default=20
        The forbidden patches of a prototype are the most similar patches of the k images of its
        class that are most similar to it. All of them should show what is meant. If the class has
        fewer than k images, all of its images are used.
    weight : float, default=1
        Weight of the penalty in the joint loss. The penalty is the mean similarity of a class's
        prototypes to a forbidden patch, where above 0, as a share of the largest possible
        similarity: for the patch alone on a plain ground, and for the patch in its place.
    epochs : int, optional
        Joint epochs of each cycle; the classifier's `joint_epochs` by default. With 0, or with a
        frozen backbone, only the start and the projection keep prototypes away.
    sample_weight, groups
        As in `partial_fit`. Nothing is found, or forbidden, in an image of weight 0.

    Returns
    -------
    ProtoPNetClassifier
        A new one, fitted. Its ``concepts_`` hold what is forbidden, so that all further training
        avoids it too. Other prototypes at a forbidden patch of their class also start again, and
        are in ``edits_`` with those of `ids`.

    Raises
    ------
    ValueError
        If an id is unknown, X has no image of the class of one, or a parameter is out of range.

    Notes
    -----
    After ProtoPDebug (Bontempelli et al., ICLR 2023), which penalises the similarity to cut-outs.
    What is forbidden for one class is not forbidden for the others. It may come back at another
    place where it looks different: look at the new prototypes, and forbid again.
    """
    how: dict[str, Any] = {"reason": reason, "k": k, "weight": weight, "epochs": epochs}
    how |= {"sample_weight": sample_weight, "groups": groups}
    return _taught(clf, ids, X, y, forbidden=True, **how)


def encourage(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any,
    y: ArrayLike,
    *,
    reason: str | dict[int, str] = "",
    k: int = 10,
    weight: float = 1.0,
    epochs: int | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
) -> ProtoPNetClassifier:
    """Return a classifier that was trained further, towards what these prototypes look at.

    Parameters
    ----------
    clf, ids, X, y, reason, epochs, sample_weight, groups
        As in `forbid`, for prototypes that show what the classifier should look at.
    k : int, default=10
        As in `forbid`.
    weight : float, default=1
        Weight of a cost in the joint loss: the smallest squared distance from an encouraged patch
        to a prototype of its class, for the patch alone on a plain ground and in its place.

    Returns
    -------
    ProtoPNetClassifier
        A new one, fitted. Its ``concepts_`` hold what is encouraged beside what is forbidden, and
        further training heeds both.

    Raises
    ------
    ValueError
        As in `forbid`.

    Notes
    -----
    This is the other half of ProtoPDebug. It acts in joint training only.
    """
    how: dict[str, Any] = {"reason": reason, "k": k, "weight": weight, "epochs": epochs}
    how |= {"sample_weight": sample_weight, "groups": groups}
    return _taught(clf, ids, X, y, forbidden=False, **how)


def _with_only(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any,
    y: ArrayLike | None,
    action: str,
    reason: str | dict[int, str],
) -> ProtoPNetClassifier:
    """Return a classifier that has only these prototypes, with its last layer solved again."""
    check_editable(clf)
    _check_reason(reason)
    known = known_prototypes("ids", ids, range(clf.n_prototypes_), may_be_none=True)
    kept = np.array(sorted(known), dtype=int)
    table = clf.prototypes_
    bare = sorted(set(clf.classes_.tolist()) - set(table["class"].iloc[kept].tolist()))
    if bare:
        names = first_quoted(bare)
        raise ValueError(f"Keep a prototype of each class: none would be left of {names}.")
    activations = activations_of(clf, X, y)
    edited = copy.deepcopy(clf)
    edited.activations_ = activations.of_prototypes(torch.from_numpy(kept))
    keep_prototypes(edited, torch.from_numpy(kept))
    self_matches = clf.self_matches if X is None else "keep"  # X need not hold the sources
    LastLayer(clf.lambda_l1_, self_matches, clf.last_layer_result_.lambda_l2).solve(edited)
    edited.__dict__.pop("last_layer_path_", None)
    if X is not None:  # another edit without images would take them for the training images
        del edited.activations_
    edited.renew_table(kept)
    gone = table.drop(index=table.index[kept])
    edited.edits_ = pd.concat([_edits(clf), _record(clf, gone, action, reason)], ignore_index=True)
    return edited


def _taught(
    clf: ProtoPNetClassifier,
    ids: ArrayLike,
    X: Any,
    y: ArrayLike,
    forbidden: bool,
    reason: str | dict[int, str],
    k: int,
    weight: float,
    epochs: int | None,
    **fit_params: Any,
) -> ProtoPNetClassifier:
    """Find patches that prototypes show, and train with them as forbidden or encouraged."""
    check_editable(clf)
    _check_reason(reason)
    COUNT.check(k=k)
    NON_NEGATIVE.check(weight=weight)
    optional(integer(0)).check(epochs=epochs)
    chosen = sorted(known_prototypes("ids", ids, range(clf.n_prototypes_)))
    X, y = unpacked(X, y)
    table, taught = clf.prototypes_, copy.deepcopy(clf)
    dataset = taught._training_data(Images(X), y, **fit_params, first=False).dataset
    taught.prepare_processor()
    data = FitData(taught, dataset, None)
    concepts = find_concepts(taught, dataset, data.train_features, chosen, k, forbidden, weight)
    reasons = {j: reason if isinstance(reason, str) else reason.get(j, "") for j in chosen}
    if forbidden:
        avoided = ForbiddenPatches(concepts, taught.module_, taught.batch_size)
        for j in avoided.among(taught.module_):
            reasons.setdefault(j, "its patch is one of those that are forbidden")
        restart_prototypes(taught, data, list(reasons), avoided)
    del data, dataset  # partial_fit reads the images itself
    known = clf.concepts_
    taught.concepts_ = concepts if known is None else known.with_others(concepts)
    if epochs is not None:
        taught.joint_epochs = epochs
    taught.partial_fit(X, y, **fit_params)
    taught.joint_epochs = clf.joint_epochs
    action = "forbid" if forbidden else "encourage"
    record = _record(clf, table.iloc[sorted(reasons)], action, reasons)
    taught.edits_ = pd.concat([_edits(clf), record], ignore_index=True)
    return taught


def activations_of(
    clf: ProtoPNetClassifier, X: Any = None, y: Any = None, views: bool = True
) -> Activations:
    """Return the activations of the training images that `fit` kept, or those of other images."""
    X, y = unpacked(X, y)
    if (X is None) != (y is None):
        raise ValueError("X and y go together: give both, or neither.")
    if X is None:
        if not hasattr(clf, "activations_"):
            raise ValueError("This classifier holds no activations of training images: pass X, y.")
        return clf.activations_
    activations = clf.activations_of(X, y, views=views)[0]
    bare = np.setdiff1d(np.arange(len(clf.classes_)), activations.y.cpu().numpy())
    if len(bare):
        raise ValueError(
            f"X has no image of {clf.classes_[bare].tolist()}: the last layer would never predict "
            "them. Give images of all classes."
        )
    return activations


def own_among_nearest(activations: Activations, k: int) -> np.ndarray:
    """Return, for each prototype, how many of its k most similar images are of its class, (m,)."""
    nearest = activations.g.argsort(dim=0, descending=True, stable=True)[:k]  # (k, m)
    return (activations.y[nearest] == activations.owner).sum(0).cpu().numpy()


def _check_reason(reason: Any) -> None:
    if not isinstance(reason, (str, dict)):
        raise TypeError(f"reason must be a str, or a dict of one for each id; got {reason!r}.")


def _edits(clf: ProtoPNetClassifier) -> pd.DataFrame:
    return getattr(clf, "edits_", pd.DataFrame(columns=EDIT_COLUMNS))


def _record(
    clf: ProtoPNetClassifier, gone: pd.DataFrame, action: str, reason: str | dict[int, str]
) -> pd.DataFrame:
    """Return the rows of `edits_` for the prototypes that go."""
    steps = _edits(clf)["step"]
    why = [reason if isinstance(reason, str) else reason.get(j, "") for j in gone["prototype"]]
    about = gone[["prototype", "class", "source", "source_index"]]
    step = 1 + (int(steps.max()) if len(steps) else 0)
    return about.assign(step=step, action=action, reason=why)[EDIT_COLUMNS]
