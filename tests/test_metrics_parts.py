"""Consistency, stability and purity: models made by hand, and the published procedure in loops."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from colour_model import CELL, COLOURS, SIDE, colour_model, parts_at, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.metrics import consistency, part_purity, stability
from protoclf.nearest_patches import nearest_patches

RED, BLUE = COLOURS["red"], COLOURS["blue"]
ONE_CELL = CELL / SIDE
SPOTS = [(2, 5), (6, 1), (4, 4), (7, 7), (1, 0)]


@pytest.fixture(scope="module")
def clf():
    return colour_model()


def spotted(places=SPOTS, colour=RED):
    return np.stack([picture({place: colour}) for place in places])


def labels(n_hits):
    """The wing is at the spot in the first images, and far from it in the others."""
    far = [((r + 4) % 8, (c + 4) % 8) for r, c in SPOTS]
    return parts_at(*({"wing": (SPOTS if i < n_hits else far)[i]} for i in range(5)))


# ---- consistency ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_hits", "consistent"), [(0, 0), (3, 0), (4, 1), (5, 1)])
def test_consistency_of_a_detector_of_red(clf, n_hits, consistent):
    table = consistency(clf, spotted(), ["red"] * 5, labels(n_hits))
    assert table.loc[1, "frequency"] == n_hits / 5
    assert table.loc[1, "consistent"] == consistent
    assert table.loc[1, "n_images"] == 5
    assert table["part"].fillna("none")[1] == ("wing" if n_hits else "none")


def test_a_class_without_images_has_no_score(clf):
    table = consistency(clf, spotted(), ["red"] * 5, labels(5))
    assert table.loc[0, ["part", "frequency", "consistent"]].isna().all()
    assert table["consistent"].mean() == 1
    assert pd.isna(stability(clf, spotted(), ["red"] * 5, labels(5)).loc[0, "stable"])


def test_parts_that_are_not_to_be_seen_do_not_count(clf):
    parts = labels(3).assign(visible=[True] * 3 + [False] * 2)
    assert consistency(clf, spotted(), ["red"] * 5, parts).loc[1, "frequency"] == 1
    cut_off = labels(3)
    cut_off.loc[3:, "x"] = SIDE + 5
    assert consistency(clf, spotted(), ["red"] * 5, cut_off).loc[1, "frequency"] == 1


def test_the_region_has_the_size_that_was_asked_for(clf):
    X = spotted([(4, 4)] * 9)
    at = 4 * CELL + CELL / 2 + np.arange(9)  # ever farther to the right
    parts = pd.DataFrame({"sample": range(9), "part": "wing", "x": at, "y": 18.0})
    for cells, hits in ((1, 2), (2, 4), (3, 6), (4, 8)):  # the highest pixel is the 17th
        table = consistency(clf, X, ["red"] * 9, parts, region=cells * ONE_CELL)
        assert table.loc[1, "frequency"] == hits / 9
    box = clf.explain(X[:1])[["x0", "x1"]].to_numpy()[0]
    inside = ((at >= box[0]) & (at <= box[1])).mean()
    table = consistency(clf, X, ["red"] * 9, parts, region="box")
    assert table.loc[1, "frequency"] == pytest.approx(inside)


def test_two_eyes_are_one_part(clf):
    eyes = pd.concat([parts_at({"eye": (2, 5)}), parts_at({"eye": (0, 0)})])
    assert consistency(clf, spotted(SPOTS[:1]), ["red"], eyes).loc[1, "frequency"] == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([(3, 3), (6, 6), (0, 7), (5, 1)]), min_size=1, max_size=6))
def test_frequencies_are_those_of_counting(clf, places):
    at = {"wing": (3, 3), "tail": (6, 6)}
    parts, y = parts_at(*[at] * len(places)), ["red"] * len(places)
    table = consistency(clf, spotted(places), y, parts, region=ONE_CELL)
    assert table.loc[1, "frequency"] == max(places.count(at[p]) / len(places) for p in at)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_large_prototype_is_at_the_middle_of_its_patch(size):
    model = colour_model()
    patch = model.module_.prototypes.detach()[:, :, :1, :1].expand(-1, -1, size, size).clone()
    model.replace_prototypes(patch, model.module_.owner, model.module_.last_layer.weight.data)
    corners = {2: [(1, 1), (5, 3)], 3: [(1, 1), (2, 4)], 5: [(1, 2)], 8: [(0, 0)]}[size]
    X = np.stack(
        [
            picture({(r + i, c + j): RED for i in range(size) for j in range(size)})
            for r, c in corners
        ]
    )
    middles = [(CELL * (c + size / 2), CELL * (r + size / 2)) for r, c in corners]
    parts = pd.DataFrame(middles, columns=["x", "y"]).assign(sample=range(len(X)), part="square")
    table = consistency(model, X, ["red"] * len(X), parts, region=2 / SIDE)
    assert table.loc[1, "frequency"] == 1
    away = parts.assign(x=parts["x"] + 3)
    table = consistency(model, X, ["red"] * len(X), away, region=2 / SIDE)
    assert table.loc[1, "frequency"] == 0


def test_a_class_without_visible_parts_has_no_score(clf):
    X, y = np.concatenate([spotted(), spotted(colour=BLUE)]), ["red"] * 5 + ["blue"] * 5
    hidden = labels(5).assign(sample=range(5, 10), visible=False)
    parts = pd.concat([labels(5).assign(visible=True), hidden])
    table = consistency(clf, X, y, parts)
    assert table.loc[0, ["part", "frequency", "consistent"]].isna().all()
    assert table["consistent"].mean() == 1
    table = part_purity(clf, X, parts, k=5, visible_only=True)
    assert table["purity"].isna().tolist() == [True, False]


@pytest.mark.parametrize("function", [consistency, stability, part_purity])
def test_labels_that_show_no_part_are_refused(clf, function):
    arguments = () if function is part_purity else (["red"] * 5,)
    for hidden in (labels(5).assign(visible=False), labels(5).assign(x=-5.0)):
        with pytest.raises(ValueError, match="No part in parts is to be seen"):
            function(clf, spotted(), *arguments, hidden)
    with pytest.raises(ValueError, match='"visible" in parts must be True or False'):
        function(clf, spotted(), *arguments, labels(5).assign(visible="False"))


# ---- stability --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_flat", "stable"), [(0, 1.0), (2, 0.5), (4, 0.0)])
def test_noise_moves_what_is_nowhere(clf, n_flat, stable):
    """A flat picture is as red everywhere: noise decides where."""
    X = np.stack([picture({})] * n_flat + [picture({(2, 5): RED})] * (4 - n_flat))
    parts = parts_at(*[{"corner": (0, 0), "wing": (2, 5)}] * 4)
    table = stability(clf, X, ["red"] * 4, parts, region=ONE_CELL)
    assert table.loc[1, "stable"] == stable
    still = stability(clf, X, ["red"] * 4, parts, region=ONE_CELL, noise=0.0)
    assert still.loc[1, "stable"] == 1


def test_another_set_of_as_many_parts_is_not_the_same(clf):
    """Flat pictures, labelled in every cell: the place moves from one part to another."""
    everywhere = {f"{r} {c}": (r, c) for r in range(8) for c in range(8)}
    table = stability(clf, np.stack([picture({})] * 3), ["red"] * 3, parts_at(*[everywhere] * 3))
    assert table.loc[1, "stable"] == 0


# ---- purity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_hits", [0, 2, 5])
def test_purity_is_the_share_of_the_nearest_patches(clf, n_hits):
    X = np.concatenate([spotted(), spotted(SPOTS, BLUE)])
    parts = pd.concat([labels(n_hits), labels(0).assign(sample=lambda t: t["sample"] + 5)])
    table = part_purity(clf, X, parts, k=5, region=ONE_CELL)
    assert table.loc[1, "purity"] == n_hits / 5
    assert table.loc[0, "purity"] == 0
    assert (table["n_images"] == 5).all()


def test_a_part_seen_once_makes_a_prototype_pure_as_in_the_published_code(clf):
    parts = labels(5).assign(visible=[True] + [False] * 4)
    assert part_purity(clf, spotted(), parts, k=5).loc[1, "purity"] == 0.2
    assert part_purity(clf, spotted(), parts, k=5, visible_only=True).loc[1, "purity"] == 1


def test_patches_are_whole_inside_the_input(clf):
    """At the first cell the square begins at 0, at the last it ends at 32."""
    X = spotted([(0, 0), (7, 7)])
    parts = pd.DataFrame({"sample": [0, 1], "part": "a", "x": [15.9, 16.1], "y": [15.9, 16.1]})
    assert part_purity(clf, X, parts, k=2, region=0.5).loc[1, "purity"] == 1
    parts = pd.DataFrame({"sample": [0, 1], "part": "a", "x": [16.1, 15.9], "y": [15.9, 16.1]})
    assert part_purity(clf, X, parts, k=2, region=0.5).loc[1, "purity"] == 0


# ---- against loops ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A classifier of birds, larger birds than it sees at once, and where their parts are."""
    X, y, parts = make_birds(tmp_path_factory.mktemp("birds"), 4, 96)
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=64,
        prototypes_per_class=3,
        joint_epochs=1,
        batch_size=7,
        random_state=0,
        verbose=0,
    )
    return clf.fit(X, y), X, y, parts


