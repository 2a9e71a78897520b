"""Pointing and coverage: masks drawn around what a model made by hand points at."""

import copy

import numpy as np
import pandas as pd
import PIL.Image
import pytest
from colour_model import CELL, COLOURS, SIDE, colour_model, picture

from protoclf.explanation import BOX
from protoclf.image_dataset import ImageDataset
from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.metrics import (
    PartMasks,
    deletion_score,
    interpretability_report,
    object_coverage,
    pointing,
)
from protoclf.metrics.masks import shown

RED = COLOURS["red"]
SPOTS = [(2, 5), (6, 1), (3, 3), (5, 5)]
X = np.stack([picture({spot: RED}) for spot in SPOTS])


@pytest.fixture(scope="module")
def clf():
    return colour_model()


@pytest.fixture(scope="module")
def boxes(clf):
    return clf.explain(X)[BOX].to_numpy()


def masks_of(boxes):
    """What lies in each box (x0, y0, x1, y1)."""
    masks = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_a_mask_that_is_the_box_is_hit_and_covered_whole(clf, boxes):
    table = pointing(clf, X, masks_of(boxes))
    assert table["inside"].tolist() == table["hit"].tolist() == [1] * 4
    assert object_coverage(clf, X, masks_of(boxes))["coverage"].tolist() == [1] * 4
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / SIDE**2
    np.testing.assert_allclose(table["object_share"], share)
    np.testing.assert_allclose(object_coverage(clf, X, masks_of(boxes))["boxes_share"], share)


def test_a_mask_elsewhere_is_not(clf, boxes):
    table = pointing(clf, X, ~masks_of(boxes))
    assert table["inside"].tolist() == table["hit"].tolist() == [0] * 4
    assert object_coverage(clf, X, ~masks_of(boxes))["coverage"].tolist() == [0] * 4


def test_half_a_mask_is_half_inside(clf, boxes):
    half = boxes.copy()
    half[:, 2] = (boxes[:, 0] + boxes[:, 2]) // 2
    table = pointing(clf, X, masks_of(half) * 7)  # not 0 is the object
    np.testing.assert_allclose(table["inside"], 0.5)
    assert (object_coverage(clf, X, masks_of(half))["coverage"] == 1).all()
    twice = boxes.copy()
    twice[:, 3] = np.minimum(boxes[:, 3] + boxes[:, 3] - boxes[:, 1], SIDE)
    area = masks_of(twice).sum((1, 2))
    coverage = object_coverage(clf, X, masks_of(twice))["coverage"]
    np.testing.assert_allclose(coverage, masks_of(boxes).sum((1, 2)) / area)


