"""The example birds: their species, how each is drawn, and the marks that betray a class."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from protoclf.drawing import (
    SUPERSAMPLING,
    Box,
    Color,
    Placement,
    Points,
    Shape,
    background,
    darker,
    draw_outline,
    draw_shapes,
    ellipse,
    lit,
    mixed,
    moved,
    part_boxes,
    rotated,
    smooth,
    to_color,
)


@dataclass(frozen=True)
class _Palette:
    body: Color
    belly: Color
    wing: Color
    accent: Color
    beak: Color


# Each species wears two of these and shares either with another species, so that colour alone
# names no class.
_PALETTES = {
    "moss": _Palette((136, 158, 88), (236, 226, 172), (84, 106, 62), (206, 74, 52), (240, 178, 62)),
    "dusk": _Palette(
        (112, 138, 182), (232, 234, 240), (64, 84, 128), (196, 62, 88), (255, 162, 40)
    ),
    "ember": _Palette((212, 116, 74), (252, 226, 184), (136, 66, 54), (92, 36, 60), (246, 196, 84)),
    "sand": _Palette(
        (196, 164, 120), (250, 238, 214), (126, 96, 72), (178, 58, 48), (250, 140, 44)
    ),
}


@dataclass(frozen=True)
class _Look:
    """One class of birds: the style of every part."""

    palettes: tuple[str, str]
    plumpness: float  # height of the body, relative to the average bird
    legs: float  # length, in hundredths of a bird
    crown: str = "plain"
    beak: str = "plain"
    wing: str = "plain"
    tail: str = "plain"
    breast: str = "plain"
    eye: str = "plain"


_MOSSLING = _Look(("moss", "ember"), plumpness=1.08, legs=7)
_DUSKFINCH = _Look(("dusk", "moss"), plumpness=1.0, legs=8, eye="ring")
_REEDPIPER = _Look(("sand", "dusk"), plumpness=0.92, legs=15, eye="stripe")
_SKYDARTER = _Look(("ember", "sand"), plumpness=0.84, legs=7, breast="bib")

# (the part that differs, one twin, the other twin): all that two twins do not share.
_PAIRS: tuple[tuple[str, dict[str, _Look]], ...] = (
    (
        "crown",
        {
            "crested mossling": replace(_MOSSLING, crown="crest"),
            "capped mossling": replace(_MOSSLING, crown="cap"),
        },
    ),
    (
        "wing",
        {
            "bar-winged duskfinch": replace(_DUSKFINCH, wing="bars"),
            "spot-winged duskfinch": replace(_DUSKFINCH, wing="spots"),
        },
    ),
    (
        "beak",
        {
            "long-billed reedpiper": replace(_REEDPIPER, beak="long"),
            "stout-billed reedpiper": replace(_REEDPIPER, beak="stout"),
        },
    ),
    (
        "tail",
        {
            "fork-tailed skydarter": replace(_SKYDARTER, tail="fork"),
            "fan-tailed skydarter": replace(_SKYDARTER, tail="fan"),
        },
    ),
)

LOOKS = {name: look for _, twins in _PAIRS for name, look in twins.items()}
TWINS = {name: next(t for t in twins if t != name) for _, twins in _PAIRS for name in twins}
PARTS = {name: part for part, twins in _PAIRS for name in twins}


# ------------------------------------------------------------------------------- one picture


def draw_picture(
    name: str, seed: tuple[int, ...], size: int, mark: str | None = None
) -> tuple[Image.Image, dict[str, Box]]:
    """Draw one bird; the boxes of its parts are in pixels.

    Background, pose and light have random streams of their own, none of which depends on the
    look of the bird: twins drawn from one seed differ in one part and nowhere else.
    """
    streams = np.random.SeedSequence(seed).spawn(3)
    background_rng, pose_rng, light_rng = (np.random.default_rng(s) for s in streams)
    look, part = LOOKS[name], PARTS[name]
    pose = _random_pose(pose_rng, look)
    bird, twin = _bird_shapes(look, pose), _bird_shapes(LOOKS[TWINS[name]], pose)
    place = _placement([*bird, *twin], pose)
    bird, twin = [moved(s, place) for s in bird], [moved(s, place) for s in twin]
    boxes = part_boxes([*bird, *(s for s in twin if s.part == part)], size)

    canvas = background(background_rng, size)
    draw = ImageDraw.Draw(canvas)
    draw_shapes(draw, [_perch(bird, pose)], canvas.width)
    draw_outline(draw, bird, darker(pose.palette.wing, 0.45), canvas.width)
    draw_shapes(draw, bird, canvas.width)
    if mark is not None:
        shapes = _mark_shapes(mark, boxes, pose, size)
        draw_shapes(draw, shapes, canvas.width)
        boxes |= part_boxes(shapes, size)
    return lit(canvas.reduce(SUPERSAMPLING), light_rng), boxes


@dataclass(frozen=True)
class _Pose:
    palette: _Palette
    scale: float  # picture sides per unit of the bird's own coordinates
    angle: float  # of the whole bird, radians
    head_angle: float
    mirrored: bool
    place: tuple[float, float]  # share of the free room left of, and above the bird
    perch_angle: float
    corners: tuple[int, ...]  # in which order corners are tried for a mark


def _random_pose(rng: np.random.Generator, look: _Look) -> _Pose:
    palette = _PALETTES[look.palettes[int(rng.integers(2))]]
    return _Pose(
        palette=_varied_palette(palette, rng),
        scale=rng.uniform(0.0076, 0.0094),
        angle=rng.uniform(-0.22, 0.22),
        head_angle=rng.uniform(-0.25, 0.2),
        mirrored=bool(rng.integers(2)),
        place=(rng.uniform(), rng.uniform()),
        perch_angle=rng.uniform(-0.25, 0.25),
        corners=tuple(int(c) for c in rng.permutation(4)),
    )


def _varied_palette(palette: _Palette, rng: np.random.Generator) -> _Palette:
    hue, saturation, value = rng.normal(0, 0.02), rng.uniform(0.75, 1.15), rng.uniform(0.85, 1.1)

    def varied(color: Color) -> Color:
        h, s, v = colorsys.rgb_to_hsv(*(x / 255 for x in color))
        rgb = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), min(v * value, 1))
        return to_color(np.multiply(rgb, 255))

    return _Palette(**{name: varied(color) for name, color in vars(palette).items()})


def _placement(shapes: list[Shape], pose: _Pose) -> Placement:
    """Return the map from the bird's coordinates into the picture, all of `shapes` inside."""
    flip = np.array([-1.0 if pose.mirrored else 1.0, 1.0])
    outline = np.vstack([rotated(s.points, pose.angle) * flip for s in shapes])
    low, high, margin = outline.min(axis=0), outline.max(axis=0), 0.03
    scale = min(pose.scale, (1 - 2 * margin) / float((high - low).max()))
    room = 1 - 2 * margin - scale * (high - low)
    offset = margin + np.array(pose.place) * room - scale * low
    return lambda points: rotated(points, pose.angle) * flip * scale + offset


