"""Prototypes in pictures: what they are parts of, and what is most similar to them.

Drawn with matplotlib; a Display holds the numbers. `protoclf.plotting` has all plots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    prototype_name,
    room_for,
    short,
    shrink,
    surroundings,
    tiles,
    value_range,
    view,
)
from protoclf.explanation import BOX
from protoclf.fitted import check_classifier
from protoclf.plot_data import (
    chosen_prototypes,
    heat_maps,
    images_of,
    nearest_rows,
    prototypes_of,
    source_images,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from protoclf.classifier import ProtoPNetClassifier

_TILE, _LARGE_TILE = 1.3, 1.5  # inches
_AT_ONCE = 16  # full training images in memory
_LOWEST = 0.6  # inches of a tile, before letters become smaller
_BLOCKS = 4  # prototypes side by side
_PAD = 6  # points between a title and its tile
_SIGNS = {True: ("✓ ", "-"), False: ("✗ ", "--")}  # whether labels agree: sign and line style


def plot_prototypes(
    clf: ProtoPNetClassifier,
    label: Any = None,
    prototypes: ArrayLike | None = None,
    top: int | None = None,
    figure: Figure | SubFigure | None = None,
) -> PrototypesDisplay:
    """Draw prototypes: the training image of each, the part of it, and the similarity to it.

    Each prototype has three pictures: the training image with the prototype's box, that box
    enlarged, and the similarity of the image to the prototype, with one colour scale for all.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    label : class label, optional
        Draw the prototypes of this class, the highest weight first; by default those of all
        classes, class by class.
    prototypes : array-like of int, optional
        Draw these, in this order, in place of a class.
    top : int, optional
        Draw at most this many prototypes of each class, those with the highest weights. Without
        `top`, a drawing of all classes has at most 4 of each, and at most 40 in all.
    figure : matplotlib Figure or SubFigure, optional
        Where to draw; a new figure by default. In a smaller figure letters are smaller.

    Returns
    -------
    PrototypesDisplay
        Holds the rows of ``clf.prototypes_``, the pictures and, in `figure_`, the drawing.

    Raises
    ------
    ValueError
        If label, prototypes or top cannot be used, or both label and prototypes are given.
    """
    table = chosen_prototypes(clf, label, prototypes, top)
    display = PrototypesDisplay(table, {}, {}, {}, clf.n_prototypes_)
    indices = table["source_index"].unique()
    for first in range(0, len(indices), _AT_ONCE):  # full pictures are not kept
        index = indices[first : first + _AT_ONCE]
        _add_prototypes(display, clf, table[table["source_index"].isin(index)])
    return display.plot(figure)


def _add_prototypes(
    display: PrototypesDisplay, clf: ProtoPNetClassifier, rows: pd.DataFrame
) -> None:
    ids, index = rows["prototype"].tolist(), rows["source_index"].tolist()
    images = source_images(clf, ids)
    place = {i: k for k, i in enumerate(images)}
    sizes = [image.shape[1::-1] for image in images.values()]
    heats, _ = heat_maps(clf, list(images.values()), sizes, [place[i] for i in index], ids)
    wholes = {i: view(image) for i, image in images.items()}
    for j, i, box, heat in zip(ids, index, rows[BOX].to_numpy(), heats, strict=True):
        display.pictures[j], display.maps[j] = wholes[i], heat
        display.crops[j] = view(images[i], box)


@dataclass(repr=False)
class PrototypesDisplay:
    """Prototypes and the training images that they are parts of, ready to draw.

    Views are pairs (pixels, box): the part of the training image that they show, or a map over
    it. Large ones are reduced.

    Attributes
    ----------
    table : DataFrame
        Rows of ``clf.prototypes_``, as drawn.
    pictures : dict of int to view
        For each prototype its training image.
    crops : dict of int to view
        For each prototype its box.
    maps : dict of int to view
        For each prototype the similarity of its training image, upsampled over what the model
        sees of it.
    n_prototypes : int
        Number of prototypes of the classifier.
    axes_ : ndarray of matplotlib Axes, shape (k, 3)
        Training image, box and similarity of each of k prototypes, after `plot`.
    figure_ : matplotlib Figure
    """

    table: pd.DataFrame
    pictures: dict[int, View]
    crops: dict[int, View]
    maps: dict[int, View]
    n_prototypes: int

    def plot(self, figure: Figure | SubFigure | None = None) -> PrototypesDisplay:
        """Draw blocks of three tiles, at most 4 side by side; each class starts a line.

        In a figure smaller than a new one would be, letters are smaller too.
        """
        if figure is None:
            lines = self._lines(_BLOCKS)
            figure = new_figure(*_inches(lines, _TILE))
        else:
            layouts = map(self._lines, range(1, _BLOCKS + 1))
            lines = max(layouts, key=lambda lines: room_for(figure, *_inches(lines, _LOWEST)))
        zoom = min(1.0, room_for(figure, *_inches(lines, _LOWEST)))
        part: Any = figure.subfigures()
        with lettering(part):
            shape = len(lines), max(map(len, lines)), 3
            grid = tiles(part, shape, above=0.3 * zoom, top=0.3 * zoom, right=0.75 * zoom)
            axes = np.array(
                [a for g, line in zip(grid, lines, strict=True) for a in g[: len(line)]]
            )
            limits = value_range(self.maps.values())
            for line, (_, row) in zip(axes, self.table.iterrows(), strict=True):
                self._draw_prototype(line, row, limits, zoom)
            draw_title(part, self._title())
        shrink(part, zoom)
        draw_scale(axes[0, 0], limits, zoom)
        self.axes_, self.figure_ = axes, figure
        return self

    def _lines(self, most: int) -> list[range]:
        """Return which rows of the table share a line: those of one class, where it is in one."""
        label = self.table["class"]
        runs = self.table.groupby((label != label.shift()).cumsum()).size().tolist()
        if max(runs) == 1 or len(runs) > label.nunique():
            runs = [len(label)]
        widest = -(-max(runs) // -(-max(runs) // most))  # as even as can be
        stops = np.cumsum(runs).tolist()
        return [
            range(first, min(first + widest, stop))
            for start, stop in zip([0, *stops], stops, strict=False)
            for first in range(start, stop, widest)
        ]

    def _title(self) -> str:
        shown = f"{len(self.table)} of {self.n_prototypes} prototypes"
        return f"{shown}: training image, box, similarity"

    def _draw_prototype(
        self, axes: np.ndarray, row: pd.Series, limits: tuple[float, float], zoom: float
    ) -> None:
        j = row["prototype"]
        draw_view(axes[0], self.pictures[j])
        draw_box(axes[0], row[BOX])
        draw_view(axes[1], self.crops[j])
        draw_heat(axes[2], self.pictures[j], self.maps[j], limits)
        draw_box(axes[2], row[BOX])
        title = f"{prototype_name(j, row['class'])}, weight {row['weight']:.2f}"
        axes[1].set_title(title, fontsize=9, pad=_PAD * zoom)


def _inches(lines: list[range], tile: float) -> tuple[float, float]:
    """Return width and height of a figure of blocks, with letters of full size."""
    return max(map(len, lines)) * (3.3 * _TILE) + 1, len(lines) * (tile + 0.3) + 0.5


def plot_nearest_patches(
    table: pd.DataFrame,
    clf: ProtoPNetClassifier | None = None,
    X: Any = None,
    prototypes: ArrayLike | None = None,
    top: int | None = None,
    figure: Figure | SubFigure | None = None,
) -> NearestPatchesDisplay:
    """Draw the patches of images that are most similar to prototypes.

    Each patch is drawn in its surroundings, with its box. If the table has labels, a solid frame
    and ✓ mark images of the prototype's class, and a dashed frame and ✗ mark other images.

    Parameters
    ----------
    table : DataFrame
        From `protoclf.nearest_patches.nearest_patches`, or of the same columns. Without labels
        nothing is marked.
    clf : ProtoPNetClassifier, optional
        A fitted one. With it, the training images that the prototypes are parts of are drawn too.
    X : images, optional
        The images that `sample` counts; by default images are read from `path`.
    prototypes : array-like of int, optional
        Draw these, in this order; by default the first of each class in the table, class by class,
        at most 4 of each and at most 40 in all.
    top : int, optional
        Draw the patches up to this rank.
    figure : matplotlib Figure or SubFigure, optional
        Where to draw; a new figure by default. In a smaller figure letters are smaller.

    Returns
    -------
    NearestPatchesDisplay
        Holds the rows, the pictures and, in `figure_`, the drawing.

    Raises
    ------
    ValueError
        If the table lacks columns or rows, a prototype is not in it, the table is of another
        classifier, or X is too short, or missing where the table has no paths.
    ImageError
        If an image cannot be read.
    """
    known, table = table, nearest_rows(table, prototypes, top)
    images = images_of(table, X)
    views: dict[int, View] = {}
    for _, rows in table.groupby("sample"):  # each image is decoded once
        image = np.asarray(images.open(rows.index[0]))
        boxes = rows[BOX].to_numpy()
        views |= {i: surroundings(image, b) for i, b in zip(rows.index, boxes, strict=True)}
    n_prototypes = known["prototype"].nunique()
    display = NearestPatchesDisplay(table, [views[i] for i in table.index], n_prototypes)
    if clf is not None:
        check_classifier(clf)
        display.sources = prototypes_of(table, clf)
        ids = display.sources["prototype"].tolist()
        boxes = display.sources[BOX].to_numpy()
        display.source_views = [
            surroundings(clf.source_image(j), b) for j, b in zip(ids, boxes, strict=True)
        ]
    return display.plot(figure)


@dataclass(repr=False)
class NearestPatchesDisplay:
    """Patches that are most similar to prototypes, ready to draw.

    Views are pairs (pixels, box): the part of an image that they show. Large ones are reduced.

    Attributes
    ----------
    table : DataFrame
        The rows as drawn, with a column more: agrees, whether the image's label is the
        prototype's class, missing where there is no label.
    views : list of views
        For each row the patch in its surroundings.
    n_prototypes : int
        Number of prototypes in the table that they were chosen from.
    sources : DataFrame or None
        Rows of ``clf.prototypes_``, where there is a classifier.
    source_views : list of views
        For each of them the prototype's patch in its surroundings.
    axes_ : ndarray of matplotlib Axes, shape (k, n)
        A row for each of k prototypes, the training image first, where there is a classifier;
        after `plot`.
    figure_ : matplotlib Figure
    """

    table: pd.DataFrame
    views: list[View]
    n_prototypes: int
    sources: pd.DataFrame | None = None
    source_views: list[View] = field(default_factory=list)

    def plot(self, figure: Figure | SubFigure | None = None) -> NearestPatchesDisplay:
        """Draw a row of tiles for each prototype.

        In a figure smaller than a new one would be, letters are smaller too.
        """
        groups = list(self.table.groupby("prototype", sort=False))
        first = 0 if self.sources is None else 1
        columns = first + max(len(rows) for _, rows in groups)
        judged = bool(self.table["agrees"].notna().any())
        below, top = 0.4 if judged else 0.22, 0.3
        width = max(columns, 3) * 1.06 * _LARGE_TILE + 0.2
        heights = [len(groups) * (h + 0.3 + below) + top + 0.2 for h in (_LARGE_TILE, _LOWEST)]
        if figure is None:
            figure = new_figure(width, heights[0])
        zoom = min(1.0, room_for(figure, width, heights[1]))
        room = {"above": 0.3 * zoom, "below": below * zoom, "top": top * zoom}
        part: Any = figure.subfigures()
        with lettering(part):
            axes = tiles(part, (len(groups), 1, columns), **room)[:, 0]
            what = "✓ of its class,  ✗ of another" if judged else "nearest patches"
            draw_title(part, f"{len(groups)} of {self.n_prototypes} prototypes:  {what}")
            for k, (line_of_axes, (_, rows)) in enumerate(zip(axes, groups, strict=True)):
                self._draw_source(line_of_axes[0], k, rows.iloc[0], zoom)
                for axis, i in zip(line_of_axes[first:], rows.index, strict=False):
                    self._draw_patch(axis, i)
        shrink(part, zoom)
        self.axes_, self.figure_ = axes, figure
        return self

    def _draw_source(self, axis: Axes, k: int, row: pd.Series, zoom: float) -> None:
        title = prototype_name(row["prototype"], row["class"])
        if self.sources is not None:
            source = self.sources.iloc[k]
            title += f", weight {source['weight']:.2f}"
            draw_view(axis, self.source_views[k])
            draw_box(axis, source[BOX])
            _caption(axis, "training image")
        axis.set_title(title, fontsize=9, loc="left", pad=_PAD * zoom)

    def _draw_patch(self, axis: Axes, i: int) -> None:
        row = self.table.loc[i]
        draw_view(axis, self.views[i])
        draw_box(axis, row[BOX])
        caption = f"{row['similarity']:.2f}"
        if not pd.isna(row["agrees"]):
            sign, style = _SIGNS[bool(row["agrees"])]
            caption += f"\n{sign}{short(row['label'], 20)}"
            axis.set_axis_on()
            for spine in axis.spines.values():
                spine.set(linestyle=style, linewidth=2)
        _caption(axis, caption)


def _caption(axis: Axes, text: str) -> None:
    axis.text(0.5, -0.05, text, fontsize=8, ha="center", va="top", transform=axis.transAxes)
