"""Pictures of sheets, prototypes and training, with matplotlib (``pip install protoclf[plot]``).

The figure of Chen et al., NeurIPS 2019, section 2.4: what looks like what, and what that adds up
to. Numbers are computed by the classifier and held by a Display, which only draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from protoclf.canvas import (
    View,
    draw_box,
    draw_heat,
    draw_scale,
    draw_title,
    draw_view,
    lettering,
    new_figure,
    room_for,
    scale,
    short,
    shrink,
    tiles,
    value_range,
    view,
)
from protoclf.curves import HistoryDisplay, LastLayerPathDisplay, plot_history, plot_last_layer_path
from protoclf.explanation import BOX, SOURCE_BOX
from protoclf.fitted import check_classifier, known_prototypes
from protoclf.gallery import (
    NearestPatchesDisplay,
    PrototypesDisplay,
    plot_nearest_patches,
    plot_prototypes,
)
from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.logits import probabilities, ranking
from protoclf.messages import similarity_in_words
from protoclf.plot_data import (
    check_one_of,
    class_index,
    heat_maps,
    source_images,
)
from protoclf.rules import COUNT, optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from protoclf.classifier import ProtoPNetClassifier

__all__ = [
    "ExplanationDisplay",
    "HistoryDisplay",
    "LastLayerPathDisplay",
    "NearestPatchesDisplay",
    "PrototypesDisplay",
    "SimilarityMapsDisplay",
    "plot_explanation",
    "plot_history",
    "plot_last_layer_path",
    "plot_nearest_patches",
    "plot_prototypes",
    "plot_similarity_maps",
]

_TILE = 1.9  # inches
_LETTERS = 0.8  # inches: what is written beside a tile is so high
_PANEL = 2.1  # inches
_PANELS = 4  # side by side

# The scoring sheet ------------------------------------------------------------------------------


def plot_explanation(
    clf: ProtoPNetClassifier,
    image: Any,
    classes: str | ArrayLike = "top2",
    top: int = 4,
    figure: Figure | None = None,
    *,
    attribution: str = "upsampled",
    percentile: float = 95,
) -> ExplanationDisplay:
    """Draw the scoring sheet of one image: its parts, what they look like, and the sums.

    The colours of each similarity map run from its own lowest value to its own highest (a map
    whose values are alike has one colour). So a map shows where the image is similar, and the
    number beside it shows how similar.
    `plot_similarity_maps` has one scale for all maps.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    image : path, PIL image or array (H, W, 3) or (H, W)
    classes : {"top2", "predicted", "all"} or labels, default="top2"
        Classes to draw side by side.
    top : int, default=4
        Number of prototypes to draw for each class; the others are summed up.
    figure : matplotlib Figure, optional
        Where to draw; a new figure by default. In a smaller figure letters are smaller.
    attribution, percentile
        How boxes in the image are found: as in `ProtoPNetClassifier.explain`.

    Returns
    -------
    ExplanationDisplay
        Holds the sheet, the pictures and, in `figure_`, the drawing.

    Raises
    ------
    ValueError
        If classes or top cannot be used, or no prototype contributes to these classes.
    """
    check_classifier(clf)
    _check_one_image(image)
    sheet = clf.explain([image], classes, top, attribution=attribution, percentile=percentile)
    if sheet.empty:
        raise ValueError(f"No prototype contributes to classes {classes!r}: there is no sheet.")
    shown = sheet["prototype"].dropna().astype(int).unique().tolist()
    picture = np.asarray(Images([image]).open(0))
    heats, _ = heat_maps(clf, [image], [picture.shape[1::-1]], [0] * len(shown), shown)
    images, index = source_images(clf, shown), clf.prototypes_["source_index"]
    display = ExplanationDisplay(
        sheet=sheet,
        verdicts=_verdicts(clf, image, classes, sheet),
        image=picture,
        region=tuple(clf.shown_region([picture.shape[1::-1]])[0].tolist()),
        maps={j: heat.pixels for j, heat in zip(shown, heats, strict=True)},
        sources={j: images[index[j]] for j in shown},
    )
    return display.plot(figure)


def _check_one_image(image: Any) -> None:
    many = isinstance(image, Sequence) and not isinstance(image, str) and len(image) != 1
    if many or getattr(image, "ndim", 0) > 3:
        raise ImageError(
            f"image must be one image; got a {type(image).__name__} of {len(image)}. Draw them one "
            "by one, image=X[0]."
        )


def _verdicts(
    clf: ProtoPNetClassifier, image: Any, classes: Any, sheet: pd.DataFrame
) -> pd.DataFrame:
    """Return class, verdict, logit and probability of each class to draw, in their order."""
    logits = clf._logits([image])  # (1, C); probabilities may all be 0 but one
    order = ranking(logits[0], np.isin(clf.classes_, sheet["class"].unique())).tolist()
    verdict = dict(zip(order, ("predicted", "rival"), strict=False))
    asked = clf._class_indices(classes)
    if isinstance(asked, str):
        asked = {"predicted": order[:1], "top2": order[:2], "all": sorted(order)}[asked]
    return pd.DataFrame(
        {
            "class": clf.classes_[asked],
            "verdict": [verdict.get(c, "") for c in asked],
            "logit": logits[0, asked],
            "probability": probabilities(logits)[0, asked],
        }
    )


@dataclass(repr=False)
class ExplanationDisplay:
    """The scoring sheet of one image, ready to draw.

    Attributes
    ----------
    sheet : DataFrame
        Rows of one sample, as from `ProtoPNetClassifier.explain`.
    verdicts : DataFrame
        One row for each class to draw: class, verdict ("predicted", "rival", the second by
        its logit, or ""), logit and probability.
    image : ndarray of shape (H, W, 3), uint8
    region : (x0, y0, x1, y1)
        The part of the image that the model sees, in its pixels.
    maps : dict of int to ndarray of shape (h, w)
        For each prototype its similarity map, upsampled over the region.
    sources : dict of int to ndarray of shape (H, W, 3)
        For each prototype the training image that it is a part of.
    figure_ : matplotlib Figure
        The drawing, after `plot`.
    """

    sheet: pd.DataFrame
    verdicts: pd.DataFrame
    image: np.ndarray
    region: tuple[float, float, float, float]
    maps: dict[int, np.ndarray]
    sources: dict[int, np.ndarray]

    def plot(self, figure: Figure | None = None) -> ExplanationDisplay:
        """Draw each class as a block of rows, blocks side by side.

        In a figure smaller than a new one would be, letters are smaller too.
        """
        groups = dict(iter(self.sheet.groupby("class", sort=False)))
        sheets = [groups.get(label, self.sheet[:0]) for label in self.verdicts["class"]]
        n_lines = max(1, *(int(rows["prototype"].notna().sum()) for rows in sheets))
        width = len(sheets) * 4.35 * _TILE
        if figure is None:
            figure = new_figure(width, n_lines * (_TILE + 0.1) + 1.6)
        zoom = min(1.0, room_for(figure, width, n_lines * _LETTERS + 1.6))
        with lettering(figure):
            parts = figure.subfigures(1, len(sheets), squeeze=False)[0]
            verdicts = self.verdicts.to_dict("records")
            for part, verdict, rows in zip(parts, verdicts, sheets, strict=True):
                room = {"above": 0.1 * zoom, "top": 0.8 * zoom, "bottom": 0.5 * zoom}
                axes = tiles(part, (n_lines, 1, 4), **room)[:, 0]
                self._draw_class(part, axes, verdict, rows)
                shrink(part, zoom)
        self.figure_ = figure
        return self

    def _draw_class(
        self, part: SubFigure, axes: np.ndarray, verdict: dict[Any, Any], rows: pd.DataFrame
    ) -> None:
        name = ": ".join(filter(None, (verdict["verdict"], short(verdict["class"], 40))))
        draw_title(
            part,
            f"{name}\nlogit {verdict['logit']:.2f}, probability {verdict['probability']:.2f}",
            fontweight="bold" if verdict["verdict"] == "predicted" else "normal",
        )
        if rows.empty:
            self._write(axes[0, 0], 0.5, "center", "No prototype speaks for or against it.")
            return
        titles = "this image", "least to most similar", "looks like"
        for axis, title in zip(axes[0], titles, strict=False):
            axis.set_title(title, fontsize=10)
        matches = rows[rows["prototype"].notna()]
        for line, (_, row) in zip(axes, matches.iterrows(), strict=False):
            self._draw_match(line, row, int(row["prototype"]))
        for _, row in rows[rows["prototype"].isna()].iterrows():
            others = f"all others together\n{_sum(row)}"
            self._write(axes[len(matches) - 1, 3], -0.1, "top", others)

    def _draw_match(self, axes: np.ndarray, row: pd.Series, prototype: int) -> None:
        picture, heat = view(self.image), View(self.maps[prototype], self.region)
        draw_view(axes[0], picture)
        draw_box(axes[0], row[BOX])
        draw_heat(axes[1], picture, heat, value_range([heat]))
        draw_view(axes[2], view(self.sources[prototype]))
        draw_box(axes[2], row[SOURCE_BOX])
        similarity = similarity_in_words(row["similarity"])
        text = (
            f"{similarity} × {row['weight']:+.2f}\n{_sum(row)}\n"
            f"prototype {prototype}\nof {short(row['source_class'], 22)}"
        )
        self._write(axes[3], 0.5, "center", text)

    def _write(self, axis: Axes, y: float, va: str, text: str) -> None:
        axis.text(0, y, text, va=va, fontsize=10, transform=axis.transAxes)


def _sum(row: pd.Series) -> str:
    return f"= {row['contribution']:+.2f}"


# Similarity maps --------------------------------------------------------------------------------


def plot_similarity_maps(
    clf: ProtoPNetClassifier,
    image: Any,
    prototypes: ArrayLike | None = None,
    label: Any = None,
    top: int = 6,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> SimilarityMapsDisplay:
    """Draw where an image is similar to some prototypes, with one colour scale for all maps.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    image : path, PIL image or array (H, W, 3) or (H, W)
    prototypes : array-like of int, optional
        Draw these, in this order.
    label : class label, optional
        Draw the prototypes that contribute most to this class; by default the predicted class.
    top : int, default=6
        Number of prototypes to draw for the class.
    axes : matplotlib Axes, or several, optional
        Where to draw, one for each prototype. By default new ones, after one that shows the image
        itself.

    Returns
    -------
    SimilarityMapsDisplay
        Holds the maps, the numbers and, in `axes_` and `figure_`, the drawing.

    Raises
    ------
    ValueError
        If prototypes, label or top cannot be used, both prototypes and label are given, the axes
        are too few or too many, or no prototype contributes to the class.
    """
    check_classifier(clf)
    optional(COUNT).check(top=top)
    check_one_of(label, prototypes)
    _check_one_image(image)
    picture = np.asarray(Images([image]).open(0))
    similarity = clf.similarities([image]).numpy()[0]  # (m,)
    label = clf.predict([image]).tolist()[0] if label is None else label
    weight = clf.coef_[class_index(clf, label)]  # (m,)
    contribution = weight * similarity
    if prototypes is None:
        order = np.argsort(-contribution, kind="stable")[:top]
        ids = order[contribution[order] > 0].tolist()
        if not ids:
            raise ValueError(
                f"No prototype contributes to label {label!r}; name prototypes to be drawn."
            )
    else:
        ids = known_prototypes("prototypes", prototypes, range(clf.n_prototypes_))
    heats, boxes = heat_maps(clf, [image], [picture.shape[1::-1]], [0] * len(ids), ids)
    table = pd.DataFrame(
        {
            "prototype": ids,
            "class": clf.prototypes_["class"].to_numpy()[ids],
            "similarity": similarity[ids].astype(float),
            "weight": weight[ids].astype(float),
            "contribution": contribution[ids].astype(float),
            **dict(zip(BOX, boxes.T, strict=True)),
        }
    )
    maps = dict(zip(ids, heats, strict=True))
    return SimilarityMapsDisplay(table, view(picture), maps, label).plot(axes)


@dataclass(repr=False)
class SimilarityMapsDisplay:
    """Similarity maps of one image, ready to draw.

    Attributes
    ----------
    table : DataFrame
        One row a prototype: prototype, class, similarity, weight and contribution to `label`, and
        the box x0, y0, x1, y1, in pixels of the image.
    picture : view
        The image: (pixels, box), reduced where it is large.
    maps : dict of int to view
        For each prototype its similarity map, upsampled over the part that the model sees.
    label : class label
        The class that contributions are for.
    axes_ : ndarray of matplotlib Axes, shape (k,)
        One for each prototype, after `plot`.
    figure_ : matplotlib Figure
    """

    table: pd.DataFrame
    picture: View
    maps: dict[int, View]
    label: Any

    def plot(self, axes: Axes | Sequence[Axes] | np.ndarray | None = None) -> SimilarityMapsDisplay:
        """Draw a map over the grey image for each prototype."""
        panels = self._new_axes() if axes is None else np.atleast_1d(np.asarray(axes, object))
        panels = panels.ravel()
        n = len(self.table)
        if len(panels) != n:
            raise ValueError(f"axes must be {n}, one for each prototype; got {len(panels)}.")
        limits = value_range(self.maps.values())
        with lettering(*panels):
            for axis, row in zip(panels, self.table.to_dict("records"), strict=True):
                axis.set_axis_off()
                draw_heat(axis, self.picture, self.maps[row["prototype"]], limits)
                draw_box(axis, [row[side] for side in BOX])
                title = f"prototype {row['prototype']}\nof {short(row['class'])},\n"
                axis.set_title(f"{title}similarity {row['similarity']:.2f}", fontsize=9)
        figure = panels[0].figure
        if axes is None:
            draw_scale(figure.axes[0], limits)
        else:
            figure.colorbar(scale(limits), ax=panels.tolist(), label="similarity")
        self.axes_, self.figure_ = panels, figure
        return self

    def _new_axes(self) -> np.ndarray:
        n = len(self.table) + 1
        columns = min(n, _PANELS)
        lines = -(-n // columns)
        figure = new_figure(columns * 1.06 * _PANEL + 1, lines * (_PANEL + 0.6) + 0.2)
        axes = tiles(figure, (lines, 1, columns), above=0.6, right=0.75).ravel()
        draw_view(axes[0], self.picture)
        axes[0].set_title("this image", fontsize=9)
        return axes[1:n]
