"""Backbone features that fits share: found by contents, never stale, never a change of result."""

import os
import shutil
from pathlib import Path

import joblib
import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from protoclf import ProtoPNetClassifier, image_dataset
from protoclf.backbones import SmallCNN
from protoclf.editing import remove
from protoclf.feature_cache import fingerprint
from protoclf.geometry import Preprocessing
from protoclf.network import ProtoPNet
from protoclf.recent import recent_tensors


def backbone():
    torch.manual_seed(3)
    return SmallCNN(16)


def frozen(memory, **parameters):
    settings = {"image_size": 48, "prototypes_per_class": 2, "batch_size": 8, "verbose": 0}
    settings |= {"train_backbone": False, "memory": memory, "random_state": 0}
    return ProtoPNetClassifier(backbone(), **settings | parameters)


def test_results_are_those_without_memory(files, tmp_path):
    X, y = files
    plain, first, second = (frozen(m).fit(X, y) for m in (None, tmp_path / "m", tmp_path / "m"))
    for clf in (first, second):
        np.testing.assert_array_equal(clf.decision_function(X), plain.decision_function(X))
        assert clf.prototypes_.equals(plain.prototypes_)
        assert clf.explain(X).equals(plain.explain(X))


@pytest.mark.parametrize("kind", ["path", "joblib"])
def test_the_backbone_sees_each_image_once(files, tmp_path, backbone_images, kind):
    X, y = files
    folder = tmp_path / "m"
    memory = folder if kind == "path" else joblib.Memory(folder, verbose=0)
    clf = frozen(memory).fit(X[:16], y[:16])
    assert sum(backbone_images) == 16
    clf.predict(X)
    assert sum(backbone_images) == len(X)  # and the other half once
    grid = {"lambda_l1": [1e-3, 1e-2], "prototypes_per_class": [1, 2]}
    GridSearchCV(clone(clf), grid, cv=2).fit(X, y).predict(X)
    assert sum(backbone_images) == len(X)
    clf.explain(X)
    clf.similarity_maps(X)
    clf.transform(X)
    assert sum(backbone_images) == len(X)


def test_a_file_that_changes_is_seen_anew(files, tmp_path, backbone_images):
    X, y = files
    clf = frozen(tmp_path / "m").fit(X, y)
    before = clf.decision_function(X)
    shutil.copy(X[0], tmp_path / "kept.png")
    shutil.copy(X[1], X[0])  # another picture under the same name
    after = clf.decision_function(X)
    assert sum(backbone_images) == len(X)  # its contents are known, under the other name
    np.testing.assert_array_equal(after[0], before[1])
    PIL.Image.fromarray(np.full((40, 60, 3), 9, np.uint8)).save(X[0])
    assert not np.array_equal(clf.decision_function(X)[0], before[1])
    assert sum(backbone_images) == len(X) + 1


@pytest.mark.parametrize("given", [{}, {"on_bad_image": "skip"}])
def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(files, tmp_path, monkeypatch, given):
    X, y = files
    clf = frozen(tmp_path / "m", **given).fit(X, y)
    shutil.rmtree(tmp_path / "m")
    recent_tensors.clear()
    file, decode = Path(X[0]), image_dataset.decode
    first = file.read_bytes()

    def replacing(*args, **kwargs):
        if not given:  # the digest is from before
            PIL.Image.fromarray(np.full((40, 60, 3), 9, np.uint8)).save(file)
        decoded = decode(*args, **kwargs)
        PIL.Image.fromarray(np.full((40, 60, 3), 9, np.uint8)).save(file)
        return decoded

    with monkeypatch.context() as patched:
        patched.setattr(image_dataset, "decode", replacing)
        if given:  # which decodes first of all
            with pytest.warns(UserWarning, match="was changed"):
                clone(clf).fit(X, y)
        else:
            clf.decision_function(X[:2])
            file.write_bytes(first)
    recent_tensors.clear()
    again = clf.decision_function(X[:1])  # of the picture that is there now
    expected = clf.set_params(memory=None).decision_function(X[:1])
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_arrays_and_pictures_are_known_by_their_pixels(squares, tmp_path, backbone_images):
    X, y = squares
    clf = frozen(tmp_path / "m").fit(X, y)
    clf.predict(X.copy())
    assert sum(backbone_images) == len(X)
    clf.predict(255 - X)
    clf.predict([PIL.Image.fromarray(pixels) for pixels in X])  # another form, another key
    assert sum(backbone_images) == 3 * len(X)


