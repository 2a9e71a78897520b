"""What plots are drawn with: views of images, boxes, heat maps, tiles, and text in any script.

Everything is placed in pixels of the original image: pixel k covers [k, k + 1).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from warnings import warn

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.text import Text

_SIDE = 600  # pixels to which a view is reduced
_MARGIN = 0.1  # inches at the edges of a figure
_LEAST_RANGE = 0.01  # of the colours of maps: in a flat map, less would show rounding
_FALLBACK_FONTS = (  # that are asked, in this order, for letters that the usual one lacks
    *("DejaVu Sans", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic"),
    *("Apple SD Gothic Neo", "AppleGothic", "Noto Sans CJK JP", "Noto Sans CJK SC"),
    *("Source Han Sans", "Arial Unicode MS", "WenQuanYi Zen Hei", "UnDotum", "Baekmuk Gulim"),
)


class View(NamedTuple):
    """A part of an image, or a map over it: pixels (h, w, ...), and the box that they cover."""

    pixels: np.ndarray
    box: tuple[float, float, float, float]


def view(image: np.ndarray, box: ArrayLike | None = None) -> View:
    """Cut a box out of an image (H, W, 3), and reduce it to what a tile can show."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else np.asarray(box, int).tolist()
    part = image[y0:y1, x0:x1]
    scale = _SIDE / max(x1 - x0, y1 - y0)
    if scale < 1:
        size = [max(1, round(scale * side)) for side in (x1 - x0, y1 - y0)]
        part = np.asarray(PIL.Image.fromarray(part).resize(size, reducing_gap=3.0))
    return View(part.copy(), (x0, y0, x1, y1))  # the copy lets go of a large image


def surroundings(image: np.ndarray, box: ArrayLike) -> View:
    """Cut out a square, moved into the image, of twice the longer side of a box in its middle."""
    x0, y0, x1, y1 = np.asarray(box, float).tolist()
    side = 2 * max(x1 - x0, y1 - y0)
    spans = []
    for low, high, size in ((x0, x1, image.shape[1]), (y0, y1, image.shape[0])):
        length = min(round(side), size)
        start = min(max(0, round((low + high) / 2 - length / 2)), size - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return view(image, (left, top, right, bottom))


# Tiles ------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, layout: Any = "none") -> Figure:
    """Return a figure of that many inches, known to pyplot; rcParams do not move its axes."""
    from matplotlib import pyplot as plt

    return plt.figure(figsize=(width, height), layout=layout)


def tiles(
    figure: Any,
    shape: tuple[int, int, int],
    above: float = 0.0,
    below: float = 0.0,
    top: float = 0.0,
    bottom: float = 0.0,
    right: float = 0.0,
) -> np.ndarray:
    """Fill a figure with empty axes: lines of blocks of tiles.

    They are no subplots, so that no layout engine of the caller's moves them under their titles.

    Parameters
    ----------
    figure : matplotlib Figure or SubFigure
    shape : (lines, blocks, tiles of a block)
    above, below : float, default=0
        Room for text over and under each line, in inches.
    top, bottom, right : float, default=0
        Room at edges of the figure, in inches.

    Returns
    -------
    ndarray of Axes, of that shape
    """
    lines, blocks, n_tiles = shape
    width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi  # inches
    inside = height - (lines * (above + below) + top + bottom + 2 * _MARGIN)
    grid = figure.add_gridspec(
        lines,
        blocks,
        left=_MARGIN / width,
        right=1 - (_MARGIN + right) / width,
        bottom=(_MARGIN + bottom + below) / height,
        top=1 - (_MARGIN + top + above) / height,
        wspace=0.09,
        hspace=max(0, (above + below) * lines / max(inside, 0.1)),
    )
    parts = [grid[i].subgridspec(1, n_tiles, wspace=0.06) for i in range(lines * blocks)]
    places = [part[k].get_position(figure).bounds for part in parts for k in range(n_tiles)]
    array = np.array([figure.add_axes(place) for place in places], dtype=object).reshape(shape)
    for axis in array.flat:
        axis.set_axis_off()
    return array


def draw_view(axis: Axes, picture: View, **style: Any) -> ScalarMappable:
    """Draw a view in the middle of a square, so that tiles align whatever their shapes."""
    x0, y0, x1, y1 = picture.box
    drawn = axis.imshow(picture.pixels, extent=(x0, x1, y1, y0), origin="upper", **style)
    half = max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[])
    return drawn


def draw_heat(axis: Axes, picture: View, heat: View, limits: tuple[float, float]) -> None:
    """Draw a picture in grey, and in colour over it the values of a map."""
    draw_view(axis, View(picture.pixels.mean(2), picture.box), cmap="gray", vmin=0, vmax=255)
    xlim, ylim = axis.get_xlim(), axis.get_ylim()
    draw_view(axis, heat, cmap="viridis", alpha=0.6).set_clim(*limits)
    axis.set(xlim=xlim, ylim=ylim)


