"""Curves: loss and accuracy along a fit, and along the penalty of the last layer.

Drawn with matplotlib; a Display holds the numbers. `protoclf.plotting` has all plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from protoclf.canvas import lettering, new_figure, short
from protoclf.fitted import check_classifier, check_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = "#0072b2", "#d55e00"  # which colour-blind people tell apart
_LINE, _LETTER = 0.16, 0.085  # inches, of text at 8 points
_ROWS_OF_STAGES = {"projection": "v", "last layer": "D"}  # stages of one row, and their markers
_PATH_COLUMNS = ["lambda_l1", "train_accuracy", "accuracy", "accuracy_std", "n_nonzero"]


def plot_history(clf_or_history: Any, axes: Axes | None = None) -> HistoryDisplay:
    """Draw loss and validation accuracy along the stages of a fit.

    Parameters
    ----------
    clf_or_history : ProtoPNetClassifier, or history
        One that was fitted, maybe not to the end, or its attribute ``history``.
    axes : matplotlib Axes, optional
        Where to draw; new ones by default.

    Returns
    -------
    HistoryDisplay
        Holds the table and, in `axes_` and `figure_`, the drawing.

    Raises
    ------
    ValueError
        If there is no history, or no row of it has a loss.
    """
    history = getattr(clf_or_history, "history_", clf_or_history)
    if isinstance(history, BaseEstimator):
        check_classifier(history)
    if not isinstance(history, Sequence) or not history:
        given = type(clf_or_history).__name__
        raise ValueError(
            f"clf_or_history must hold a row at least; this {given} has none. Call 'fit' first."
        )
    rows: list[Mapping[str, Any]] = list(history)
    names = ["train_loss", "valid_loss", "valid_acc"]
    columns = {n: pd.to_numeric(pd.Series([r.get(n) for r in rows], dtype=object)) for n in names}
    table = pd.DataFrame({"row": np.arange(1, len(rows) + 1), **columns})
    table.insert(1, "stage", [str(r.get("stage", "")) for r in rows])
    if table[["train_loss", "valid_loss"]].isna().all(axis=None):
        raise ValueError("clf_or_history has no loss: no row holds train_loss or valid_loss.")
    return HistoryDisplay(table).plot(axes)


@dataclass(repr=False)
class HistoryDisplay:
    """Losses and accuracies along the stages of a fit, ready to draw.

    Attributes
    ----------
    table : DataFrame
        One row for each row of the history: row, counted from 1, stage, train_loss, valid_loss
        and valid_acc, NaN where the history has none.
    axes_ : tuple of matplotlib Axes
        Losses and, where there are any, accuracies, after `plot`.
    figure_ : matplotlib Figure
    """

    table: pd.DataFrame

    def plot(self, axes: Axes | None = None) -> HistoryDisplay:
        """Draw lines, epochs in named bands, and projections and last layers as markers.

        The legend is below the axes; leave room for it below axes that you give.
        """
        from matplotlib.ticker import MaxNLocator

        own = axes is None
        if axes is None:
            axes = new_figure(6.4, 4, "constrained").add_subplot()
        lines = [
            *axes.plot(*self._points("train_loss"), ".-", color=_ink(axes), label="training loss"),
            *axes.plot(*self._points("valid_loss"), ".--", color=_BLUE, label="validation loss"),
        ]
        axes.set(xlabel="row of the history", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = [axes]
        if self.table["valid_acc"].notna().any():
            twin = axes.twinx()
            accuracy = twin.plot(*self._points("valid_acc"), ".:", color=_ORANGE)
            accuracy[0].set_label("validation accuracy (right)")
            lines += accuracy
            twin.set(ylabel="accuracy", ylim=(0, 1.15), yticks=np.linspace(0, 1, 6))
            drawn.append(twin)
        handles: list[Any] = [line for line in lines if np.size(line.get_xdata())]
        handles += self._mark_stages(drawn, handles)
        with lettering(axes.figure):
            handles += self._draw_bands(axes)
            if own:
                axes.figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
            else:
                _legend_below(axes, handles)
        self.axes_, self.figure_ = tuple(drawn), axes.figure
        return self

    def _points(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and values; nothing where there is no value at all."""
        values = self.table[column]
        shown = self.table if values.notna().any() else self.table.iloc[:0]
        return shown["row"].to_numpy(), shown[column].to_numpy()

    def _mark_stages(self, axes: list[Axes], lines: list[Any]) -> list[Any]:
        """Mark rows that are no epochs on every line; return a marker of each kind."""
        kinds, face = [], axes[0].get_facecolor()
        for stage, marker in _ROWS_OF_STAGES.items():
            there = (self.table["stage"] == stage).to_numpy()
            style: dict[str, Any] = {"ls": "", "marker": marker, "ms": 7, "mfc": face}
            for line in lines if there.any() else []:
                x, y = line.get_data()
                line.axes.plot(x[there], y[there], color=line.get_color(), **style)
            if there.any():
                kinds += axes[0].plot([], [], color=_ink(axes[0]), label=stage, **style)
        return kinds

    def _draw_bands(self, axes: Axes) -> list[Any]:
        """Shade each run of epochs of one stage and name it; return those without room for that."""
        n, stages = len(self.table), self.table["stage"]
        inches = axes.get_window_extent().width / axes.figure.dpi / n  # of a row
        named, nameless, upright = set(), {}, False
        for _, run in self.table.groupby((stages != stages.shift()).cumsum()):
            stage, start, stop = (
                run["stage"].iloc[0],
                run["row"].min() - 0.5,
                run["row"].max() + 0.5,
            )
            if stage in _ROWS_OF_STAGES or not stage:
                continue
            shade = {"color": _ink(axes), "alpha": 0.15 if stage == "warm-up" else 0.06}
            nameless[stage] = axes.axvspan(start, stop, **shade, lw=0, zorder=0, label=short(stage))
            room = (stop - start) * inches
            if room < _LINE:
                continue
            flat = room > _LETTER * len(stage)
            name = axes.text((start + stop) / 2, 0.985, short(stage), fontsize=8, va="top")
            name.set(transform=axes.get_xaxis_transform(), ha="center", rotation=0 if flat else 90)
            named.add(stage)
            upright |= not flat
        low, high = axes.get_ylim()
        top = high + (0.25 if upright else 0.15) * (high - low)
        axes.set(xlim=(0.5, n + 0.5), ylim=(low, top))
        return [band for stage, band in nameless.items() if stage not in named]


