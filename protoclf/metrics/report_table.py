"""All metrics of a classifier in one table, each beside its random baseline, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.utils import _safe_indexing

from protoclf.explanation import BOX
from protoclf.fitted import check_classifier
from protoclf.images import Images
from protoclf.labels import read_labels
from protoclf.metrics.baselines import random_prototypes
from protoclf.metrics.bootstrap import bootstrap_interval
from protoclf.metrics.catalogue import METRICS, Data, Metric, Row
from protoclf.metrics.object_metrics import Masks, PartMasks
from protoclf.progress import with_bar
from protoclf.rules import COUNT, SEED, SHARE
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def interpretability_report(
    clf: ProtoPNetClassifier,
    X: Any,
    y: ArrayLike,
    parts: pd.DataFrame | None = None,
    masks: Masks | None = None,
    *,
    metrics: Sequence[str] | None = None,
    draw_from: tuple[Any, ArrayLike] | None = None,
    n_perturbed: int = 100,
    n_resamples: int = 1000,
    level: float = 0.95,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return a table of all metrics that the data allow, with intervals and random baselines.

    The baseline is the same metric for `random_prototypes`: the same backbone, with prototypes at
    random patches. Intervals are from `bootstrap_interval`, over images or prototypes.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X, y : images and labels
        As in its `fit`; new images, as a rule.
    parts : DataFrame, optional
        Where parts are, for consistency, stability and part purity: see
        `protoclf.metrics.PartLabels`.
    masks : sequence of arrays, optional
        Masks of the objects, for pointing and object coverage: see `protoclf.metrics.pointing`. By
        default, where `parts` has boxes, all that lies in any box of an image.
    metrics : sequence of str, optional
        Names of the rows to compute; all by default.
    draw_from : (X, y), optional
        Images and labels from which the baseline draws its patches, and on which it solves its
        last layer: best of all, those of the fit. By default the images that are measured; the
        baseline's patches are then parts of these images.
    n_perturbed : int, default=100
        Number of images, drawn at random, for the metrics that run the network many times for each
        image: box deletion, deletion and insertion, location and activation change.
    n_resamples, level
        As in `bootstrap_interval`.
    random_state : int, default=0

    Returns
    -------
    DataFrame
        One row for each metric, by name:

        - value, low, high : the score and its interval
        - baseline, baseline_low, baseline_high : the same of the baseline; missing for the
          accuracy without `draw_from`, since the baseline's last layer has seen the labels
        - better : "higher" or "lower"
        - unit, n, baseline_n : what the interval is over, "sample" or "prototype", and how many of
          them; a "model" has no interval. Images in which nothing speaks for the predicted class
          have no boxes, so the baseline's number can be far smaller

    Notes
    -----
    What the rows are the means of:

    - accuracy
    - global size : `global_size`
    - sparsity : `size` of `sparsity`
    - distinctness : `distinct` of `distinctness`
    - class purity : `protoclf.nearest_patches.purity` of the ten nearest images of X
    - rank stability, JPEG or noise : `kept` of `rank_stability`
    - box deletion : ``similarity_drop - control_similarity_drop`` of `deletion_score`
    - deletion, insertion : gains over random order, of `deletion_insertion`
    - location change, activation change : of `spatial_misalignment`
    - consistency, stability, part purity : of `consistency`, `stability` and `part_purity`
    - pointing : `inside` of `pointing`
    - object coverage : `coverage` of `object_coverage`
    """
    SHARE.check(level=level)
    COUNT.check(n_resamples=n_resamples, n_perturbed=n_perturbed)
    SEED.check(random_state=random_state)
    check_classifier(clf)
    if not (draw_from is None or (isinstance(draw_from, tuple | list) and len(draw_from) == 2)):
        raise ValueError("draw_from must be a pair: images and their labels.")
    X, y = unpacked(X, y)
    labels = read_labels(y, len(Images(X)))
    if masks is None and parts is not None and set(BOX) <= set(parts):
        masks = PartMasks(clf, X, parts)
    data = Data(X, labels, parts, masks, random_state)
    wanted = chosen(metrics, data)
    few = _some(data, n_perturbed)
    source = (X, labels) if draw_from is None else draw_from
    models = {"": clf, "baseline_": random_prototypes(clf, *source, random_state=random_state)}
    rows: dict[str, dict[str, Any]] = {}
    for metric in with_bar(wanted, "metrics", clf.verbose):
        unseen = draw_from is not None or not metric.needs_unseen
        for prefix in ("", "baseline_") if unseen else ("",):
            table = metric.compute(models[prefix], few if metric.many_runs else data)
            for row in metric.rows:
                if metrics is None or row.name in metrics:
                    found = _scored(row, metric, table, prefix, n_resamples, level, random_state)
                    rows.setdefault(row.name, {}).update(found)
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")
    result = result.rename(columns={"baseline_value": "baseline"})
    baseline = ["baseline", "baseline_low", "baseline_high"]
    columns = ["value", "low", "high", *baseline, "better", "unit", "n", "baseline_n"]
    return result.reindex(columns=columns).astype({"baseline_n": "Int64"})