def test_the_place_is_that_of_the_cell(clf):
    """Only the pixel in the middle of the cell is the object: half of it to either side."""
    for (row, col), image in zip(SPOTS, X, strict=True):
        mask = np.zeros((1, SIDE, SIDE))
        mask[0, CELL * row + CELL // 2, CELL * col + CELL // 2] = 1
        assert pointing(clf, image[None], mask)["hit"].tolist() == [1]
        assert pointing(clf, image[None], np.roll(mask, 1, axis=2))["hit"].tolist() == [0]


@pytest.mark.parametrize("options", [{}, {"attribution": "gradient", "percentile": 80}])
def test_all_boxes_of_a_sheet_count(fitted, squares, options):
    images = squares[0][:6]
    masks = np.random.default_rng(0).random((6, 40, 60)) < 0.3
    sheet = fitted.explain(images, **options)
    sheet = sheet[sheet["contribution"] > 0]
    table = pointing(fitted, images, masks, top=100, **options)
    assert table["prototype"].tolist() == sheet["prototype"].tolist()
    coverage = object_coverage(fitted, images, masks, top=100, **options)
    for i, rows in sheet.groupby("sample"):
        covered = np.zeros((40, 60), bool)
        for j, (x0, y0, x1, y1) in zip(rows["prototype"], rows[BOX].to_numpy(), strict=True):
            inside = masks[i, y0:y1, x0:x1].mean()
            found = table[(table["sample"] == i) & (table["prototype"] == j)]
            assert found["inside"].item() == pytest.approx(inside)
            covered[y0:y1, x0:x1] = True
        shown = np.zeros((40, 60), bool)
        shown[:, 10:50] = True  # the square in the middle
        expected = (covered & masks[i] & shown).sum() / (masks[i] & shown).sum()
        assert coverage.loc[i, "coverage"] == pytest.approx(expected)
        assert coverage.loc[i, "boxes_share"] == pytest.approx(covered.sum() / shown.sum())
        rows = table[table["sample"] == i]
        np.testing.assert_allclose(rows["object_share"], masks[i][shown].mean())
    assert len(pointing(fitted, images, masks, top=1)) == 6


def test_what_speaks_against_the_class_has_no_box_to_count():
    model = colour_model(weight=[[1.0, -0.4], [-0.4, 1.0]])
    image = picture({(2, 5): RED, (6, 1): COLOURS["blue"], (6, 2): COLOURS["blue"]})[None]
    sheet = model.explain(image)
    assert (sheet["contribution"] > 0).tolist() == [True, False]
    mask = np.ones((1, SIDE, SIDE))
    for table in (pointing(model, image, mask), deletion_score(model, image)):
        assert table["prototype"].tolist() == sheet["prototype"][:1].tolist()


def test_an_object_out_of_sight_has_no_coverage(fitted, squares):
    mask = np.zeros((1, 40, 60))
    mask[0, :, :10] = 1
    table = object_coverage(fitted, squares[0][:1], mask)
    assert table["coverage"].isna().all()
    table = pointing(fitted, squares[0][:1], mask)
    assert table[["inside", "hit"]].isna().all(axis=None)
    assert (table["object_share"] == 0).all()


@pytest.mark.parametrize("shape", [(27, 30), (27, 28), (30, 27), (3, 6), (1, 300), (40, 60)])
def test_what_a_crop_shows_of_a_mask_is_a_square(fitted, shape):
    side = min(shape)
    dataset = ImageDataset(Images([np.zeros((*shape, 3), np.uint8)]), fitted.preprocessing_)
    assert shown(dataset, 0, np.ones(shape, bool)).shape == (side, side)


def test_masks_of_parts_are_the_union_of_their_boxes(clf):
    rows = [
        (0, "a", 0, 0, 4, 8),
        (0, "b", 2, 2, 10, 6),
        (1, "a", 1, 1, 2, 2),
        (1, "b", 9, 9, 40, 40),
    ]
    parts = pd.DataFrame(rows, columns=["sample", "part", *BOX])
    masks = PartMasks(clf, X[:2], parts)
    expected = masks_of([[0, 0, 4, 8]])[0] | masks_of([[2, 2, 10, 6]])[0]
    np.testing.assert_array_equal(masks[0], expected)
    assert masks[1].sum() == 1 + 23 * 23
    assert len(masks) == 2
    hidden = PartMasks(clf, X[:2], parts.assign(visible=[True, True, False, False]))
    assert not hidden[1].any()
    with pytest.raises(ValueError, match="parts has points alone"):
        PartMasks(clf, X[:2], parts[["sample", "part"]].assign(x=1.0, y=1.0))
    with pytest.raises(ValueError, match="parts has rows without a box"):
        PartMasks(clf, X[:2], parts.assign(x0=[0, np.nan, 1, 9]))


@pytest.mark.parametrize("names", [["accuracy"], ["sparsity"], ["box deletion"], ["pointing"]])
def test_an_image_that_cannot_be_read_stops_a_metric(clf, tmp_path, names):
    paths = [tmp_path / f"{i}.png" for i in range(len(X))]
    for path, pixels in zip(paths, X, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])  # its header is in order
    skips = copy.deepcopy(clf).set_params(on_bad_image="skip")
    good, y, masks = [paths[0], paths[1]], ["red"] * 4, np.ones((4, SIDE, SIDE))
    options = {"draw_from": (good, ["red", "blue"]), "metrics": names}
    assert len(interpretability_report(skips, good, y[:2], masks=masks[:2], **options)) == 1
    with pytest.raises(ImageError, match="2"):
        interpretability_report(skips, paths, y, masks=masks, **options)


@pytest.mark.parametrize("function", [pointing, object_coverage])
def test_masks_that_cannot_be_used_are_refused(clf, function):
    with pytest.raises(ValueError, match="X has 4 images and masks 3; as many are needed"):
        function(clf, X, np.ones((3, SIDE, SIDE)))
    with pytest.raises(ValueError, match=r"mask of image 0 has shape \(32, 31\)"):
        function(clf, X, np.ones((4, SIDE, SIDE - 1)))
    with pytest.raises(ValueError, match="attribution must be one of"):
        function(clf, X, np.ones((4, SIDE, SIDE)), attribution="gradcam")
