"""Where a match is: painted patches are found again, and gradients are those of a plain loop."""

import weakref

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from sklearn.base import clone
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.attribution import _COPIES, _NOISE, gradient_maps, input_boxes, salient_box
from protoclf.explanation import BOX, FIELD, REST, SOURCE_BOX
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.metrics import deletion_score
from protoclf.metrics.faithfulness import DELETION_COLUMNS, _elsewhere

SIZES = [(64, 64), (200, 100), (90, 250), (333, 77), (41, 40), (1000, 700)]
COLOURS = {"blue": (20, 40, 250), "red": (250, 40, 20)}


def painted(size, colour, rng, resize):
    """A grey picture with a patch of a quarter of the shown side, and the box of the patch."""
    width, height = size
    shown = np.array([min(size)] * 2 if resize == "crop" else size)
    side = shown // 4
    corner = (np.array(size) - shown) // 2
    x0, y0 = corner + rng.integers(0, shown - side + 1)
    pixels = rng.integers(110, 140, (height, width, 3)).astype(np.uint8)
    pixels[y0 : y0 + side[1], x0 : x0 + side[0]] = colour
    return PIL.Image.fromarray(pixels), [x0, y0, x0 + side[0], y0 + side[1]]


@pytest.fixture(scope="module", params=["crop", "squash"])
def finder(request):
    """Cells of 4 x 4 pixels of the model input: one prototype for each colour."""
    rng = np.random.default_rng(0)
    y = list(COLOURS) * 6
    X = [painted(SIZES[i % 6], COLOURS[c], rng, request.param)[0] for i, c in enumerate(y)]
    clf = ProtoPNetClassifier(
        nn.AvgPool2d(4),
        image_size=64,
        resize=request.param,
        normalization=([0.5] * 3, [0.5] * 3),
        train_backbone=False,
        prototypes_per_class=1,
        similarity="log",  # cosines of grey cells are those of noise
        random_state=0,
        verbose=0,
    )
    return clf.fit(X, y)


@pytest.mark.parametrize("attribution", ["upsampled", "gradient"])
def test_a_painted_patch_is_found_in_pixels_of_the_original(finder, attribution):
    rng = np.random.default_rng(1)
    for size in SIZES:
        for label, colour in COLOURS.items():
            picture, patch = painted(size, colour, rng, finder.resize)
            assert finder.predict([picture]) == [label]
            row = finder.explain([picture], top=1, attribution=attribution).iloc[0]
            box, field = row[BOX].to_numpy(int), row[FIELD].to_numpy(int)
            for found in (box, field):
                assert (found >= 0).all()
                assert (found <= [*size, *size]).all()
                centre = (found[:2] + found[2:]) / 2
                cell = np.array([patch[2] - patch[0], patch[3] - patch[1]]) / 4  # and a pixel
                assert (centre >= patch[:2] - cell - 1).all(), (size, found, patch)
                assert (centre <= patch[2:] + cell + 1).all(), (size, found, patch)


def test_the_receptive_field_is_that_of_the_cell(finder):
    rng = np.random.default_rng(2)
    picture, _ = painted((128, 128), COLOURS["red"], rng, "crop")
    sheet = finder.explain([picture], "all")
    for row in sheet.to_dict("records"):
        x, y = 8 * row["col"], 8 * row["row"]  # pixels of the original are half those of the input
        assert [row[name] for name in FIELD] == [x, y, x + 8, y + 8]


def test_only_the_boxes_depend_on_the_attribution(fitted, squares):
    upsampled = fitted.explain(squares[0][:4], "top2", top=1)
    gradient = fitted.explain(squares[0][:4], "top2", top=1, attribution="gradient")
    both = [*BOX, *SOURCE_BOX]
    pd.testing.assert_frame_equal(gradient.drop(columns=both), upsampled.drop(columns=both))
    assert (gradient[both].dtypes == upsampled[both].dtypes).all()
    rest = gradient["source"] == REST
    assert rest.any()
    assert gradient[both].isna().all(axis=1).equals(rest)
    assert not gradient[BOX].equals(upsampled[BOX])


