"""How much there is to read: prototypes of a decision, of the whole model, and repeated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from protoclf.duplicates import distances_within_classes, repeated
from protoclf.features import distance_batches
from protoclf.fitted import check_classifier
from protoclf.metrics.streams import opened, paths_of
from protoclf.rules import NON_NEGATIVE, SHARE

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_ROUNDING = 1e-9  # of a sum of contributions


@torch.no_grad()
def sparsity(clf: ProtoPNetClassifier, X: Any, *, share: float = 0.9) -> pd.DataFrame:
    """Return how many prototypes carry most of each decision.

    A decision's contributions are similarity times weight for the predicted class. Its size is
    the smallest number of prototypes whose contributions, in absolute values, sum to `share` of
    all of them. (If none is negative, the sum of all is the logit.) The score is the mean of
    `size`, at least 0. The smaller it is, the less there is to read.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    share : float, default=0.9

    Returns
    -------
    DataFrame
        One row for each image:

        - sample, path, class : the predicted class
        - size
        - n_rows : number of prototypes with a contribution: the rows of its scoring sheet

    Notes
    -----
    Other sizes of a decision have been published, which do not weigh a prototype by what it adds:
    PIP-Net's (Nauta et al., CVPR 2023) is near to `n_rows`, with contributions above 1e-3;
    QuanProto's local size counts prototypes that are at least a tenth as similar as the most
    similar one, whatever their weights.
    """
    SHARE.check(share=share)
    dataset, module = opened(clf, X), clf.module_
    classes, sizes, rows = [], [], []
    for _, distance, _ in distance_batches(clf, dataset, bool(clf.verbose)):
        c = module.logits(distance).argmax(1)  # (n,)
        parts = (module.activations(distance) * module.last_layer.weight[c]).abs().cpu().double()
        descending = parts.sort(1, descending=True).values.cumsum(1)  # (n, m)
        wanted = (share - _ROUNDING) * descending[:, -1:]
        size = (descending < wanted).sum(1) + (descending[:, -1] > 0)
        classes.append(c.cpu().numpy())
        sizes.append(size.cpu().numpy())
        rows.append((parts > 0).sum(1).cpu().numpy())
    return pd.DataFrame(
        {
            "sample": np.arange(len(dataset)),
            "path": paths_of(dataset),
            "class": clf.classes_[np.concatenate(classes)],
            "size": np.concatenate(sizes),
            "n_rows": np.concatenate(rows),
        }
    )


def global_size(clf: ProtoPNetClassifier) -> int:
    """Return the number of prototypes that at least one class uses, at most m.

    A class uses a prototype if its weight is not 0, for or against the class. QuanProto counts
    only weights above 1e-3, for a class.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    """
    check_classifier(clf)
    return int((clf.coef_ != 0).any(0).sum())


@torch.no_grad()
def distinctness(clf: ProtoPNetClassifier, *, max_distance: float = 1e-6) -> pd.DataFrame:
    """Return which prototypes repeat another one of their class.

    Going through the prototypes in order, one is a duplicate if its squared distance to an earlier
    one of its class, itself no duplicate, is at most `max_distance`. The score is the share of
    prototypes that are distinct, above 0 and at most 1, where 1 is best: 1 minus the share of
    duplicates.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    max_distance : float, default=1e-6
        Squared distance as latents are compared: for cosines, 2 - 2 cos. The default finds the
        same patch twice; a larger value also finds similar patches.

    Returns
    -------
    DataFrame
        One row for each prototype:

        - prototype, class
        - nearest, distance : the nearest other prototype of its class, and the squared distance
          to it; missing where there is none
        - distinct : 1 or 0

    Notes
    -----
    The rule is that of `protoclf.editing.merge_duplicates`, which leaves as many prototypes as are
    distinct.
    """
    NON_NEGATIVE.check(max_distance=max_distance)
    check_classifier(clf)
    m = clf.n_prototypes_
    nearest, distance, distinct = np.full(m, -1), np.full(m, np.nan), np.ones(m)
    for mine, between in distances_within_classes(clf.module_):
        distinct[mine] = repeated(between, max_distance) < 0
        if len(mine) > 1:
            np.fill_diagonal(between, np.inf)
            nearest[mine] = mine[between.argmin(1)]
            distance[mine] = between.min(1)
    table = clf.prototypes_[["prototype", "class"]].copy()
    table["nearest"] = pd.Series(nearest, dtype="Int64").mask(nearest < 0)
    return table.assign(distance=distance, distinct=distinct)