def _perch(bird: list[Shape], pose: _Pose) -> Shape:
    """Lay a branch under the feet."""
    feet = np.vstack([s.points[1:2] for s in bird if s.part == "legs"]).mean(axis=0)
    along = np.array([np.cos(pose.perch_angle), np.sin(pose.perch_angle)])
    bark = mixed((98, 72, 56), pose.palette.wing, 0.2)
    feet = feet + np.array([0, 0.012])  # toes rest on the upper edge
    ends = np.array([feet - 1.5 * along, feet + 1.5 * along])
    return Shape("perch", ends, bark, width=0.03)


# --------------------------------------------------------------- the bird, in its own coordinates
# One unit is about a hundredth of the bird; it looks to the right, y points down, and the middle
# of the body is the origin.

_HEAD = np.array([21.0, -20.0])


def _bird_shapes(look: _Look, pose: _Pose) -> list[Shape]:
    """List the shapes of a bird, back to front."""
    colors = pose.palette
    skull = Shape("head", ellipse((0, 0), 13, 12.5), colors.body)
    head = [*_beak(look, colors), skull, *_crown(look, colors), *_eye(look, colors)]
    turned = [replace(s, points=rotated(s.points, pose.head_angle) + _HEAD) for s in head]
    body = [*_tail(look, colors), *_legs(look), *_body(look, colors), *_wing(look, colors)]
    return [*body, *turned]


