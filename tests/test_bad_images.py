"""Images that cannot be read, that change or vanish; and numbers that are none."""

import copy
import os

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback
from torch import nn

from protoclf import ImageError, ProtoPNetClassifier, ProtoPNetEnsemble
from protoclf.editing import forbid, remove
from protoclf.explanation import UNREADABLE

BAD = [3, 10, 11]


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """Paths of 24 squares."""
    folder = tmp_path_factory.mktemp("예쁜 사진")
    paths = [str(folder / f"{i}.png") for i in range(len(squares[0]))]
    for pixels, path in zip(squares[0], paths, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory):
    """The same, of which one file is cut, one is text and one is not there."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = [str(folder / f"{i}.png") for i in range(len(whole))]
    for source, path in zip(whole, paths, strict=True):
        with open(source, "rb") as file:
            content = file.read()
        if source == whole[BAD[0]]:
            content = content[: len(content) // 2]
        elif source == whole[BAD[1]]:
            content = b"no picture"
        elif source == whole[BAD[2]]:
            continue
        with open(path, "wb") as file:
            file.write(content)
    return paths


def small(**given):
    settings = {
        "image_size": 32,
        "prototypes_per_class": 2,
        "joint_epochs": 1,
        "batch_size": 5,
        "random_state": 0,
        "verbose": 0,
        "on_bad_image": "skip",
    }
    return ProtoPNetClassifier("small_cnn", **settings | given)


def without(values):
    return np.delete(np.asarray(values), BAD, axis=0)


FROZEN = {"train_backbone": False}


@pytest.mark.parametrize("given", [{}, FROZEN, FROZEN | {"memory": True}])
def test_a_fit_that_skips_is_one_of_the_images_that_are_left(
    whole, damaged, squares, tmp_path, given
):
    if "memory" in given:
        given = given | {"memory": tmp_path}
    y, weight, groups = squares[1], np.linspace(1, 2, 24), np.arange(24) // 2
    clf = small(**given).fit(damaged, y, sample_weight=weight, groups=groups)
    skipped = clf.skipped_
    assert skipped["position"].tolist() == BAD
    assert skipped["path"].tolist() == [damaged[i] for i in BAD]
    assert all(skipped["reason"])
    expected = clone(clf).set_params(on_bad_image="raise")
    expected.fit(without(damaged), without(y), without(weight), without(groups))
    left = np.delete(np.arange(24), BAD)
    for name, value in expected.module_.state_dict().items():
        assert torch.equal(clf.module_.state_dict()[name], value)
    table = expected.prototypes_.assign(source_index=left[expected.prototypes_["source_index"]])
    pd.testing.assert_frame_equal(clf.prototypes_, table)
    assert clone(clf).fit(whole, y).skipped_.empty


@pytest.fixture(scope="module")
def fitted_to_skip(whole, squares):
    return small().fit(whole, squares[1])


def test_rows_without_an_answer(fitted_to_skip, whole, damaged):
    clf, good = fitted_to_skip, np.delete(np.arange(24), BAD)
    predicted = clf.predict(damaged)
    assert [predicted[i] for i in BAD] == [None] * 3
    assert np.array_equal(predicted[good], clf.predict(whole)[good])
    for method in (clf.predict_proba, clf.decision_function, clf.transform):
        found, expected = method(damaged), method(whole)
        assert np.isnan(found[BAD]).all()
        assert np.array_equal(found[good], expected[good])


def test_loaders_with_workers_note_them_too(fitted_to_skip, damaged):
    clf = copy.deepcopy(fitted_to_skip)
    clf.set_params(iterator_valid__num_workers=1, iterator_valid__persistent_workers=True)
    expected = fitted_to_skip.predict(damaged[:5])
    assert expected[BAD[0]] is None
    assert clf.predict(damaged[:5]).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"classes": "all"}, {"classes": "top2"}])
def test_a_sheet_has_one_row_for_an_image_without_an_answer(
    fitted_to_skip, whole, damaged, options
):
    sheet = fitted_to_skip.explain(damaged, **options)
    rows = sheet[sheet["sample"].isin(BAD)]
    assert rows["sample"].tolist() == BAD
    assert rows["path"].tolist() == [damaged[i] for i in BAD]
    assert (rows["source"] == UNREADABLE).all()
    assert rows.drop(columns=["sample", "path", "source"]).isna().all(axis=None)
    expected = fitted_to_skip.explain(whole, **options)
    others = sheet[~sheet["sample"].isin(BAD)].reset_index(drop=True)
    expected = expected[~expected["sample"].isin(BAD)].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        others.drop(columns="path"), expected.drop(columns="path"), check_dtype=False
    )
    assert sheet["sample"].is_monotonic_increasing
    totals = sheet.groupby(["sample", "class"])["contribution"].sum()
    logits = sheet.groupby(["sample", "class"])["logit"].first()
    assert np.allclose(totals.to_numpy(float), logits.to_numpy(float), atol=1e-4)


def test_gradient_boxes_beside_an_image_without_an_answer(fitted_to_skip, damaged):
    sheet = fitted_to_skip.explain(damaged[2:4], top=1, attribution="gradient")
    assert sheet["x0"].notna().any()
    assert sheet.loc[sheet["sample"] == 1, "x0"].isna().all()


def test_an_ensemble_gives_no_answer_either(whole, damaged, squares):
    ensemble = ProtoPNetEnsemble([("a", small(**FROZEN)), ("b", small(**FROZEN))], verbose=0)
    ensemble.fit(whole, squares[1])
    assert pd.isna(ensemble.predict(damaged)[BAD]).all()
    assert np.isnan(ensemble.predict_proba(damaged)[BAD]).all()


@pytest.mark.parametrize("top", [None, 1])
def test_a_sheet_of_an_ensemble_has_their_rows_too(whole, damaged, squares, top):
    ensemble = ProtoPNetEnsemble([("a", small(**FROZEN)), ("b", small(**FROZEN))], verbose=0)
    sheet = ensemble.fit(whole, squares[1]).explain(damaged, top=top)
    rows = sheet[sheet["sample"].isin(BAD)]
    assert rows["sample"].tolist() == sorted(BAD)
    assert (rows["source"] == UNREADABLE).all()
    nothing = ["class", "is_predicted", "rank", "logit", "prototype", "member"]
    assert rows[nothing].isna().all(axis=None)
    assert sheet["rank"].dtype == "Int64"
    assert set(sheet["sample"]) == set(range(24))


def test_an_ensemble_of_members_that_skip_skips(damaged, squares):
    ensemble = ProtoPNetEnsemble([("a", small(**FROZEN)), ("b", small(**FROZEN))], verbose=0)
    ensemble.fit(damaged, squares[1])
    assert [member.skipped_["position"].tolist() for member in ensemble.estimators_] == [BAD, BAD]
    with pytest.warns(UserWarning, match="leaves out 3 of 24 images"):
        ensemble.score(damaged, squares[1])
    ensemble.set_params(b__on_bad_image="raise")
    with pytest.raises(ImageError):
        ensemble.fit(damaged, squares[1])


@pytest.mark.parametrize("labels", [np.arange(24) % 3, np.arange(24) % 2 == 0])
def test_labels_of_any_type_can_be_missing(whole, damaged, labels):
    clf = small(**FROZEN).fit(whole, labels)
    predicted = clf.predict(damaged)
    assert pd.isna(predicted).sum() == len(BAD)
    assert set(predicted[pd.notna(predicted)]) <= set(labels.tolist())
    assert clf.predict(whole).dtype == labels.dtype


def test_a_class_that_would_be_lost_is_an_error(damaged):
    y = np.repeat(["kept"], 24).astype(object)
    y[BAD] = "lost"
    with pytest.raises(ImageError, match=r"No image is left of \['lost'\]") as caught:
        small().fit(damaged, y)
    assert [failure.position for failure in caught.value.failures] == BAD


def test_nothing_of_a_bad_image_is_cached(damaged, squares, tmp_path, monkeypatch):
    clf = small(memory=tmp_path, **FROZEN).fit(damaged, squares[1])
    features = list(tmp_path.rglob("*.npy"))
    clf.predict(damaged)
    assert sorted(tmp_path.rglob("*.npy")) == sorted(features)
    assert len(features) == 24 - len(BAD)


def test_by_default_they_are_named(damaged, squares):
    with pytest.raises(ImageError, match=r"3 image\(s\) of X cannot be read"):
        small(on_bad_image="raise").fit(damaged, squares[1])
    with pytest.raises(ValueError, match="on_bad_image must be one of"):
        small(on_bad_image="ignore").fit(damaged, squares[1])


class During(Callback):
    """Does something in the first epoch."""

    def __init__(self, action):
        self.action = action

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 1:
            self.action()


def test_files_that_change_or_vanish_during_a_fit_are_noticed(squares, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(24)]
    for pixels, path in zip(squares[0], paths, strict=True):
        PIL.Image.fromarray(pixels).save(path)

    def change():
        os.remove(paths[4])
        PIL.Image.fromarray(squares[0][0][::2]).save(paths[5])

    clf = small(callbacks=[During(change)])
    with pytest.warns(UserWarning, match=r"4\.png' is gone, .*5\.png' was changed"):
        clf.fit(paths, squares[1])


# ---- numbers ------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A backbone whose answer to a bright image is not a number, once it is in training."""

    def __init__(self, always):
        super().__init__()
        self.convolution, self.always = nn.Conv2d(3, 4, 8, 8), always

    def forward(self, x):
        bright = (x.amax((1, 2, 3)) > 2.5)[:, None, None, None] & (self.training or self.always)
        return torch.where(bright, torch.nan, self.convolution(x))


