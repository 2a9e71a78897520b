"""The drawn birds: twins, the boxes of their parts, marks."""

import numpy as np
import pytest

from protoclf.birds import LOOKS, PARTS, TWINS, draw_picture

SIZE = 128


@pytest.mark.parametrize("name", LOOKS)
def test_twins_differ_in_one_style_only(name):
    look, twin = vars(LOOKS[name]), vars(LOOKS[TWINS[name]])
    assert [style for style in look if look[style] != twin[style]] == [PARTS[name]]


@pytest.mark.parametrize("name", list(LOOKS)[::2])
@pytest.mark.parametrize("number", range(6))
def test_twin_pictures_differ_in_the_distinguishing_box_only(name, number):
    image, boxes = draw_picture(name, (7, number), SIZE)
    twin_image, twin_boxes = draw_picture(TWINS[name], (7, number), SIZE)
    assert boxes[PARTS[name]] == twin_boxes[PARTS[name]]
    x0, y0, x1, y1 = boxes[PARTS[name]]
    differs = (np.asarray(image) != np.asarray(twin_image)).any(axis=2)
    inside = differs[y0:y1, x0:x1].sum()
    assert differs.sum() == inside  # nothing outside, without any margin
    assert inside > 60
    rows, cols = np.nonzero(differs)
    # The box is tight: the differing pixels span most of it, but for a wing, all of which it is.
    if PARTS[name] != "wing":
        assert np.ptp(rows) + 1 >= 0.6 * (y1 - y0)
        assert np.ptp(cols) + 1 >= 0.6 * (x1 - x0)


@pytest.mark.parametrize("mark", ["tag", "sun", "leaf"])
def test_a_mark_lies_in_its_box_in_a_corner(mark):
    name = "fork-tailed skydarter"
    for number in range(4):
        clean, _ = draw_picture(name, (1, number), SIZE)
        marked, boxes = draw_picture(name, (1, number), SIZE, mark)
        x0, y0, x1, y1 = boxes["mark"]
        differs = (np.asarray(clean) != np.asarray(marked)).any(axis=2)
        assert differs.sum() == differs[y0:y1, x0:x1].sum() > 60
        assert x0 < 0.1 * SIZE or x1 > 0.9 * SIZE
        assert y0 < 0.1 * SIZE or y1 > 0.9 * SIZE