def found_parts(clf, X, parts, maps, half):
    """Which parts of each image (n, K) each prototype (m) is at, by the published procedure."""
    names = sorted(parts["part"].unique())
    found = np.zeros((len(X), maps.shape[1], len(names)), bool)
    seen = np.zeros((len(X), len(names)), bool)
    for i, path in enumerate(X):
        rows = parts[parts["path"] == path]
        for j in range(maps.shape[1]):
            cells = torch.from_numpy(maps[i, j])[None, None].double()
            up = torch.nn.functional.interpolate(cells, (64, 64), mode="bicubic")[0, 0]
            row, col = divmod(int(up.argmax()), 64)
            for part in rows.to_dict("records"):
                x = (part["x0"] + part["x1"]) / 2 * 64 / 96
                y = (part["y0"] + part["y1"]) / 2 * 64 / 96
                k = names.index(part["part"])
                seen[i, k] = True
                found[i, j, k] = abs(x - col - 0.5) <= half and abs(y - row - 0.5) <= half
    return names, found, seen


def test_consistency_is_that_of_the_published_procedure(birds):
    clf, X, y, parts = birds
    names, found, seen = found_parts(clf, X, parts, clf.similarity_maps(X), half=36 / 224 * 64)
    table = consistency(clf, X, y, parts, threshold=0.5)
    for row in table.to_dict("records"):
        own = y == row["class"]
        share = found[own, row["prototype"]].sum(0) / np.maximum(seen[own].sum(0), 1)
        assert row["frequency"] == pytest.approx(share.max())
        assert row["consistent"] == (share.max() >= 0.5)
        assert row["part"] == names[share.argmax()] if share.any() else pd.isna(row["part"])
    assert 0 < table["consistent"].mean() < 1
    clf.set_params(batch_size=32)
    pd.testing.assert_frame_equal(consistency(clf, X, y, parts, threshold=0.5), table)
    clf.set_params(batch_size=7)