def score(
    clf: ProtoPNetClassifier, X: Any, y: ArrayLike, name: str, n_perturbed: int, random_state: int
) -> float:
    """Return the value of one row of the report, minus it where lower is better."""
    check_classifier(clf)
    X, y = unpacked(X, y)
    data = Data(X, read_labels(y, len(Images(X))), None, None, random_state)
    (metric,) = chosen([name], data)
    (row,) = (row for row in metric.rows if row.name == name)
    table = metric.compute(clf, _some(data, n_perturbed) if metric.many_runs else data)
    value = float(row.value(table).astype(float).mean())
    return value if row.better == "higher" else -value


def chosen(names: Sequence[str] | None, data: Data) -> list[Metric]:
    """Return the metrics that make the named rows; all that the data allow where None is named.

    Raises
    ------
    ValueError
        If a name is unknown, or what it needs is missing.
    """
    missing = {name for name in ("parts", "masks") if getattr(data, name) is None}
    if names is None:
        return [metric for metric in METRICS if metric.needs not in missing]
    known = {row.name: metric for metric in METRICS for row in metric.rows}
    if isinstance(names, str) or set(names) - set(known):
        raise ValueError(f"metrics must be a list of names among {list(known)}; got {names!r}.")
    lacking = [name for name in names if known[name].needs in missing]
    if lacking:
        raise ValueError(f"{lacking[0]!r} needs {known[lacking[0]].needs}, which are not given.")
    return [m for m in METRICS if any(row.name in names for row in m.rows)]


def _some(data: Data, n: int) -> Data:
    """Return n of the images, drawn at random, without parts and masks; all if there are fewer."""
    if len(data.y) <= n:
        return data
    draw = np.random.default_rng(data.random_state).permutation(len(data.y))[:n]
    index = np.sort(draw)
    X = _safe_indexing(data.X, index)
    return data._replace(X=X, y=data.y[index], parts=None, masks=None)


def _scored(
    row: Row,
    metric: Metric,
    table: pd.DataFrame,
    prefix: str,
    n_resamples: int,
    level: float,
    random_state: int,
) -> dict[str, Any]:
    """Return value and interval of a row, named with the prefix, and what it is over."""
    values = row.value(table).astype(float)
    groups = table[metric.unit]
    low, high = bootstrap_interval(
        values, groups, level=level, n_resamples=n_resamples, random_state=random_state
    )
    found = {"value": values.mean(), "low": low, "high": high}
    found["n"] = groups[values.notna()].nunique()
    found = {f"{prefix}{name}": number for name, number in found.items()}
    return found if prefix else found | {"better": row.better, "unit": metric.unit}
