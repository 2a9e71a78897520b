import numpy as np
import pytest
import torch

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
    from protoclf import ProtoPNetClassifier
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