@pytest.fixture
def compared(monkeypatch):
    """How many images were compared with prototypes, batch by batch."""
    sizes, nearest = [], ProtoPNet.nearest

    def counting(self, z):
        sizes.append(len(z))
        return nearest(self, z)

    monkeypatch.setattr(ProtoPNet, "nearest", counting)
    return sizes


def test_images_are_compared_once_with_the_same_prototypes(files, tmp_path, compared):
    X, y = files
    plain = frozen(None).fit(X, y)
    expected, similarities = plain.decision_function(X), plain.transform(X)
    clf = frozen(tmp_path / "m").fit(X, y)
    compared.clear()
    np.testing.assert_array_equal(clf.decision_function(X), expected)
    for _ in range(2):
        np.testing.assert_array_equal(clf.decision_function(X), expected)
        np.testing.assert_array_equal(clf.transform(X), similarities)
    sparser = clone(clf).set_params(lambda_l1=0.05).fit(X, y)  # start and projection are known
    assert not np.array_equal(sparser.decision_function(X), expected)
    assert sum(compared) == len(X)


def test_other_prototypes_and_other_images_are_compared_anew(files, tmp_path, compared):
    X, y = files
    clf = frozen(tmp_path / "m").fit(X, y)
    similarities = clf.transform(X)
    fewer = remove(clf, [1])
    compared.clear()
    np.testing.assert_allclose(
        fewer.transform(X), np.delete(similarities, 1, axis=1), rtol=0, atol=1e-6
    )
    assert sum(compared) == len(X)
    compared.clear()
    PIL.Image.fromarray(np.full((40, 60, 3), 9, np.uint8)).save(X[0])
    assert not np.allclose(clf.transform(X)[0], similarities[0])
    assert sum(compared) == 8  # the batch that the image is in
    np.testing.assert_array_equal(clf.transform(X)[1:], similarities[1:])


def test_what_add_on_layers_do_is_seen(files, tmp_path):
    X, y = files
    clf = frozen(tmp_path / "m").fit(X, y)
    similarities = clf.transform(X)
    hook = clf.module_.add_on.register_forward_hook(lambda module, args, z: -z)
    assert not np.allclose(clf.transform(X), similarities)
    hook.remove()
    np.testing.assert_array_equal(clf.transform(X), similarities)
    clf.module_.add_on[-1] = nn.Identity()
    assert not np.allclose(clf.transform(X), similarities)


def test_what_cannot_be_read_has_no_similarity_a_second_time(files, tmp_path):
    X, y = files
    clf = frozen(tmp_path / "m", on_bad_image="skip").fit(X, y)
    whole = Path(X[0]).read_bytes()
    Path(X[0]).write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        assert np.isnan(clf.transform(X)[:, 0]).nonzero()[0].tolist() == [0]
    Path(X[0]).write_bytes(whole)
    assert not np.isnan(clf.transform(X)).any()


def test_a_trained_backbone_keeps_nothing(files, tmp_path, backbone_images):
    X, y = files
    clf = frozen(tmp_path / "m", train_backbone=True, joint_epochs=1).fit(X, y)
    kept = len(list((tmp_path / "m").rglob("*.npy")))
    assert kept == len(X)  # for its start, from the backbone as given
    clf.predict(X)
    assert len(list((tmp_path / "m").rglob("*.npy"))) == kept