def test_a_source_has_the_box_that_its_image_has(fitted, squares):
    X, _ = squares
    sheet = fitted.explain(X, attribution="gradient")
    sources = fitted.explain(X[fitted.prototypes_["source_index"]], "all", attribution="gradient")
    for row in sheet.drop_duplicates("prototype").to_dict("records"):
        j = row["prototype"]
        own = sources[(sources["sample"] == j) & (sources["prototype"] == j)].iloc[0]
        assert [row[name] for name in SOURCE_BOX] == own[BOX].tolist()


def test_a_source_that_is_gone_keeps_its_box_with_a_warning(fitted, squares, tmp_path):
    X, y = squares
    paths = [tmp_path / f"{i}.png" for i in range(len(X))]
    for path, pixels in zip(paths, X, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    clf = clone(fitted).fit(paths, y)
    for path in paths:
        path.unlink()
    with pytest.warns(UserWarning, match="is not by gradient"):
        sheet = clf.explain(X[:1], attribution="gradient")
    assert sheet[SOURCE_BOX].equals(clf.explain(X[:1])[SOURCE_BOX])


def test_a_higher_percentile_gives_smaller_boxes(fitted, squares):
    def area(percentile, attribution):
        found = fitted.explain(squares[0][:4], percentile=percentile, attribution=attribution)
        return ((found["x1"] - found["x0"]) * (found["y1"] - found["y0"])).sum()

    for attribution in ("upsampled", "gradient"):
        areas = [area(percentile, attribution) for percentile in (50, 90, 99)]
        assert areas[0] > areas[1] > areas[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attribution": "gradcam"}, "attribution must be one of 'upsampled', 'gradient'"),
        ({"percentile": 100}, "percentile must be 0, or a number >= 1 and < 100 .*; got 100"),
        ({"percentile": 0.95}, r"\(95, not 0.95\); got 0.95"),
        ({"percentile": "95"}, "percentile must be 0, or a number"),
    ],
)
def test_wrong_arguments_are_refused(fitted, squares, wrong, message):
    with pytest.raises(ValueError, match=message):
        fitted.explain(squares[0][:1], **wrong)


