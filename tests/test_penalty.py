"""The path of the penalty, and what chooses from it."""

import warnings

import numpy as np
import pytest
import torch

from protoclf import ProtoPNetClassifier
from protoclf.activations import Activations, tolerance
from protoclf.last_layer import solve_last_layer
from protoclf.penalty import PENALTIES, auto_penalty, penalties_to_try, penalty_path


def activations(n=60, m=12, n_classes=3, seed=0, weight=None):
    """Prototypes fire on images of their class, with noise."""
    rng = torch.Generator().manual_seed(seed)
    y, owner = torch.arange(n) % n_classes, torch.arange(m) % n_classes
    g = 0.4 * torch.rand(n, m, generator=rng) + 0.3 * (y[:, None] == owner)
    return Activations(g.double(), y, owner, n_classes, weight)


@pytest.mark.parametrize("lambda_l2", [0.0, 0.1])
def test_every_row_is_the_optimum_for_its_penalty(lambda_l2):
    data = activations()
    path = penalty_path(data, [1e-4, 1e-2, 1e-3], folds=3, seed=0, lambda_l2=lambda_l2)
    assert path["lambda_l1"].tolist() == [1e-2, 1e-3, 1e-4]
    for _, row in path.iterrows():
        places = data.y, data.owner, row["lambda_l1"]
        alone = solve_last_layer(data.g, *places, lambda_l2=lambda_l2)
        assert row["objective"] == pytest.approx(alone.objective, abs=1e-7)
        assert row["n_nonzero"] == (row["weight"] != 0).sum()
        assert row["n_prototypes"] == (row["weight"] != 0).any(0).sum()
        right = (data.g.numpy() @ row["weight"].T).argmax(1) == data.y.numpy()
        assert row["train_accuracy"] == pytest.approx(right.mean())
    assert path["n_nonzero"].is_monotonic_increasing


