"""Pictures of scoring sheets, with matplotlib (``pip install protoclf[plot]``).

The figure of Chen et al., NeurIPS 2019, section 2.4: what looks like what, and what that adds up
to. Numbers are computed by the classifier and held by a Display, which only draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from protoclf.images import Images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from protoclf.classifier import ProtoPNetClassifier

_CJK_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "AppleGothic")
_ROW, _COLUMN = 1.9, 1.9  # inches


def plot_explanation(
    clf: ProtoPNetClassifier,
    image: Any,
    classes: str | ArrayLike = "top2",
    top: int = 4,
    figure: Figure | None = None,
) -> ExplanationDisplay:
    """Draw the scoring sheet of one image.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    image : path, PIL image or array (H, W, 3) or (H, W)
    classes : {"top2", "predicted", "all"} or labels, default="top2"
        Classes to draw side by side.
    top : int, default=4
        Prototypes to draw for each class; the others are summed up.
    figure : matplotlib Figure, optional
        Where to draw; a new one by default.

    Returns
    -------
    ExplanationDisplay
        Holds the sheet, the pictures and, in `figure_`, the drawing.
    """
    images = Images([image])
    sheet = clf.explain([image], classes, top)
    shown = sheet["prototype"].dropna().astype(int).unique()
    maps = clf.similarity_maps([image], upsampled=True)
    picture = np.asarray(images.open(0))
    region = clf.shown_region([picture.shape[1::-1]])[0]
    display = ExplanationDisplay(
        sheet=sheet,
        image=picture,
        region=tuple(region.tolist()),
        maps={j: maps[0][j] for j in shown.tolist()},
        sources={j: clf.source_image(j) for j in shown.tolist()},
    )
    return display.plot(figure)


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
    """
    return LastLayerPathDisplay(path).plot(axes)


@dataclass
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
        from matplotlib import pyplot as plt

        if axes is None:
            _, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        path, x = self.path, self.path["lambda_l1"]
        axes.plot(x, path["train_accuracy"], ":", color="black", label="training images")
        axes.plot(x, path["accuracy"], "o-", color="#0072b2", label="images left out")
        low, high = (path["accuracy"] + sign * path["accuracy_std"] for sign in (-1, 1))
        axes.fill_between(x, low, high, color="#0072b2", alpha=0.2)
        axes.set(xscale="log", xlabel="lambda_l1", ylabel="accuracy")
        twin = axes.twinx()
        twin.plot(x, path["n_nonzero"], "s--", color="#d55e00", label="weights (right)")
        twin.set(ylabel="weights other than 0", ylim=(0, None))
        lines = [*axes.get_lines(), *twin.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower left")
        self.axes_, self.figure_ = (axes, twin), axes.figure
        return self


@dataclass
class ExplanationDisplay:
    """The scoring sheet of one image, ready to draw.

    Attributes
    ----------
    sheet : DataFrame
        Rows of one sample, as from `ProtoPNetClassifier.explain`.
    image : ndarray of shape (H, W, 3), uint8
    region : (x0, y0, x1, y1)
        The part of the image that the model sees, in its pixels.
    maps : dict of int to ndarray
        For each prototype its similarity map, upsampled to the region.
    sources : dict of int to ndarray of shape (H, W, 3)
        For each prototype the training image that it is a part of.
    figure_ : matplotlib Figure
        The drawing, after `plot`.
    """

    sheet: pd.DataFrame
    image: np.ndarray
    region: tuple[float, float, float, float]
    maps: dict[int, np.ndarray]
    sources: dict[int, np.ndarray]

    def plot(self, figure: Figure | None = None) -> ExplanationDisplay:
        """Draw each class as a block of rows, blocks side by side."""
        from matplotlib import pyplot as plt

        blocks = list(self.sheet.groupby("class", sort=False))
        n_rows = max(len(rows) for _, rows in blocks)
        with _fonts():
            if figure is None:
                size = (len(blocks) * 4.6 * _COLUMN, (n_rows + 0.9) * _ROW)
                figure = plt.figure(figsize=size, layout="constrained")
            parts = figure.subfigures(1, len(blocks), wspace=0.04, squeeze=False)[0]
            for part, (_, rows) in zip(parts, blocks, strict=True):
                self._draw_class(part, rows, n_rows)
            figure.canvas.draw()  # with these fonts
        self.figure_ = figure
        return self

    def _draw_class(self, part: Any, rows: pd.DataFrame, n_rows: int) -> None:
        first = rows.iloc[0]
        verdict = "predicted" if first["is_predicted"] else "rival"
        part.suptitle(
            f"{verdict}: {first['class']}\n"
            f"logit {first['logit']:.2f}, probability {first['probability']:.2f}",
            fontsize=12,
            fontweight="bold" if first["is_predicted"] else "normal",
        )
        axes = part.subplots(n_rows, 4, squeeze=False, width_ratios=[1, 1, 1, 1.15])
        for axis in axes.flat:
            axis.set_axis_off()
        for line, (_, row) in zip(axes, rows.iterrows(), strict=False):
            self._draw_row(line, row)
        for axis, title in zip(
            axes[0], ("this image", "similarity", "looks like", ""), strict=True
        ):
            axis.set_title(title, fontsize=10)

    def _draw_row(self, axes: np.ndarray, row: pd.Series) -> None:
        if pd.isna(row["prototype"]):
            text = f"all others together\n= {row['contribution']:+.2f}"
        else:
            prototype = int(row["prototype"])
            self._draw_match(axes, row, prototype)
            text = (
                f"{row['similarity']:.2f} × {row['weight']:+.2f}\n= {row['contribution']:+.2f}\n"
                f"prototype {prototype}\nof {row['source_class']}"
            )
        axes[3].text(0, 0.5, text, va="center", fontsize=10, transform=axes[3].transAxes)

    def _draw_match(self, axes: np.ndarray, row: pd.Series, prototype: int) -> None:
        axes[0].imshow(self.image)
        _draw_box(axes[0], row[["x0", "y0", "x1", "y1"]])
        x0, y0, x1, y1 = self.region
        grey = self.image.mean(2)
        axes[1].imshow(grey, cmap="gray")
        axes[1].imshow(self.maps[prototype], extent=(x0, x1, y1, y0), cmap="viridis", alpha=0.6)
        axes[1].set(xlim=(0, grey.shape[1]), ylim=(grey.shape[0], 0))
        axes[2].imshow(self.sources[prototype])
        _draw_box(axes[2], row[[f"source_{name}" for name in ("x0", "y0", "x1", "y1")]])


def _draw_box(axis: Axes, box: pd.Series) -> None:
    """Draw a yellow box on a black line: it stands out in colour and in grey."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(v) for v in box)
    for colour, width in (("black", 4), ("#ffdd00", 2)):
        outline = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False)
        outline.set(edgecolor=colour, linewidth=width)
        axis.add_patch(outline)


@contextmanager
def _fonts() -> Iterator[None]:
    """Fall back to an installed font with Korean letters where the usual one has none."""
    from matplotlib import font_manager, rc_context, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fallback = [name for name in _CJK_FONTS if name in installed]
    with rc_context({"font.family": [*rcParams["font.family"], *fallback]}):
        yield
