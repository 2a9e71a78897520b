"""Scoring sheets in a notebook: a pandas Styler with the patches in it.

Needs Jinja2, as all of pandas' styles do: ``pip install "protoclf[report]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import PIL.Image

from protoclf.explanation import BOX, REST, SOURCE_BOX, UNREADABLE
from protoclf.fitted import check_columns
from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.messages import similarity_in_words
from protoclf.sheets import SHEET
from protoclf.thumbnails import thumbnail_of

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

    from protoclf.classifier import ProtoPNetClassifier

_NUMBERS = ["similarity", "weight", "contribution"]
_SHOWN = [
    *("sample", "class", "logit", "prototype", "prototype_class", *_NUMBERS, *BOX),
    *("source", "source_index", *SOURCE_BOX),
]


def style_sheet(
    clf: ProtoPNetClassifier, sheet: pd.DataFrame, X: Any = None, side: int = 72
) -> Styler:
    """Return a view of a sheet with the cropped patches beside the numbers.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        The classifier that made the sheet.
    sheet : DataFrame
        From `ProtoPNetClassifier.explain`; a few dozen rows at most, or the view gets heavy.
    X : images, optional
        What was explained; by default the images are read from the sheet's paths.
    side : int, default=72
        Longer side of the patches, in pixels, at most.

    Returns
    -------
    pandas Styler
        It shows itself in a notebook; ``to_html`` writes it. Similarities below 0 are marked
        "unlike".

    Raises
    ------
    ValueError
        If the sheet lacks columns, or has no paths and X is not given.
    """
    check_columns("sheet", sheet, _SHOWN if X is not None else ["path", *_SHOWN], SHEET)
    if X is None and sheet["path"].isna().any():
        raise ValueError("The sheet has no paths: pass the images as X.")
    pictures: dict[Any, PIL.Image.Image | None] = {}
    images = None if X is None else Images(X)
    parts, sources = [], []
    for row in sheet.to_dict("records"):
        if pd.isna(row["prototype"]):
            parts.append("")
            sources.append("")
            continue
        sample, j = row["sample"], int(row["prototype"])
        if sample not in pictures:
            one = Images([row["path"]]) if images is None else images.take([sample])
            pictures[sample] = one.open(0)
        source = ("source", row.get("member"), row["source_index"])
        if source not in pictures:
            pictures[source] = _source(clf, j)
        parts.append(_patch(pictures[sample], [row[name] for name in BOX], side))
        sources.append(_patch(pictures[source], [row[name] for name in SOURCE_BOX], side))
    shown = sheet[["sample", "class", "logit", "prototype"]].copy()
    shown["this part"], shown["looks like"] = parts, sources
    shown["of class"] = sheet["prototype_class"]
    shown[_NUMBERS] = sheet[_NUMBERS]
    largest = float(np.abs(sheet["contribution"]).max()) if len(sheet) else 1.0
    formats: dict[str, Any] = dict.fromkeys(["logit", *_NUMBERS], "{:.2f}")
    formats["similarity"] = similarity_in_words
    formats |= {"this part": _image("part of the image"), "looks like": _image("training patch")}
    unreadable = sheet["source"] == UNREADABLE
    shown["class"] = shown["class"].astype(object).mask(unreadable, UNREADABLE)
    return (
        shown.style.format(formats, escape="html", na_rep=REST)
        .format(na_rep="", subset=(unreadable, shown.columns[2:]))
        .bar(subset=["contribution"], align=0, vmin=-largest, vmax=largest, color="#9ecae1")
        .hide(axis="index")
    )


def _source(clf: ProtoPNetClassifier, prototype: int) -> PIL.Image.Image | None:
    """Return the training image of a prototype, where it is still to be found."""
    try:
        return PIL.Image.fromarray(clf.source_image(prototype))
    except ImageError:
        return None


def _patch(picture: PIL.Image.Image | None, box: list[Any], side: int) -> str:
    if picture is None:
        return ""
    x0, y0, x1, y1 = map(int, box)
    return thumbnail_of(picture.crop((x0, y0, x1, y1)), side).uri


def _image(alt: str) -> Any:
    return lambda uri: f'<img alt="{alt}" src="{uri}">' if uri else ""