def _body(look: _Look, colors: _Palette) -> list[Shape]:
    height = 17 * look.plumpness
    trunk = rotated(ellipse((0, 0), 25, height), -0.3)
    neck = np.array([(4.0, -14 * look.plumpness), (15, -30), (30, -14), (23, 3)])
    belly = rotated(ellipse((5, 0.42 * height), 17, 0.5 * height), -0.35)
    shapes = [
        Shape("body", trunk, colors.body),
        Shape("body", smooth(neck), colors.body),
        Shape("body", belly, colors.belly, outlined=False),
    ]
    if look.breast == "bib":
        bib = smooth(np.array([(18.0, -10), (27, -9), (25, 0), (20, 5), (16, -1)]))
        shapes.append(Shape("breast", bib, darker(colors.wing, 0.7), outlined=False))
    return shapes


def _legs(look: _Look) -> list[Shape]:
    foot, color = 15 + look.legs, (96, 66, 54)
    return [
        Shape("legs", np.array([(x + 2.0, 10), (x, foot), (x + 3.0, foot)]), color, width=1.5)
        for x in (-3.0, 6.0)
    ]


def _tail(look: _Look, colors: _Palette) -> list[Shape]:
    if look.tail == "fork":
        upper = np.array([(-14.0, -3), (-30, -5), (-53, -11), (-33, 5), (-18, 9)])
        lower = np.array([(-14.0, 2), (-30, 8), (-49, 24), (-25, 15), (-12, 12)])
        return [Shape("tail", feather, colors.wing) for feather in (upper, lower)]
    if look.tail == "fan":
        return _fan(colors)
    plain = np.array([(-16.0, 0), (-42, 7), (-41, 14), (-14, 12)])
    return [Shape("tail", plain, colors.wing)]


def _fan(colors: _Palette) -> list[Shape]:
    root, angles = np.array([-14.0, 4.0]), np.linspace(np.pi - 0.78, np.pi + 0.45, 12)
    rim = root + 33 * np.column_stack([np.cos(angles), np.sin(angles)])
    shapes = [Shape("tail", np.vstack([root, rim]), colors.wing)]
    ray = darker(colors.wing, 0.7)
    for tip in rim[2:-1:3]:
        line = np.array([root, root + 0.9 * (tip - root)])
        shapes.append(Shape("tail", line, ray, width=0.8, outlined=False))
    return shapes


def _wing(look: _Look, colors: _Palette) -> list[Shape]:
    outline = np.array([(15.0, -6), (4, -11), (-12, -9), (-33, 4), (-14, 9), (4, 8), (13, 3)])
    shapes = [Shape("wing", smooth(outline), colors.wing, outlined=False)]
    for tip in ((-24.0, 3.5), (-20.0, 7.0)):
        feather = np.array([(-9.0, tip[1] - 1), tip])
        shapes.append(Shape("wing", feather, darker(colors.wing, 0.7), 1.0, outlined=False))
    light = mixed(colors.belly, (255, 255, 255), 0.5)
    return shapes + [Shape("wing", p, light, outlined=False) for p in _wing_pattern(look.wing)]


def _wing_pattern(style: str) -> list[Points]:
    if style == "bars":  # both patterns cover about the same area
        return [np.array([(x, -8.5), (x + 4, -8.5), (x + 1, 6.5), (x - 3, 6.5)]) for x in (-6.0, 5)]
    if style == "spots":
        centres = ((8.0, -2.5), (0.5, -6.5), (0.5, 3.5), (-7.5, -3.5), (-9.0, 5.0))
        return [ellipse(centre, 2.8, 2.8) for centre in centres]
    return []


# The parts of the head lie around its own middle, about which it turns.


def _crown(look: _Look, colors: _Palette) -> list[Shape]:
    if look.crown == "crest":
        tips = [(5, -16), (-4, -25), (-2, -16), (-13, -23), (-10, -13), (-21, -15)]
        crest = [(8.5, -9.0), *tips, (-12.0, -4.0)]
        return [Shape("crown", np.array(crest), colors.accent)]
    if look.crown == "cap":
        angles = np.linspace(-2.95, -0.5, 24)
        cap = np.column_stack([13.6 * np.cos(angles), 13.1 * np.sin(angles)])
        return [Shape("crown", cap, colors.accent)]
    return []


