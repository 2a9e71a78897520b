"""Whole fits on a device that is not the CPU: nothing is left behind, and all comes out alike."""

import numpy as np
import pytest
import torch
from device_with_values import OnDevice, device_with_values
from fit_and_die import Stop
from torch import nn

from protoclf import ProtoPNetClassifier, editing, storage
from protoclf.metrics import (
    distinctness,
    random_prototypes,
    rank_stability,
    sparsity,
    spatial_misalignment,
)
from protoclf.nearest_patches import nearest_patches

slow = pytest.mark.slow

FITS = [
    pytest.param({}, id="default"),
    pytest.param(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)),
            "micro_batch_size": 4,
            "augmented_views": 1,
            "warmup_epochs": 1,
        },
        id="pieces, views",
    ),
    pytest.param(
        {"prototype_init": "random", "similarity": "log", "latent_dim": 8},
        id="random start, log",
        marks=slow,
    ),
    pytest.param(
        {"prototype_init": "kmeans", "prototype_size": (2, 2)}, id="k-means, 2 x 2", marks=slow
    ),
    pytest.param(
        {
            "prototypes_per_class": "auto",
            "lambda_l1": "cv",
            "self_matches": "median",
            "train_backbone": False,
        },
        id="auto, cv, median",
        marks=slow,
    ),
    pytest.param(
        {"distinct": "patches", "cycles": 2, "class_weight": "balanced"},
        id="distinct, cycles",
        marks=slow,
    ),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*num_batches_tracked:UserWarning")


@pytest.fixture(params=[True, pytest.param(False, marks=slow)], ids=["float64", "float32 alone"])
def device(request):
    with device_with_values(float64=request.param) as name:
        yield name


def classifier(device, **given):
    settings = {
        "backbone": "small_cnn",
        "image_size": 32,
        "joint_epochs": 1,
        "prototypes_per_class": 2,
        "batch_size": 8,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier(device=device, **settings | given)


def assert_adds_up(clf, X):
    logits, sheet = clf.decision_function(X), clf.explain(X, "all")
    codes = np.searchsorted(clf.classes_, sheet["class"].to_numpy())
    totals = np.zeros_like(logits)
    np.add.at(totals, (sheet["sample"].to_numpy(), codes), sheet["contribution"].to_numpy())
    np.testing.assert_allclose(totals, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("given", FITS)
def test_a_fit_leaves_no_tensor_behind(squares, device, given):
    X, y = squares
    clf = classifier(device, **given).fit(X, y)
    state = clf.module_.state_dict()
    assert all(isinstance(tensor, OnDevice) for tensor in state.values())
    assert_adds_up(clf, X)
    # what is pickled with it can be read where the device is not
    assert clf.last_layer_result_.weight.device.type == "cpu"
    assert clf.activations_.g.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("start", ["random", "kmeans"])
def test_a_fit_ends_as_on_the_cpu(squares, start):
    X, y = squares
    given = {"prototype_init": start, "latent_dim": 8, "warmup_epochs": 1}
    expected = classifier("cpu", **given).fit(X, y)
    with device_with_values() as device:
        found = classifier(device, **given).fit(X, y)
        np.testing.assert_allclose(
            found.decision_function(X), expected.decision_function(X), atol=1e-2, rtol=1e-2
        )
    places = ["class", "source_index", "row", "col"]
    assert found.prototypes_[places].equals(expected.prototypes_[places])


@slow
def test_a_fitted_network_follows_the_parameter(squares, device):
    X, y = squares
    clf = classifier(device).fit(X, y)
    logits = clf.decision_function(X)
    clf.set_params(device="cpu")
    np.testing.assert_allclose(clf.decision_function(X), logits, atol=1e-4)
    assert clf.module_.prototypes.device.type == "cpu"
    clf.partial_fit(X, y)
    clf.set_params(device=device).partial_fit(X, y)
    assert isinstance(clf.module_.prototypes.data, OnDevice)
    assert_adds_up(clf, X)


@slow
def test_edits_and_metrics(squares, device):
    X, y = squares
    clf = classifier(device, train_backbone=False, prototypes_per_class=3).fit(X, y)
    for table in (
        nearest_patches(clf, X, k=2, y=y),
        sparsity(clf, X),
        distinctness(clf),
        spatial_misalignment(clf, X[:2]),
    ):
        assert len(table)
    clf = editing.merge_duplicates(editing.remove(clf, [0]), max_distance=1e-3)
    assert_adds_up(clf, X)


def test_the_device_may_be_where_torch_makes_tensors_by_default(squares):
    X, y = squares
    with device_with_values() as device:
        clf = classifier(device, train_backbone=False).fit(X, y)
        torch.set_default_device(device)
        try:
            clf.explain(X[:1], attribution="gradient", top=1)
            clf.last_layer_path(X, y, [1e-3], folds=0)
            rank_stability(clf, X[:2])
            random_prototypes(clf, X, y)
            forbidden = editing.forbid(clf, [0], X, y, k=1, epochs=1).concepts_
        finally:
            torch.set_default_device(None)
    assert {tensor.device.type for tensor in vars(forbidden).values()} == {"cpu"}


# of the images, of a view, of the images again for `forbid`: how many have room on the device
@pytest.mark.parametrize("room", [1, pytest.param(0, marks=slow)])
def test_features_that_the_device_has_no_room_for(squares, device, monkeypatch, room):
    X, y = squares
    rooms = iter([2**30] * room)
    monkeypatch.setattr(storage, "_budget", lambda device: next(rooms, 0))
    clf = classifier(device, train_backbone=False, augmented_views=1, warmup_epochs=1).fit(X, y)
    assert_adds_up(clf, X)
    assert_adds_up(editing.forbid(clf, [0], X, y, k=1, epochs=1), X)


@slow
@pytest.mark.parametrize("edit", [editing.forbid, editing.encourage])
def test_prototypes_start_anew_as_on_the_cpu(squares, edit):
    X, y = squares
    given = {"train_backbone": False, "precision": "float32"}
    expected = edit(classifier("cpu", **given).fit(X, y), [0], X, y, k=1, epochs=1)
    with device_with_values() as device:
        found = edit(classifier(device, **given).fit(X, y), [0], X, y, k=1, epochs=1)
        logits = found.decision_function(X)
    np.testing.assert_allclose(logits, expected.decision_function(X), atol=1e-2, rtol=1e-2)


@slow
def test_a_checkpoint_of_the_device_is_read(squares, tmp_path):
    X, y = squares
    with device_with_values() as device:
        fits = [
            classifier(device, joint_epochs=2, checkpoint=tmp_path, callbacks=[Stop(row)])
            for row in (None, 2, None)
        ]
        expected = fits[0].fit(X, y).decision_function(X)
        with pytest.raises(RuntimeError, match="stopped"):
            fits[1].fit(X, y)
        assert list(tmp_path.iterdir())
        found = fits[2].fit(X, y).decision_function(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