def test_stability_is_that_of_the_published_procedure(birds):
    clf, X, y, parts = birds
    options = {"noise": 1.0, "clip": 0.8, "random_state": 3}
    table = stability(clf, X, y, parts, **options)
    pixels = clf.get_dataset(X).decoded(np.arange(len(X))).float()
    for i in range(len(X)):
        draws = np.random.default_rng((3, i)).standard_normal((3, 64, 64), dtype=np.float32)
        levels = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        pixels[i] += levels * torch.from_numpy(draws).clamp(-0.8, 0.8)
    with torch.no_grad():
        noisy = clf.module_.similarity_maps(clf.module_.latents(clf.module_.features(pixels)))
    half = 36 / 224 * 64
    _, before, _ = found_parts(clf, X, parts, clf.similarity_maps(X), half)
    _, after, _ = found_parts(clf, X, parts, noisy.numpy(), half)
    for row in table.to_dict("records"):
        own, j = y == row["class"], row["prototype"]
        expected = (before[own, j] == after[own, j]).all(1).mean()
        assert row["stable"] == pytest.approx(expected)
    assert 0 < table["stable"].mean() < 1


def test_purity_is_that_of_the_published_procedure(birds):
    clf, X, _, parts = birds
    table = part_purity(clf, X, parts, k=6)
    g, maps = clf.transform(X), clf.similarity_maps(X)
    names, side = sorted(parts["part"].unique()), 32 / 224 * 64
    for row in table.to_dict("records"):
        j, counts = row["prototype"], dict.fromkeys(names, 0)
        for i in np.argsort(-g[:, j], kind="stable")[:6]:
            cell = np.unravel_index(maps[i, j].argmax(), maps[i, j].shape)
            y0, x0 = (
                c / (n - 1) * (64 - side) for c, n in zip(cell, maps[i, j].shape, strict=True)
            )
            for part in parts[parts["path"] == X[i]].to_dict("records"):
                px = (part["x0"] + part["x1"]) / 2 * 64 / 96
                py = (part["y0"] + part["y1"]) / 2 * 64 / 96
                counts[part["part"]] += x0 <= px <= x0 + side and y0 <= py <= y0 + side
        assert row["purity"] == max(counts.values()) / 6
    assert 0 < table["purity"].mean() < 1