def test_gradients_are_those_of_each_copy_by_itself(fitted, squares):
    module = fitted.module_
    image = ImageDataset(Images(squares[0]), fitted.preprocessing_).__getitems__([3])[0]["images"]
    prototypes = torch.tensor([4, 0])
    maps = gradient_maps(module, image[0], prototypes)
    noise = torch.randn(_COPIES, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    for j, found in zip(prototypes.tolist(), maps, strict=True):
        cell = int(module.similarity_maps(module.latents(module.features(image)))[0, j].argmax())
        expected = torch.zeros(48, 48)
        for copy in image[0] + 255 * _NOISE * noise:
            pixels = copy.clone().requires_grad_()
            z = module.latents(module.features(pixels[None]))
            module.similarity_maps(z)[0, j].flatten()[cell].backward()
            expected += pixels.grad.abs().sum(0) / _COPIES
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_a_map_is_blurred_by_half_a_cell_in_each_direction(squares, monkeypatch):
    clf = ProtoPNetClassifier(
        nn.AvgPool2d((2, 8)), image_size=32, train_backbone=False, prototypes_per_class=1, verbose=0
    ).fit(*squares)
    spike = torch.zeros(1, 32, 32)
    spike[0, 16, 16] = 1
    monkeypatch.setattr("protoclf.attribution.gradient_maps", lambda *_: spike)
    dataset = ImageDataset(Images(squares[0]), clf.preprocessing_)
    ((x0, y0, x1, y1),) = input_boxes(clf, dataset, 0, np.array([0]), 95)
    assert x1 - x0 > 3 * (y1 - y0)


def test_gradients_of_many_prototypes_are_not_held_at_once(fitted, squares, monkeypatch):
    image = torch.from_numpy(squares[0][0][:, :40]).permute(2, 0, 1)
    grad, made, held = torch.autograd.grad, [], []

    def noting(*args, **kwargs):
        held.append(sum(gradient() is not None for gradient in made))
        (found,) = grad(*args, **kwargs)
        made.append(weakref.ref(found))
        return (found,)

    monkeypatch.setattr(torch.autograd, "grad", noting)
    maps = gradient_maps(fitted.module_.eval(), image, torch.arange(6))
    assert maps.shape == (6, 40, 40)
    assert max(held) <= 1


def test_a_salient_box_surrounds_the_highest_region_alone():
    attribution = np.zeros((40, 40))
    attribution[5:9, 20:26] = 2
    attribution[30:36, 2:8] = 1
    assert salient_box(attribution, 0, 95) == [20, 5, 26, 9]
    assert salient_box(np.ones((6, 6)), 1, 95) == [0, 0, 6, 6]


def test_covering_a_box_is_scored_as_by_hand(finder):
    rng = np.random.default_rng(3)
    X = [painted(size, COLOURS["red"], rng, finder.resize)[0] for size in SIZES]
    table = deletion_score(finder, X, top=1, n_controls=8)
    sheet = finder.explain(X, top=1)
    sheet = sheet[sheet["source"] != REST]
    dataset = ImageDataset(Images(X), finder.preprocessing_)
    assert table["sample"].tolist() == sheet["sample"].tolist()
    for row, of_sheet in zip(table.to_dict("records"), sheet.to_dict("records"), strict=True):
        i = row["sample"]
        pixels = dataset.__getitems__([i])[0]["images"][0].permute(1, 2, 0).numpy().copy()
        before = finder.transform([PIL.Image.fromarray(pixels)])[0, row["prototype"]]
        logit = finder.explain([PIL.Image.fromarray(pixels)], [row["class"]])["logit"].iloc[0]
        box = np.array([of_sheet[name] for name in BOX], float)
        x0, y0, x1, y1 = (
            finder.preprocessing_.to_input(box, dataset.sizes([i])[0]).round().astype(int)
        )
        pixels[y0:y1, x0:x1] = pixels.mean((0, 1)).round()
        after = finder.transform([PIL.Image.fromarray(pixels)])[0, row["prototype"]]
        assert row["similarity_drop"] == pytest.approx(before - after, abs=1e-4)
        logit -= finder.explain([PIL.Image.fromarray(pixels)], [row["class"]])["logit"].iloc[0]
        assert row["logit_drop"] == pytest.approx(logit, abs=1e-4)
        assert row["area"] == pytest.approx((x1 - x0) * (y1 - y0) / 64**2)
    assert (table["logit_drop"] > table["control_logit_drop"]).mean() > 0.5
    again = deletion_score(finder, X, top=1, n_controls=8)
    assert again[DELETION_COLUMNS].equals(table[DELETION_COLUMNS])
    assert not deletion_score(finder, X, top=1, random_state=1)[DELETION_COLUMNS].equals(
        table[DELETION_COLUMNS]
    )


def test_random_places_are_as_large_as_the_box_and_anywhere():
    boxes = np.array([[0, 0, 4, 10], [2, 3, 32, 5]])
    places = _elsewhere(boxes, 32, 200, np.random.default_rng(0))  # (2, 200, 4)
    sizes = places[..., 2:] - places[..., :2]
    assert (sizes == (boxes[:, 2:] - boxes[:, :2])[:, None]).all()
    assert (places[..., :2].min(1) == 0).all()
    assert (places[..., 2:].max(1) == 32).all()


def test_a_box_over_the_whole_image_scores_nothing(fitted, squares):
    table = deletion_score(fitted, squares[0][:2], percentile=0)
    whole = table[table["area"] == 1]
    assert len(whole)
    np.testing.assert_allclose(whole["logit_drop"], whole["control_logit_drop"], atol=1e-5)