@pytest.mark.parametrize("always", [True, False])
def test_what_is_not_a_number_stops_the_fit_and_names_the_images(squares, always, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(24)] + [str(tmp_path / "흰색.png")]
    white = np.full((40, 60, 3), 255, np.uint8)
    for pixels, path in zip([*squares[0] // 2, white], paths, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    clf = ProtoPNetClassifier(
        Broken(always),
        image_size=32,
        prototypes_per_class=1,
        joint_epochs=1,
        augmentation=None,
        batch_size=5,
        random_state=0,
        verbose=0,
    )
    said = "features are not finite" if always else "loss is nan in row 1 of the history, stage"
    with pytest.raises(FloatingPointError, match=said) as caught:
        clf.fit(paths, [*squares[1], "red"])
    assert "흰색.png" in str(caught.value)
    assert "Try lower learning rates" in str(caught.value)
    assert not hasattr(clf, "prototypes_")


class Huge(nn.Module):
    """A backbone whose features are finite, and whose squares are not."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return 1e25 * self.convolution(x)


@pytest.mark.parametrize("similarity", ["cosine", "log"])
def test_features_too_large_to_be_compared_stop_the_fit(squares, similarity):
    with pytest.raises(FloatingPointError, match="features are not finite, or their squares"):
        small(similarity=similarity, **FROZEN).set_params(backbone=Huge()).fit(*squares)


class BrokenLater(Broken):
    """Makes NaN of bright images once it is told to."""

    broken = False

    def forward(self, x):
        return super().forward(x) if self.broken else self.convolution(x)


@pytest.mark.parametrize("memory", [False, True])
def test_what_is_not_a_number_is_no_answer(squares, memory, tmp_path):
    clf = small(memory=str(tmp_path) if memory else None, **FROZEN)
    clf.set_params(backbone=BrokenLater(True))
    clf.fit(*squares)
    X = [*squares[0][:2] // 2, np.full((40, 60, 3), 255, np.uint8)]
    clf.predict(X[:2])
    clf.module_.backbone.broken = True
    clf.predict(X[:2])
    for ask in (
        clf.predict,
        clf.decision_function,
        clf.transform,
        clf.explain,
        clf.similarity_maps,
    ):
        with pytest.raises(FloatingPointError, match="NaN or infinity of the images 2,"):
            ask(X)


class Louder(nn.Module):
    """Multiplies its features once it is told to."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return self.factor * self.convolution(x)


@pytest.mark.parametrize("similarity", ["cosine", "log"])
def test_an_image_infinitely_far_from_all_prototypes_has_no_answer(squares, similarity):
    clf = small(similarity=similarity, **FROZEN).set_params(backbone=Louder()).fit(*squares)
    clf.module_.backbone.factor = 1e25
    for ask in (clf.predict, clf.explain):
        with pytest.raises(FloatingPointError, match="NaN or infinity of the images 0, 1,"):
            ask(squares[0][:2])


class OfContrast(nn.Module):
    """Makes NaN of images of one colour, such as what stands in for those that cannot be read."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        return self.convolution((x - mean) / std)


@pytest.mark.filterwarnings("ignore:The score leaves out")
def test_what_stands_in_for_an_unreadable_image_may_be_anything(whole, damaged, squares):
    clf = small(**FROZEN).set_params(backbone=OfContrast()).fit(whole, squares[1])
    np.testing.assert_array_equal(without(clf.predict(damaged)), clf.predict(without(whole)))
    assert clf.score(damaged, squares[1]) == clf.score(without(whole), without(squares[1]))
    sheet = clf.explain(damaged)
    assert sheet.loc[sheet["source"] == "(unreadable)", "sample"].tolist() == list(BAD)
    with pytest.raises(FloatingPointError, match="NaN or infinity of the images 1,"):
        clf.predict([squares[0][0], np.full((40, 60, 3), 99, np.uint8)])


def test_nothing_is_forbidden_in_an_image_that_cannot_be_read(whole, damaged, squares):
    y = squares[1]
    clf = small(**FROZEN).set_params(backbone=OfContrast()).fit(whole, y)
    taught = forbid(clf, [0, 2, 4], damaged, y, k=24)
    alone = forbid(clf, [0, 2, 4], without(whole), without(y), k=24)
    assert torch.equal(taught.concepts_.images, alone.concepts_.images)


# ---- scores and last layers of the images that are left ------------------------------------------


def test_a_score_leaves_out_what_cannot_be_read(fitted_to_skip, whole, damaged, squares):
    clf, y, weight = fitted_to_skip, squares[1], np.linspace(1, 2, 24)
    with pytest.warns(UserWarning, match="The score leaves out 3 of 24 images"):
        score = clf.score(damaged, y, weight)
    assert score == pytest.approx(clf.score(without(whole), without(y), without(weight)))
    with pytest.raises(ValueError, match="None of the 3 images can be read"):
        clf.score([damaged[i] for i in BAD], y[BAD])


@pytest.mark.filterwarnings("ignore:The score leaves out")
def test_a_search_goes_over_images_that_cannot_be_read(damaged, squares):
    search = GridSearchCV(small(**FROZEN), {"lambda_l1": [1e-3, 1e-2]}, cv=3)
    search.fit(damaged, squares[1])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_a_last_layer_is_solved_on_what_can_be_read(whole, damaged, squares, class_weight):
    y, groups = squares[1], np.arange(24) // 2
    clf = small(class_weight=class_weight, **FROZEN).fit(whole, y)
    path = clf.last_layer_path(damaged, y, [1e-2, 1e-3], 2, groups=groups)
    expected = clf.last_layer_path(
        without(whole), without(y), [1e-2, 1e-3], 2, groups=without(groups)
    )
    numbers = expected.columns.drop("weight")
    pd.testing.assert_frame_equal(path[numbers], expected[numbers])
    edited = remove(clf, [0], X=damaged, y=y)
    expected = remove(clf, [0], X=without(whole), y=without(y)).coef_
    np.testing.assert_allclose(edited.coef_, expected, rtol=1e-6)
