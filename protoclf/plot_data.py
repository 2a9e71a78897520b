"""What plots ask of a classifier and of its tables: chosen prototypes, their maps and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from protoclf.canvas import View
from protoclf.explanation import BOX
from protoclf.fitted import check_classifier, check_columns, known_prototypes
from protoclf.images import Images
from protoclf.localization import activation_boxes, covered_cells, upsample
from protoclf.rules import COUNT, optional

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_MOST, _MOST_OF_CLASS = 40, 4  # prototypes in a picture that nobody asked to be larger
_SHARPEST = 400  # pixels of a heat map's side
_NEAREST_COLUMNS = ["prototype", "class", "rank", "sample", "similarity", *BOX]


def chosen_prototypes(
    clf: ProtoPNetClassifier, label: Any, prototypes: ArrayLike | None, top: int | None
) -> pd.DataFrame:
    """Return rows of ``clf.prototypes_``: of a class, of given ids, or of all classes."""
    check_classifier(clf)
    check_one_of(label, prototypes)
    optional(COUNT).check(top=top)
    table = clf.prototypes_
    by_weight = table.sort_values("weight", ascending=False, kind="stable")
    if prototypes is not None:
        chosen = table.iloc[known_prototypes("prototypes", prototypes, table["prototype"])]
    elif label is not None:
        class_index(clf, label)
        chosen = by_weight[by_weight["class"] == label]
    else:
        chosen = by_weight if top is not None else _some_of_each_class(by_weight)
        chosen = chosen.sort_values("class", kind="stable")
    if top is not None:
        order = chosen.sort_values("weight", ascending=False, kind="stable").groupby("class")
        chosen = chosen[order.cumcount()[chosen.index] < top]
    if chosen.empty:
        raise ValueError(f"label {label!r} has no prototypes.")
    return chosen.reset_index(drop=True)


def _some_of_each_class(table: pd.DataFrame) -> pd.DataFrame:
    """Return at most 4 rows of each class, its first, and at most 40, as even as can be."""
    place = table.groupby("class").cumcount().to_numpy()  # in its class, from 0
    order = place.argsort(kind="stable")
    return table.iloc[order[place[order] < _MOST_OF_CLASS][:_MOST]]


def class_index(clf: ProtoPNetClassifier, label: Any) -> int:
    """Return the index of a class label."""
    labels = clf.classes_.tolist()
    if label not in labels:
        raise ValueError(f"label must be one of {labels}; got {label!r}.")
    return labels.index(label)


def check_one_of(label: Any, prototypes: Any) -> None:
    """Refuse two ways to choose prototypes at once."""
    if label is not None and prototypes is not None:
        raise ValueError("Give label or prototypes, not both.")


def source_images(clf: ProtoPNetClassifier, prototypes: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the training images of prototypes by `source_index`; each is read once."""
    index = clf.prototypes_["source_index"].tolist()
    of = {index[j]: j for j in prototypes}
    return {i: clf.source_image(j) for i, j in of.items()}


def heat_maps(
    clf: ProtoPNetClassifier,
    X: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    sample: Sequence[int],
    prototype: Sequence[int],
) -> tuple[list[View], np.ndarray]:
    """Return similarity maps, and boxes (k, 4), of k pairs of an image of X and a prototype.

    Maps are upsampled over the part that the model sees, to at most 400 pixels a side. Boxes are
    of the high activation, in pixels of the image.
    """
    maps = clf.similarity_maps(X)  # (n, m, H', W')
    pairs = torch.from_numpy(np.asarray(maps)[sample, prototype])  # (k, H', W')
    cells = covered_cells(pairs, clf.module_.prototype_size)  # (k, H, W)
    regions = clf.shown_region(sizes)  # (n, 4)
    views = []
    for one, i in zip(cells, sample, strict=True):
        x0, y0, x1, y1 = regions[i].tolist()
        height, width = (min(_SHARPEST, round(side)) for side in (y1 - y0, x1 - x0))
        views.append(View(upsample(one[None], height, width)[0].numpy(), (x0, y0, x1, y1)))
    boxes = activation_boxes(cells, clf.preprocessing_.image_size)  # (k, 4)
    chosen = np.asarray(sizes)[sample]
    return views, clf.preprocessing_.to_original_pixels(boxes.numpy(), chosen)


def nearest_rows(
    table: pd.DataFrame, prototypes: ArrayLike | None, top: int | None
) -> pd.DataFrame:
    """Return the rows of a table of nearest patches that are to be drawn, in their order.

    A column "agrees" says whether an image is of the prototype's class, where it has a label.
    """
    optional(COUNT).check(top=top)
    what = "one of nearest patches, as from nearest_patches(clf, X)"
    check_columns("table", table, _NEAREST_COLUMNS, what)
    if table.empty:
        raise ValueError("table must hold a row at least; it is empty.")
    if prototypes is None:
        known = _some_of_each_class(table.drop_duplicates("prototype"))
        ids = known.sort_values("class", kind="stable")["prototype"].tolist()
    else:
        ids = known_prototypes("prototypes", prototypes, table["prototype"], "the table")
    order = {j: i for i, j in enumerate(ids)}
    rows = table[table["prototype"].isin(ids)]
    rows = rows if top is None else rows[rows["rank"] <= top]
    if rows.empty:
        raise ValueError(f"No row of the table has a rank up to top={top}.")
    rows = rows.assign(order=rows["prototype"].map(order)).sort_values(["order", "rank"])
    rows = rows.drop(columns="order").reset_index(drop=True)
    label = rows["label"] if "label" in rows else pd.Series(None, rows.index, dtype=object)
    agrees = pd.array((label == rows["class"]).to_numpy(bool), dtype="boolean")
    return rows.assign(label=label, agrees=pd.Series(agrees).mask(label.isna()))


def prototypes_of(table: pd.DataFrame, clf: ProtoPNetClassifier) -> pd.DataFrame:
    """Return the rows of ``clf.prototypes_`` that a table of nearest patches is about."""
    named = table.drop_duplicates("prototype")
    ids = known_prototypes("table", named["prototype"], range(clf.n_prototypes_))
    found = clf.prototypes_.iloc[ids].reset_index(drop=True)
    if found["class"].tolist() != named["class"].tolist():
        raise ValueError(
            "The table was made with another classifier: its prototypes are of other classes. Find "
            "the nearest patches again with this one."
        )
    return found


def images_of(table: pd.DataFrame, X: Any) -> Images:
    """Return the images that the rows of a table of nearest patches are parts of."""
    if X is None:
        if "path" not in table or table["path"].isna().any():
            raise ValueError("X must be given: the table does not hold the paths of all images.")
        return Images(table["path"].tolist())
    images, last = Images(X), int(table["sample"].max())
    if last >= len(images):
        raise ValueError(
            f"X must be the images that the table counts; it has {len(images)}, and the table "
            f"names sample {last}."
        )
    return images.take(table["sample"].to_numpy(dtype=int))
