"""Saved and loaded: nothing changes, nothing in the files runs, and damage is an error."""

import contextlib
import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch.callbacks import EarlyStopping, EpochScoring
from skorch.dataset import ValidSplit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protoclf import ImageError, ProtoPNetClassifier, saved_model
from protoclf.editing import remove
from protoclf.geometry import Preprocessing
from protoclf.model_files import ModelFileError, as_json, decode, encode
from protoclf.network_structure import probe
from protoclf.plotting import plot_explanation, plot_prototypes
from protoclf.report import write_report

DATA = Path(__file__).parent / "data"


def own_module(seed=7, stride=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 6, 2, stride), nn.ReLU())


def classifier(backbone=None, **parameters):
    settings = {
        "image_size": 32,
        "prototypes_per_class": 2,
        "warmup_epochs": 1,
        "joint_epochs": 1,
        "random_state": 0,
        "device": "cpu",
        "verbose": 0,
    }
    return ProtoPNetClassifier(backbone or own_module(), **{**settings, **parameters})


@pytest.fixture(scope="module")
def images(squares):
    X, y = squares
    return X[:12], y[:12]


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """Paths of the same images, and labels."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [str(folder / f"{i}.png") for i in range(len(images[0]))]
    for path, pixels in zip(paths, images[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths, images[1]


@pytest.fixture(scope="module")
def clf(images):
    """To be read, not to be changed."""
    return classifier().fit(*images)


@pytest.fixture(scope="module")
def master(clf, tmp_path_factory):
    """A saved model, to be read."""
    return clf.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def saved(master, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(master, tmp_path / "model"))


def load(folder, **given):
    return ProtoPNetClassifier.load(folder, **{"backbone": own_module(0), "device": "cpu", **given})


def same(a, b, X):
    """Assert that two classifiers are the same in all that a user can see."""
    np.testing.assert_array_equal(a.decision_function(X), b.decision_function(X))
    np.testing.assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    np.testing.assert_array_equal(a.transform(X), b.transform(X))
    predictions = a.predict(X), b.predict(X)
    np.testing.assert_array_equal(*predictions)
    assert predictions[0].dtype == predictions[1].dtype
    np.testing.assert_array_equal(a.classes_, b.classes_)
    assert a.classes_.dtype == b.classes_.dtype
    np.testing.assert_array_equal(a.coef_, b.coef_)
    pd.testing.assert_frame_equal(a.prototypes_, b.prototypes_)
    for options in ({}, {"classes": "all", "top": 1}):
        pd.testing.assert_frame_equal(a.explain(X, **options), b.explain(X, **options))
    assert list(a.get_feature_names_out()) == list(b.get_feature_names_out())
    assert a.geometry_ == b.geometry_
    assert a.geometry_.receptive_field == b.geometry_.receptive_field
    assert a.lambda_l1_ == b.lambda_l1_
    results = [dict(vars(c.last_layer_result_)) for c in (a, b)]
    weights = [result.pop("weight") for result in results]
    assert torch.equal(*weights)
    assert results[0] == results[1]
    assert a.history.to_list() == b.history.to_list()
    assert a.history[:, "stage"] == b.history[:, "stage"]
    assert a.source_images_.keys() == b.source_images_.keys()
    for j in range(a.n_prototypes_):
        np.testing.assert_array_equal(a.source_image(j), b.source_image(j))


# What survives ----------------------------------------------------------------------------------

BY_CLASS = {"blue": 1, "green": 2, "red": 1}


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"similarity": "log", "latent_dim": 5, "prototype_size": (2, 2), "resize": "squash"},
        {"similarity": "log", "lambda_l1": "cv", "normalization": ([0.4] * 3, (0.3, 0.2, 0.1))},
        {"latent_dim": 4, "prototype_size": "full", "prototypes_per_class": BY_CLASS},
        {"prototypes_per_class": "auto", "train_backbone": False, "lambda_l1": 1e-2},
        {"precision": "bfloat16", "prototype_init": "random", "cycles": 2},
    ],
)
def test_nothing_changes(images, tmp_path, parameters):
    clf = classifier(**parameters).fit(*images)
    loaded = load(clf.save(tmp_path / "model"))
    same(clf, loaded, images[0])
    if clf.lambda_l1 == "cv":
        pd.testing.assert_frame_equal(clf.last_layer_path_, loaded.last_layer_path_)
    ours, theirs = (c.get_params(deep=False) for c in (clf, loaded))
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"backbone", "device"}:
        assert ours[name] == theirs[name]
        assert type(ours[name]) is type(theirs[name])
    assert vars(clf).keys() == vars(loaded).keys()
    for name, values in clf.sources_.items():
        np.testing.assert_array_equal(values, loaded.sources_[name])
    assert torch.equal(clf.activations_.g, loaded.activations_.g)
    assert torch.equal(clf.activations_.y, loaded.activations_.y)
    assert torch.equal(clf.activations_.views, loaded.activations_.views)


LABELS = {
    "integers": np.array([3, -1, 2**40]),
    "small integers": np.array([3, 1, 200], dtype=np.uint8),
    "floats": np.array([0.0, 2.0, -7.0], dtype=np.float32),
    "objects": np.array(["ž", "a b", "\n"], dtype=object),
    "long strings": np.array(["새", "b", "c"], dtype="<U9"),
    "booleans": np.array([True, False]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_keep_their_type(images, tmp_path, kind):
    X, _ = images
    labels = LABELS[kind]
    clf = classifier(joint_epochs=0).fit(X, labels[np.arange(len(X)) % len(labels)])
    same(clf, load(clf.save(tmp_path / "model")), X)


@pytest.mark.parametrize("self_matches", ["keep", "median"])
def test_a_loaded_classifier_is_edited_like_the_first(images, tmp_path, self_matches):
    weights = np.linspace(0.5, 1, len(images[0]))
    clf = classifier(self_matches=self_matches).fit(*images, sample_weight=weights)
    edited = remove(clf, [1], reason="the background")
    loaded = load(clf.save(tmp_path / "model"))
    same(edited, remove(loaded, [1]), images[0])
    again = load(edited.save(tmp_path / "edited"))
    same(edited, again, images[0])
    assert again.edits_.to_numpy().tolist() == edited.edits_.to_numpy().tolist()
    ours, theirs = remove(edited, [2]), remove(again, [2])
    pd.testing.assert_frame_equal(ours.edits_, theirs.edits_, check_dtype=False)
    same(ours, theirs, images[0])


def test_edits_keep_thumbnails_small(clf, tmp_path):
    loaded = remove(load(clf.save(tmp_path / "model", thumbnails=16)), [0])
    again = load(loaded.save(tmp_path / "edited"))
    assert len(os.listdir(tmp_path / "edited" / "thumbnails")) == len(again.source_images_)
    assert set(again.source_images_) == set(again.prototypes_["source_index"])


def test_a_classifier_of_paths_names_them(photos, tmp_path):
    clf = classifier(joint_epochs=0).fit(*photos)
    loaded = load(clf.save(tmp_path / "model"))
    same(clf, loaded, photos[0])
    gradient = [c.explain(photos[0][:1], attribution="gradient") for c in (clf, loaded)]
    pd.testing.assert_frame_equal(*gradient)
    assert loaded.source_images_ == {}
    assert sorted(os.listdir(tmp_path / "model")) == ["model.json", "tensors.safetensors"]


def test_a_source_that_is_another_file_now_is_not_shown(photos, tmp_path, monkeypatch):
    """Neither by the classifier nor by what it was saved as, whatever the size of the file."""
    X, y = photos
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    names = [f"{i}.png" for i in range(len(X))]
    for path, name in zip(X, names, strict=True):
        shutil.copy(path, tmp_path / "here" / name)
        shutil.copy(X[0], tmp_path / "there" / name)
    monkeypatch.chdir(tmp_path / "here")
    clf = classifier(joint_epochs=0).fit(names, y)
    loaded = load(clf.save(tmp_path / "model"))
    j = next(j for j, name in enumerate(clf.prototypes_["source"]) if name != "0.png")
    expected = clf.source_image(j)
    np.testing.assert_array_equal(loaded.source_image(j), expected)
    monkeypatch.chdir(tmp_path / "there")
    np.testing.assert_array_equal(clf.source_image(j), expected)  # where it was
    with pytest.raises(ImageError, match="is another file than the fit saw"):
        loaded.source_image(j)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="is not there"):
        loaded.source_image(j)
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "here" / clf.prototypes_["source"][j])
    for draw in (
        lambda: plot_prototypes(clf, prototypes=[j]),
        lambda: clf.save(tmp_path / "other", thumbnails=16),
    ):
        with pytest.raises(ImageError, match=f"which prototype {j} is a part of, is another file"):
            draw()
    with pytest.warns(UserWarning, match="the report marks them as not found"):
        write_report(clf, X[:2], path=tmp_path / "report.html")
    with pytest.warns(UserWarning, match="is another file than the fit saw"):
        clf.explain(X[:6], "all", attribution="gradient")


@pytest.mark.parametrize("trains", [False, True])
def test_another_fit_of_a_loaded_one_starts_where_the_first_did(images, tmp_path, trains):
    backbone = own_module()
    backbone[0].weight.requires_grad_(False)
    clf = classifier(backbone, train_backbone=trains).fit(*images)
    given = own_module(0 if not trains else 7)
    loaded = load(clf.save(tmp_path / "model"), backbone=given)
    assert loaded.module_.frozen == clf.module_.frozen == ("0.weight",)
    before = [p.clone() for p in given.parameters()]
    pairs = [(clf.partial_fit, loaded.partial_fit)]
    if not trains:  # the weights that it started from are in the file
        pairs.append((clone(clf).fit, clone(loaded).fit))
    for one, other in pairs:
        logits = [fit(*images).decision_function(images[0]) for fit in (one, other)]
        np.testing.assert_array_equal(*logits)
    assert torch.equal(loaded.module_.backbone[0].weight, backbone[0].weight)  # still frozen
    assert all(torch.equal(a, b) for a, b in zip(before, given.parameters(), strict=True))
    assert all(p.requires_grad for p in given.parameters())


def test_a_model_loaded_in_inference_mode_can_be_trained(saved, images):
    with torch.inference_mode():
        loaded = load(saved)
    loaded.partial_fit(*images)


def test_strings_of_numpy_are_strings_and_long_ones_are_refused(images, tmp_path):
    X, y = images
    clf = classifier(joint_epochs=0).fit(X, np.array([np.str_(label) for label in y], dtype=object))
    same(clf, load(clf.save(tmp_path / "model")), X)
    clf.classes_inferred_ = np.array(["a", "b", "c" * 10_001], dtype=object)
    with pytest.raises(ValueError, match="more than 10000 characters cannot be saved"):
        clf.save(tmp_path / "long")


def test_images_of_sources_are_among_those_of_the_activations(images, tmp_path):
    folder = classifier(joint_epochs=0, self_matches="median").fit(*images).save(tmp_path / "model")
    edit_tensors(folder, lambda t: t["sources.image"].add_(1000))
    with pytest.raises(ModelFileError, match=r"'sources\.image' out of the range 0 to 12"):
        load(folder)


def test_a_subclass_saves_what_is_as_by_default(images, tmp_path):
    class Plain(ProtoPNetClassifier):
        def __init__(self, backbone="small_cnn", **parameters):
            super().__init__(backbone, **parameters)

    given = classifier(joint_epochs=0).get_params(deep=False)
    clf = Plain(**{name: given[name] for name in ("backbone", "image_size", "verbose", "device")})
    clf.set_params(prototypes_per_class=2, joint_epochs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.fit(*images).save(tmp_path / "model")


def test_a_backbone_by_name_needs_no_download(images, tmp_path, monkeypatch):
    clf = classifier("squeezenet1_1", weights=None, joint_epochs=0, image_size=48).fit(*images)
    clf.set_params(weights="DEFAULT")  # as if they had been downloaded

    def offline(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("protoclf.backbones._download", offline)
    loaded = ProtoPNetClassifier.load(clf.save(tmp_path / "model"), device="cpu")
    same(clf, loaded, images[0])
    assert (loaded.backbone, loaded.weights) == ("squeezenet1_1", "DEFAULT")
    with pytest.raises(ModelFileError, match="'squeezenet1_1': give none"):
        load(tmp_path / "model")


def test_a_loaded_classifier_is_like_any_other(clf, master, images, tmp_path):
    X, y = images
    loaded = load(master)
    same(clf, pickle.loads(pickle.dumps(loaded)), X)
    same(clf, load(loaded.save(tmp_path / "again")), X)
    assert loaded.set_params(lambda_l1=1e-3, batch_size=5).lambda_l1 == 1e-3
    loaded.set_params(optimizer__weight_decay=1e-4)
    loaded.partial_fit(X, y)
    assert len(loaded.history) == len(clf.history) + 3
    before = len(loaded.history)
    loaded.set_params(warm_start=True).fit(X, y)
    assert len(loaded.history) == before + 3
    with pytest.raises(NotFittedError):
        clone(loaded).predict(X)


def test_a_second_fit_is_the_first_one(clf, master, images):
    again = load(master, backbone=own_module()).fit(*images)
    np.testing.assert_array_equal(again.predict_proba(images[0]), clf.predict_proba(images[0]))


def test_parameters_set_since_the_fit_are_kept_beside_the_network(images, tmp_path):
    clf = classifier(latent_dim=5).fit(*images)
    later = {
        "image_size": 64,
        "similarity": "log",
        "latent_dim": None,
        "prototype_size": (9, 9),
        "resize": "squash",
        "prototypes_per_class": 7,
        "normalization": [[0.0] * 3, [1.0] * 3],
    }
    loaded = load(clf.set_params(**later).save(tmp_path / "model"))
    same(clf, loaded, images[0])
    assert later.items() <= loaded.get_params().items()


@pytest.mark.parametrize("backbone", ["small_cnn", "squeezenet1_1"])
def test_the_generator_of_torch_is_left_alone(images, tmp_path, monkeypatch, backbone):
    """So that a fit in another thread draws what it would alone."""
    clf = classifier(backbone, weights=None, latent_dim=4, image_size=64).fit(*images)
    before = torch.get_rng_state()
    with monkeypatch.context() as patched:
        for name in ("manual_seed", "set_rng_state"):
            patched.setattr(torch, name, pytest.fail)
        ProtoPNetClassifier.load(clf.save(tmp_path / "model"))
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_saved_is_named_once(images, tmp_path):
    class Own(torch.optim.SGD):
        pass

    clf = classifier(
        callbacks=[EarlyStopping(monitor="train_loss"), EpochScoring("accuracy", name="mine")],
        callbacks__EarlyStopping__patience=3,
        augmentation=lambda image: image,
        optimizer=Own,
        optimizer__momentum=0.5,
        train_split=ValidSplit(3, stratified=True),
        memory=tmp_path / "memory",
        iterator_valid__num_workers=0,
        random_state=np.random.RandomState(0),
    ).fit(*images)
    clf.history.record("odd", object())
    clf.set_output(transform="pandas")
    names = (
        "augmentation, callbacks, callbacks__EarlyStopping__patience, optimizer, "
        "optimizer__momentum, random_state, train_split, 'odd' in history, "
        "set_output"
    )
    with pytest.warns(UserWarning, match="Not saved") as caught:
        clf.save(tmp_path / "model")
    (warning,) = caught
    assert f": {names}." in str(warning.message)
    assert "forbid" not in str(warning.message)
    assert warning.filename == __file__
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(images[0]), clf.predict_proba(images[0]))
    parameters, default = loaded.get_params(deep=False), ProtoPNetClassifier().get_params()
    for name in ("augmentation", "callbacks", "memory", "optimizer", "random_state", "train_split"):
        assert parameters[name] == default[name]
    assert parameters["iterator_valid__num_workers"] == 0
    assert "optimizer__momentum" not in parameters
    loaded.fit(*images)


def test_what_belongs_to_the_machine_is_left_out_without_a_word(images, tmp_path):
    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, own=0, **kwargs):
            super().__init__(*args, **kwargs)

    settings = {"memory": tmp_path / "memory", "checkpoint": tmp_path / "checkpoint"}
    settings |= {"iterator_valid": Loader, "iterator_valid__own": 1}
    clf = classifier(**settings).fit(*images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(clf.save(tmp_path / "model"))
    assert loaded.memory is loaded.checkpoint is None
    assert "iterator_valid__own" not in loaded.get_params()


def test_optimizers_of_torch_are_saved_by_name(images, tmp_path):
    clf = classifier(optimizer=torch.optim.AdamW, optimizer__betas=(0.8, 0.9)).fit(*images)
    loaded = load(clf.save(tmp_path / "model"))
    assert loaded.optimizer is torch.optim.AdamW
    assert loaded.optimizer_.param_groups[0]["betas"] == (0.8, 0.9)


def test_the_device_is_that_of_load(master):
    assert load(master).get_params()["device"] == "cpu"
    assert ProtoPNetClassifier.load(master, backbone=own_module()).get_params()["device"] == "auto"
    with pytest.raises(ValueError, match="device must be"):  # a wrong argument, not a wrong file
        load(master, device="nowhere")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -0.0, 1e-300, "a\udc80", [], {}, (1, (2, [3])), {1: "a", (1.5): None}),
        *({"$tuple": [1]}, {"a": {"$b": 2}}, float("inf"), Path("x/y"), 2**63),
    ],
    ids=repr,
)
def test_values_come_back(value):
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)
    assert math.isnan(decode(encode(np.float32("nan"))))


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, 1j, 10**200, ValueError, []])
def test_values_that_json_cannot_hold(value):
    if value == []:
        value.append(value)  # without an end
    with pytest.raises(TypeError):
        encode(value)


# Thumbnails -------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
    """Large smooth pictures, by path, and labels."""
    y, x = np.mgrid[:300, :400]
    paths, labels = [], []
    for i in range(8):
        pixels = np.stack([x * (i % 2) // 2, y // 2 + 10 * i, (x + y) // 4], -1).astype(np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        PIL.Image.fromarray(pixels).save(paths[-1])
        labels.append("odd" if i % 2 else "even")
    return paths, labels


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
def test_thumbnails_stand_in_for_the_images(drawn, tmp_path):
    X, y = drawn
    clf = classifier(joint_epochs=0, similarity="log").fit(X, y)
    folder = clf.save(tmp_path / "model", thumbnails=64)
    sources = [clf.source_image(j).astype(int) for j in range(clf.n_prototypes_)]
    assert {PIL.Image.open(p).size for p in (folder / "thumbnails").iterdir()} == {(64, 48)}
    elsewhere = [np.asarray(PIL.Image.open(path)) for path in X]
    table, sheet = clf.prototypes_, clf.explain(elsewhere, "all")
    for path in X:
        os.remove(path)
    loaded = load(folder)
    pd.testing.assert_frame_equal(loaded.prototypes_, table)
    pd.testing.assert_frame_equal(loaded.explain(elsewhere, "all"), sheet)
    for j, pixels in enumerate(sources):
        found = loaded.source_image(j)
        assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
        assert np.abs(found - pixels).mean() < 4  # of 255
    plot_explanation(loaded, elsewhere[0])
    plot_prototypes(loaded)
    page = write_report(loaded, elsewhere, y, tmp_path / "report.html").read_text()
    assert page.count("data:image/") >= len(X)
    again = load(loaded.save(tmp_path / "again"))
    for j in range(loaded.n_prototypes_):
        np.testing.assert_array_equal(again.source_image(j), loaded.source_image(j))
    smaller = load(again.save(tmp_path / "smaller", thumbnails=16))
    assert smaller.source_image(0).shape == (300, 400, 3)
    copied = pickle.loads(pickle.dumps(smaller))
    np.testing.assert_array_equal(copied.source_image(0), smaller.source_image(0))


def test_thumbnails_take_the_place_of_pixels(clf, master, tmp_path):
    loaded = load(clf.save(tmp_path / "model", thumbnails=512))
    assert loaded.source_image(0).shape == (40, 60, 3)
    assert set(loaded.source_images_) == set(clf.source_images_)
    sizes = [(f / "tensors.safetensors").stat().st_size for f in (tmp_path / "model", master)]
    assert sizes[0] < sizes[1]


def test_a_new_fit_forgets_thumbnails(clf, images, tmp_path):
    loaded = load(clf.save(tmp_path / "model", thumbnails=8), backbone=own_module())
    loaded.fit(*images)
    np.testing.assert_array_equal(loaded.source_image(0), clf.source_image(0))


@pytest.mark.parametrize("side", [0, -1, 1.5, True, "512", 10**6])
def test_a_wrong_size_of_thumbnails_is_refused(clf, tmp_path, side):
    with pytest.raises(ValueError, match="thumbnails must be None, or an int from 1 to"):
        clf.save(tmp_path / "model", thumbnails=side)
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
def test_a_source_that_is_gone_has_no_thumbnail(drawn, tmp_path):
    X, y = drawn
    clf = classifier(joint_epochs=0).fit(X, y)
    os.remove(clf.prototypes_["source"][0])
    with pytest.raises(ImageError, match="which prototype 0 is a part of, is not there"):
        clf.save(tmp_path / "model", thumbnails=64)
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".png")]


def cut(file, size):
    file.write_bytes(file.read_bytes()[:-size])


def make_link(file):
    shutil.move(file, file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def make_pipe(file):
    os.remove(file)
    os.mkfifo(file)


def make_folder(file):
    os.remove(file)
    os.mkdir(file)


THUMBNAIL = {
    "missing": (os.remove, "is not there"),
    "cut off": (lambda file: cut(file, 200), "no JPEG that can be read"),
    "no picture": (lambda file: file.write_bytes(b"no picture"), "no JPEG that can be read"),
    "small": (lambda file: PIL.Image.new("RGB", (9, 9)).save(file), "in RGB, 16 x 11 pixels"),
    "grey": (lambda file: PIL.Image.new("L", (16, 11)).save(file), "in RGB, 16 x 11 pixels"),
    "PNG": (lambda file: PIL.Image.new("RGB", (16, 11)).save(file, "PNG"), "no JPEG that can"),
    "huge": (lambda file: os.truncate(file, 10**9), "at most"),
    "link": (make_link, "no regular file"),
    "pipe": (make_pipe, "no regular file"),
    "folder": (make_folder, "no regular file"),
    "linked folder": (lambda file: make_link(file.parent), "is a link"),
}


@pytest.mark.parametrize("case", THUMBNAIL)
def test_damaged_thumbnails_are_refused(clf, tmp_path, case):
    damage, match = THUMBNAIL[case]
    folder = clf.save(tmp_path / "model", thumbnails=16)
    damage(min((folder / "thumbnails").iterdir()))
    with pytest.raises(ModelFileError, match=match):
        load(folder)


SIZES = {
    "missing": (lambda s: s[1:], "other images than the sources"),
    "additional": (lambda s: [*s, [10**6, 60, 40]], "other images than the sources"),
    "twice": (lambda s: [*s, s[0]], "other images than the sources"),
    "huge": (lambda s: [[s[0][0], 60, 10**9], *s[1:]], "more than PIL.Image.MAX_IMAGE_PIXELS"),
    "small": (lambda s: [[s[0][0], 1, 1], *s[1:]], "as a thumbnail must be"),
    "of boxes": (lambda s: [[i, 6, 4] for i, _, _ in s], "as a thumbnail must be"),
    "path": (lambda s: [["../../x", 60, 40], *s[1:]], "must be a list of .index, width, height"),
    "negative": (lambda s: [[-1, 60, 40], *s[1:]], "must be a list of .index, width, height"),
}


@pytest.mark.parametrize("case", SIZES)
def test_wrong_sizes_of_thumbnails_are_refused(clf, tmp_path, case):
    change, match = SIZES[case]
    folder = clf.save(tmp_path / "model", thumbnails=16)
    edit_json(folder, lambda c: c["thumbnails"].update(sizes=change(c["thumbnails"]["sizes"])))
    with pytest.raises(ModelFileError, match=match):
        load(folder)


# What is refused --------------------------------------------------------------------------------


def edit_json(folder, change):
    file = folder / "model.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder, change):
    file = folder / "tensors.safetensors"
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(file).items()}
    change(tensors)
    file.write_bytes(safetensors.torch.save(tensors))


def put(*path):
    """Return what sets a field: the names that lead to it, and at the end the value."""
    *names, last, value = path

    def change(content):
        for name in names:
            content = content[name]
        content[last] = value

    return change


def parameter(name, value):
    return put("parameters", name, value)


ROW = {"batches": []}
INNER = 60 * "[" + 60 * "]"
JSON = {
    "no version": (lambda c: c.pop("version"), "not the description of a saved"),
    "version 0": (put("version", 0), "not the description"),
    "version true": (put("version", True), "not the description"),
    "newer": (put("version", 4), "saved by a newer version of protoclf: its format is 4"),
    "another format": (put("format", "x"), "not the description"),
    "a field less": (lambda c: c.pop("sources"), "lacks the field sources"),
    "a field more": (put("pickle", "x"), "fields too many: ..pickle"),
    "a nested field more": (put("fit", "x", 1), "fields too many in fit"),
    "seed": (put("fit", "seed", 1.5), "fit.seed; it must be an int from 0"),
    "flag": (put("fit", "backbone_trained", 1), "fit.backbone_trained; it must be true or false"),
    "result": (put("last_layer_result", "n_iter", "3"), "last_layer_result.n_iter"),
    "result as a list": (put("last_layer_result", []), "it must be an object"),
    "result as a dict": (put("last_layer_result", {"$dict": []}), "lacks the field"),
    "result as a tuple": (put("last_layer_result", {"$tuple": []}), "holds a tuple"),
    "sources as numbers": (put("sources", [1, 2]), "a list of strings"),
    "a source less": (lambda c: c["sources"].pop(), "'network.owner' as int64 of shape"),
    "no sources": (put("sources", []), "has no prototypes"),
    "edits": (put("edits", [[1, "remove"]]), "a list of rows of 7"),
    "history": (put("history", [1]), "a list of objects"),
    "history without batches": (put("history", [{}]), "each with a list of batches"),
    "deep history": (put("history", [{**ROW, "x": json.loads(INNER)}]), "too deeply"),
    "unknown value": (put("history", [{**ROW, "x": {"$call": "os"}}]), "nothing is written as"),
    "image_size 0": (put("network", "image_size", 0), "image_size; it must be"),
    "huge image_size": (put("network", "image_size", 4097), "it must be an int from 1 to 4096"),
    "small image_size": (put("network", "image_size", 4), "cannot be built"),
    "other image_size": (put("network", "image_size", 64), "not computed in the same way"),
    "resize": (put("network", "resize", "no"), "network.resize"),
    "similarity": (put("network", "similarity", "log"), "too many"),
    "huge latent_dim": (put("network", "latent_dim", 10**9), "has latent_dim 1000000000"),
    "latent_dim of D": (put("network", "latent_dim", 6), "lacks tensors"),
    "backbone": (put("network", "backbone", "resnet18"), "give none"),
    "layers": (put("network", "layers", "0", "Linear"), "layer '0' is Linear, and Conv2d in the"),
    "layers more": (put("network", "layers", "9", "ReLU"), "'9' is ReLU, and not there"),
    "no layers": (put("network", "layers", None), "network.layers|another backbone"),
    "labels twice": (put("classes", "labels", ["a", "a", "b"]), "labels twice"),
    "labels unsorted": (put("classes", "labels", ["b", "a", "c"]), "out of order"),
    "a label less": (put("classes", "labels", ["a", "b"]), "last_layer.weight"),
    "a label more": (put("classes", "labels", ["a", "b", "c", "d"]), "last_layer.weight"),
    "one label": (put("classes", "labels", ["a"]), "only one"),
    "labels of a type": (put("classes", "labels", ["a", "b", 3]), "not all str"),
    "long labels": (put("classes", "labels", ["a", "b", "c" * 999]), "longer than it says"),
    "numbers as labels": (put("classes", "type", "int64"), "not all int64"),
    "unknown labels": (put("classes", "type", "O"), "it must be one of"),
    "huge labels": (put("classes", "width", 10**9), "classes.width"),
    "labels out of range": (
        put("classes", {"type": "uint8", "width": 0, "labels": [1, 2, 300]}),
        "class labels",
    ),
    "parameter": (parameter("lambda_l3", 1), "no parameter 'lambda_l3'"),
    "parameter value": (parameter("batch_size", 0), "batch_size must be an int >= 1"),
    "internals": (parameter("module", "x"), "no parameter 'module'"),
    "self": (parameter("self", "x"), "cannot be used"),
    "device": (parameter("device", "cuda"), "has 'device' among"),
    "memory": (parameter("memory", "/tmp"), "'memory', which no file may"),
    "compile": (parameter("compile", True), "'compile', which no file may"),
    "backend": (parameter("compile__backend", "x"), "which no file may"),
    "unpickling": (parameter("torch_load_kwargs", {"weights_only": False}), "which no file may"),
    "iterator": (parameter("iterator_valid", "x"), "which no file may"),
    "workers": (parameter("iterator_train__num_workers", 10**6), "more than 256 processes"),
    "iterator value": (parameter("iterator_valid__x", 1), "sets 'iterator_valid__x' to what no"),
    "iterator code": (parameter("iterator_train__collate_fn", "x"), "__collate_fn' to what no"),
    "timeout": (parameter("iterator_valid__timeout", 1), "for processes that it does not ask for"),
    "huge batch": (parameter("batch_size", 10**60), "'batch_size' to an integer out of all range"),
    "huge valid batch": (parameter("iterator_valid__batch_size", 2**63), "out of all range"),
    "no batch size": (parameter("iterator_valid__batch_size", None), "__batch_size' to what no"),
    "digests": (put("source_digests", ["x"]), "6 sources and 1 digests"),
    "frozen": (put("network", "frozen", ["x"]), "names frozen layers that the backbone does not"),
    "optimizer": (parameter("optimizer", "os.system"), "torch.optim does not have"),
    "optimizer list": (parameter("optimizer", []), "torch.optim does not have"),
    "optimizer value": (parameter("optimizer__x", 1), "optimizer has no parameter 'x'"),
    "callbacks": (parameter("callbacks", ["os.system"]), "cannot be built|cannot be used"),
    "parameters as a tuple": (put("parameters", {"$tuple": []}), "holds a tuple as parameters"),
    "names of parameters": (put("parameters", {"$dict": [[1, 2]]}), "has 1 among its parameters"),
    "thumbnails": (put("thumbnails", {"side": 9, "sizes": []}), "pixels of images that have"),
    "thumbnail side": (put("thumbnails", {"side": 0, "sizes": []}), "thumbnails.side"),
}


@pytest.mark.parametrize("case", JSON)
def test_wrong_json_is_refused(saved, case):
    change, match = JSON[case]
    edit_json(saved, change)
    with pytest.raises(ModelFileError, match=match) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_two_names_of_one_training_image_are_refused(images, tmp_path):
    clf = classifier(prototypes_per_class=4, joint_epochs=0).fit(*images)
    assert clf.prototypes_["source_index"].nunique() < clf.n_prototypes_
    folder = clf.save(tmp_path / "model")
    edit_json(folder, lambda c: c.update(sources=[str(i) for i, _ in enumerate(c["sources"])]))
    with pytest.raises(ModelFileError, match="names two sources for one training image"):
        load(folder)


def fill(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def drop_pixels(tensors):
    tensors.pop(min(name for name in tensors if name.startswith("pixels.")))


POINT = (0, 0, 0, 0)
TENSORS = {
    "missing": (lambda t: t.pop("network.prototypes"), "lacks tensors, ..network.prototypes"),
    "missing weight": (lambda t: t.pop("network.backbone.0.bias"), "lacks tensors"),
    "additional": (put("network.backbone.9.weight", torch.ones(3)), "holds tensors too many"),
    "additional kind": (put("code", torch.ones(3)), "holds tensors too many, ..code"),
    "shape": (put("network.backbone.0.bias", torch.ones(9)), r"must be float32 of shape \(8\)"),
    "scalar": (put("network.prototypes", torch.tensor(1.0)), "'network.prototypes' as float32"),
    "empty": (put("network.prototypes", torch.ones(6, 0, 1, 1)), "'network.prototypes' as"),
    "type": (put("network.backbone.0.bias", torch.ones(8).double()), "must be float32"),
    "no integers": (put("network.owner", torch.ones(6)), "must be int64"),
    "more prototypes": (put("network.prototypes", torch.ones(7, 6, 1, 1)), "network.prototypes"),
    "other channels": (put("network.prototypes", torch.ones(6, 7, 1, 1)), "add_on.0.mean"),
    "large prototypes": (put("network.prototypes", torch.ones(6, 6, 9, 9)), "cannot be built"),
    "NaN": (fill("network.prototypes", POINT, math.nan), "NaN or infinity in 'network.proto"),
    "infinity": (fill("network.backbone.0.bias", 0, math.inf), "NaN or infinity"),
    "owner": (fill("network.owner", 0, 3), "'network.owner' out of the range"),
    "negative owner": (fill("network.owner", 0, -1), "'network.owner' out of the range"),
    "std": (fill("network.std", 0, 0), "not above 0"),
    "row": (fill("prototypes.row", 0, 4), "'prototypes.row' out of the range 0 to 4"),
    "col": (fill("prototypes.col", 0, -1), "'prototypes.col' out of the range"),
    "empty box": (fill("prototypes.box", 0, 5), "are no boxes"),
    "box outside": (fill("prototypes.box", (0, 2), 61), "a box outside of"),
    "negative box": (fill("prototypes.box", (0, 0), -1), "are no boxes"),
    "a row less": (put("prototypes.moved", torch.ones(5).double()), "prototypes.moved"),
    "share": (fill("prototypes.strongest_share", 0, 2), "strongest_share"),
    "index": (fill("prototypes.source_index", 0, -1), "source_index"),
    "pixels": (
        put("pixels.999", torch.ones(2, 2, 3).byte()),
        "pixels of other images",
    ),
    "pixels by path": (
        put("pixels.../x", torch.ones(2, 2, 3).byte()),
        "pixels of other images",
    ),
    "pixels less": (
        lambda t: t.pop(min(n for n in t if n.startswith("pixels"))),
        "of other images",
    ),
    "grey pixels": (put("pixels.999", torch.ones(2, 2).byte()), "pixels.999"),
    "result": (put("last_layer_result.weight", torch.ones(2, 6)), "last_layer_result.weight"),
    "path": (put("last_layer_path.weight", torch.ones(2, 3, 6).double()), "lacks tensors"),
    "sources": (put("sources.box", torch.ones(6, 3).double()), "'sources.box' as float64"),
    "targets": (fill("activations.y", 0, 3), "'activations.y' out of the range 0 to 3"),
    "activations": (put("activations.g", torch.ones(12, 5)), r"float32 of shape \(12, 6\)"),
    "lone weights": (lambda t: t.pop("activations.y"), "activations.y"),
    "probe": (lambda t: t["probe"].add_(1), "not computed in the same way"),
    "length of probe": (put("probe", torch.ones(3)), "not computed in the same way"),
    "other weights": (lambda t: t["network.backbone.0.weight"].neg_(), "not computed in the same"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_refused(saved, case):
    change, match = TENSORS[case]
    edit_tensors(saved, change)
    with pytest.raises(ModelFileError, match=match) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


DEEP = b'{"format": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TEXTS = {
    "empty": (b"", "not the JSON"),
    "list": (b"[]", "holds a list where an object belongs"),
    "deep": (DEEP, "nested too deeply"),
    "NaN": (b'{"version": NaN}', "NaN is no finite number"),
    "infinity": (b'{"version": -Infinity}', "no finite number"),
    "too large a number": (b'{"version": 1e999}', "1e999 is no finite number"),
    "too long a number": (b'{"version": ' + b"9" * 10**6 + b"}", "an integer of 1000000 digits"),
    "duplicate": (b'{"version": 1, "version": 2}', "the key 'version' stands in it twice"),
    "nested duplicate": (b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' stands in it twice"),
    "not UTF-8": (b'{"version": "\xff"}', "not the JSON"),
    "a pickle": (pickle.dumps({"version": 1}), "not the JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_json_of_a_model_is_refused(saved, case):
    text, match = TEXTS[case]
    (saved / "model.json").write_bytes(text)
    with pytest.raises(ModelFileError, match=match):
        load(saved)


def safetensors_file(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2)
FILES = {
    "empty": b"",
    "short": b"\x01\x00",
    "length alone": safetensors_file(b"", length=10**6),
    "header length lies": safetensors_file({"a": ENTRY}, bytes(8), length=2**63),
    "header length short": safetensors_file({"a": ENTRY}, bytes(8), length=5),
    "data missing": safetensors_file({"a": ENTRY}, bytes(4)),
    "data too many": safetensors_file({"a": ENTRY}, bytes(99)),
    "huge": safetensors_file({"a": HUGE}, bytes(8)),
    "overlap": safetensors_file({"a": ENTRY, "b": ENTRY}, bytes(8)),
    "offsets backwards": safetensors_file({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
    "negative": safetensors_file({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
    "type": safetensors_file({"a": ENTRY | {"dtype": "OBJECT"}}, bytes(8)),
    "duplicate": safetensors_file(TWICE, bytes(8)),
    "deep": safetensors_file(DEEP),
    "list": safetensors_file([]),
    "pickle": pickle.dumps({"network.owner": [0]}),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_no_tensors_are_refused(saved, case):
    (saved / "tensors.safetensors").write_bytes(FILES[case])
    with pytest.raises(ModelFileError, match=r"tensors\.safetensors"):
        load(saved)


def test_a_file_of_torch_is_no_file_of_tensors(saved):
    torch.save({"network.owner": torch.ones(3)}, saved / "tensors.safetensors")
    with pytest.raises(ModelFileError, match=r"tensors\.safetensors"):
        load(saved)


@pytest.mark.parametrize("name", ["model.json", "tensors.safetensors"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (os.remove, "is not there"),
        (make_folder, "no regular file"),
        (make_pipe, "no regular file"),
        (make_link, "no regular file"),
        (lambda file: cut(file, 3), None),
        (lambda file: cut(file, file.stat().st_size // 2), None),
    ],
)
def test_files_that_are_none_are_refused(saved, name, damage, match):
    damage(saved / name)
    if damage is make_link:
        assert (saved / name).is_symlink()
    with pytest.raises(ModelFileError, match=match) as caught:
        load(saved)
    assert name in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    for folder in (tmp_path / "none", f"{tmp_path}/no\0name", Path(__file__)):
        with pytest.raises(ModelFileError, match=r"model\.json"):
            load(folder)


def test_lies_about_sizes_take_neither_time_nor_memory(saved):
    """A file with a hole says that it has 40 GB; the JSON asks for the largest of backbones."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux

    before, start = peak(), time.perf_counter()
    entry = {"dtype": "F32", "shape": [100_000, 100_000], "data_offsets": [0, 4 * 10**10]}
    file = saved / "tensors.safetensors"
    whole = file.read_bytes()
    file.write_bytes(safetensors_file({"network.prototypes": entry}))
    os.truncate(file, file.stat().st_size + 4 * 10**10)
    with pytest.raises(ModelFileError, match=r"lacks tensors|can be read"):
        load(saved)
    file.write_bytes(whole)
    edit_json(saved, put("network", "backbone", "regnet_y_128gf"))
    with pytest.raises(ModelFileError, match="lacks tensors"):
        ProtoPNetClassifier.load(saved)
    os.truncate(saved / "model.json", 10**10)
    with pytest.raises(ModelFileError, match="at most"):
        load(saved)
    assert peak() - before < 300
    assert time.perf_counter() - start < 20


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.nbytes for t in [made] if isinstance(t, torch.Tensor))])
        return made


