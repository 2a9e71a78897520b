"""What the example pictures are drawn with: colours, shapes, a background and light."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
Points = NDArray[np.float64]
Box = tuple[int, int, int, int]
Placement = Callable[[Points], Points]

SUPERSAMPLING = 4  # drawn that much larger and averaged down, for smooth edges
_OUTLINE = 0.011  # width of the contour, in picture sides


@dataclass(frozen=True)
class Shape:
    """A filled polygon, or a line where it has a width; coordinates are shares of the picture."""

    part: str
    points: Points
    fill: Color
    width: float = 0.0
    outlined: bool = True


def to_color(rgb: NDArray[np.float64]) -> Color:
    """Round to a colour that can be drawn."""
    r, g, b = (int(x) for x in np.clip(np.round(rgb), 0, 255))
    return r, g, b


def darker(color: Color, factor: float) -> Color:
    """Multiply a colour; a factor above 1 makes it lighter."""
    return to_color(np.multiply(color, factor))


def mixed(color: Color, other: Color, share: float) -> Color:
    """Mix two colours, `share` of them the other."""
    return to_color(np.multiply(color, 1 - share) + np.multiply(other, share))


def ellipse(centre: tuple[float, float], rx: float, ry: float) -> Points:
    """Return an ellipse as a polygon of 32 corners."""
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.column_stack([centre[0] + rx * np.cos(angles), centre[1] + ry * np.sin(angles)])


def smooth(corners: Points) -> Points:
    """Round a closed polygon: a Catmull-Rom spline through its corners, six points for each."""
    before, after = np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0)
    slope = (after - before) / 2
    next_slope = np.roll(slope, -1, axis=0)
    t = (np.arange(6) / 6)[:, None, None]
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * corners
        + (t**3 - 2 * t**2 + t) * slope
        + (3 * t**2 - 2 * t**3) * after
        + (t**3 - t**2) * next_slope
    )  # (6, corners, 2)
    return curve.swapaxes(0, 1).reshape(-1, 2)


def rotated(points: Points, angle: float) -> Points:
    """Turn points about the origin, clockwise as y points down."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def moved(shape: Shape, place: Placement) -> Shape:
    """Map a shape, its width in proportion."""
    unit = place(np.array([(0.0, 0.0), (1.0, 0.0)]))
    scale = float(np.linalg.norm(unit[1] - unit[0]))
    return replace(shape, points=place(shape.points), width=shape.width * scale)


def part_boxes(shapes: list[Shape], size: int) -> dict[str, Box]:
    """Return the box of each part, in pixels of a picture of side `size`."""
    boxes: dict[str, Box] = {}
    slack = 1 / SUPERSAMPLING  # rasterized edges reach up to one fine pixel further
    for part in dict.fromkeys(s.part for s in shapes):
        own = [s for s in shapes if s.part == part]
        rims = [max(s.width, _OUTLINE if s.outlined else 0) / 2 for s in own]
        low = np.min([s.points.min(axis=0) - rim for s, rim in zip(own, rims, strict=True)], axis=0)
        high = np.max(
            [s.points.max(axis=0) + rim for s, rim in zip(own, rims, strict=True)], axis=0
        )
        x0, y0 = (int(v) for v in np.clip(np.floor(low * size - slack), 0, size - 1))
        x1, y1 = (int(v) for v in np.clip(np.ceil(high * size + slack), 1, size))
        boxes[part] = (x0, y0, x1, y1)
    return boxes


def draw_shapes(draw: ImageDraw.ImageDraw, shapes: list[Shape], side: int) -> None:
    """Draw shapes one over the other; `side` is that of the canvas in pixels."""
    for shape in shapes:
        points = (shape.points * side).ravel().tolist()
        if shape.width:
            width = max(1, round(shape.width * side))
            draw.line(points, fill=shape.fill, width=width, joint="curve")
        else:
            draw.polygon(points, fill=shape.fill)


