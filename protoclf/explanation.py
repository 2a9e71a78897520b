"""The scoring sheet, the table of prototypes, and where in an image a prototype was found.

Chen et al., NeurIPS 2019, sections 2.3 and 2.4. Everything here reads what the forward pass
computed. N images, C classes, m prototypes, H x W cells; boxes are half-open (x0, y0, x1, y1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.image_dataset import ImageDataset
from protoclf.images import names_column
from protoclf.localization import pair_boxes
from protoclf.network import ProtoPNet
from protoclf.receptive_field import BackboneGeometry
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
REST = "(rest)"
UNREADABLE = "(unreadable)"


class BatchExplanation(NamedTuple):
    """What the sheet says of one batch, a row for each (sample, class, prototype), in its order."""

    sample: np.ndarray
    class_index: np.ndarray
    prototype: np.ndarray
    is_predicted: np.ndarray
    logit: np.ndarray
    probability: np.ndarray
    similarity: np.ndarray
    weight: np.ndarray
    row: np.ndarray
    col: np.ndarray
    rank: np.ndarray
    box: np.ndarray


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
) -> BatchExplanation:
    """Explain images by their latent maps (n, D, H, W); boxes are in pixels of the model input.

    `classes` is "predicted", "top2", "all" or class indices. Rows that rank behind `top` have no
    box, but zeros.
    """
    logits, distance, cell = module.compare(z)  # (n, C), (n, m), (n, m)
    g, weight = module.activations(distance), module.last_layer.weight  # (n, m), (C, m)
    chosen = chosen_classes(logits, classes)  # (n, c)
    sample, slot, prototype = torch.nonzero(g[:, None] * weight[chosen], as_tuple=True)
    class_index = chosen[sample, slot]
    row, col = _row_col(cell[sample, prototype], z.shape[3] - module.prototypes.shape[3] + 1)
    values = {
        "sample": sample,
        "class_index": class_index,
        "prototype": prototype,
        "is_predicted": class_index == logits.argmax(1)[sample],
        "logit": logits[sample, class_index],
        "probability": logits.softmax(1)[sample, class_index],
        "similarity": g[sample, prototype],
        "weight": weight[class_index, prototype],
        "row": row,
        "col": col,
    }
    rows = {name: v.cpu().numpy() for name, v in values.items()}
    order, rank = _ranking(rows)
    shown = rank <= (top or len(rank))
    at = torch.from_numpy(order[shown]).to(z.device)
    boxes = pair_boxes(module, z, sample[at], prototype[at], image_size, percentile).cpu().numpy()
    box = np.zeros((len(rank), 4), boxes.dtype)
    box[shown] = boxes
    return BatchExplanation(**{name: v[order] for name, v in rows.items()}, rank=rank, box=box)


def chosen_classes(logits: Tensor, classes: str | list[int]) -> Tensor:
    """Return the class indices (n, c) to explain for each sample, by the logits (n, C)."""
    n, n_classes = logits.shape
    if classes == "predicted":
        return logits.argmax(1, keepdim=True)
    if classes == "top2":
        return logits.argsort(dim=1, descending=True, stable=True)[:, :2]
    indices = list(range(n_classes)) if classes == "all" else classes
    return torch.tensor(indices, device=logits.device).expand(n, -1)


def _row_col(cell: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return cell // width, cell % width


def _ranking(rows: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of a sheet's rows, and in that order the place of each in its class.

    Samples are as in X, their likeliest class comes first, and its highest contribution.
    """
    contribution = rows["similarity"].astype(float) * rows["weight"].astype(float)
    order = np.lexsort(
        (rows["prototype"], -contribution, rows["class_index"], -rows["logit"], rows["sample"])
    )
    group = pd.DataFrame({name: rows[name][order] for name in ("sample", "class_index")})
    return order, group.groupby(["sample", "class_index"]).cumcount().to_numpy() + 1


def sheet_rows(
    batch: BatchExplanation,
    first: int,
    dataset: ImageDataset,
    fields: np.ndarray,
    class_names: np.ndarray,
    prototypes: pd.DataFrame,
    top: int | None,
) -> pd.DataFrame:
    """Return the scoring sheet of a batch, whose first sample is number `first` of the data set.

    What is behind the `top` rows of a class is summed up in one more, which is not named yet.

    `fields` (k, 4) are the receptive fields of its rows, in pixels of the model input.
    """
    sample = batch.sample + first
    preprocessing, sizes = dataset.preprocessing, dataset.sizes(sample)  # 0 where unreadable
    boxes = preprocessing.to_original_pixels(batch.box, sizes)
    fields = preprocessing.to_original_pixels(fields, sizes)
    similarity, weight = batch.similarity.astype(float), batch.weight.astype(float)
    sheet = pd.DataFrame(
        {
            "sample": sample,
            "class": class_names[batch.class_index],
            "is_predicted": batch.is_predicted,
            "logit": batch.logit.astype(float),
            "probability": batch.probability.astype(float),
            "rank": batch.rank,
            "prototype": batch.prototype,
            "similarity": similarity,
            "weight": weight,
            "contribution": similarity * weight,
            "row": batch.row,
            "col": batch.col,
            **dict(zip(BOX, boxes.T, strict=True)),
            **dict(zip(FIELD, fields.T, strict=True)),
        }
    )
    paths = dataset.images.paths
    sheet["path"] = None if paths is None else names_column(paths[i] for i in sample)
    owners = prototypes.set_index("prototype").loc[batch.prototype]
    sheet["prototype_class"] = owners["class"].to_numpy()
    sheet["source"] = names_column(owners["source"])
    sheet["source_index"] = owners["source_index"].to_numpy()
    sheet["source_class"] = owners["class"].to_numpy()
    sheet[SOURCE_BOX] = owners[BOX].to_numpy()
    sheet = sheet[SHEET_COLUMNS]
    return sheet if top is None else with_sum_of_rest(sheet, top)


def receptive_fields(
    geometry: BackboneGeometry, batch: BatchExplanation, prototype_size: tuple[int, int]
) -> np.ndarray:
    """Return the pixels of the model input that each match of a batch sees, boxes (k, 4)."""
    return np.stack(geometry.cell_box(batch.row, batch.col, *prototype_size), axis=1)


def with_sum_of_rest(sheet: pd.DataFrame, top: int) -> pd.DataFrame:
    """Sum up all rows behind the `top` of each class in the first of them; drop the others."""
    hidden = sheet["rank"] > top
    total = sheet["contribution"].where(hidden).groupby([sheet["sample"], sheet["class"]])
    sheet = sheet.assign(contribution=sheet["contribution"].where(~hidden, total.transform("sum")))
    shown = (sheet["rank"] <= top + 1) | sheet["class"].isna()  # without an answer, no class
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