def test_damage_costs_time_alone(files, tmp_path, backbone_images):
    X, y = files
    clf = frozen(tmp_path / "m").fit(X, y)
    expected = clf.decision_function(X)
    for i, file in enumerate(sorted((tmp_path / "m").rglob("*.npy"))):
        if i % 2:
            file.write_bytes(b"")
    recent_tensors.clear()
    np.testing.assert_allclose(clf.decision_function(X), expected, atol=1e-4)
    assert sum(backbone_images) == len(X) + len(X) // 2


def test_bfloat16_features_are_kept_as_they_are(files, tmp_path):
    X, y = files
    plain = frozen(None, precision="bfloat16").fit(X, y)
    clf = frozen(tmp_path / "m", precision="bfloat16").fit(X, y)
    np.testing.assert_array_equal(clf.decision_function(X), plain.decision_function(X))
    (file, *_) = (tmp_path / "m").rglob("*.npy")
    assert np.load(file).dtype == np.uint16


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return 2 * self.conv(x)


class Doubled(Scaled):
    def forward(self, x):
        return 3 * self.conv(x)


def module_of(backbone, normalization=((0.5,) * 3, (0.2,) * 3)):
    from protoclf.network import PrototypeSpec

    spec = PrototypeSpec([0, 1], 2, (1, 1), "cosine")
    return ProtoPNet(backbone, 4, spec, None, normalization)


def test_the_fingerprint_covers_whatever_features_depend_on():
    torch.manual_seed(0)
    base = module_of(Scaled())
    prints = {fingerprint(base, Preprocessing(16))}
    assert fingerprint(base, Preprocessing(16)) in prints
    prints.add(fingerprint(base, Preprocessing(17)))
    prints.add(fingerprint(base, Preprocessing(16, "squash")))
    other = Doubled()
    other.load_state_dict(base.backbone.state_dict())
    prints.add(fingerprint(module_of(other), Preprocessing(16)))  # the same weights
    prints.add(fingerprint(module_of(base.backbone, ((0.5,) * 3, (0.3,) * 3)), Preprocessing(16)))
    base.half_precision = True
    prints.add(fingerprint(base, Preprocessing(16)))
    base.half_precision = False
    with torch.no_grad():
        base.backbone.conv.weight[0, 0, 0, 0] += 1e-6
    prints.add(fingerprint(base, Preprocessing(16)))
    assert len(prints) == 7


def test_a_class_without_source_is_known_by_its_code():
    def made(factor):
        space = {"nn": nn, "Scaled": Scaled}
        code = (
            f"class Own(Scaled):\n    def forward(self, x):\n        return {factor} * self.conv(x)"
        )
        exec(code, space)
        torch.manual_seed(0)
        return fingerprint(module_of(space["Own"]()), Preprocessing(16))

    assert made(2) == made(2)
    assert made(2) != made(5)


def test_missing_files_are_named_at_once(files, tmp_path):
    X, y = files
    X = X.copy()
    X[3], X[7] = "gone.png", "lost.png"
    with pytest.raises(ValueError, match=r"2 image\(s\) of X cannot be read"):
        frozen(tmp_path / "m").fit(X, y)


@pytest.mark.timeout(60)
def test_what_is_no_file_is_refused_without_reading_it(files, tmp_path):
    X, y = files
    X = X.copy()
    X[3] = str(tmp_path / "pipe")
    os.mkfifo(X[3])  # to read from it would take for ever
    with pytest.raises(ValueError, match="not a regular file"):
        frozen(tmp_path / "m").fit(X, y)


def test_files_are_checked_once_for_what_they_hold(files, tmp_path, monkeypatch):
    X, y = files
    for file in X:  # unlike those of other tests, which this process has seen
        with open(file, "ab") as end:
            end.write(os.urandom(8))
    checked, check = [], image_dataset.check_files

    def noting(images, **kwargs):
        checked.append(len(images))
        check(images, **kwargs)

    monkeypatch.setattr(image_dataset, "check_files", noting)
    for _ in range(2):
        frozen(tmp_path / "m").fit(X, y)
        assert checked == [24]
    with open(X[0], "wb") as file:
        file.write(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 image\(s\) of X cannot be read"):
            frozen(tmp_path / "m").fit(X, y)
    assert checked == [24, 24, 24]
