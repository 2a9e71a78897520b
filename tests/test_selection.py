"""The start at patches that a sparse last layer makes use of."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import kmeans_plusplus

from protoclf import ProtoPNetClassifier, selection
from protoclf.selection import (
    _best,
    _candidates_each,
    _contrast,
    _principal_axes,
    _representatives,
    _spread,
)


def clusters(n=200, k=8, d=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(k, d, generator=rng)
    label = torch.arange(n) % k
    return centres[label] + 0.1 * torch.randn(n, d, generator=rng), label


def test_seeds_are_spread_over_all_clusters():
    points, label = clusters()
    seeds = _spread(points, 8, torch.Generator().manual_seed(1))
    assert sorted(label[seeds].tolist()) == list(range(8))


def test_seeds_are_as_good_as_those_of_scikit_learn():
    points = torch.rand(400, 6, generator=torch.Generator().manual_seed(0))

    def cost(index):
        return float(torch.cdist(points, points[index]).square().amin(1).mean())

    ours = [cost(_spread(points, 20, torch.Generator().manual_seed(s))) for s in range(10)]
    theirs = [cost(kmeans_plusplus(points.numpy(), 20, random_state=s)[1]) for s in range(10)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)
    at_random = [cost(torch.randperm(400)[:20]) for _ in range(10)]
    assert np.mean(ours) < np.mean(at_random)


def test_representatives_are_the_middle_points_of_their_clusters():
    points, label = clusters()
    index = _representatives(points, 8, 2, torch.Generator().manual_seed(0))
    assert sorted(label[index].tolist()) == list(range(8))
    for i in index:
        mine = points[label == label[i]]
        middle = (mine - mine.mean(0)).square().sum(1).amin()
        assert (points[i] - mine.mean(0)).square().sum() == pytest.approx(float(middle), rel=1e-3)


@pytest.mark.parametrize(
    ("m", "n", "each"),
    [
        (10, 9, 32),
        (256, 900, 32),
        (512, 900, 16),
        (2000, 900, 8),
        (100, 10_000, 16),
        (100, 10**6, 8),
    ],
)
def test_more_prototypes_or_images_have_fewer_candidates_each(m, n, each):
    assert _candidates_each(m, n) == each


def test_components_come_from_all_columns_of_the_map(monkeypatch):
    seen = []

    def noting(patches, most):
        seen.append(patches)
        return torch.eye(1)

    monkeypatch.setattr(selection, "_SAMPLE", 64)
    monkeypatch.setattr(selection, "_principal_axes", noting)
    column = torch.arange(8.0).repeat(64)[:, None]  # of maps of 8 x 8 cells
    _representatives(column, 4, 2, torch.Generator().manual_seed(0))
    (sample,) = seen
    assert len(sample) == 64
    assert len(sample.unique()) == 8


@pytest.mark.parametrize("weight", [None, [1.0, 3, 1, 1]])
def test_contrasts_count_an_image_as_often_as_its_weight_says(weight):
    g = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    y, owner = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1])
    again = [0, 1, 2, 3] if weight is None else [0, 1, 1, 1, 2, 3]
    means = torch.stack([g[again][y[again] == c].mean(0)[j] for j, c in enumerate(owner)])
    given = None if weight is None else torch.tensor(weight)
    torch.testing.assert_close(_contrast(g, y, owner, given), means - g[again].mean(0))


def test_the_best_have_the_largest_weights_and_then_the_largest_contrasts():
    weight, contrast = torch.tensor([0.0, 2, 0, 0, 1, 0]), torch.tensor([0.1, 0, 0.3, 0.2, 0, 0.5])
    owner = torch.tensor([0, 0, 0, 0, 1, 1])
    assert _best(weight, contrast, owner, [3, 1]).tolist() == [1, 2, 3, 4]


@pytest.fixture
def forty_colours(tmp_path):
    """Two images of each of forty classes, which differ in colour."""
    rng = np.random.default_rng(0)
    paths, y = [], []
    for c, colour in enumerate(rng.integers(0, 256, (40, 3))):
        for i in range(2):
            pixels = (colour + rng.normal(0, 10, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            paths.append(str(tmp_path / f"{c}-{i}.png"))
            Image.fromarray(pixels).save(paths[-1])
            y.append(f"class {c:02}")
    return np.array(paths), np.array(y)


@pytest.mark.parametrize(("n_classes", "share"), [(5, 1), (40, 0.25)])
def test_candidates_of_many_classes_are_rated_with_a_lower_penalty(
    forty_colours, monkeypatch, n_classes, share
):
    """Four times as many classes have gradients of a quarter, and few candidates a weight."""
    seen, solve = [], selection.solve_last_layer

    def noting(g, y, owner, penalty, **settings):
        seen.append(penalty / float(g.amax()))
        assert settings["tol"] < penalty / 10
        return solve(g, y, owner, penalty, **settings)

    monkeypatch.setattr(selection, "solve_last_layer", noting)
    X, y = (values[: 2 * n_classes] for values in forty_colours)
    settings = {"image_size": 32, "train_backbone": False, "random_state": 0, "verbose": 0}
    clf = ProtoPNetClassifier("small_cnn", prototypes_per_class="auto", **settings).fit(X, y)
    np.testing.assert_allclose(seen, [share * 3e-3], rtol=1e-6)
    assert clf.lambda_l1_ == pytest.approx(4e-4 * share**0.5)


def test_where_no_prototype_has_a_weight_one_of_each_class_stays(squares):
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=32,
        train_backbone=False,
        prototypes_per_class="auto",
        lambda_l1=10.0,
        random_state=0,
        verbose=0,
    ).fit(*squares)
    assert not clf.coef_.any()
    assert clf.prototypes_["class"].tolist() == clf.classes_.tolist()


@pytest.mark.parametrize("least", [1, 3])
def test_equal_points_are_enough(least):
    index = _representatives(torch.ones(6, 4), 4, least, torch.Generator().manual_seed(0))
    assert len(index) >= least
    assert len(index.unique()) == len(index)


def test_principal_axes_are_those_of_the_largest_spread():
    rng = torch.Generator().manual_seed(0)
    sample = torch.randn(500, 6, generator=rng) * torch.tensor([9.0, 0.1, 5.0, 0.1, 0.1, 0.1])
    axes = _principal_axes(sample, 2)
    assert axes.shape == (6, 2)
    assert (axes[[0, 2]].abs().sum(0) > 0.99).all()
    before = torch.random.get_rng_state()
    assert torch.equal(_principal_axes(sample, 2), axes)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(_principal_axes(sample[:, :2], 2), torch.eye(2))
