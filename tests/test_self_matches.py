from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protoclf import ProtoPNetClassifier, stages
from protoclf.editing import keep
from protoclf.last_layer import solve_last_layer
from protoclf.self_matches import rare_classes, replace_self_matches


def test_own_source_gets_the_median_of_the_other_images_of_its_class():
    rng = np.random.default_rng(0)
    y, owner = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 1, 1])
    source = np.array([2, 3, 6])
    g = rng.random((7, 3)).astype(np.float32)
    expected = g.copy()
    for j, i in enumerate(source):
        others = [g[k, j] for k in range(7) if y[k] == owner[j] and k != i]
        expected[i, j] = sorted(others)[(len(others) - 1) // 2]  # torch takes the lower median
    result = replace_self_matches(*map(torch.from_numpy, (g, y, owner, source)))
    np.testing.assert_array_equal(result.numpy(), expected)


def test_activation_stays_where_the_class_has_no_other_image():
    g = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    index = torch.tensor([0, 1])
    assert torch.equal(replace_self_matches(g, index, index, index), g)


@pytest.mark.parametrize("self_matches", ["keep", "median", "auto"])
@pytest.mark.parametrize("views", [0, 2])
def test_the_last_layer_is_optimal_for_the_activations_it_is_shown(squares, self_matches, views):
    X, y = squares
    few = np.r_[np.flatnonzero(y == "blue")[:2], np.flatnonzero(y != "blue")]
    clf = ProtoPNetClassifier(
        "small_cnn", image_size=32, train_backbone=False, prototypes_per_class=2,
        self_matches=self_matches, lambda_l1=0.01, random_state=0, verbose=0,
        distinct="images", augmented_views=views,
    ).fit(X[few], y[few])  # fmt: skip
    a = clf.activations_
    source = torch.from_numpy(clf.prototypes_["source_index"].to_numpy(copy=True))
    shown = [a.g, *a.views]
    if self_matches == "median":
        shown = [replace_self_matches(g, a.y, a.owner, source) for g in shown]
    elif self_matches == "auto":  # 2 blue images, 8 of each other colour
        blue = clf.classes_.tolist().index("blue")
        assert rare_classes(a.y, 3).nonzero().flatten().tolist() == [blue]
        mine = a.owner == blue
        for g in shown:
            g[:, mine] = replace_self_matches(g[:, mine], a.y, a.owner[mine], source[mine])
    again = solve_last_layer(
        torch.cat(shown),
        a.y.repeat(1 + views),
        a.owner,
        0.01,
        lambda_l2=clf.last_layer_result_.lambda_l2,
    )
    np.testing.assert_allclose(again.objective, clf.last_layer_result_.objective, rtol=1e-5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_rare_is_a_class_of_fewer_than_half_as_many_images_as_the_mean_class(counts):
    y = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    expected = [n < Fraction(sum(counts), 2 * len(counts)) for n in counts]
    assert rare_classes(y, len(counts)).tolist() == expected


@pytest.mark.parametrize("number", [3, {"red": 5, "blue": 1, "green": 1}, "auto"])
def test_with_as_many_images_each_self_matches_are_kept_by_default(squares, number):
    settings = {"image_size": 32, "train_backbone": False, "prototypes_per_class": number}
    settings |= {"random_state": 0, "verbose": 0}
    default, kept = (
        ProtoPNetClassifier("small_cnn", **settings, **other).fit(*squares)
        for other in ({}, {"self_matches": "keep"})
    )
    np.testing.assert_array_equal(default.coef_, kept.coef_)


def test_images_of_the_group_of_a_source_are_no_new_ones_either():
    g = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    y, owner = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1])
    source, groups = torch.tensor([0, 2, 4]), torch.tensor([7, 7, 3, 1, 5, 5])
    expected = g.clone()
    expected[:2, 0] = g[2:4, 0].min()  # torch takes the lower median
    expected[2, 1] = g[[0, 1, 3], 1].median()
    # the class of the third prototype has no image of another group
    assert torch.equal(replace_self_matches(g, y, owner, source, groups), expected)


def test_images_of_another_class_in_the_group_of_a_source_get_the_median_of_that_class():
    g = torch.tensor([[1.0], [0.8], [0.9], [0.3], [0.1], [0.2]])
    y, zero = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0])
    result = replace_self_matches(g, y, zero, zero, groups=torch.tensor([5, 1, 2, 5, 1, 2]))
    assert result[:, 0].tolist() == pytest.approx([0.8, 0.8, 0.9, 0.1, 0.1, 0.2])


def test_penalties_are_tried_without_the_groups_of_sources(squares, monkeypatch):
    X, y = squares[0][:12], squares[1][:12]
    groups, shown = np.arange(12) // 6, []

    def noting(activations, *rest):
        shown.append(activations.g)
        return path(activations, *rest)

    path = stages.penalty_path
    monkeypatch.setattr(stages, "penalty_path", noting)
    clf = ProtoPNetClassifier(
        "small_cnn", image_size=32, train_backbone=False, prototypes_per_class=2,
        lambda_l1="cv", random_state=0, verbose=0,
    ).fit(X, y, groups=groups)  # fmt: skip
    a = clf.activations_
    source = torch.from_numpy(clf.prototypes_["source_index"].to_numpy(copy=True))
    expected = replace_self_matches(a.g, a.y, a.owner, source, torch.from_numpy(groups))
    assert torch.equal(shown[0].float(), expected)
    assert not torch.equal(expected, replace_self_matches(a.g, a.y, a.owner, source))


def test_an_edit_leaves_the_rule_of_rare_classes_as_it_was(squares):
    X, y = squares
    few = np.r_[np.flatnonzero(y == "blue")[:2], np.flatnonzero(y != "blue")]
    clf = ProtoPNetClassifier(
        "small_cnn", image_size=32, train_backbone=False, prototypes_per_class=2,
        random_state=0, verbose=0,
    ).fit(X[few], y[few])  # fmt: skip
    blue = clf.classes_.tolist().index("blue")
    edited = keep(clf, [int((clf.module_.owner == c).nonzero()[0]) for c in range(3)])
    a = edited.activations_
    source = torch.from_numpy(edited.prototypes_["source_index"].to_numpy(copy=True))
    g = replace_self_matches(a.g, a.y, a.owner, source, some=a.owner == blue)
    assert not torch.equal(g, a.g)
    again = solve_last_layer(
        g, a.y, a.owner, clf.lambda_l1_, lambda_l2=clf.last_layer_result_.lambda_l2
    )
    np.testing.assert_allclose(again.objective, edited.last_layer_result_.objective, rtol=1e-5)