def test_a_probe_takes_no_more_memory_than_an_image(clf):
    side = 600
    steps = torch.arange(3 * side**2, dtype=torch.float64) * 0.6180339887498949
    pattern = (2 * (steps % 1) - 1).float().view(1, 3, side, side)
    with Largest() as largest:
        found = probe(clf.module_, side)
    assert largest.nbytes == pattern.nbytes
    with torch.no_grad():
        assert torch.equal(found, clf.module_.backbone(pattern).mean(dim=(2, 3))[0])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_a_network_for_which_memory_lacks_is_refused(saved, monkeypatch, error):
    def lacks(*_):
        raise error

    monkeypatch.setattr("protoclf.persistence.probe", lacks)
    with pytest.raises(ModelFileError, match=r"model\.json' has a network that cannot be run here"):
        load(saved)


def test_a_timeout_of_processes_that_there_are_is_kept(saved):
    workers = {"iterator_valid__timeout": 9, "iterator_valid__num_workers": 1}
    edit_json(saved, lambda content: content["parameters"].update(workers))
    assert workers.items() <= load(saved).get_params().items()


def test_another_backbone_than_the_one_saved(master):
    with pytest.raises(ModelFileError, match=r"has a backbone of its own.*backbone=module"):
        ProtoPNetClassifier.load(master)
    with pytest.raises(TypeError, match=r"must be the nn\.Module that was fitted"):
        load(master, backbone="small_cnn")
    with pytest.raises(ModelFileError, match="its layer '1' is ReLU, and Tanh in the one given"):
        load(master, backbone=nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), *own_module()[2:]))
    with pytest.raises(ModelFileError, match=r"backbone\.2\.weight.*must be float32 of shape"):
        load(master, backbone=nn.Sequential(*own_module()[:2], nn.Conv2d(8, 9, 2, 2), nn.ReLU()))
    with pytest.raises(ModelFileError, match="not computed in the same way"):
        load(master, backbone=own_module(stride=1))
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        load(master, backbone=own_module().double())