def _ink(axes: Axes) -> Any:
    """Return the colour of text on these axes, which stands out on a dark style too."""
    return axes.xaxis.label.get_color()


def _legend_below(axes: Axes, handles: list[Any]) -> None:
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -0.45, axes.figure.dpi_scale_trans)  # inches
    style: dict[str, Any] = {"loc": "upper center", "borderaxespad": 0, "ncols": 2, "fontsize": 8}
    axes.legend(handles=handles, bbox_to_anchor=(0.5, 0), bbox_transform=below, **style)


def plot_last_layer_path(path: pd.DataFrame, axes: Axes | None = None) -> LastLayerPathDisplay:
    """Draw accuracy and sparsity against the penalty of the last layer.

    Parameters
    ----------
    path : DataFrame
        From `ProtoPNetClassifier.last_layer_path`, or the attribute ``last_layer_path_``.
    axes : matplotlib Axes, optional
        Where to draw; new ones by default.

    Returns
    -------
    LastLayerPathDisplay
        Holds the table and, in `axes_` and `figure_`, the drawing.

    Raises
    ------
    ValueError
        If path is no such table, or has no rows.
    """
    check_columns("path", path, _PATH_COLUMNS, "the table of last_layer_path")
    if path.empty:
        raise ValueError("path must be the table of last_layer_path; it lacks rows.")
    return LastLayerPathDisplay(path).plot(axes)


@dataclass(repr=False)
class LastLayerPathDisplay:
    """The path of the last layer's penalty, ready to draw.

    Attributes
    ----------
    path : DataFrame
    axes_ : tuple of two matplotlib Axes
        Accuracy, and the number of weights, after `plot`.
    figure_ : matplotlib Figure
    """

    path: pd.DataFrame

    def plot(self, axes: Axes | None = None) -> LastLayerPathDisplay:
        """Draw accuracies with lines, held-out ones with a band, and weights on a second axis."""
        if axes is None:
            axes = new_figure(6, 3.6, "constrained").add_subplot()
        path, x = self.path, self.path["lambda_l1"]
        axes.plot(x, path["train_accuracy"], ":", color=_ink(axes), label="training images")
        axes.plot(x, path["accuracy"], "o-", color=_BLUE, label="images left out")
        low, high = (path["accuracy"] + sign * path["accuracy_std"] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=_BLUE, alpha=0.2)
        axes.set(xlabel="lambda_l1", ylabel="accuracy")
        if (x > 0).all():
            axes.set_xscale("log")
        else:  # a logarithm has no place for 0
            axes.set_xscale("symlog", linthresh=x[x > 0].min() if x.any() else 1)
        twin = axes.twinx()
        twin.plot(x, path["n_nonzero"], "s--", color=_ORANGE, label="weights (right)")
        twin.set(ylabel="weights other than 0", ylim=(0, None))
        lines = [*axes.get_lines(), *twin.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower left")
        self.axes_, self.figure_ = (axes, twin), axes.figure
        return self