def draw_box(axis: Axes, box: ArrayLike) -> None:
    """Draw a yellow box on a black line: it stands out in colour and in grey."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(v) for v in np.asarray(box))
    for colour, width in (("black", 4), ("#ffdd00", 2)):
        axis.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width)
        )


def value_range(maps: Iterable[View]) -> tuple[float, float]:
    """Return the lowest and the highest value of all maps, further apart if maps are flat."""
    values = [(float(heat.pixels.min()), float(heat.pixels.max())) for heat in maps]
    low, high = min(low for low, _ in values), max(high for _, high in values)
    more = max(0.0, _LEAST_RANGE - (high - low)) / 2
    return low - more, high + more


def scale(limits: tuple[float, float]) -> ScalarMappable:
    """Return the colours of `draw_heat`, opaque, for a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(*limits), "viridis")


def draw_scale(axis: Axes, limits: tuple[float, float], zoom: float = 1.0) -> None:
    """Draw the colour bar at the right edge of the figure, as high as the line of a tile."""
    figure = axis.figure
    inch = zoom * figure.dpi / figure.bbox.width
    place = axis.get_position()
    bar = figure.add_axes((1 - 0.75 * inch, place.y0, 0.12 * inch, place.height))
    outline = figure.colorbar(scale(limits), cax=bar).outline
    outline.set_linewidth(zoom * outline.get_linewidth())
    bar.tick_params(labelsize=8 * zoom, length=3.5 * zoom, width=0.8 * zoom, pad=3.5 * zoom)
    bar.set_title("similarity", fontsize=8 * zoom, pad=7 * zoom, loc="left")


def room_for(figure: Figure | SubFigure, width: float, height: float) -> float:
    """Return how many times so many inches fit into a figure."""
    return min(figure.bbox.width / width, figure.bbox.height / height) / figure.dpi


def shrink(figure: Any, zoom: float) -> None:
    """Make letters and lines smaller."""
    from matplotlib.patches import Rectangle
    from matplotlib.spines import Spine
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontsize(zoom * text.get_fontsize())
    for line in (*figure.findobj(Rectangle), *figure.findobj(Spine)):
        line.set_linewidth(zoom * line.get_linewidth())


def draw_title(figure: Figure | SubFigure, title: str, **style: Any) -> None:
    """Write over all tiles."""
    y = 1 - _MARGIN * figure.dpi / figure.bbox.height
    figure.suptitle(title, fontsize=11, y=y, va="top", **style)


# Text -------------------------------------------------------------------------------------------


def short(label: Any, width: int = 24) -> str:
    """Return a label on one line of at most `width` letters, left out in the middle.

    Letters as wide as high, as those of Korean, count twice. Dollars are dollars, not formulas.
    """
    if isinstance(label, float) and label.is_integer():  # an int from a column with gaps
        label = int(label)
    text = " ".join(unicodedata.normalize("NFC", str(label)).split())
    if _width(text) > width:
        head = tail = ""
        while _width(head + tail) < width - 2:
            if _width(head) <= _width(tail):
                head += text[len(head)]
            else:
                tail = text[-len(tail) - 1] + tail
        text = f"{head}…{tail}"
    return text.replace("$", r"\$")


def prototype_name(prototype: int, label: Any) -> str:
    """Return how plots name a prototype."""
    return f"prototype {prototype} of {short(label)}"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


@contextmanager
def lettering(*artists: Artist) -> Iterator[None]:
    """Let the text that is drawn meanwhile fall back to fonts that have its letters.

    The fonts are the text's own: it looks the same whenever it is saved. Letters that no font has
    become question marks, with one warning.
    """
    before = {text: text.get_text() for text in _texts(artists)}
    yield
    missing = set()
    for text in _texts(artists):
        string = text.get_text()
        if string != before.get(text) and not string.isascii():
            missing |= _fall_back(text)
    if missing:
        import matplotlib

        warn(
            f"No font has the letters {''.join(sorted(missing))!r}; '?' is drawn for them. Install "
            "one, such as Noto Sans CJK for Korean, Chinese and Japanese (Debian and Ubuntu: "
            "fonts-noto-cjk) or NanumGothic (fonts-nanum), and delete matplotlib's list of fonts, "
            f"{matplotlib.get_cachedir()}/fontlist*.json; or set rcParams['font.family'] to a "
            "font that has them.",
            UserWarning,
            stacklevel=5,
        )


def _texts(artists: tuple[Artist, ...]) -> list[Text]:
    from matplotlib.text import Text

    return [text for artist in artists for text in artist.findobj(Text)]


def _fall_back(text: Text) -> set[str]:
    """Give a text the fonts that it needs; return the letters that none of them has."""
    families, string = list(text.get_fontfamily()), text.get_text()
    missing = {letter for letter in string if not letter.isspace()}
    for family in families:
        missing -= _letters(text, family)
    for family in _FALLBACK_FONTS:
        found = missing & _letters(text, family) if missing else set()
        if found:
            families.append(family)
            missing -= found
    text.set_fontfamily(families)
    text.set_text("".join("?" if letter in missing else letter for letter in string))
    return missing


def _letters(text: Text, family: str) -> frozenset[str]:
    from matplotlib import font_manager

    properties = text.get_fontproperties().copy()
    if properties.get_file() is None:
        properties.set_family(family)
    try:
        return _letters_of(str(font_manager.findfont(properties, fallback_to_default=False)))
    except ValueError:  # not installed
        return frozenset()


@lru_cache(maxsize=16)
def _letters_of(path: str) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(path).get_charmap()))
