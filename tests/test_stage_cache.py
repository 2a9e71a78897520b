"""Starts and projections that fits share: the same to the bit, and never those of another fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback
from skorch.dataset import ValidSplit
from torch import nn

from protoclf import ProtoPNetClassifier, selection, stage_cache, stages
from protoclf.backbones import SmallCNN
from protoclf.recent import recent_tensors

FROZEN = {
    "default": {},
    "log and add-on layers": {"similarity": "log", "latent_dim": 8, "warmup_epochs": 2},
    "k-means": {"prototype_init": "kmeans"},
    "random": {"prototype_init": "random", "warmup_epochs": 1},
    "auto": {"prototypes_per_class": "auto", "lambda_l1": 1e-3},
    "distinct": {"distinct": "patches", "prototype_size": (2, 2)},
    "cv": {"lambda_l1": "cv"},
    "views": {"augmented_views": 1},
    "validation": {"train_split": ValidSplit(4, stratified=True)},
    "medians": {"self_matches": "median", "cycles": 2},
}

EVERYTHING = ["start", "candidates", "projection"]


@pytest.fixture
def computed(monkeypatch):
    """What was computed, not remembered, in the order in which it was begun."""
    names = []

    def note(name, where, function):
        work = getattr(where, function)

        def noting(*args, **kwargs):
            names.append(name)
            return work(*args, **kwargs)

        monkeypatch.setattr(where, function, noting)

    note("start", stages.Start, "_begin")
    note("candidates", selection, "_candidates")
    note("projection", stages, "project")
    return names


def frozen(memory, **parameters):
    torch.manual_seed(3)
    settings = {"image_size": 48, "prototypes_per_class": 2, "batch_size": 8, "verbose": 0}
    settings |= {
        "train_backbone": False,
        "memory": memory,
        "random_state": 0,
        "precision": "float32",
    }
    return ProtoPNetClassifier(SmallCNN(16), **settings | parameters)


def assert_same_model(one, other, X):
    state = other.module_.state_dict()
    assert one.module_.state_dict().keys() == state.keys()
    for name, tensor in one.module_.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert one.prototypes_.equals(other.prototypes_)
    assert torch.equal(one.activations_.g, other.activations_.g)
    np.testing.assert_array_equal(one.decision_function(X), other.decision_function(X))
    assert one.explain(X[:3]).equals(other.explain(X[:3]))
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine["stage"] == theirs["stage"]
        assert mine["train_loss"] == theirs["train_loss"]
        assert mine.get("valid_loss") == theirs.get("valid_loss")


@pytest.mark.parametrize("kind", FROZEN)
def test_a_fit_is_the_same_without_memory_and_with_it_cold_and_warm(files, tmp_path, kind):
    X, y = files
    weight = np.linspace(0.5, 2, len(X))
    plain, cold, warm = (
        frozen(m, **FROZEN[kind]).fit(X, y, sample_weight=weight)
        for m in (None, tmp_path / "m", tmp_path / "m")
    )
    assert_same_model(cold, plain, X)
    assert_same_model(warm, plain, X)


def test_what_only_the_last_layer_sees_computes_nothing_again(files, tmp_path, computed):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    assert computed == EVERYTHING
    penalties = {"lambda_l1": 1e-2}, {"lambda_l2": 1e-2}, {"lambda_l1": "cv"}
    for changed in (*penalties, {"self_matches": "median"}):
        clf = frozen(tmp_path / "m", **changed).fit(X, y)
        assert_same_model(clf, frozen(None, **changed).fit(X, y), X)
        assert computed[3:] == EVERYTHING  # of the fit without memory
        del computed[3:]


def test_numbers_of_prototypes_share_candidates_and_their_rating(files, tmp_path, monkeypatch):
    X, y = files
    expected = frozen(None, prototypes_per_class=1).fit(X, y)
    frozen(tmp_path / "m").fit(X, y)
    monkeypatch.setattr(selection, "_candidates", None)
    monkeypatch.setattr(selection, "solve_last_layer", None)
    assert_same_model(frozen(tmp_path / "m", prototypes_per_class=1).fit(X, y), expected, X)


def test_a_warm_fit_runs_no_backbone_and_reads_no_features(files, tmp_path, monkeypatch):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    shutil.rmtree(tmp_path / "m" / "protoclf-cache" / "features")
    recent_tensors.clear()
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # of torch: the backbone is still the same
    frozen(tmp_path / "m", lambda_l1=1e-2).fit(X, y)


OTHER = {
    "classes": lambda X, y: (X, np.roll(y, 1), None, {}),
    "order": lambda X, y: (X[::-1], y[::-1], None, {}),
    "images": lambda X, y: (X[:-1], y[:-1], None, {}),
    "weights": lambda X, y: (X, y, np.arange(1.0, len(X) + 1), {}),
    "seed": lambda X, y: (X, y, None, {"random_state": 1}),
    "prototypes": lambda X, y: (X, y, None, {"prototypes_per_class": 3}),
    "prototypes of a class": lambda X, y: (
        *(X, y, None),
        {"prototypes_per_class": {"blue": 1, "green": 2, "red": 2}},
    ),
    "size": lambda X, y: (X, y, None, {"prototype_size": (1, 2)}),
    "similarity": lambda X, y: (X, y, None, {"similarity": "log"}),
    "add-on layers": lambda X, y: (X, y, None, {"latent_dim": 8}),
    "init": lambda X, y: (X, y, None, {"prototype_init": "kmeans"}),
    "image size": lambda X, y: (X, y, None, {"image_size": 56}),
    "resize": lambda X, y: (X, y, None, {"resize": "squash"}),
    "normalization": lambda X, y: (X, y, None, {"normalization": ((0.5,) * 3, (0.2,) * 3)}),
    "precision": lambda X, y: (X, y, None, {"precision": "bfloat16"}),
    "batches": lambda X, y: (X, y, None, {"batch_size": 5}),
    "a loader's batches": lambda X, y: (X, y, None, {"iterator_valid__batch_size": 5}),
    "class weights": lambda X, y: (
        *(X, y, None),
        {"class_weight": {"blue": 1, "green": 2, "red": 1}},
    ),
}


SHARES = {  # the candidates, or needs none
    "prototypes": ["start", "projection"],
    "prototypes of a class": ["start", "projection"],
    "init": ["start", "projection"],
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_start_is_never_used_for_others(files, tmp_path, computed, kind):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    assert computed == EVERYTHING
    X, y, weight, parameters = OTHER[kind](X, y)
    clf = frozen(tmp_path / "m", **parameters).fit(X, y, sample_weight=weight)
    assert computed[3:] == SHARES.get(kind, EVERYTHING)
    assert_same_model(clf, frozen(None, **parameters).fit(X, y, sample_weight=weight), X)


def test_no_start_is_shared_where_other_numbers_of_images_are_taken_at_once(
    files, tmp_path, computed
):
    trained = {"train_backbone": True, "joint_epochs": 1, "augmented_views": 0, "batch_size": 9}
    for size, expected in (("auto", 1), ("auto", 1), (None, 2)):
        frozen(tmp_path / "m", micro_batch_size=size, **trained).fit(*files)
        assert computed.count("start") == expected


def test_another_projection_shares_the_start(files, tmp_path, computed):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    frozen(tmp_path / "m", distinct="images").fit(X, y)
    assert computed == [*EVERYTHING, "projection"]


def test_warm_up_lies_between_start_and_projection(files, tmp_path, computed):
    X, y = files
    for epochs, expected in ((0, 3), (1, 4), (1, 4), (2, 5)):
        frozen(tmp_path / "m", warmup_epochs=epochs).fit(X, y)
        assert len(computed) == expected


def test_another_picture_under_the_same_name_is_another(files, tmp_path, computed):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    shutil.copy(X[3], X[0])  # of the same class
    clf = frozen(tmp_path / "m").fit(X, y)
    assert computed == EVERYTHING * 2
    assert_same_model(clf, frozen(None).fit(X, y), X)


def test_other_weights_of_the_backbone_are_another(files, tmp_path, computed):
    X, y = files
    clf = frozen(tmp_path / "m")
    clf.fit(X, y)
    with torch.no_grad():
        clf.backbone[0][0].weight[0, 0, 0, 0] += 1e-3
    clf.fit(X, y)
    assert computed == EVERYTHING * 2


def test_other_code_is_another(files, tmp_path, computed, monkeypatch):
    X, y = files
    frozen(tmp_path / "m").fit(X, y)
    monkeypatch.setattr(stage_cache, "code_digest", lambda: "another version")
    frozen(tmp_path / "m").fit(X, y)
    assert computed == EVERYTHING * 2


def test_images_that_change_meanwhile_leave_nothing_behind(files, tmp_path, monkeypatch):
    X, y = files
    find_discriminants = stages.find_discriminants

    def changing(net, data):
        shutil.copy(X[3], X[0])  # features come next
        return find_discriminants(net, data)

    monkeypatch.setattr(stages, "find_discriminants", changing)
    with pytest.warns(UserWarning, match="was changed"):
        frozen(tmp_path / "m").fit(X, y)
    assert not list((tmp_path / "m").rglob("*.npz"))
    monkeypatch.undo()
    assert_same_model(frozen(tmp_path / "m").fit(X, y), frozen(None).fit(X, y), X)


def test_images_that_change_once_features_are_there_count_as_they_were(
    files, tmp_path, monkeypatch, computed
):
    X, y = files
    before = frozen(None).fit(X, y)
    selected = stages.selected_prototypes
    original = Path(X[0]).read_bytes()

    def changing(net, data):
        shutil.copy(X[3], X[0])
        return selected(net, data)

    monkeypatch.setattr(stages, "selected_prototypes", changing)
    with pytest.warns(UserWarning, match="was changed"):
        assert_same_model(frozen(tmp_path / "m").fit(X, y), before, X[1:])
    monkeypatch.setattr(stages, "selected_prototypes", selected)
    computed.clear()
    assert_same_model(frozen(tmp_path / "m").fit(X, y), frozen(None).fit(X, y), X)
    assert computed == EVERYTHING * 2  # nothing of before, and once more without memory
    computed.clear()
    Path(X[0]).write_bytes(original)
    assert_same_model(frozen(tmp_path / "m").fit(X, y), before, X)
    assert computed == []


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"garbage" * 100])
def test_damage_costs_time_alone(files, tmp_path, computed, damage):
    X, y = files
    first = frozen(tmp_path / "m").fit(X, y)
    kept = list((tmp_path / "m").rglob("*.npz"))
    assert len(kept) == 6  # discriminants, those of folds, centre, candidates, start, projection
    for file in kept:
        file.write_bytes(damage)
    assert_same_model(frozen(tmp_path / "m").fit(X, y), first, X)
    assert computed == EVERYTHING * 2
    frozen(tmp_path / "m").fit(X, y)
    assert computed == EVERYTHING * 2


def test_a_trained_backbone_shares_its_start_alone(files, tmp_path, computed):
    X, y = files
    trained = {"train_backbone": True, "joint_epochs": 1}
    plain, cold, warm = (
        frozen(m, **trained).fit(X, y) for m in (None, tmp_path / "m", tmp_path / "m")
    )
    assert computed == EVERYTHING * 2 + ["projection"]
    assert_same_model(cold, plain, X)
    assert_same_model(warm, plain, X)


def test_going_on_is_the_same_with_memory(files, tmp_path):
    X, y = files
    one, other = (frozen(m).fit(X, y) for m in (None, tmp_path / "m"))
    for clf in (one, other):
        clf.partial_fit(X[:12], y[:12])
    assert_same_model(other, one, X)


@pytest.mark.slow
def test_two_processes_search_as_one_does_without_memory(files, tmp_path):
    X, y = files
    grid = {"lambda_l1": [1e-3, 1e-2], "prototypes_per_class": [1, 2]}
    searches = [
        GridSearchCV(frozen(memory), grid, cv=3, n_jobs=2).fit(X, y)
        for memory in (None, tmp_path / "m", tmp_path / "m")
    ]
    for search in searches[1:]:
        for name in ("mean_test_score", "split0_test_score", "split2_test_score"):
            np.testing.assert_array_equal(search.cv_results_[name], searches[0].cv_results_[name])
        assert_same_model(search.best_estimator_, searches[0].best_estimator_, X)


class Seen(nn.Module):
    """A backbone that cannot be told from others by the names of its layers."""

    def __init__(self, factor):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.factor = factor

    def forward(self, x):
        return self.factor * self.conv(x)


def test_backbones_that_differ_in_an_attribute_are_told_apart(files, tmp_path, computed):
    X, y = files
    for k, factor in enumerate((1.0, -1.0)):
        clf = frozen(tmp_path / "m")
        torch.manual_seed(0)
        clf.set_params(backbone=Seen(factor)).fit(X, y)
        assert computed == EVERYTHING * (k + 1)


def test_prototypes_that_a_callback_moves_are_projected_anew(files, computed):
    X, y = files

    class Moving(Callback):
        def on_epoch_begin(self, net, **kwargs):
            with torch.no_grad():
                net.module_.prototypes.mul_(1.01).add_(0.01)

    clf = frozen(None, callbacks=[Moving()]).fit(X, y)
    assert computed == EVERYTHING
    assert clf.prototypes_["moved"].max() > 0


def test_results_beyond_what_is_worth_keeping_are_not_kept(files, tmp_path, monkeypatch):
    X, y = files
    monkeypatch.setattr(stage_cache, "LARGEST", 100)
    frozen(tmp_path / "m").fit(X, y)
    (centre,) = (tmp_path / "m").rglob("*.npz")
    assert list(np.load(centre)) == ["mean"]
