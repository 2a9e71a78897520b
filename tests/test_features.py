"""Features in place of images: the same batches, wherever they are kept."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from protoclf import ProtoPNetClassifier, features, storage
from protoclf.features import FeatureDataset, FitData, extract_features
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.last_layer import solve_last_layer


@pytest.fixture
def mapped(monkeypatch):
    """Leave room for nothing, and list the shapes that are mapped to files."""
    shapes, memmap = [], np.memmap

    def noting(*args, **kwargs):
        shapes.append(kwargs["shape"])
        return memmap(*args, **kwargs)

    monkeypatch.setattr(storage, "MEMORY_BUDGET", 0)
    monkeypatch.setattr(np, "memmap", noting)
    return shapes


def dataset_of(net, squares, sample_weight=None):
    y = np.unique(squares[1], return_inverse=True)[1]
    return ImageDataset(Images(squares[0]), net.preprocessing_, y, sample_weight).keep()


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_are_the_rows_asked_for(weighted):
    features, y = torch.rand(6, 3, 2, 2), torch.arange(6)
    weight = torch.rand(6) if weighted else None
    dataset = FeatureDataset(features, y, weight, torch.arange(len(y)))
    assert len(dataset) == 6
    assert dataset.takes_no_workers
    for index in ([4, 0, 4], np.array([4, 0, 4]), torch.tensor([4, 0, 4])):
        inputs, target = dataset.__getitems__(index)
        assert torch.equal(inputs["features"], features[[4, 0, 4]])
        assert target.tolist() == [4, 0, 4]
        assert set(inputs) == {"features", "index"} | ({"sample_weight"} if weighted else set())
        if weighted:
            assert torch.equal(inputs["sample_weight"], weight[[4, 0, 4]])


@torch.no_grad()
def test_extracted_features_are_those_of_the_backbone_in_order(fitted, squares):
    weight = np.linspace(0, 1, 24)
    dataset = dataset_of(fitted, squares, weight)
    features = extract_features(fitted, dataset)
    expected = fitted.module_.eval().features(dataset.pixels)
    torch.testing.assert_close(features.features, expected)
    assert torch.equal(features.y, dataset.y)
    torch.testing.assert_close(features.sample_weight, torch.tensor(weight, dtype=torch.float32))
    part = extract_features(fitted, Subset(dataset, [5, 3, 20]))
    torch.testing.assert_close(part.features, expected[[5, 3, 20]])
    assert part.y.tolist() == dataset.y[[5, 3, 20]].tolist()
    assert extract_features(fitted, dataset_of(fitted, squares)).sample_weight is None


def test_features_need_no_gradients_and_leave_batch_norm_alone(fitted, squares):
    before = fitted.module_.backbone[0][1].running_mean.clone()
    fitted.module_.train()
    features = extract_features(fitted, dataset_of(fitted, squares))
    assert not features.features.requires_grad
    assert torch.equal(fitted.module_.backbone[0][1].running_mean, before)


def test_features_are_computed_once_until_they_are_forgotten(fitted, squares):
    data = FitData(fitted, dataset_of(fitted, squares), None)
    once = data.train_features
    assert data.train_features is once
    assert data.valid_features is None
    data.forget_features()
    again = data.train_features
    assert again is not once
    assert torch.equal(again.features, once.features)


def test_features_beyond_the_budget_are_mapped_to_a_file(fitted, squares, mapped, monkeypatch):
    features = extract_features(fitted, dataset_of(fitted, squares)).features
    channels = 128 * features.element_size()  # in bytes, as are the images
    assert mapped == [(24, 3, 48, 48), (24, 6, 6, channels)]
    monkeypatch.undo()
    kept = extract_features(fitted, dataset_of(fitted, squares)).features
    assert len(mapped) == 2
    assert torch.equal(kept, features)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_fit_beyond_the_budget_is_the_same_fit(squares, monkeypatch, train_backbone):
    def fit():
        clf = ProtoPNetClassifier(
            "small_cnn",
            image_size=32,
            prototypes_per_class=2,
            train_backbone=train_backbone,
            warmup_epochs=2,
            joint_epochs=1,
            batch_size=7,
            random_state=0,
            verbose=0,
        )
        return clf.fit(*squares)

    expected = fit()
    monkeypatch.setattr(storage, "MEMORY_BUDGET", 0)
    mapped = fit()
    assert np.array_equal(mapped.coef_, expected.coef_)
    assert mapped.prototypes_.equals(expected.prototypes_)
    assert np.array_equal(mapped.predict_proba(squares[0]), expected.predict_proba(squares[0]))


def test_views_are_drawn_once_and_learned_from(fitted, squares):
    clf = copy.deepcopy(fitted).set_params(augmented_views=2, random_state=0)
    data = FitData(clf, dataset_of(clf, squares, np.arange(24) / 24), None)
    views = data.view_features
    assert data.view_features is views
    assert len(views) == 2
    assert not torch.equal(views[0].features, views[1].features)
    everything = data.features_to_learn_from
    assert len(everything) == 3 * 24
    inputs, y = everything.__getitems__([50, 3, 30])
    expected = [data.train_features.features[3], views[0].features[6], views[1].features[2]]
    assert torch.equal(inputs["features"], torch.stack(expected))
    assert torch.equal(y, data.train_features.y[[3, 6, 2]])
    assert inputs["sample_weight"].tolist() == pytest.approx([3 / 24, 6 / 24, 2 / 24])
    data.forget_features()
    assert data.view_features is not views


def test_workers_draw_other_views_each_time_and_for_each_seed(fitted, squares):
    clf = copy.deepcopy(fitted).set_params(augmented_views=2, device="cpu")
    clf.set_params(iterator_valid__num_workers=1)
    dataset = dataset_of(clf, squares)
    found = []
    for clf.seed_ in (0, 0, 1):
        found.append([view.features for view in FitData(clf, dataset, None).view_features])
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0][0], found[2][0])
    assert all(map(torch.equal, found[0], found[1]))


def test_without_views_features_are_those_of_the_images(fitted, squares):
    clf = copy.deepcopy(fitted).set_params(augmentation=None, augmented_views=2)
    data = FitData(clf, dataset_of(clf, squares), None)
    assert data.features_to_learn_from is data.train_features


@pytest.mark.parametrize(("trained", "expected"), [(True, 2), (False, 0)])
def test_a_trained_backbone_gets_views_by_default(fitted, squares, trained, expected):
    clf = copy.deepcopy(fitted).set_params(augmented_views="auto", random_state=0)
    clf.backbone_trained_ = trained
    assert len(FitData(clf, dataset_of(clf, squares), None).view_features) == expected


def test_views_of_the_warmup_are_not_those_of_the_last_layer(squares):
    X, y = squares
    settings = {"image_size": 32, "prototypes_per_class": 2, "random_state": 0, "verbose": 0}
    settings |= {"warmup_epochs": 1, "joint_epochs": 1}
    clf = ProtoPNetClassifier("small_cnn", **settings).fit(X, y)
    assert clf.activations_.views.shape == (2, len(X), 6)
    frozen = ProtoPNetClassifier("small_cnn", train_backbone=False, **settings).fit(X, y)
    assert frozen.activations_.views.shape == (0, len(X), 6)


def test_a_fit_learns_from_views(squares):
    X, y = squares
    settings = {"image_size": 48, "prototypes_per_class": 2, "joint_epochs": 0, "verbose": 0}
    settings |= {"random_state": 0, "lambda_l1": 1e-3, "lambda_l2": 0.0}
    settings["augmentation"] = lambda image: 255 - image
    plain = ProtoPNetClassifier("small_cnn", **settings).fit(X, y)
    clf = ProtoPNetClassifier("small_cnn", augmented_views=1, **settings).fit(X, y)
    assert clf.prototypes_["source_index"].equals(plain.prototypes_["source_index"])
    g = torch.from_numpy(np.concatenate([clf.transform(X), clf.transform(255 - X)])).double()
    codes = np.searchsorted(clf.classes_, np.tile(y, 2))
    expected = solve_last_layer(g, codes, clf.module_.owner, 1e-3)

    def objective(weight):
        logits = g @ torch.from_numpy(weight).double().T
        entropy = torch.nn.functional.cross_entropy(logits, torch.from_numpy(codes))
        return float(entropy + 1e-3 * np.abs(weight).sum())

    assert objective(clf.coef_) == pytest.approx(expected.objective, abs=1e-3)
    assert objective(plain.coef_) > expected.objective + 1e-2


def latents_of_all(net, data):
    with torch.no_grad():
        return net.module_.latents(data.train_features.features)


@pytest.mark.parametrize("budget", [0, features.LATENT_BUDGET])
def test_latents_are_those_of_the_features_whether_they_are_kept_or_not(
    fitted, squares, monkeypatch, budget
):
    monkeypatch.setattr(features, "LATENT_BUDGET", budget)
    data = FitData(fitted, dataset_of(fitted, squares), None)
    expected = latents_of_all(fitted, data)
    parts = [z for z, _ in data.train_latents()]
    assert [len(part) for part in parts] == [8, 8, 8]
    torch.testing.assert_close(torch.cat(parts), expected)
    assert torch.equal(torch.cat([y for _, y in data.train_latents()]), data.train_y)
    (some,) = [z for z, _ in data.train_latents(range(8, 16))]
    torch.testing.assert_close(some, expected[8:16])
    index = np.array([0, 3, 8, 15, 23])
    torch.testing.assert_close(torch.cat(list(data.latents_of(index))), expected[index])


def test_kept_latents_are_computed_anew_when_add_on_layers_or_features_change(fitted, squares):
    net = copy.deepcopy(fitted)
    data = FitData(net, dataset_of(net, squares), None)
    first = data.train_latents()
    assert data.train_latents() is first
    with torch.no_grad():
        net.module_.add_on[-1].mean += 0.1
    torch.testing.assert_close(
        torch.cat([z for z, _ in data.train_latents()]), latents_of_all(net, data)
    )
    with torch.no_grad():
        net.module_.backbone[0][0].weight *= 2
    data.forget_features()
    torch.testing.assert_close(
        torch.cat([z for z, _ in data.train_latents()]), latents_of_all(net, data)
    )


@pytest.mark.parametrize("memory", [True, False])
def test_loaders_start_in_the_thread_that_asks(squares, tmp_path, memory):
    """Their workers too: forked by a thread of a pool, one fails when that thread is joined."""
    threads = []

    class Noting(DataLoader):
        def __iter__(self):
            threads.append(threading.current_thread())
            return super().__iter__()

    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=32,
        prototypes_per_class=1,
        train_backbone=False,
        memory=tmp_path if memory else None,
        iterator_valid=Noting,
        verbose=0,
    )
    clf.fit(*squares).predict(squares[0])
    assert threads
    assert set(threads) == {threading.main_thread()}