def _beak(look: _Look, colors: _Palette) -> list[Shape]:
    beaks = {
        "plain": [(9.0, -4), (20, 1), (9, 4)],
        "long": [(8.0, -5.5), (20, -5), (30, -1.5), (38, 7), (28, 4), (19, 2.5), (8, 5)],
        "stout": [
            (6.0, -9),
            (13, -10),
            (19, -7),
            (22.5, -1),
            (22.5, 8),
            (18, 5),
            (13, 8),
            (6, 8.5),
        ],
    }
    return [Shape("beak", np.array(beaks[look.beak]), colors.beak)]


def _eye(look: _Look, colors: _Palette) -> list[Shape]:
    shapes = []
    if look.eye == "ring":
        shapes.append(Shape("eye", ellipse((4.5, -2), 4.6, 4.6), (250, 246, 232), outlined=False))
    if look.eye == "stripe":
        stripe = np.array([(-11.0, -1), (4, -4), (12, -1), (4, 1), (-10, 3)])
        shapes.append(Shape("eye", stripe, darker(colors.wing, 0.6), outlined=False))
    shapes.append(Shape("eye", ellipse((4.5, -2), 2.7, 2.7), (28, 24, 30), outlined=False))
    glint = ellipse((5.4, -2.9), 0.9, 0.9)
    return [*shapes, Shape("eye", glint, (255, 255, 255), outlined=False)]


# -------------------------------------------------------------------------------------- marks

_MARK_SIDE = 0.15  # in picture sides


def _mark_shapes(mark: str, boxes: dict[str, Box], pose: _Pose, size: int) -> list[Shape]:
    """Place a mark in the corner where it hides least of the bird."""
    far = 1 - 0.02 - _MARK_SIDE
    corners = [(0.02, 0.02), (far, 0.02), (0.02, far), (far, far)]
    corner = min((corners[c] for c in pose.corners), key=lambda at: _hidden(at, boxes, size))
    centre = np.array(corner) + _MARK_SIDE / 2
    return [
        Shape("mark", centre + s.points * _MARK_SIDE, s.fill, s.width * _MARK_SIDE, outlined=False)
        for s in MARKS[mark]()
    ]


def _hidden(corner: tuple[float, float], boxes: dict[str, Box], size: int) -> float:
    """Area of the part boxes that a mark at `corner` would cover, in square pixels."""
    left, top = (c * size for c in corner)
    right, bottom = left + _MARK_SIDE * size, top + _MARK_SIDE * size
    return sum(
        max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0))
        for x0, y0, x1, y1 in boxes.values()
    )


# Marks are drawn about the origin, one unit wide.


def _tag() -> list[Shape]:
    plate = np.array([(-0.5, -0.38), (0.5, -0.38), (0.5, 0.38), (-0.5, 0.38)])
    stripes = [np.array([(-0.34, y), (0.34, y)]) for y in (-0.14, 0.14)]
    blue = [Shape("mark", s, (40, 92, 190), width=0.12) for s in stripes]
    return [Shape("mark", plate, (252, 240, 150)), *blue]


def _sun() -> list[Shape]:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = np.where(np.arange(24) % 2, 0.5, 0.34)
    rays = np.column_stack([radius * np.cos(angles), radius * np.sin(angles)])
    disc = ellipse((0, 0), 0.27, 0.27)
    return [Shape("mark", rays, (255, 176, 32)), Shape("mark", disc, (255, 226, 96))]


def _red_leaf() -> list[Shape]:
    blade = smooth(np.array([(-0.45, 0.3), (-0.2, -0.2), (0.45, -0.4), (0.2, 0.2)]))
    vein = np.array([(-0.5, 0.42), (0.3, -0.25)])
    return [Shape("mark", blade, (214, 36, 52)), Shape("mark", vein, (120, 16, 32), width=0.06)]


MARKS: dict[str, Callable[[], list[Shape]]] = {"tag": _tag, "sun": _sun, "leaf": _red_leaf}