def test_held_out_scores_are_those_of_images_left_out():
    """Labels at random: what the training images are told by heart, no other image confirms."""
    data = activations(n=80, m=40, n_classes=4)
    data.y = data.y[torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    path = penalty_path(data, [1e-6], folds=4, seed=0)
    assert path["accuracy"][0] < 0.4
    assert path["train_accuracy"][0] > path["accuracy"][0] + 0.1
    assert 0 <= path["accuracy_std"][0] < 0.5
    assert path["cross_entropy"][0] > np.log(4) - 0.1


def test_held_out_scores_are_of_both_penalties():
    path = penalty_path(activations(), [1e-4], folds=3, seed=0, lambda_l2=1e3)
    assert path["cross_entropy"][0] == pytest.approx(np.log(3), abs=0.01)  # all weights are small


def test_without_folds_nothing_is_held_out():
    path = penalty_path(activations(), [1e-3], folds=0, seed=0)
    assert path["accuracy"].isna().all()
    assert path["n_nonzero"][0] > 0


def test_small_classes_lower_the_number_of_folds():
    data = activations().take(np.r_[0:30:3, 1:30:3, 2, 5])  # two images of the last class
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = penalty_path(data, [1e-3], folds=4, seed=0)
    assert 0.5 < path["accuracy"][0] <= 1


def test_weights_count_as_repeated_images():
    data = activations(n=30)
    twice = activations(n=30, weight=torch.tensor([2.0, 1.0, 1.0]).repeat(10))
    index = np.r_[0:30, 0:30:3]
    (weighted,), (repeated,) = twice.solve([1e-3]), data.take(index).solve([1e-3])
    torch.testing.assert_close(weighted.weight, repeated.weight, atol=1e-4, rtol=0)
    assert twice.scores(weighted.weight) == pytest.approx(data.take(index).scores(weighted.weight))


@pytest.fixture(scope="module")
def chosen(squares):
    return ProtoPNetClassifier(
        "small_cnn",
        image_size=48,
        prototypes_per_class="auto",
        lambda_l1="cv",
        joint_epochs=2,
        batch_size=8,
        random_state=0,
        verbose=0,
    ).fit(*squares)


def test_a_fit_chooses_the_penalty_of_the_lowest_cross_entropy(chosen):
    path = chosen.last_layer_path_
    assert len(path) == len(PENALTIES)
    best = path["cross_entropy"].idxmin()
    assert chosen.lambda_l1_ == path["lambda_l1"][best]
    assert chosen.last_layer_result_.residual <= 1e-6


def test_penalties_are_for_what_the_solver_is_shown(squares):
    """Not for the matches of prototypes with their own images, which it is not shown."""
    common = {"image_size": 48, "prototypes_per_class": 2, "random_state": 0, "verbose": 0}
    clf = ProtoPNetClassifier(
        "small_cnn", similarity="log", lambda_l1="cv", joint_epochs=1, **common
    ).fit(*squares)
    g = clf.activations_.g.clone()
    largest = float(g.amax())
    g[clf.sources_["image"], np.arange(clf.n_prototypes_)] = 0
    assert largest == pytest.approx(np.log(1e4), rel=1e-3)
    assert clf.last_layer_path_["lambda_l1"].max() < PENALTIES[0] * largest / 2
    assert clf.last_layer_path_["lambda_l1"].max() == pytest.approx(
        PENALTIES[0] * float(g.amax()), rel=0.05
    )


def test_a_class_without_other_groups_leaves_the_penalties_of_all_as_they_are(squares):
    X, y = squares
    groups = np.where(y == y[0], -1, np.arange(len(y)))  # the first class is one group
    common = {"image_size": 48, "prototypes_per_class": 2, "random_state": 0, "verbose": 0}
    largest = []
    for given in (None, groups):
        clf = ProtoPNetClassifier(
            "small_cnn", similarity="log", lambda_l1="cv", joint_epochs=1, **common
        ).fit(X, y, groups=given)
        largest.append(clf.last_layer_path_["lambda_l1"].max())
    assert largest[1] == pytest.approx(largest[0], rel=0.3)


@pytest.mark.parametrize("scale", [1, 0.1, 0.02])
def test_held_out_scores_are_solved_as_penalties_need_it(scale):
    data = activations(n=80).changed(lambda g: scale * g)
    penalties = [scale * p for p in PENALTIES]
    path = penalty_path(data, penalties, 2, seed=0)
    for i, penalty in enumerate(penalties):
        alone = penalty_path(data, [penalty * 1e-3, penalty], 2, seed=0)  # solved more closely
        assert path["cross_entropy"][i] == pytest.approx(alone["cross_entropy"][0], abs=5e-3)


def test_a_fixed_penalty_has_no_path(fitted):
    assert not hasattr(fitted, "last_layer_path_")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"train_backbone": False}, (4e-4, 1e-3)),
        ({"train_backbone": False, "discriminant_weight": 0}, (2e-4, 1e-3)),
        ({}, (5e-4, 0.0)),
        ({"discriminant_weight": 0.5}, (5e-4, 0.0)),
        ({"joint_epochs": 0}, (4e-4, 1e-3)),
        ({"train_backbone": False, "lambda_l1": 0.01}, (0.01, 1e-3)),
        ({"lambda_l2": 0.02}, (5e-4, 0.02)),
    ],
)
def test_automatic_penalties_depend_on_the_features(squares, parameters, expected):
    settings = {"image_size": 48, "prototypes_per_class": 1, "joint_epochs": 1, "verbose": 0}
    clf = ProtoPNetClassifier("small_cnn", **settings | parameters, random_state=0).fit(*squares)
    result = clf.last_layer_result_
    assert (clf.lambda_l1_, result.lambda_l1, result.lambda_l2) == (expected[0], *expected)
    if clf.module_.discriminants is None:  # otherwise `fit` sees the images as if they were new
        path = clf.last_layer_path(*squares, [expected[0]], folds=0)
        assert path["objective"][0] == pytest.approx(result.objective, rel=1e-2)