def test_a_backbone_set_since_the_fit_is_not_saved(images, tmp_path):
    clf = classifier(joint_epochs=0).fit(*images).set_params(backbone="small_cnn")
    with pytest.raises(ValueError, match="backbone was set to another"):
        clf.save(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_broken_classifier_is_not_saved(clf, tmp_path):
    broken = pickle.loads(pickle.dumps(clf))
    with torch.no_grad():
        broken.module_.prototypes[0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in network\.prototypes"):
        broken.save(tmp_path / "model")
    with pytest.raises(ValueError, match="lambda_clst must be"):
        pickle.loads(pickle.dumps(clf)).set_params(lambda_clst=-1).save(tmp_path / "model")
    large = pickle.loads(pickle.dumps(clf))
    large.preprocessing_ = Preprocessing(4097)
    with pytest.raises(ValueError, match="image_size of 4096 at most, and this one has 4097"):
        large.save(tmp_path / "model")
    with pytest.raises(NotFittedError):
        classifier().save(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_loading_runs_no_code(saved, monkeypatch):
    def run(*_, **__):
        raise AssertionError("code was run")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "builtins.eval"):
        monkeypatch.setattr(place, run)
    load(saved)


# Damage at random -------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=120,
    deadline=10_000,  # milliseconds
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
KEYS = st.sampled_from(["$tuple", "$dict", "$float", "$path", "a"])
ODD = ["../../etc/passwd", "os.system", "$dict", "inf", "resnet18", 2**62, -1]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)


def loads_or_is_refused(folder, X):
    """Load and use it: it is refused, works, or names the images that its numbers overflow at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load(folder)
        except ModelFileError:
            return
        for answer in (loaded.explain, loaded.predict):
            with contextlib.suppress(FloatingPointError):
                answer(X[:2])
        loaded.source_image(0)
        repr(loaded)


@FUZZ
@given(data=st.data())
def test_damaged_bytes_crash_nothing(saved, master, images, data):
    name = data.draw(st.sampled_from(["model.json", "tensors.safetensors"]))
    whole = (master / name).read_bytes()
    place = st.integers(0, min(len(whole), 3000) - 1) | st.integers(0, len(whole) - 1)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(place)] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(whole)) | place)
    (saved / name).write_bytes(bytes(damaged[:end]))
    try:
        loads_or_is_refused(saved, images[0])
    finally:
        (saved / name).write_bytes(whole)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_damaged_json_crashes_nothing(saved, master, images, data):
    content = json.loads((master / "model.json").read_text())
    holder, name, place = content, data.draw(st.sampled_from(sorted(content))), None
    place = content[name]
    while isinstance(place, dict | list) and len(place) and data.draw(st.integers(0, 3)):
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        holder, name = place, data.draw(st.sampled_from(keys))
        place = holder[name]
    if isinstance(holder, dict) and data.draw(st.integers(0, 9)) == 0:
        del holder[name]
    else:
        holder[name] = data.draw(ANYTHING)
    (saved / "model.json").write_text(json.dumps(content))
    loads_or_is_refused(saved, images[0])


NUMBERS = st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1.0, 1e30, -1e30, 2.0**40])
TYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16])


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_damaged_tensors_crash_nothing(saved, master, images, data):
    file = master / "tensors.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = data.draw(st.sampled_from(["value", "type", "shape", "values"]))
    if kind == "value":
        number = data.draw(NUMBERS)
        if not tensor.is_floating_point():
            number = int(np.clip(np.nan_to_num(number), 0, torch.iinfo(tensor.dtype).max // 2))
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = number
    elif kind == "type":
        tensors[name] = tensor.to(data.draw(TYPES))
    elif kind == "shape":
        lengths = data.draw(st.lists(st.integers(0, 7), max_size=5))
        tensors[name] = torch.ones(lengths, dtype=tensor.dtype)
    else:
        tensors[name] = torch.full_like(tensor, data.draw(st.sampled_from([0, 1, 3, 100])))
    (saved / "tensors.safetensors").write_bytes(safetensors.torch.save(tensors))
    loads_or_is_refused(saved, images[0])


@settings(max_examples=300)
@given(value=ANYTHING)
def test_values_are_decoded_or_refused(value):
    with contextlib.suppress(ValueError):
        decode(value)


# Writing ----------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_an_existing_folder_is_left_alone(clf, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        clf.save(tmp_path / "model")
    clf.save(tmp_path / "model", overwrite=True)  # of an empty one nothing is lost
    with pytest.raises(FileExistsError, match="overwrite=True"):
        clf.save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no folder"):
        clf.save(tmp_path / "not there" / "model")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "thumbnails/portrait.jpg", "thumbnails/12.jpg/x", ".git/config"]
)
def test_what_is_no_saved_model_is_never_replaced(clf, tmp_path, name):
    folder = clf.save(tmp_path / "model")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(tmp_path)
    for target in (folder, folder / name, folder.parent):
        with pytest.raises(FileExistsError, match="is not replaced"):
            clf.save(target, overwrite=True)
    assert contents(tmp_path) == before
    load(folder)  # a model with a note beside it is one


OTHERS = {
    "other JSON": {"model.json": '{"format": "mine"}', "thumbnails/1.jpg": "mine"},
    "no JSON": {"model.json": "mine"},
    "a folder as JSON": {"model.json/important.txt": "mine"},
    "no description": {"tensors.safetensors": "mine"},
    "a file as thumbnails": {"model.json": '{"format": "protoclf model"}', "thumbnails": "mine"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_that_only_looks_like_a_saved_model_is_never_replaced(clf, tmp_path, case):
    for name, text in OTHERS[case].items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="is not replaced"):
        clf.save(tmp_path / "mine", overwrite=True)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["mine"]


def test_the_working_folder_is_never_replaced(clf, tmp_path, monkeypatch):
    folder = clf.save(tmp_path / "model")
    monkeypatch.chdir(folder)
    with pytest.raises(FileExistsError, match="is the working folder of this process"):
        clf.save(".", overwrite=True)
    clf.save(tmp_path / "other")
    assert sorted(os.listdir(".")) == ["model.json", "tensors.safetensors"]


def test_a_model_is_replaced_whole(clf, images, tmp_path):
    folder = clf.save(tmp_path / "model", thumbnails=16)
    other = classifier(random_state=1, similarity="log").fit(*images)
    (tmp_path / "link").symlink_to("model")
    other.save(tmp_path / "link", overwrite=True)
    same(other, load(folder), images[0])
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]
    assert sorted(os.listdir(folder)) == ["model.json", "tensors.safetensors"]
    assert (tmp_path / "link").is_symlink()


def save_before(monkeypatch, reading, models, folder, **options):
    """Have a function that reads find the folder replaced: by one model each time, while any."""
    models, read = list(models), getattr(saved_model, reading)

    def replaced(*args):
        if models:
            models.pop().save(folder, overwrite=True, **options)
        return read(*args)

    monkeypatch.setattr(saved_model, reading, replaced)


@pytest.mark.parametrize("thumbnails", [None, 16])
def test_a_model_that_is_replaced_while_it_is_read_is_read_again(
    clf, images, tmp_path, monkeypatch, thumbnails
):
    other = classifier(random_state=1, prototypes_per_class=1).fit(*images)
    folder = clf.save(tmp_path / "model", thumbnails=16)
    for models in ([other], [clf, other, clf]):
        save_before(monkeypatch, "read_tensors", models, folder, thumbnails=thumbnails)
        loaded = load(folder)
        np.testing.assert_array_equal(loaded.coef_, models[0].coef_)
        assert loaded.prototypes_["source"].tolist() == models[0].prototypes_["source"].tolist()


def test_a_model_that_is_replaced_all_the_time_is_refused(clf, tmp_path, monkeypatch):
    folder = clf.save(tmp_path / "model")
    save_before(monkeypatch, "read_tensors", [clf] * 10, folder)
    with pytest.raises(ModelFileError, match="saved anew each time that it is read"):
        load(folder)
    load(folder)


def test_a_model_is_waited_for_between_two_renames(clf, tmp_path, monkeypatch):
    folder = clf.save(tmp_path / "model")
    folder.rename(tmp_path / "former")
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "former").rename(folder))
    load(folder)


@pytest.mark.parametrize(
    ("function", "call", "older_stays"),
    [("rename", 1, True), ("rename", 2, False), ("unlink", 1, False)],  # of the older one's files
)
def test_ctrl_c_behind_a_call_leaves_one_model_whole_and_nothing_else(
    clf, tmp_path, monkeypatch, function, call, older_stays
):
    folder = clf.save(tmp_path / "model", thumbnails=16)
    before, calls, real = contents(tmp_path), [], getattr(os, function)

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        clf.save(folder, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    load(folder)
    assert (contents(tmp_path) == before) == older_stays


@pytest.mark.parametrize(
    ("function", "call"),
    [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 5), ("rename", 1), ("rename", 2)],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_older_one(
    clf, tmp_path, monkeypatch, function, call, error
):
    folder = clf.save(tmp_path / "model", thumbnails=16)
    before, calls, real = contents(tmp_path), [], getattr(os, function)

    def fails_once(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(os, function, fails_once)
    named = (
        re.escape(f"No space left on device: '{folder}'") if isinstance(error, OSError) else None
    )
    with pytest.raises(type(error), match=named):
        clf.save(folder, thumbnails=32, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["model"]
    load(folder)


def test_files_may_be_read_by_whom_the_process_allows(clf, tmp_path):
    old = os.umask(0o027)
    try:
        folder = clf.save(tmp_path / "model", thumbnails=16)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o640}


def test_a_long_history_loses_its_batches(clf, tmp_path, monkeypatch):
    monkeypatch.setattr("protoclf.persistence.MOST_JSON", 1000)
    with pytest.warns(UserWarning, match="the batches in history"):
        loaded = load(clf.save(tmp_path / "model"))
    assert loaded.history[:, "train_loss"] == clf.history[:, "train_loss"]
    assert [row["batches"] for row in loaded.history.to_list()] == [[]] * len(clf.history)


def test_json_has_a_line_for_each_field(master):
    text = (master / "model.json").read_text()
    assert text == as_json(json.loads(text)).decode()
    assert len(text.splitlines()) == len(json.loads(text)) + 2


# Versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", range(1, saved_model.VERSION + 1))
def test_a_model_of_each_version_loads(version):
    made = runpy.run_path(str(DATA / "make_saved_model.py"))
    expected = json.loads((DATA / f"saved_model_{version}_expected.json").read_text())
    folder = DATA / f"saved_model_{version}"
    clf = ProtoPNetClassifier.load(folder, backbone=made["tiny_backbone"](), device="cpu")
    assert clf.lambda_l2 == (0 if version < 3 else "auto")
    X, y = made["drawn_images"]()
    logits = np.array(expected["logits"])
    np.testing.assert_allclose(clf.decision_function(X), logits[:, 1] - logits[:, 0], atol=1e-4)
    sheet = clf.explain(X, classes=clf.classes_)
    found = sheet.pivot_table(index="sample", columns="class", values="contribution", aggfunc="sum")
    np.testing.assert_allclose(found.to_numpy(), logits, atol=1e-4)
    assert clf.predict(X).tolist() == expected["classes"] == y.tolist()
    assert clf.explain(X)[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == expected["boxes"]
    for j, row in clf.prototypes_.iterrows():
        source, original = clf.source_image(j), X[row["source_index"]]
        assert source.shape == original.shape
        assert np.abs(source.astype(int) - original).mean() < 40
    assert len(clf.last_layer_path_) == 9
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 300_000


def test_older_versions_are_brought_up_to_date(saved, monkeypatch):
    def rename(content, tensors):
        content["fit"]["seed"] = content["fit"].pop("random_seed")
        tensors["probe"] = tensors.pop("check")

    edit_json(saved, lambda c: c["fit"].update(random_seed=c["fit"].pop("seed")))
    edit_tensors(saved, lambda t: t.update(check=t.pop("probe")))
    monkeypatch.setattr(saved_model, "VERSION", 5)
    monkeypatch.setattr(saved_model, "MIGRATIONS", {3: rename, 4: lambda *_: None})
    load(saved)
    edit_json(saved, lambda c: c["fit"].pop("random_seed"))
    with pytest.raises(ModelFileError, match="is no model of version 3"):
        load(saved)
