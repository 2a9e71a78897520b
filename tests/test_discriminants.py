"""Discriminants: the ridge regression, against scikit-learn's, and what a fit makes of it."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import Ridge

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.discriminants import discriminants
from protoclf.features import feature_batches
from protoclf.network import Discriminants


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    paths, y, _ = make_birds(tmp_path_factory.mktemp("birds"), n_per_class=3, image_size=32)
    return paths, y


def classifier(**settings):
    given = {"image_size": 32, "prototypes_per_class": 2, "random_state": 0, "verbose": 0}
    return ProtoPNetClassifier("small_cnn", **given | {"train_backbone": False} | settings)


def textbook(x, y, share, weight):
    """Ridge regression of 0 and 1 on means of unit deviation, but for channels that hardly vary."""
    target = np.eye(y.max() + 1)[y]
    centred = x - np.average(x, axis=0, weights=weight)
    variance = np.average(centred**2, axis=0, weights=weight)
    deviation = np.sqrt(variance + 0.01 * variance.mean())
    standard = centred / deviation
    length = np.average((standard**2).sum(1), weights=weight)
    ridge = Ridge(alpha=length * weight.mean()).fit(standard, target, sample_weight=weight)
    functions = ridge.coef_ / deviation
    said = np.average(((centred @ functions.T) ** 2).sum(1), weights=weight)
    return functions * share * np.sqrt(variance.sum() / said)


@pytest.mark.parametrize(("n", "channels"), [(12, 40), (40, 12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_discriminants_are_a_ridge_regression(n, channels, weighted):
    rng = np.random.default_rng(n)
    x, y = rng.normal(3, rng.uniform(0, 2, channels), (n, channels)), np.arange(n) % 3
    weight = rng.uniform(0.1, 2, n) if weighted else np.ones(n)
    given = torch.from_numpy(weight).float() if weighted else None
    found = discriminants(torch.from_numpy(x), torch.from_numpy(y), 3, 0.4, given)
    assert_allclose(found.numpy(), textbook(x, y, 0.4, weight), rtol=1e-5, atol=1e-7)


def test_the_weight_is_a_ratio_of_lengths():
    x, y = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
    functions = discriminants(x, y, 4, 0.7)
    centred = (x - x.mean(0)).double()
    said = (centred @ functions.T).square().sum(1).mean().sqrt()
    assert said.item() == pytest.approx(0.7 * centred.square().sum(1).mean().sqrt().item())


def test_images_that_are_all_alike_have_no_discriminants():
    functions = discriminants(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 2, 0.3)
    assert (functions == 0).all()


def test_a_frozen_backbone_has_them_by_default(birds):
    clf = classifier().fit(*birds)
    first = clf.module_.add_on[0]
    assert isinstance(first, Discriminants)
    (features,) = [b["features"] for b, _ in feature_batches(clf, clf.get_dataset(birds[0]))]
    y = torch.from_numpy(np.unique(birds[1], return_inverse=True)[1])
    means = features.float().mean((2, 3))
    expected = discriminants(means, y, len(clf.classes_), 0.45)
    assert_allclose(first.weight[:, :, 0, 0], expected, rtol=1e-4, atol=1e-6)
    channels = clf.geometry_.channels + len(clf.classes_)
    assert clf.module_.prototypes.shape[1] == channels


@pytest.mark.parametrize(
    "settings",
    [
        {"discriminant_weight": 0},
        {"latent_dim": 4, "warmup_epochs": 1},
        {"similarity": "log", "latent_dim": 4, "warmup_epochs": 1},
        {"train_backbone": True, "joint_epochs": 1},
    ],
    ids=str,
)
def test_others_have_none(birds, settings):
    clf = classifier(**settings).fit(*birds)
    assert not any(isinstance(layer, Discriminants) for layer in clf.module_.add_on)


@pytest.mark.parametrize("other", [{"latent_dim": 4}, {"similarity": "log"}], ids=str)
def test_a_weight_needs_cosines_of_the_backbones_channels(birds, other):
    with pytest.raises(ValueError, match=r"discriminant_weight is for similarity=\"cosine\""):
        classifier(discriminant_weight=0.5, **other).fit(*birds)


def test_they_stay_through_warm_up_and_joint_training(birds):
    given = {"discriminant_weight": 0.3, "precision": "float32"}
    start = classifier(**given).fit(*birds)
    trained = classifier(train_backbone=True, warmup_epochs=1, joint_epochs=1, **given).fit(*birds)
    found = [clf.module_.add_on[0].weight for clf in (start, trained)]
    assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", ["auto", 0, 0.8])
def test_a_saved_model_has_them_or_not(birds, tmp_path, weight):
    clf = classifier(discriminant_weight=weight).fit(*birds)
    clf.save(tmp_path / "model")
    loaded = ProtoPNetClassifier.load(tmp_path / "model")
    assert loaded.get_params()["discriminant_weight"] == weight
    assert (loaded.predict_proba(birds[0]) == clf.predict_proba(birds[0])).all()
    loaded.fit(*birds)  # builds anew what the parameters ask for
    assert len(loaded.module_.add_on) == len(clf.module_.add_on)