@pytest.mark.parametrize("features", ["given", "given, with discriminants", "trained"])
def test_automatic_penalties_of_many_classes_are_lower(features):
    first = [auto_penalty("lambda_l1", "auto", features, c) for c in (2, 10, 40, 1000)]
    np.testing.assert_allclose(np.divide(first, first[1]), [1, 1, 0.5, 0.1])
    second = {auto_penalty("lambda_l2", "auto", features, c) for c in (2, 10, 40)}
    assert len(second) == 1  # its sum of squares is divided by the number of classes
    assert auto_penalty("lambda_l1", 0.01, features, 40) == 0.01


@pytest.mark.parametrize(("n_classes", "share"), [(3, 1), (10, 1), (40, 0.25)])
def test_what_is_chosen_from_is_lower_for_many_classes(n_classes, share):
    data = activations(n_classes=n_classes, m=80)
    g = data.g.numpy().copy()
    g[g.argmax(0), np.arange(80)] = 0  # those of prototypes with their own images
    np.testing.assert_allclose(penalties_to_try(data), g.max() * share * np.array(PENALTIES))


def test_where_only_own_images_are_similar_what_is_chosen_from_is_in_proportion_to_these():
    g, index = 0.5 * torch.eye(3), torch.arange(3)
    data = Activations(g, index, index, 3, None)
    np.testing.assert_allclose(penalties_to_try(data), 0.5 * np.array(PENALTIES))


