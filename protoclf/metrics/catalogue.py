"""The metrics of `interpretability_report`: what each computes, and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from protoclf.features import distance_batches
from protoclf.metrics.curves import deletion_insertion
from protoclf.metrics.faithfulness import deletion_score
from protoclf.metrics.misalignment import spatial_misalignment
from protoclf.metrics.object_metrics import object_coverage, pointing
from protoclf.metrics.part_metrics import consistency, stability
from protoclf.metrics.prototype_metrics import distinctness, global_size, sparsity
from protoclf.metrics.purity import part_purity
from protoclf.metrics.ranks import rank_stability
from protoclf.metrics.streams import codes_of, opened
from protoclf.nearest_patches import nearest_patches, purity


class Data(NamedTuple):
    """What metrics are computed on; `parts`, a DataFrame, and `masks` may be None."""

    X: Any
    y: np.ndarray
    parts: Any
    masks: Any
    random_state: int


class Row(NamedTuple):
    """One line of the report.

    Attributes
    ----------
    name : str
    value : callable
        From the table that a metric's function returns to one value a row of it.
    better : {"higher", "lower"}
    """

    name: str
    value: Callable[[pd.DataFrame], pd.Series]
    better: str


class Metric(NamedTuple):
    """A function and the lines of the report that its table makes.

    Attributes
    ----------
    compute : callable
        From a classifier and `Data` to a table.
    rows : tuple of Row
    unit : {"sample", "prototype", "model"}
        The column of the table that says what is drawn together for an interval.
    needs : {"", "parts", "masks"}
        What of `Data` must not be None.
    many_runs : bool
        Whether it runs the network many times for each image.
    needs_unseen : bool
        Whether it says nothing on images that the last layer was solved on.
    """

    compute: Callable[[Any, Data], pd.DataFrame]
    rows: tuple[Row, ...]
    unit: str
    needs: str = ""
    many_runs: bool = False
    needs_unseen: bool = False


def _column(name: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda table: table[name]


def _difference(a: str, b: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda table: table[a] - table[b]


def _where(change: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda table: table["kept"].where(table["change"] == change)


def _right(clf: Any, data: Data) -> pd.DataFrame:
    batches = distance_batches(clf, opened(clf, data.X), bool(clf.verbose))
    with torch.no_grad():
        codes = [clf.module_.logits(d).argmax(1).cpu().numpy() for _, d, _ in batches]
    right = np.concatenate(codes) == codes_of(clf, data.y, len(data.y))
    return pd.DataFrame({"sample": np.arange(len(right)), "right": right.astype(float)})


def _class_purity(clf: Any, data: Data) -> pd.DataFrame:
    return purity(nearest_patches(clf, data.X, 10, data.y)).reset_index()


def _global_size(clf: Any, data: Data) -> pd.DataFrame:
    return pd.DataFrame({"model": [0], "size": [global_size(clf)]})


METRICS: tuple[Metric, ...] = (
    Metric(_right, (Row("accuracy", _column("right"), "higher"),), "sample", needs_unseen=True),
    Metric(_global_size, (Row("global size", _column("size"), "lower"),), "model"),
    Metric(
        lambda clf, data: sparsity(clf, data.X),
        (Row("sparsity", _column("size"), "lower"),),
        "sample",
    ),
    Metric(
        lambda clf, data: distinctness(clf),
        (Row("distinctness", _column("distinct"), "higher"),),
        "prototype",
    ),
    Metric(_class_purity, (Row("class purity", _column("purity"), "higher"),), "prototype"),
    Metric(
        lambda clf, data: rank_stability(clf, data.X, random_state=data.random_state),
        (
            Row("rank stability, JPEG", _where("jpeg"), "higher"),
            Row("rank stability, noise", _where("noise"), "higher"),
        ),
        "sample",
    ),
    Metric(
        lambda clf, data: deletion_score(clf, data.X, random_state=data.random_state),
        (
            Row(
                "box deletion",
                _difference("similarity_drop", "control_similarity_drop"),
                "higher",
            ),
        ),
        "sample",
        many_runs=True,
    ),
    Metric(
        lambda clf, data: deletion_insertion(clf, data.X, random_state=data.random_state),
        (
            Row("deletion", _difference("control_deletion", "deletion"), "higher"),
            Row("insertion", _difference("insertion", "control_insertion"), "higher"),
        ),
        "sample",
        many_runs=True,
    ),
    Metric(
        lambda clf, data: spatial_misalignment(clf, data.X, random_state=data.random_state),
        (
            Row("location change", _column("location_change"), "lower"),
            Row("activation change", _column("activation_change"), "lower"),
        ),
        "sample",
        many_runs=True,
    ),
    Metric(
        lambda clf, data: consistency(clf, data.X, data.y, data.parts),
        (Row("consistency", _column("consistent"), "higher"),),
        "prototype",
        "parts",
    ),
    Metric(
        lambda clf, data: stability(
            clf, data.X, data.y, data.parts, random_state=data.random_state
        ),
        (Row("stability", _column("stable"), "higher"),),
        "prototype",
        "parts",
    ),
    Metric(
        lambda clf, data: part_purity(clf, data.X, data.parts),
        (Row("part purity", _column("purity"), "higher"),),
        "prototype",
        "parts",
    ),
    Metric(
        lambda clf, data: pointing(clf, data.X, data.masks),
        (Row("pointing", _column("inside"), "higher"),),
        "sample",
        "masks",
    ),
    Metric(
        lambda clf, data: object_coverage(clf, data.X, data.masks),
        (Row("object coverage", _column("coverage"), "higher"),),
        "sample",
        "masks",
    ),
)
