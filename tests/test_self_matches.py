import numpy as np
import pytest
import torch

from protoclf import ProtoPNetClassifier, stages
from protoclf.self_matches import replace_self_matches


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


@pytest.mark.parametrize("self_matches", ["keep", "median"])
def test_the_last_layer_is_optimal_for_the_activations_it_is_shown(squares, self_matches):
    from protoclf.last_layer import solve_last_layer

    clf = ProtoPNetClassifier(
        "small_cnn", image_size=32, train_backbone=False, prototypes_per_class=2,
        self_matches=self_matches, lambda_l1=0.01, random_state=0, verbose=0,
    ).fit(*squares)  # fmt: skip
    y, owner = np.searchsorted(clf.classes_, squares[1]), clf.module_.owner
    g = torch.from_numpy(clf.transform(squares[0]))
    if self_matches == "median":
        source = torch.from_numpy(clf.prototypes_["source_index"].to_numpy())
        g = replace_self_matches(g, torch.from_numpy(y), owner, source)
    again = solve_last_layer(g, y, owner, 0.01)
    np.testing.assert_allclose(again.objective, clf.last_layer_result_.objective, rtol=1e-5)


def test_images_of_the_group_of_a_source_are_no_new_ones_either():
    g = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    y, owner = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1])
    source, groups = torch.tensor([0, 2, 4]), torch.tensor([7, 7, 3, 1, 5, 5])
    expected = g.clone()
    expected[:2, 0] = g[2:4, 0].min()  # torch takes the lower median
    expected[2, 1] = g[[0, 1, 3], 1].median()
    # the class of the third prototype has no image of another group
    assert torch.equal(replace_self_matches(g, y, owner, source, groups), expected)


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
