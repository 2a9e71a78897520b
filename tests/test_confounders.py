"""Signs of confounders, on a model made by hand that points at what its tests draw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colour_model import CELL, COLOURS, SIDE, colour_model, picture

from protoclf.metrics import find_confounders
from protoclf.metrics.confounders import SIGNS, _drop, _kept, _same_place
from protoclf.receptive_field import BackboneGeometry

BLUE, RED = COLOURS["blue"], COLOURS["red"]
YELLOW, GREEN = (255, 255, 0), (0, 255, 0)
CORNER = (0, 0)
SPOTS = [(2, 2), (3, 5), (5, 2), (6, 6), (2, 6), (6, 3)]


def pictures(mark=True):
    """Each with a spot of its class and a green one; blue ones have a yellow corner too."""
    y = np.array(["blue", "red"] * 3)
    images = []
    for k, label in enumerate(y):
        spots = {SPOTS[k]: COLOURS[label], SPOTS[k - 1]: GREEN}
        images.append(picture(spots | ({CORNER: YELLOW} if mark and label == "blue" else {})))
    return np.stack(images), y


def masks():
    """The spot and the green one: what the picture is of."""
    found = np.zeros((6, SIDE, SIDE), bool)
    for k, mask in enumerate(found):
        for row, col in (SPOTS[k], SPOTS[k - 1]):
            mask[CELL * row : CELL * row + CELL, CELL * col : CELL * col + CELL] = True
    return found


@pytest.fixture(scope="module")
def clf():
    """Prototypes: blue, the yellow mark and green for "blue"; red, green and red for "red"."""
    owner, weight = (0, 0, 0, 1, 1, 1), [[1.0, 4, 2, 0, 0, 0], [0, 0, 0, 3, 1, 2]]
    colours = [BLUE, YELLOW, GREEN, RED, GREEN, RED]
    return colour_model(colours=colours, owner=owner, weight=weight)


@pytest.fixture(scope="module")
def table(clf):
    X, y = pictures()
    clean, y_clean = pictures(mark=False)
    return find_confounders(clf, X, y, masks=masks(), X_valid=clean, y_valid=y_clean)


def test_the_mark_comes_first_with_its_reasons(table):
    first = table.iloc[0]
    assert first["prototype"] == 1
    assert first["signs"] == 3
    assert first["reasons"].startswith("keeps 100% of its similarity when the object is covered; ")
    assert "is at the same place in 100% of the images of its class" in first["reasons"]
    assert "of its similarity on validation images" in first["reasons"]
    assert (table["signs"].diff().dropna() <= 0).all()
    for _, rows in table.groupby("signs"):
        assert rows["weight"].is_monotonic_decreasing


def test_the_signs_are_those_of_plain_loops(clf, table):
    X, y = pictures()
    clean, _ = pictures(mark=False)
    covered = X.copy()
    for image, mask in zip(covered, masks(), strict=True):
        image[mask] = image.reshape(-1, 3).mean(0).round()
    g, g_covered, g_clean = clf.transform(X), clf.transform(covered), clf.transform(clean)
    for row in table.to_dict("records"):
        j, own = row["prototype"], np.flatnonzero(y == row["class"])
        others = np.flatnonzero(y != row["class"])
        shares = [max(min(g_covered[i, j] / g[i, j], 1), 0) for i in own]
        assert row["kept"] == pytest.approx(np.mean(shares), abs=1e-4)
        wins = [(g[i, j] > g[k, j]) + (g[i, j] == g[k, j]) / 2 for i in own for k in others]
        assert row["separation"] == pytest.approx(np.mean(wins), abs=1e-6)
        drop = 1 - np.median(g_clean[own, j]) / np.median(g[own, j])
        assert row["validation_drop"] == pytest.approx(np.clip(drop, 0, 1), abs=1e-4)
        cells = [CORNER if j == 1 else SPOTS[i - (clf_colour(j) == GREEN)] for i in own]
        near = [
            np.mean([max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1 for b in cells]) for a in cells
        ]
        assert row["same_place"] == pytest.approx(max(near))


def clf_colour(j):
    return [BLUE, YELLOW, GREEN, RED, GREEN, RED][j]


def test_green_fires_alike(table):
    green = table[table["prototype"].isin([2, 4])]
    assert green["separation"].tolist() == [0.5, 0.5]
    assert green["reasons"].str.contains("fires alike across classes").all()


def test_what_is_on_the_object_has_no_sign(table):
    red = table[table["prototype"].isin([3, 5])]
    assert (red["signs"] == 0).all()
    assert (red["reasons"] == "").all()


def test_without_masks_and_validation_these_signs_are_missing(clf):
    table = find_confounders(clf, *pictures())
    assert table[["kept", "validation_drop"]].isna().all(axis=None)
    assert table["prototype"].iloc[0] == 1
    assert not table["reasons"].str.contains("object|validation").any()


def test_thresholds_can_be_set(clf):
    X, y = pictures()
    strict = find_confounders(clf, X, y, thresholds={"same_place": 1.01, "separation": 0.4})
    assert (strict["signs"] == 0).all()
    assert set(SIGNS) == {"kept", "same_place", "separation", "validation_drop"}


def test_a_class_that_validation_lacks_has_no_drop(clf):
    X, y = pictures()
    red = y == "red"
    table = find_confounders(clf, X, y, X_valid=X[red], y_valid=y[red])
    assert table.loc[table["class"] == "blue", "validation_drop"].isna().all()
    assert table.loc[table["class"] == "red", "validation_drop"].notna().all()


def test_images_without_an_object_do_not_count(clf, table):
    X, y = pictures()
    some = masks()
    some[::3] = False
    found = find_confounders(clf, X, y, masks=some)
    seen = find_confounders(clf, X[[1, 2, 4, 5]], y[[1, 2, 4, 5]], masks=masks()[[1, 2, 4, 5]])
    kept = [t.set_index("prototype")["kept"].sort_index() for t in (found, seen)]
    np.testing.assert_allclose(*kept)
    none = find_confounders(clf, X, y, masks=np.zeros((6, SIDE, SIDE)))
    assert none["kept"].isna().all()
    assert not none["reasons"].str.contains("covered").any()


def test_two_images_are_too_few_to_be_at_one_place(clf):
    X, y = pictures()
    few = find_confounders(clf, X[:4], y[:4])
    assert few["same_place"].isna().all()


@pytest.mark.parametrize(("side", "share"), [(8, np.nan), (9, 1)])
def test_on_maps_of_3_x_3_patches_no_place_says_anything(side, share):
    clf = SimpleNamespace(
        geometry_=BackboneGeometry(side, 1, side, side, (1.0, 1.0), torch.nn.Identity()),
        module_=SimpleNamespace(prototype_size=(6, 6)),
    )
    found = _same_place(clf, np.zeros((4, 2), int), np.ones((4, 2), bool))
    np.testing.assert_array_equal(found, [share, share])


def test_what_was_not_similar_before_loses_nothing():
    own = np.ones((4, 2), bool)
    g = np.array([[-0.1, 0.4]] * 4)
    np.testing.assert_array_equal(_drop(g, own, g, own), [np.nan, 0])
    covered = np.full((4, 2), 0.1)
    g[:2, 1] = -0.5, 0
    np.testing.assert_allclose(_kept(g, covered, own), [np.nan, 0.25])


def test_wrong_arguments_are_refused(clf):
    X, y = pictures()
    with pytest.raises(ValueError, match="X_valid and y_valid go together"):
        find_confounders(clf, X, y, X_valid=X)
    with pytest.raises(ValueError, match=r"thresholds may have kept, .*; got \['place'\]"):
        find_confounders(clf, X, y, thresholds={"place": 1})
    with pytest.raises(ValueError, match="thresholds must be numbers; 'kept' is 'high'"):
        find_confounders(clf, X, y, thresholds={"kept": "high"})
    with pytest.raises(ValueError, match="as many are needed"):
        find_confounders(clf, X, y, masks=masks()[:2])
    with pytest.raises(ValueError, match=r"X has no image of \['blue'\]"):
        find_confounders(clf, X[y == "red"], y[y == "red"])
    with pytest.raises(ValueError, match="requires y to be passed"):
        find_confounders(clf, X, None)


def test_masks_are_seen_as_the_model_sees_the_image(fitted, squares):
    """Cropped and resized: covering all that the model sees leaves one colour."""
    X, y = squares
    everything = np.ones((len(X), 40, 60), bool)
    everything[:, :, :10] = everything[:, :, 50:] = False  # cut off by the crop
    table = find_confounders(fitted, X, y, masks=everything)
    one_colour = np.stack([np.full_like(x, x[:, 10:50].mean((0, 1)).round()) for x in X])
    g, covered = fitted.transform(X), fitted.transform(one_colour)
    for row in table.to_dict("records"):
        j, own = row["prototype"], y == row["class"]
        share = (covered[own, j] / g[own, j].clip(1e-6)).clip(0, 1).mean()
        assert row["kept"] == pytest.approx(share, abs=0.05)