@pytest.mark.parametrize("given", [{}, {"groups": np.arange(24) // 3 * 3}])
def test_the_path_shows_the_penalties_that_a_fit_chooses_from(squares, given):
    common = {"image_size": 48, "prototypes_per_class": 2, "random_state": 0, "verbose": 0}
    clf = ProtoPNetClassifier(
        "small_cnn", similarity="log", lambda_l1="cv", joint_epochs=1, **common
    ).fit(*squares, **given)
    path = clf.last_layer_path(*squares, folds=0, **given)
    expected = clf.last_layer_path_["lambda_l1"]
    np.testing.assert_allclose(path["lambda_l1"], expected, rtol=0.05)  # medians among them


@pytest.mark.parametrize(
    ("penalties", "n_classes", "expected"),
    [([1e-9], 10, 1e-6), ([1e-4], 100, 1e-6), ([1e-3, 3e-5], 100, 3e-7), ([0.0], 100, 1e-7)],
)
def test_residuals_are_a_hundredth_of_weak_penalties_of_many_classes(
    penalties, n_classes, expected
):
    assert tolerance(penalties, n_classes) == pytest.approx(expected)


def test_weak_penalties_of_many_classes_are_solved_closely():
    """To 1e-6 alone, the residual is 8e-7 and weights are missing."""
    rng = np.random.default_rng(0)
    colours = np.repeat(rng.integers(0, 190, (40, 1, 1, 3), dtype=np.uint8), 2, axis=0)
    X, y = colours + rng.integers(0, 64, (80, 24, 24, 3), dtype=np.uint8), np.repeat(range(40), 2)
    settings = {"image_size": 24, "train_backbone": False, "random_state": 0, "verbose": 0}
    settings |= {"self_matches": "keep", "lambda_l1": 2.5e-5, "prototypes_per_class": 1}
    settings |= {"discriminant_weight": 0}
    clf = ProtoPNetClassifier("small_cnn", **settings).fit(X, y)
    path = clf.last_layer_path(X, y, [2.5e-5], folds=0)
    (closely,) = clf.activations_.changed(torch.Tensor.double).solve([2.5e-5], 1e-9, 1e-3)
    for weight in (clf.coef_, path["weight"][0]):
        np.testing.assert_allclose(weight, closely.weight, atol=4e-3)  # to 1e-6 it is 0.014


def test_the_path_of_a_fitted_classifier(fitted, squares):
    X, y = squares
    before = fitted.coef_.copy()
    path = fitted.last_layer_path(X, y, [fitted.lambda_l1_, 0.05], folds=3)
    assert path["weight"][0].shape == fitted.coef_.shape
    np.testing.assert_allclose(path["weight"][1], before, atol=2e-2)
    assert path["n_nonzero"][0] < path["n_nonzero"][1]
    np.testing.assert_array_equal(fitted.coef_, before)
    with pytest.raises(ValueError, match="did not see"):
        fitted.last_layer_path(X, ["other"] * len(y))
    for folds in (-1, 1, 2.5):
        with pytest.raises(ValueError, match="folds must be 0 or an int >= 2"):
            fitted.last_layer_path(X, y, folds=folds)
    for penalties in ([], [-1e-3], ["a"], 0.1, "auto"):
        with pytest.raises(ValueError, match="penalties must be a list of one or more finite numb"):
            fitted.last_layer_path(X, y, penalties)
    with pytest.raises(ValueError, match="two groups where there are groups; folds=0 leaves"):
        fitted.last_layer_path(X, y, groups=[0] * len(y))


@pytest.mark.parametrize("wrong", ["y", "sample_weight", "groups"])
def test_the_path_refuses_what_does_not_fit_before_it_looks_at_images(
    fitted, squares, backbone_images, wrong
):
    X, y = squares
    given = {"y": y} | {wrong: y[:3] if wrong != "sample_weight" else np.ones(3)}
    with pytest.raises(ValueError, match=wrong):
        fitted.last_layer_path(X, **given)
    assert not backbone_images


def test_the_path_holds_out_a_file_that_stands_in_x_several_times_as_a_whole(files):
    X, y = files
    settings = {"image_size": 48, "train_backbone": False, "random_state": 0, "verbose": 0}
    clf = ProtoPNetClassifier("small_cnn", prototypes_per_class=1, **settings).fit(X, y)
    twice = np.tile(X, 2), np.tile(y, 2)
    path = clf.last_layer_path(*twice, [1e-3], folds=3)
    grouped = clf.last_layer_path(*twice, [1e-3], folds=3, groups=np.tile(range(len(X)), 2))
    assert path["cross_entropy"].equals(grouped["cross_entropy"])


def test_auto_keeps_the_prototypes_that_count(chosen, squares):
    X, _ = squares
    table, coef = chosen.prototypes_, chosen.coef_
    assert chosen.n_prototypes_ == len(table) == coef.shape[1]
    assert set(table["class"]) == set(chosen.classes_)
    assert table["class"].value_counts().max() <= 20
    own = coef[np.searchsorted(chosen.classes_, table["class"]), table["prototype"]]
    np.testing.assert_allclose(own, table["weight"])
    alone = table.groupby("class")["prototype"].transform("size") == 1
    assert ((coef != 0).any(0) | alone).all()
    sheet = chosen.explain(X)
    totals = sheet.groupby("sample")["contribution"].sum()
    logits = chosen.decision_function(X).max(1)
    np.testing.assert_allclose(totals, logits, atol=1e-4)
    similarity = chosen.transform(X)[table["source_index"], table["prototype"]]
    np.testing.assert_allclose(similarity, 1, atol=1e-4)


def test_auto_can_be_fitted_further(chosen, squares):
    import copy

    clf = copy.deepcopy(chosen).partial_fit(*squares)
    assert clf.coef_.shape[1] == len(clf.prototypes_)


@pytest.mark.parametrize("name", ["kmeans", "random"])
def test_auto_takes_the_selected_start(name):
    clf = ProtoPNetClassifier("small_cnn", prototypes_per_class="auto", prototype_init=name)
    with pytest.raises(ValueError, match='"auto" chooses among the candidates'):
        clf.fit(["a"], [0])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lambda_l1", "best", '"cv" or a finite number'),
        ("lambda_l1", -1, '"cv" or a finite number'),
        ("prototypes_per_class", "all", '"auto", an int'),
        ("tune_allocator", 1, "True or False"),
    ],
)
def test_other_words_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words):
        ProtoPNetClassifier("small_cnn", **{name: value}).fit(["a"], [0])