def test_the_region_of_purity_may_be_the_box(birds):
    clf, X, _, parts = birds
    table, found = part_purity(clf, X, parts, k=6, region="box"), nearest_patches(clf, X, 6)
    for j, purity in table["purity"].items():
        counts = dict.fromkeys(parts["part"], 0)
        for row in found[found["prototype"] == j].to_dict("records"):
            for part in parts[parts["path"] == row["path"]].to_dict("records"):
                px, py = (part["x0"] + part["x1"]) / 2, (part["y0"] + part["y1"]) / 2
                inside = row["x0"] <= px <= row["x1"] and row["y0"] <= py <= row["y1"]
                counts[part["part"]] += inside
        assert purity == max(counts.values()) / 6


def test_images_in_another_order_have_the_same_scores(birds):
    clf, X, y, parts = birds
    order = np.random.default_rng(0).permutation(len(X))
    shuffled = [X[i] for i in order]
    first, second = consistency(clf, X, y, parts), consistency(clf, shuffled, y[order], parts)
    pd.testing.assert_frame_equal(first, second)


# ---- labels that cannot be used ---------------------------------------------------------------


def test_paths_may_be_path_objects(birds):
    clf, X, y, parts = birds
    given_paths = parts.assign(path=[Path(p) for p in parts["path"]])
    first, second = (consistency(clf, X, y, table) for table in (parts, given_paths))
    pd.testing.assert_frame_equal(first, second)


def test_paths_may_be_no_valid_text(birds, tmp_path):
    clf, X, y, parts = birds
    names = {
        path: os.fsdecode(os.fsencode(tmp_path / str(i)) + b"\xff.png") for i, path in enumerate(X)
    }
    for path, name in names.items():
        shutil.copy(path, name)
    renamed = parts.assign(path=pd.Series([names[p] for p in parts["path"]], dtype=object))
    first, second = (
        consistency(clf, X, y, parts),
        consistency(clf, list(names.values()), y, renamed),
    )
    pd.testing.assert_frame_equal(first, second)


def test_images_and_labels_may_come_as_a_data_set(birds):
    clf, X, y, parts = birds
    dataset = [(np.asarray(PIL.Image.open(path)), label) for path, label in zip(X, y, strict=True)]
    by_position = parts.assign(sample=parts["path"].map({path: i for i, path in enumerate(X)}))
    for function in (consistency, stability):
        first = function(clf, X, y, parts)
        pd.testing.assert_frame_equal(first, function(clf, Items(dataset), None, by_position))


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="part"), "parts must have the columns sample, part, and either"),
        (lambda t: t.drop(columns="y"), "parts must have the columns"),
        (lambda t: t.to_numpy(), r"parts must have the columns .*; it has \[\]"),
        (lambda t: t[t["sample"] != 3], r"no row for 1 of 5 images, such as sample 3"),
        (lambda t: t.assign(x=[np.nan] * 5), "parts has rows without a place"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(clf, change, message):
    with pytest.raises(ValueError, match=message):
        consistency(clf, spotted(), ["red"] * 5, change(labels(5)))


def test_labels_of_other_paths_are_refused(birds):
    clf, X, y, parts = birds
    elsewhere = parts.assign(path=["elsewhere/" + p for p in parts["path"]])
    with pytest.raises(ValueError, match="no row for 32 of 32 images, such as path"):
        consistency(clf, X, y, elsewhere)


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (consistency, {"region": 2}, 'region must be "box", or a number > 0 and <= 1'),
        (consistency, {"region": "square"}, "region must be"),
        (consistency, {"threshold": 0}, "threshold must be a number > 0 and <= 1; got 0"),
        (stability, {"noise": -1}, "noise must be a finite number >= 0"),
        (stability, {"random_state": 0.5}, "random_state must be an int >= 0"),
    ],
)
def test_wrong_arguments_are_refused(clf, function, wrong, message):
    with pytest.raises(ValueError, match=message):
        function(clf, spotted(), ["red"] * 5, labels(5), **wrong)
    with pytest.raises(ValueError, match="k must be an int >= 1"):
        part_purity(clf, spotted(), labels(5), k=0)
