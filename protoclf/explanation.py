"""The scoring sheet, the table of prototypes, and where in an image a prototype was found.

Chen et al., NeurIPS 2019, sections 2.3 and 2.4. Everything here reads what the forward pass
computed. N images, C classes, m prototypes, H x W cells; boxes are half-open (x0, y0, x1, y1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.image_dataset import ImageDataset
from protoclf.images import names_column
from protoclf.localization import pair_boxes
from protoclf.network import ProtoPNet
from protoclf.rules import ATTRIBUTION, COUNT, PERCENTILE, optional

BOX = ["x0", "y0", "x1", "y1"]
FIELD = [f"rf_{side}" for side in BOX]
SOURCE_BOX = [f"source_{side}" for side in BOX]
SHEET_COLUMNS = [
    *("sample", "path", "class", "is_predicted", "logit", "probability"),
    *("rank", "prototype", "prototype_class", "similarity", "weight", "contribution"),
    *("row", "col", *BOX, *FIELD),
    *("source", "source_index", "source_class", *SOURCE_BOX),
]
EDIT_COLUMNS = ["step", "action", "prototype", "class", "source", "source_index", "reason"]
_NUMBERS = ("logit", "probability", "similarity", "weight")
REST = "(rest)"
UNREADABLE = "(unreadable)"


def check_options(top: Any, attribution: Any, percentile: Any) -> None:
    """Refuse options of `explain` that cannot be used."""
    optional(COUNT).check(top=top)
    ATTRIBUTION.check(attribution=attribution)
    PERCENTILE.check(percentile=percentile)


@torch.no_grad()
def explain_batch(
    module: ProtoPNet,
    z: Tensor,
    classes: str | list[int],
    image_size: int,
    percentile: float,
    top: int | None = None,
) -> pd.DataFrame:
    """Return what the sheet says of images by their latent maps (n, D, H, W), in its order.

    `classes` is "predicted", "top2", "all" or class indices. Classes in the rows are indices, and
    boxes are in pixels of the model input. What is behind the `top` rows of a class is summed up in
    one more, which is not named yet, and has zeros for a box.
    """
    logits, distance, cell = module.compare(z)  # (n, C), (n, m), (n, m)
    g, weight = module.activations(distance), module.last_layer.weight  # (n, m), (C, m)
    chosen = chosen_classes(logits, classes)  # (n, c)
    sample, slot, prototype = torch.nonzero(g[:, None] * weight[chosen], as_tuple=True)
    c, place = chosen[sample, slot], cell[sample, prototype]
    width = z.shape[3] - module.prototype_size[1] + 1
    columns = {
        "sample": sample,
        "class": c,
        "is_predicted": c == logits.argmax(1)[sample],
        "logit": logits[sample, c],
        "probability": logits.softmax(1)[sample, c],
        "prototype": prototype,
        "similarity": g[sample, prototype],
        "weight": weight[c, prototype],
        "row": place // width,
        "col": place % width,
    }
    rows = {name: values.cpu().numpy() for name, values in columns.items()}
    rows |= {name: rows[name].astype(float) for name in _NUMBERS}
    rows["contribution"] = rows["similarity"] * rows["weight"]
    # samples as in X, of each its likeliest class first, of each class its highest contribution
    order = np.lexsort(
        (rows["prototype"], -rows["contribution"], rows["class"], -rows["logit"], rows["sample"])
    )
    rows = {name: values[order] for name, values in rows.items()}
    rows["rank"] = _ranks(rows["sample"], rows["class"])
    shown = rows["rank"] <= (top or len(order))
    at = torch.from_numpy(order[shown]).to(z.device)
    boxes = np.zeros((len(order), 4))
    found = pair_boxes(module, z, sample[at], prototype[at], image_size, percentile)
    boxes[shown] = found.cpu().numpy()
    sheet = pd.DataFrame(rows | dict(zip(BOX, boxes.T, strict=True)))
    return sheet if top is None else with_sum_of_rest(sheet, top)


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """Return 1, 2, ... for the rows of each group, which are next to one another and share keys."""
    first = np.any([np.diff(key, prepend=-1) != 0 for key in keys], axis=0)
    return np.arange(1, len(first) + 1) - np.flatnonzero(first)[first.cumsum() - 1]


def chosen_classes(logits: Tensor, classes: str | list[int]) -> Tensor:
    """Return the class indices (n, c) to explain for each sample, by the logits (n, C)."""
    n, n_classes = logits.shape
    if classes == "predicted":
        return logits.argmax(1, keepdim=True)
    if classes == "top2":
        return logits.argsort(dim=1, descending=True, stable=True)[:, :2]
    indices = list(range(n_classes)) if classes == "all" else classes
    return torch.tensor(indices, device=logits.device).expand(n, -1)


def scoring_sheet(
    rows: pd.DataFrame,
    dataset: ImageDataset,
    fields: np.ndarray,
    class_names: np.ndarray,
    prototypes: pd.DataFrame,
) -> pd.DataFrame:
    """Return the scoring sheet of a data set: names for indices, and pixels of the originals.

    `rows` are those of `explain_batch`, their samples numbered as in the data set, and `fields`
    (k, 4) their receptive fields, in pixels of the model input.
    """
    sample = rows["sample"].to_numpy()
    preprocessing, sizes = dataset.preprocessing, dataset.sizes(sample)  # 0 where unreadable
    boxes = preprocessing.to_original_pixels(rows[BOX].to_numpy(), sizes)
    fields = preprocessing.to_original_pixels(fields, sizes)
    paths = dataset.images.paths
    owners = prototypes.set_index("prototype").loc[rows["prototype"]].set_axis(rows.index)
    of_class = owners["class"]  # a column, which keeps its type where there is no row
    sheet = rows.assign(
        path=None if paths is None else names_column(paths[i] for i in sample),
        prototype_class=of_class,
        source=owners["source"],
        source_index=owners["source_index"].to_numpy(),
        source_class=of_class,
        **{"class": pd.Series(class_names).array[rows["class"].to_numpy()]},
        **dict(zip([*BOX, *FIELD], [*boxes.T, *fields.T], strict=True)),
    )
    sheet[SOURCE_BOX] = owners[BOX].to_numpy()
    return sheet[SHEET_COLUMNS]


def with_sum_of_rest(sheet: pd.DataFrame, top: int) -> pd.DataFrame:
    """Sum up all rows behind the `top` of each class in the first of them; drop the others."""
    hidden = sheet["rank"] > top
    total = sheet["contribution"].where(hidden).groupby([sheet["sample"], sheet["class"]])
    sheet = sheet.assign(contribution=sheet["contribution"].where(~hidden, total.transform("sum")))
    shown = sheet["rank"] <= top + 1
    return sheet[shown].reset_index(drop=True)


def with_rest_named(sheet: pd.DataFrame, top: int) -> pd.DataFrame:
    """Name the rows behind the `top` of their class "(rest)"; keep only what is about the class."""
    rest = sheet["rank"] > top
    about_class = ["sample", "path", "class", "is_predicted", "logit", "probability"]
    about_match = sheet.columns.difference([*about_class, "rank", "contribution"])
    sheet = _with_missing_values(sheet, about_match)
    sheet[about_match] = sheet[about_match].mask(rest)
    sheet.loc[rest, "source"] = REST
    return sheet


def without_answer(
    sheet: pd.DataFrame, samples: list[int], paths: Sequence[str] | None = None
) -> pd.DataFrame:
    """Leave one row for each of these samples: it has no class and no number.

    Samples without a row get one, with the path that they have in `paths`.
    """
    if not samples:
        return sheet
    keys = ["sample", "path"]
    sheet = _with_missing_values(sheet, sheet.columns.difference(keys))
    rowless = sorted(set(samples) - set(sheet["sample"]))
    if rowless:
        names = [None if paths is None else paths[i] for i in rowless]
        more = pd.DataFrame({"sample": rowless, "path": names_column(names)})
        more = more.reindex(columns=sheet.columns).astype(sheet.dtypes)
        sheet = pd.concat([sheet, more]).sort_values("sample", kind="stable", ignore_index=True)
    first = ~sheet.duplicated("sample")
    bad = sheet["sample"].isin(samples)
    sheet = sheet[first | ~bad].reset_index(drop=True)
    bad = sheet["sample"].isin(samples)
    sheet[sheet.columns.difference(keys)] = sheet[sheet.columns.difference(keys)].mask(bad)
    sheet.loc[bad, "source"] = UNREADABLE
    return sheet


def _with_missing_values(sheet: pd.DataFrame, columns: pd.Index) -> pd.DataFrame:
    """Let columns hold missing values beside integers, and beside True and False."""
    integers = sheet[columns].select_dtypes("integer").columns
    large = sheet[columns].select_dtypes("uint64").columns  # labels, perhaps beyond int64
    flags = sheet[columns].select_dtypes("bool").columns
    types = dict.fromkeys(integers, "Int64") | dict.fromkeys(large, "UInt64")
    return sheet.astype(types | dict.fromkeys(flags, "boolean"))


def prototype_table(
    owner: np.ndarray,
    class_names: np.ndarray,
    sources: dict[str, np.ndarray],
    paths: Mapping[int, str] | None,
    coef: np.ndarray,
    strongest_share: np.ndarray,
) -> pd.DataFrame:
    """Return one row a prototype: what it is a part of, and how it is used."""
    m = len(owner)
    image = sources["image"]
    return pd.DataFrame(
        {
            "prototype": np.arange(m),
            "class": class_names[owner],
            "source": names_column(str(i) if paths is None else paths[i] for i in image),
            "source_index": image,
            "row": sources["row"],
            "col": sources["col"],
            **{name: sources["box"][:, i] for i, name in enumerate(BOX)},
            "moved": sources["moved"],
            "weight": coef[owner, np.arange(m)].astype(float),
            "strongest_share": strongest_share,
        }
    )
