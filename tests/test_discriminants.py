"""Discriminants: the ridge regression, against scikit-learn's, and what a fit makes of it."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold
from torch import nn

from protoclf import ProtoPNetClassifier, cross_fitting
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
    given |= {"backbone": "small_cnn", "train_backbone": False}
    return ProtoPNetClassifier(**given | settings)


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


def said_by_folds(clf, X, y, folds, n_classes):
    """Latents of the training images, one by one, by discriminants of the other folds' images."""
    (features,) = [b["features"].float() for b, _ in feature_batches(clf, clf.get_dataset(X))]
    means, mean = features.mean((2, 3)), features.mean((0, 2, 3))
    latents = []
    for i, f in enumerate(features):
        others = folds != folds[i]
        weight = discriminants(means[others], y[others], n_classes, 0.45).float()
        centred = f - mean[:, None, None]
        z = torch.cat([centred, torch.einsum("cd,dhw->chw", weight, centred)])
        latents.append(z / z.norm(dim=0))
    return torch.stack(latents)


@pytest.mark.parametrize("views", [0, 2])
def test_the_last_layer_sees_training_images_as_if_they_were_new(birds, views):
    paths, labels = birds
    y = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    given = {"augmentation": nn.Identity(), "augmented_views": views}
    clf = classifier(precision="float32", **given).fit(paths, labels)
    folds = np.zeros(len(y), int)
    splits = StratifiedKFold(3, shuffle=True, random_state=clf.seed_).split(y, y)
    for k, (_, held_out) in enumerate(splits):  # 3, because no class has more images
        folds[held_out] = k
    z = said_by_folds(clf, paths, y, folds, len(clf.classes_))
    prototypes = clf.module_.scaled_prototypes()[:, :, 0, 0]
    g = torch.einsum("md,ndhw->nmhw", prototypes, z).amax((2, 3))
    assert_allclose(clf.activations_.g, g, atol=1e-5)
    assert len(clf.activations_.views) == views
    for view in clf.activations_.views:
        assert_allclose(view, g, atol=1e-5)
    assert not np.allclose(clf.transform(paths), g, atol=1e-3)


def test_labels_that_mean_nothing_are_not_believed():
    """Discriminants know the images that they were found by, whatever their labels."""
    X = np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    y = np.arange(60) % 3
    clf = classifier(backbone=nn.Conv2d(3, 200, 16, 16), image_size=16, discriminant_weight=1.0)
    clf.fit(X, y)
    owner, source = clf.module_.owner.numpy(), clf.prototypes_["source_index"].to_numpy()
    own = (y[:, None] == owner) & (np.arange(60)[:, None] != source)
    other = y[:, None] != owner

    def favour(g):
        return g[own].mean() - g[other].mean()

    assert favour(clf.transform(X)) > 0.5
    assert abs(favour(clf.activations_.g.numpy())) < 0.15


def test_images_of_a_group_are_left_out_together(birds, monkeypatch):
    twice, y = np.tile(birds[0], 2), np.tile(birds[1], 2)
    groups = np.tile(np.arange(len(y) // 2), 2)
    found, find = [], cross_fitting._found
    monkeypatch.setattr(cross_fitting, "_found", lambda *a: found.append(find(*a)) or found[-1])
    by_groups = classifier().fit(twice, y, groups=groups)
    by_files = classifier().fit(twice, y)  # the same file is left out as a whole
    for folds in found:
        first, second = np.split(folds["fold"], 2)
        assert (first == second).all()
        assert len(np.unique(first)) == 5
    assert torch.equal(by_groups.activations_.g, by_files.activations_.g)


def test_the_only_image_of_a_class_is_never_left_out(birds):
    paths, y = np.asarray(birds[0]), birds[1]
    first = y == y[0]
    kept = ~first | (first.cumsum() == 1)
    paths, alone = paths[kept], first[kept]
    clf = classifier(prototypes_per_class=1, precision="float32").fit(paths, y[kept])
    as_it_is, shown = clf.transform(paths), clf.activations_.g.numpy()
    assert_allclose(shown[alone], as_it_is[alone], atol=1e-5)
    assert not np.allclose(shown[~alone], as_it_is[~alone], atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"discriminant_weight": 0}, {"train_backbone": True, "joint_epochs": 1}], ids=str
)
def test_without_discriminants_of_these_features_images_are_as_they_are(birds, settings):
    given = {"precision": "float32", "augmented_views": 0, "discriminant_weight": 0.5} | settings
    clf = classifier(**given).fit(*birds)
    assert_allclose(clf.activations_.g, clf.transform(birds[0]), atol=1e-5)


def test_further_training_sees_images_as_the_fit_did(birds):
    clf = classifier().fit(*birds)
    before = clf.activations_.g
    assert_allclose(clf.partial_fit(*birds).activations_.g, before, atol=1e-6)


@pytest.mark.parametrize("settings", [{"discriminant_weight": 0}, {"latent_dim": 8}], ids=str)
def test_further_training_keeps_the_weight_of_discriminants(birds, settings):
    """The network stays as it was built, and images of one file are in one fold."""
    twice = np.tile(birds[0], 2), np.tile(birds[1], 2)
    clf = classifier().fit(*twice)
    before = clf.activations_.g
    clf.set_params(**settings).partial_fit(*twice)
    assert_allclose(clf.activations_.g, before, atol=1e-6)


def test_a_search_finds_the_folds_of_its_groups(birds, tmp_path):
    """What `memory=` keeps of one fit is not taken for that of other groups."""
    paths, labels = birds
    groups = np.arange(len(paths)) // 2
    fits = [
        classifier(memory=tmp_path / str(k)).fit(paths, labels, groups=given).activations_.g
        for k, given in [(0, None), (0, groups), (1, groups)]
    ]
    assert torch.equal(fits[1], fits[2])
    assert not torch.equal(fits[0], fits[1])


def test_images_that_are_new_to_discriminants_are_seen_as_they_are(birds, tmp_path):
    others, y, _ = make_birds(tmp_path, n_per_class=3, image_size=32, random_state=1)
    clf = classifier(precision="float32").fit(*birds).partial_fit(others, y)
    assert_allclose(clf.activations_.g, clf.transform(others), atol=1e-5)