def draw_outline(draw: ImageDraw.ImageDraw, shapes: list[Shape], color: Color, side: int) -> None:
    """Draw a dark contour, to be covered by the shapes but for its outer half."""
    for shape in shapes:
        if shape.outlined and not shape.width:
            closed = np.vstack([shape.points, shape.points[:2]]) * side
            width = max(1, round(_OUTLINE * side))
            draw.line(closed.ravel().tolist(), fill=color, width=width, joint="curve")


# ---- around the bird ----------------------------------------------------------------------


_SCENES: tuple[tuple[Color, Color], ...] = (  # top and bottom of the background
    ((176, 208, 226), (232, 232, 208)),
    ((150, 178, 132), (84, 116, 78)),
    ((246, 206, 164), (196, 138, 128)),
    ((206, 214, 206), (148, 166, 160)),
    ((216, 196, 150), (150, 130, 92)),
    ((128, 148, 178), (190, 184, 196)),
    ((232, 176, 130), (170, 196, 178)),
)
_LEAVES: tuple[Color, ...] = (
    (96, 134, 72),
    (150, 164, 84),
    (206, 138, 66),
    (184, 84, 62),
    (112, 124, 156),
    (226, 196, 128),
)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a soft backdrop with twigs and leaves, at the size of the supersampled canvas."""
    top, bottom = (np.array(c, dtype=float) for c in _SCENES[int(rng.integers(len(_SCENES)))])
    share = np.linspace(0, 1, size)[:, None, None]
    rows = (1 - share) * top + share * bottom  # (size, 1, 3)
    pixels = np.broadcast_to(np.round(rows), (size, size, 3)).astype(np.uint8)
    canvas = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(canvas)
    draw_shapes(draw, list(_blobs(rng, (bottom + top) / 2)), size)
    canvas = canvas.filter(ImageFilter.GaussianBlur(size / 40))
    canvas = canvas.resize((size * SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    draw_shapes(ImageDraw.Draw(canvas), list(_twigs(rng)), canvas.width)
    return canvas


def _blobs(rng: np.random.Generator, middle: NDArray[np.float64]) -> Iterator[Shape]:
    for _ in range(int(rng.integers(8, 18))):
        centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.16)
        leaf = _LEAVES[int(rng.integers(len(_LEAVES)))]
        color = mixed(to_color(middle + rng.uniform(-35, 35)), leaf, rng.uniform(0.1, 0.75))
        yield Shape("blob", ellipse((centre[0], centre[1]), radius, radius), color)


def _twigs(rng: np.random.Generator) -> Iterator[Shape]:
    for _ in range(int(rng.integers(1, 4))):
        start, angle = rng.uniform(0, 1, 2), rng.uniform(0, np.pi)
        along = np.array([np.cos(angle), np.sin(angle)])
        line = np.array([start - 0.7 * along, start, start + 0.7 * along])
        line[1] += rng.uniform(-0.05, 0.05, 2)
        leaf = _LEAVES[int(rng.integers(len(_LEAVES)))]
        bark = mixed((110, 84, 68), (190, 180, 165), rng.uniform(0, 0.7))
        yield Shape("twig", line, bark, width=rng.uniform(0.006, 0.014))
        for _ in range(int(rng.integers(3, 8))):
            yield _leaf(start + along * rng.uniform(-0.6, 0.6), rng, leaf)


def _leaf(stem: Points, rng: np.random.Generator, color: Color) -> Shape:
    length, angle = rng.uniform(0.06, 0.12), rng.uniform(0, 2 * np.pi)
    blade = length * np.array([(0.0, 0), (0.4, -0.3), (1, 0), (0.4, 0.3)])
    return Shape(
        "leaf", stem + rotated(smooth(blade), angle), darker(color, rng.uniform(0.8, 1.15))
    )


def lit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, tint and grain, and let the light fall from one side."""
    size = image.width
    gain = rng.uniform(0.78, 1.12) * rng.uniform(0.9, 1.1, 3)
    slope = rng.uniform(-0.18, 0.18, 2)
    axis = np.linspace(-1, 1, size)
    shade = 1 + slope[0] * axis[None, :, None] + slope[1] * axis[:, None, None]
    grain = rng.normal(0, rng.uniform(1, 5), (size, size, 1))
    pixels = np.asarray(image) * gain * shade + grain  # (size, size, 3)
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
