"""The estimator: what holds for every fitted model, what X and y may be, and what is refused."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from enum import Enum
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import PredefinedSplit
from skorch.callbacks import Callback, EarlyStopping
from skorch.dataset import ValidSplit
from torch import nn
from torch.utils.data import Subset

from protoclf import ImageError, ProtoPNetClassifier
from protoclf.localization import upsample
from protoclf.metrics import sparsity
from protoclf.nearest_patches import nearest_patches
from protoclf.sheets import class_totals, compare

NAMES = np.array(["wren", "auk", "owl"])  # not sorted
SHAPE = 40, 48  # height and width of the pictures


def pictures(n_per_class=6, n_classes=3, seed=0):
    """Noise with a square in the colour of the class, somewhere."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n_per_class * n_classes) % n_classes
    X = rng.integers(0, 60, (len(codes), *SHAPE, 3), dtype=np.uint8)
    for image, c in zip(X, codes, strict=True):
        row, col = rng.integers(2, 26), rng.integers(6, 30)
        image[row : row + 12, col : col + 12, c] = 220
    return X, codes


def own_module():
    """A user's backbone, with batch normalisation; cells of 8 x 8 pixels."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 2, 2), nn.ReLU()
    )


def classifier(backbone="small_cnn", **parameters):
    settings = {
        "image_size": 32,
        "prototypes_per_class": 2,
        "warmup_epochs": 1,
        "joint_epochs": 1,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier(backbone, **{**settings, **parameters})


SETTINGS = {
    "small_cnn": {},
    "own_module": {
        "backbone": own_module(),
        "similarity": "log",
        "latent_dim": 8,
        "prototype_size": (2, 2),
        "lambda_l1": 1e-3,
    },
}
X, CODES = pictures()
Y = NAMES[CODES]
NEW_X, NEW_CODES = pictures(n_per_class=3, seed=1)


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def model(settings):
    """A model that tests read and never change."""
    return classifier(**settings).fit(X, Y)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The pictures of X as files; names hold spaces and Korean letters."""
    folder = tmp_path_factory.mktemp("새 사진")
    paths = [folder / f"까치 {i}.png" for i in range(len(X))]
    for path, image in zip(paths, X, strict=True):
        PIL.Image.fromarray(image).save(path)
    return [str(path) for path in paths]


def assert_same_model(one, other):
    ours, theirs = one.module_.state_dict(), other.module_.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pd.testing.assert_frame_equal(one.prototypes_, other.prototypes_)


def assert_same_answers(one, other, X=NEW_X):
    assert np.array_equal(one.predict(X), other.predict(X))
    for method in ("predict_proba", "decision_function", "transform"):
        assert np.array_equal(getattr(one, method)(X), getattr(other, method)(X))
    sheets = one.explain(X, classes="all"), other.explain(X, classes="all")
    pd.testing.assert_frame_equal(*sheets)


def sums(sheet, clf, n):
    """Contributions summed for each sample and class, (n, C); a class without rows sums to 0."""
    table = sheet.pivot_table(values="contribution", index="sample", columns="class", aggfunc="sum")
    return table.reindex(index=range(n), columns=clf.classes_, fill_value=0).fillna(0).to_numpy()


# ---- what holds for every model ---------------------------------------------------------------


def test_contributions_sum_to_the_logits(model):
    logits = model.decision_function(NEW_X)
    assert logits.shape == (9, 3)
    sheet = model.explain(NEW_X, classes="all")
    np.testing.assert_allclose(sums(sheet, model, 9), logits, rtol=1e-5, atol=1e-5)
    product = sheet["similarity"] * sheet["weight"]
    np.testing.assert_array_equal(product, sheet["contribution"])
    named = logits[sheet["sample"], np.searchsorted(model.classes_, sheet["class"])]
    np.testing.assert_allclose(sheet["logit"], named, rtol=1e-6)


def test_probabilities_are_the_softmax_and_the_prediction_the_argmax(model):
    logits, probability = model.decision_function(NEW_X), model.predict_proba(NEW_X)
    power = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probability, power / power.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(NEW_X)), probability, rtol=1e-5)
    assert np.array_equal(model.predict(NEW_X), model.classes_[logits.argmax(1)])
    assert len(set(model.predict(X))) == 3  # not one answer for all
    sheet = model.explain(NEW_X)
    assert sheet["is_predicted"].all()
    chosen = sheet.groupby("sample")["class"].agg(["first", "nunique"])
    assert chosen["first"].tolist() == model.predict(NEW_X).tolist()
    assert (chosen["nunique"] == 1).all()


def test_last_layer_keeps_its_signs_and_reports_its_optimality(model):
    W = model.coef_
    own = model.prototypes_["class"].to_numpy() == model.classes_[:, None]
    assert (W[own] >= 0).all()
    assert (W[~own] <= 0).all()
    assert (W[own] > 0).any()
    assert model.last_layer_result_.residual <= 1e-6
    assert model.history[-1, "residual"] == model.last_layer_result_.residual
    assert model.history[-1, "objective"] == model.last_layer_result_.objective


def test_same_data_and_random_state_give_the_same_model(model, settings):
    torch.manual_seed(99)  # the global generator has no say
    before = torch.random.get_rng_state()
    again = classifier(**settings).fit(X, Y)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_model(model, again)
    assert_same_answers(model, again)
    assert model.history[:, "train_loss"] == again.history[:, "train_loss"]
    other = classifier(**settings, random_state=1).fit(X, Y)
    assert not np.array_equal(other.transform(NEW_X), model.transform(NEW_X))


def test_a_clone_fits_to_the_same_model_and_starts_unfitted(model):
    copy = clone(model)
    with pytest.raises(NotFittedError):
        copy.predict(NEW_X)
    assert_same_model(model, copy.fit(X, Y))


WRITE = """
import multiprocessing  # first, as scikit-learn and joblib do: __main__ is __mp_main__ from then on
import pickle, sys
import numpy as np
import torch
from protoclf import ProtoPNetClassifier

X = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
settings = {"image_size": 16, "prototypes_per_class": 1, "joint_epochs": 1, "verbose": 0}
clf = ProtoPNetClassifier("small_cnn", **settings).fit(X, [0, 1] * 4)
with open(sys.argv[1], "wb") as file:
    pickle.dump((clf, X, clf.predict_proba(X)), file)
"""


def test_initialize_leaves_no_table_of_another_network():
    with pytest.raises(NotFittedError, match="call fit"):
        classifier().initialize()
    clf = classifier().fit(X, Y).initialize()
    assert not hasattr(clf, "prototypes_")
    with pytest.raises(NotFittedError):
        clf.predict(X)
    assert_same_model(clf.fit(X, Y), classifier().fit(X, Y))


@pytest.mark.slow  # two processes
def test_a_pickle_is_read_in_a_process_whose_script_imports_nothing(tmp_path):
    """A memory format of torch is pickled as if it were of any module that has a `torch`."""
    file = str(tmp_path / "clf.pickle")
    subprocess.run([sys.executable, "-c", WRITE, file], check=True)
    with open(file, "rb") as stream:
        clf, X, expected = pickle.load(stream)
    np.testing.assert_allclose(clf.predict_proba(X), expected, atol=1e-6)


def test_pickle_and_joblib_keep_predictions_and_sheets(model, tmp_path):
    assert_same_answers(model, pickle.loads(pickle.dumps(model)))
    joblib.dump(model, tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib")
    assert_same_answers(model, loaded)
    pd.testing.assert_frame_equal(model.prototypes_, loaded.prototypes_)
    assert model.history == loaded.history
    assert loaded.get_params(deep=False).keys() == model.get_params(deep=False).keys()


def test_all_images_are_trained_on_and_pass_a_frozen_backbone_once(backbone_images, settings):
    for count in (1, 5):
        backbone_images.clear()
        clf = classifier(**settings | {"prototypes_per_class": count}, train_backbone=False)
        clf.fit(X, Y)
        assert sum(backbone_images) == len(X)
        assert clf.n_prototypes_ == 3 * count
        assert clf.history[:, "stage"] == ["warm-up", "projection", "last layer"]
        assert not any(key.startswith("valid") for row in clf.history for key in row)


@pytest.mark.parametrize("views", [0, 3])
def test_projection_and_last_layer_cost_one_pass_and_the_views(backbone_images, views):
    classifier(cycles=2, augmented_views=views).fit(X, Y)
    begun = 1 + views  # warm-up
    passes = begun + 2 * (1 + 1 + views)  # in each cycle an epoch, and projection with last layer
    assert sum(backbone_images) == passes * len(X)


# ---- y ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[3, 10, 7], [False, True, False]])
def test_numbers_and_booleans_among_objects_are_what_they_are(names):
    clf = classifier(prototypes_per_class=1).fit(X, np.array([names[c] for c in CODES], object))
    assert clf.classes_.dtype == np.array(names).dtype
    assert clf.classes_.tolist() == sorted(set(names))


@pytest.mark.parametrize(
    ("names", "wrap"),
    [
        (["wren", "auk", "owl"], list),
        (["wren", "auk", "owl"], np.array),
        (["wren", "auk", "owl"], lambda y: np.array(y, dtype=object)),
        (["wren", "auk", "owl"], pd.Series),
        (["wren", "auk", "owl"], lambda y: pd.Series(y, dtype="str")),
        (["wren", "auk", "owl"], lambda y: pd.Series(y, dtype="string")),
        (["wren", "auk", "owl"], lambda y: pd.Series(y, dtype="category")),
        (["wren", "auk", "owl"], lambda y: pd.Series(y, index=range(50, 50 + len(y)))),
        (["새 3", "새 1", "새 2"], list),
        ([40, -2, 7], list),
        ([40, -2, 7], np.array),
        ([40, 2, 7], lambda y: np.array(y, dtype=np.uint8)),
        ([40, -2, 7], pd.Series),
        ([40, -2, 7], lambda y: pd.Series(y, dtype="category")),
        ([True, False, True], lambda y: pd.Series(y, dtype="category")),
        ([True, False, True], pd.Categorical),
        ([2.0, 0.0, 1.0], np.array),
    ],
)
def test_labels_come_back_as_they_were_given(names, wrap):
    y = wrap([names[c] for c in CODES])
    clf = classifier(own_module()).fit(X, y)
    assert clf.classes_.tolist() == sorted({*names})
    predicted = clf.predict(X)
    assert predicted.dtype == clf.classes_.dtype == np.asarray(y).dtype
    assert set(predicted.tolist()) <= set(names)
    assert clf.score(X, y) == np.mean(predicted == np.asarray(y))
    sheet = clf.explain(X[:3], classes=[names[0]])
    assert sheet["class"].unique().tolist() == [names[0]]
    codes = classifier(own_module()).fit(X, np.searchsorted(sorted({*names}), np.asarray(y)))
    assert np.array_equal(codes.decision_function(X), clf.decision_function(X))


@pytest.mark.parametrize(
    ("labels", "dtype"), [(CODES, "Int64"), (CODES, "UInt8"), (CODES > 0, "boolean")]
)
def test_labels_that_pandas_could_miss_keep_their_type(labels, dtype):
    column = pd.Series(labels, dtype=dtype)
    clf = classifier(own_module()).fit(X, column)
    assert clf.classes_.dtype == dtype.lower().replace("boolean", "bool")
    missing = pd.Series([None, *labels[1:]], dtype=dtype)
    with pytest.raises(ValueError, match="NaN"):
        clf.fit(X, missing)
    with pytest.warns(DataConversionWarning):
        clf.fit(X, column.to_frame())
    assert clf.classes_.dtype == dtype.lower().replace("boolean", "bool")
    with pytest.warns(DataConversionWarning), pytest.raises(ValueError, match="NaN"):
        clf.fit(X, missing.to_frame())


def test_labels_in_half_precision_are_explained():
    labels = CODES.astype(np.float16)
    clf = classifier(own_module()).fit(X, labels)
    assert np.isin(clf.predict(X), labels).all()
    assert clf.explain(X[:1])["class"].tolist()[0] in labels


def test_a_missing_group_in_a_list_is_refused():
    with pytest.raises(ValueError, match="some are missing"):
        classifier().fit(X, Y, groups=["a", float("nan")] * 9)


@pytest.mark.parametrize("names", [[True, False], ["b", "a"], [5, 3]])
def test_two_classes_have_one_decision_value(names):
    few = CODES < 2
    y = np.array(names)[CODES[few]]
    clf = classifier(own_module()).fit(X[few], y)
    assert clf.classes_.dtype == y.dtype
    assert clf.classes_.tolist() == sorted(names)
    margin, probability = clf.decision_function(NEW_X), clf.predict_proba(NEW_X)
    assert margin.shape == (9,)
    assert probability.shape == (9, 2)
    assert np.array_equal(clf.predict(NEW_X), clf.classes_[(margin > 0).astype(int)])
    np.testing.assert_allclose(1 / (1 + np.exp(-margin)), probability[:, 1], rtol=1e-4, atol=1e-6)
    total = sums(clf.explain(NEW_X, classes="all"), clf, 9)
    np.testing.assert_allclose(total[:, 1] - total[:, 0], margin, rtol=1e-4, atol=1e-5)


def test_a_column_of_labels_warns_and_is_read():
    with pytest.warns(DataConversionWarning):
        clf = classifier(own_module()).fit(X, Y[:, None])
    assert_same_model(clf, classifier(own_module()).fit(X, Y))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (None, ["requires y to be passed", "None"]),
        (Y[:-1], ["18 images", "17 labels"]),
        (np.full(18, "wren"), ["one class only", "'wren'", "at least two"]),
        (np.linspace(0.1, 5, 18), ["continuous"]),
        (np.where(CODES == 1, np.nan, CODES), ["NaN"]),
        (pd.Series(Y).where(CODES > 0), ["position 0"]),
        ([None, *Y[1:]], ["position 0", "None"]),
        (np.column_stack([CODES, CODES]), ["(18, 2)"]),
        (np.array([*Y[:-1], 3.5], dtype=object), ["mixes", "'float'", "'str_'"]),
        ([*Y[:-1], float("nan")], ["NaN", "position 17"]),
        ([1, *Y[1:]], ["mixes", "'int'"]),
        (CODES.astype("datetime64[D]"), ["strings, numbers or booleans"]),
        (CODES.astype("datetime64[D]").astype(object), ["strings, numbers or booleans", "date"]),
        ([pd.Timestamp(2020, 1, 1 + c) for c in CODES], ["strings, numbers or booleans"]),
        (pd.cut(CODES, 3), ["strings, numbers or booleans", "Interval"]),
        (["\udcbc", *Y[1:]], ["is no text", "not in UTF-8"]),
    ],
)
def test_wrong_labels_are_refused_before_training(y, words, backbone_images):
    with pytest.raises((ValueError, TypeError)) as caught:
        classifier().fit(X, y)
    for word in words:
        assert word in str(caught.value)
    assert not backbone_images


def test_random_features_that_stay_so_are_noticed_unless_they_are_meant():
    with pytest.warns(UserWarning, match="train_backbone=False keeps its random") as caught:
        classifier(train_backbone=False).fit(X, Y)
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no pretrained weights")
        classifier(train_backbone=False, weights=None).fit(X, Y)
        classifier(own_module(), train_backbone=False).fit(X, Y)
        classifier(joint_epochs=0).fit(X, Y)


ONE_AUK = (CODES != 1) | (np.arange(18) < 2)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"distinct": "images"}, "training images than .* 'auk' has 1 for 2"),
        ({"prototype_size": "full"}, "training images than .* 'auk' has 1 for 2"),
        (
            {"prototypes_per_class": 17},
            "patches, 16 for each of the training images, than .* 'auk' has 16 for 17",
        ),
    ],
)
def test_too_few_images_of_a_class_say_which_and_how_many(settings, what, backbone_images):
    with pytest.raises(ValueError, match=rf"{what} prototypes.*lower it"):
        classifier(**settings).fit(X[ONE_AUK], Y[ONE_AUK])
    assert not backbone_images


@pytest.mark.parametrize("train_backbone", [True, False])
@pytest.mark.parametrize("init", ["selected", "kmeans", "random"])
def test_one_image_can_hold_all_prototypes_of_its_class(init, train_backbone):
    settings = {"prototype_init": init, "train_backbone": train_backbone, "distinct": "patches"}
    clf = classifier(prototypes_per_class=16, **settings).fit(X[ONE_AUK], Y[ONE_AUK])
    auks = clf.prototypes_[clf.prototypes_["class"] == "auk"]
    assert auks["source"].nunique() == 1
    assert len(auks[["row", "col"]].drop_duplicates()) == 16
    matches = clf.transform(X[ONE_AUK])[auks["source_index"], auks["prototype"]]
    np.testing.assert_allclose(matches, 1, atol=1e-5)


def test_images_of_the_validation_part_do_not_count_for_prototypes(backbone_images):
    split = ValidSplit(3, stratified=True)
    clf = classifier(prototypes_per_class=6, distinct="images", train_split=split)
    with pytest.raises(ValueError, match=r"that train_split leaves .* 'auk' has 4 for 6 prototype"):
        clf.fit(X, Y)
    assert not backbone_images


def test_a_validation_part_that_holds_a_whole_class_is_named_for_it(backbone_images):
    clf = classifier(train_split=ValidSplit(PredefinedSplit(np.where(CODES == 1, 0, -1))))
    words = r"that train_split leaves.* 'auk' has 0 for 2 prototypes\. Each fit .* stratified=True"
    with pytest.raises(ValueError, match=words):
        clf.fit(X, Y)
    assert not backbone_images


def test_one_path_with_two_labels_is_refused(photos, backbone_images):
    twice = [*photos, photos[4]]
    with pytest.raises(ImageError) as caught:
        classifier().fit(twice, [*Y, "wren"])
    for word in ("까치 4.png", "'auk' at position 4", "'wren' at position 18"):
        assert word in str(caught.value)
    assert not backbone_images
    classifier(own_module()).fit(twice, [*Y, Y[4]])


def test_wrong_sample_weights_are_refused(backbone_images):
    for weight in (np.ones(17), -np.ones(18), np.full(18, np.nan), np.ones((18, 2))):
        with pytest.raises(ValueError, match=r"(?i)sample.weight"):
            classifier().fit(X, Y, sample_weight=weight)
    assert not backbone_images


def test_a_class_weight_of_zero_is_refused_as_sample_weights_of_zero_are():
    with pytest.raises(ValueError, match="class_weight must hold finite weights > 0"):
        classifier(class_weight={"wren": 0}).fit(X, Y)


# ---- X ----------------------------------------------------------------------------------------

PATHS = {
    "list": list,
    "tuple": tuple,
    "pathlib": lambda p: [Path(q) for q in p],
    "array": np.array,
    "column": lambda p: np.array(p, dtype=object)[:, None],
    "series": lambda p: pd.Series(p, index=range(7, 7 + len(p))),
    "string series": lambda p: pd.Series(p, dtype="string"),
    "category": lambda p: pd.Series(p, dtype="category"),
    "frame": lambda p: pd.DataFrame({"file": p}),
}
PIXELS = {
    "uint8": lambda a: a,
    "float64": lambda a: a / 255,
    "float32": lambda a: (a / 255).astype(np.float32),
    "arrays": list,
    "pil": lambda a: [PIL.Image.fromarray(image) for image in a],
    "tensor": torch.from_numpy,
}


@pytest.fixture(scope="module")
def reference():
    """A model of a user's module, and its answers on the training images."""
    clf = classifier(own_module(), batch_size=5).fit(X, Y)
    return clf, clf.predict_proba(X), clf.explain(X)


@pytest.mark.parametrize("form", PATHS)
def test_every_form_of_paths_is_the_same_to_fit_predict_and_explain(form, photos, reference):
    given = PATHS[form](photos)
    clf = classifier(own_module(), batch_size=5).fit(given, Y)
    assert np.array_equal(clf.predict_proba(given), reference[1])
    sheet = clf.explain(given)
    assert sheet["path"].tolist() == [photos[i] for i in sheet["sample"]]
    assert sheet["source"].tolist() == [photos[i] for i in sheet["source_index"]]
    told = ["path", "source"]
    pd.testing.assert_frame_equal(sheet.drop(columns=told), reference[2].drop(columns=told))
    assert np.array_equal(clf.transform(given), reference[0].transform(X))


@pytest.mark.parametrize("form", PIXELS)
def test_every_form_of_pixels_is_the_same_to_fit_predict_and_explain(form, reference):
    given = PIXELS[form](X)
    clf = classifier(own_module(), batch_size=5).fit(given, Y)
    assert np.array_equal(clf.predict_proba(given), reference[1])
    sheet = clf.explain(given)
    assert sheet["path"].isna().all()
    assert sheet["source"].tolist() == sheet["source_index"].astype(str).tolist()
    pd.testing.assert_frame_equal(sheet, reference[2])
    for i, pixels in clf.source_images_.items():
        assert np.array_equal(pixels, X[i])


def test_grey_pictures_are_the_same_as_three_equal_channels():
    grey = X[..., 0]
    colour = np.repeat(grey[..., None], 3, axis=-1)
    clf = classifier(own_module()).fit(grey, Y)
    assert_same_model(clf, classifier(own_module()).fit(colour, Y))
    assert np.array_equal(clf.predict_proba(grey), clf.predict_proba(colour))


def test_pictures_of_unequal_sizes_have_boxes_in_their_own_pixels():
    images = [np.asarray(PIL.Image.fromarray(x).resize((40 + 9 * i, 50))) for i, x in enumerate(X)]
    clf = classifier(own_module()).fit(images, Y)
    sheet = clf.explain(images, classes="all")
    for box, index in (("", "sample"), ("source_", "source_index")):
        width = np.array([images[i].shape[1] for i in sheet[index]])
        assert (sheet[f"{box}x0"] >= 0).all()
        assert (sheet[f"{box}x0"] < sheet[f"{box}x1"]).all()
        assert (sheet[f"{box}x1"] <= width).all()
        assert (sheet[f"{box}y0"] >= 0).all()
        assert (sheet[f"{box}y0"] < sheet[f"{box}y1"]).all()
        assert (sheet[f"{box}y1"] <= 50).all()


def test_a_list_of_paths_is_one_input_and_not_several(photos, reference):
    for k in (1, 2, 3):
        assert reference[0].predict(photos[:k]).shape == (k,)
        assert reference[0].predict(tuple(photos[:k])).shape == (k,)


def test_answers_do_not_depend_on_the_batches(reference):
    clf = pickle.loads(pickle.dumps(reference[0])).set_params(batch_size=18)
    np.testing.assert_allclose(clf.predict_proba(X), reference[1], rtol=1e-5)
    one_by_one = np.concatenate([clf.transform(X[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(one_by_one, reference[0].transform(X)[:4], rtol=1e-5, atol=1e-6)


def spoil(kind, folder):
    """Return the path of a file that is no readable image."""
    path = folder / f"못 쓰는 {kind}.jpg"
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        PIL.Image.fromarray(X[0]).save(path, quality=95)
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "text":
        path.write_text("This is no picture. " * 20)
    elif kind == "directory":
        path.mkdir()
    elif kind == "bomb":
        PIL.Image.new("RGB", (SHAPE[1] + 1, SHAPE[0])).save(path)
    return str(path)


BAD_FILES = [
    ("missing", "no such file"),
    ("empty", "the file is empty"),
    ("truncated", "truncated or damaged"),
    ("text", "not an image"),
    ("directory", "is a directory"),
    ("bomb", "too large"),
]


@pytest.mark.parametrize(("kind", "reason"), BAD_FILES)
def test_a_bad_file_is_named_with_its_position_before_training(
    kind, reason, photos, tmp_path, monkeypatch, backbone_images
):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", SHAPE[0] * SHAPE[1])
    bad = spoil(kind, tmp_path)
    given = [*photos[:7], bad, *photos[8:]]
    with pytest.raises(ImageError) as caught:
        classifier().fit(given, Y)
    for word in ("position 7", repr(bad), reason, "Replace"):
        assert word in str(caught.value)
    assert [failure[:2] for failure in caught.value.failures] == [(7, bad)]
    assert not backbone_images


@pytest.mark.parametrize(("kind", "reason"), BAD_FILES)
@pytest.mark.parametrize("method", ["predict", "explain", "similarity_maps"])
def test_a_bad_file_is_named_with_its_position_when_predicting(
    method, kind, reason, photos, tmp_path, monkeypatch, reference
):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", SHAPE[0] * SHAPE[1])
    bad = spoil(kind, tmp_path)
    with pytest.raises(ImageError) as caught:  # in the second batch of five
        getattr(reference[0], method)([*photos[:7], bad, *photos[8:]])
    for word in ("position 7", repr(bad), reason):
        assert word in str(caught.value)


def wrong_pixels():
    nan = X / 255
    nan[3, 0, 0, 0] = np.nan
    return [
        (nan, ["position 3", "NaN"]),
        (X.astype(float), ["position 0", "[0, 1]", "divide by 255"]),
        (X.astype(int), ["int64", "uint8"]),
        (X.transpose(0, 3, 1, 2), ["(18, 3, 40, 48)", "Channels come last"]),
        (X.reshape(18, -1), ["(18, 5760)", "Reshape your data"]),
        (X[:0], ["0 sample(s)"]),
        ([], ["0 sample(s)"]),
        ([*X[:17], None], ["position 17", "None"]),
        ([*X[:17], "a.png"], ["mixes", "position 17"]),
        ("a.png", ["single path", "list"]),
        (Path(__file__).parent, ["folder", "load_folder"]),
        (pd.DataFrame({"file": ["a"] * 18, "label": Y}), ["file", "label", "Select the one"]),
    ]


@pytest.mark.parametrize(("given", "words"), wrong_pixels())
def test_wrong_X_is_refused_before_training_and_when_predicting(
    given, words, reference, backbone_images
):
    for use in (lambda: classifier().fit(given, Y), lambda: reference[0].predict(given)):
        with pytest.raises(ImageError) as caught:
            use()
        for word in words:
            assert word in str(caught.value)
    assert not backbone_images


# ---- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        ("train_backbone", "yes", "True or False"),
        ("image_size", 0, "an int >= 1"),
        ("image_size", 32.0, "an int >= 1"),
        ("resize", "pad", "one of 'crop', 'squash'"),
        ("prototypes_per_class", 0, '"auto", an int >= 1, or a dict'),
        ("prototypes_per_class", 2.5, '"auto", an int >= 1, or a dict'),
        ("prototypes_per_class", {"wren": 0, "auk": 1, "owl": 1}, '"auto", an int >= 1, or a dict'),
        ("prototype_size", 3, '"full" or (rows, columns)'),
        ("prototype_size", (0, 1), '"full" or (rows, columns)'),
        ("prototype_size", np.array([1, 1]), '"full" or (rows, columns)'),
        ("latent_dim", 0, "an int >= 1, or None"),
        ("similarity", "l2", "one of 'log', 'cosine'"),
        ("similarity", np.zeros(2), "one of 'log', 'cosine'"),
        ("prototype_init", None, "one of 'selected', 'kmeans', 'random'"),
        ("distinct", True, "one of None, 'patches', 'images'"),
        ("lambda_clst", -0.8, "a finite number >= 0"),
        ("lambda_sep", np.inf, "a finite number >= 0"),
        ("lambda_l1", "small", '"auto", "cv" or a finite number >= 0'),
        ("lambda_l1", np.nan, '"auto", "cv" or a finite number >= 0'),
        ("lambda_l2", "cv", '"auto" or a finite number >= 0'),
        ("warmup_epochs", -1, "an int >= 0"),
        ("joint_epochs", 1.5, "an int >= 0"),
        ("cycles", 0, "an int >= 1"),
        ("cycles", True, "an int >= 1"),
        ("lr", -1e-3, "a finite number >= 0"),
        ("backbone_lr", None, "a finite number >= 0"),
        ("lr_schedule", "linear", "one of 'cosine', 'step', None"),
        ("batch_size", -1, "an int >= 1"),
        ("augmentation", "strong", "None, 'default', or a callable"),
        ("normalization", "cifar", "'imagenet' or (mean, std)"),
        ("memory", 3, "None, a folder (and no file) or a joblib.Memory"),
        ("memory", __file__, "None, a folder (and no file) or a joblib.Memory"),
        ("checkpoint", 3, "None or a folder"),
        ("device", "gpu", '"auto" or a device of torch'),
        ("device", "meta", '"auto" or a device of torch'),
        ("verbose", "a", "an int, 0 or more"),
        ("class_weight", {"wren": "a"}, 'None, "balanced" or a dict of a number for each class'),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(name, wrong, allowed, backbone_images):
    clf = classifier(**{name: wrong})  # stored as it is
    assert clf.get_params()[name] is wrong
    with pytest.raises((ValueError, TypeError)) as caught:
        clf.fit(X, Y)
    for word in (f"{name} must be {allowed}", f"got {wrong!r}"):
        assert word in str(caught.value)
    assert not backbone_images


def test_unknown_backbones_and_weights_are_named(backbone_images):
    with pytest.raises(ValueError, match="resnet18"):
        classifier("resnet81").fit(X, Y)
    with pytest.raises(TypeError, match="backbone must be"):
        classifier(18).fit(X, Y)
    with pytest.raises(ValueError, match=r"no\.pt"):
        classifier(weights="no.pt").fit(X, Y)
    assert not backbone_images


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("protoypes_per_class", "prototypes_per_class"),
        ("lamda_clst", "lambda_clst"),
        ("max_epochs", "joint_epochs"),
        ("n_prototypes", "prototypes_per_class"),
        ("learning_rate", "lr"),
        ("prototypes", "prototypes_per_class"),
        ("seed", "random_state"),
        ("pretrained", "weights"),
        ("optimiser__weight_decay", "optimizer__weight_decay"),
        ("iterator_trian__num_workers", "iterator_train__num_workers"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(TypeError, match=f"no parameter '{name}'.*{nearest}"):
        classifier(**{name: 3})
    with pytest.raises(ValueError, match=f"no parameter '{name}'.*{nearest}"):
        classifier().set_params(**{name: 3})


def test_an_unlike_name_is_refused_without_a_guess():
    with pytest.raises(TypeError, match=r"no parameter 'xyz'\.$"):
        classifier(xyz=3)


def test_prototypes_per_class_may_differ_between_classes():
    clf = classifier(own_module(), prototypes_per_class={"wren": 3, "auk": 1, "owl": 2}).fit(X, Y)
    assert clf.prototypes_["class"].tolist() == ["auk", "owl", "owl", "wren", "wren", "wren"]
    assert clf.n_prototypes_ == 6


def test_prototypes_per_class_must_name_every_class_of_y(backbone_images):
    counts = {"wren": 3, "auk": 1, "kiwi": 2}
    with pytest.raises(ValueError, match=r"missing: 'owl'; not in y: 'kiwi'"):
        classifier(prototypes_per_class=counts).fit(X, Y)
    assert not backbone_images


def test_a_prototype_larger_than_the_latent_map_is_refused(backbone_images):
    with pytest.raises(ValueError, match=r"prototype_size \(5, 1\) is larger .* 4 x 4 cells"):
        classifier(prototype_size=(5, 1)).fit(X, Y)
    assert not backbone_images


def test_whole_image_prototypes():
    clf = classifier(own_module(), prototype_size="full").fit(X, Y)
    assert clf.module_.prototypes.shape == (6, 12, 4, 4)
    assert clf.similarity_maps(NEW_X).shape == (9, 6, 1, 1)
    assert (clf.prototypes_[["row", "col"]] == 0).all(axis=None)


class Rates(Callback):
    """Learning rate of every part, epoch by epoch."""

    def on_train_begin(self, net, X=None, y=None, **kwargs):
        self.seen = []

    def on_epoch_end(self, net, **kwargs):
        rates = {group["part"]: group["lr"] for group in net.optimizer_.param_groups}
        self.seen.append((net.history[-1, "stage"], rates))


def test_paper_has_the_settings_of_the_paper():
    params = ProtoPNetClassifier.paper().get_params()
    expected = {
        "image_size": 224,
        "latent_dim": 128,
        "prototypes_per_class": 10,
        "prototype_size": (1, 1),
        "similarity": "log",
        "prototype_init": "random",
        "optimizer": torch.optim.Adam,
        "optimizer__weight_decay": 1e-3,
        "lr": 3e-3,
        "backbone_lr": 1e-4,
        "lr_schedule": "step",
        "warmup_epochs": 5,
        "joint_epochs": 10,
        "lambda_clst": 0.8,
        "lambda_sep": 0.08,
        "lambda_patch": 0.0,
        "lambda_l1": 1e-4,
        "batch_norm": "train",
        "train_backbone": True,
    }
    assert {name: params[name] for name in expected} == expected
    assert ProtoPNetClassifier.paper(backbone="vgg16", cycles=1).get_params()["cycles"] == 1


def test_paper_trains_as_the_paper_says():
    clf = ProtoPNetClassifier.paper(
        backbone=own_module(),
        image_size=32,
        latent_dim=8,
        prototypes_per_class=2,
        cycles=2,
        joint_epochs=3,
        callbacks=[("rates", Rates())],
        random_state=0,
        verbose=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random prototypes may well collapse on so few images
        clf.fit(X, Y)
    assert type(clf.module_.add_on[-1]) is nn.Sigmoid
    decay = {group["part"]: group["weight_decay"] for group in clf.optimizer_.param_groups}
    assert decay == {"backbone": 1e-3, "add_on": 1e-3, "prototypes": 0}
    seen = dict(clf.callbacks_)["rates"].seen
    cycle = ["joint"] * 3 + ["projection", "last layer"]
    assert [stage for stage, _ in seen] == ["warm-up"] * 5 + cycle * 2
    assert all(r == {"backbone": 0, "add_on": 3e-3, "prototypes": 3e-3} for _, r in seen[:5])
    joint = [rates for stage, rates in seen if stage == "joint"]
    for epoch, rates in enumerate(joint):  # a tenth from the sixth joint epoch on
        factor = 0.1 ** (epoch // 5)
        expected = {"backbone": 1e-4, "add_on": 3e-3, "prototypes": 3e-3}
        assert rates == pytest.approx({part: lr * factor for part, lr in expected.items()})


def test_a_module_given_by_the_user_is_never_changed():
    module = own_module().train()
    module[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in module.parameters()]
    clf = classifier(module, backbone_lr=0.1, distinct="patches").fit(X, Y)
    clf.predict(X)
    assert clf.backbone is module
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in module.parameters()] == flags
    assert all(part.training for part in module.modules())
    trained = clf.module_.backbone.state_dict()
    assert not torch.equal(trained["3.weight"], state["3.weight"])


def test_parameters_and_data_are_left_as_they_were():
    counts, images, y = {"wren": 2, "auk": 2, "owl": 2}, X.copy(), Y.copy()
    clf = classifier(own_module(), prototypes_per_class=counts)
    before = clf.get_params(deep=False)
    clf.fit(images, y)
    after = clf.get_params(deep=False)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert counts == {"wren": 2, "auk": 2, "owl": 2}
    assert np.array_equal(images, X)
    assert np.array_equal(y, Y)


# ---- fitting again ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function", "transform"])
def test_nothing_is_answered_before_fit(method):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(classifier(), method)(X)


def test_nothing_is_explained_before_fit():
    clf = classifier()
    for use in (
        lambda: clf.explain(X),
        lambda: clf.similarity_maps(X),
        lambda: clf.score(X, Y),
        lambda: clf.get_feature_names_out(),
        lambda: clf.n_prototypes_,
    ):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            use()
    assert not any(hasattr(clf, name) for name in ("coef_", "prototypes_", "n_prototypes_"))


def test_a_second_fit_replaces_the_first():
    clf = classifier(own_module()).fit(NEW_X, NEW_CODES * 10)
    clf.set_params(prototypes_per_class=3, image_size=40, similarity="log").fit(X, Y)
    fresh = classifier(own_module(), prototypes_per_class=3, image_size=40, similarity="log")
    fresh.fit(X, Y)
    assert_same_model(clf, fresh)
    assert_same_answers(clf, fresh)
    assert len(clf.history) == len(fresh.history)
    assert clf.source_images_.keys() == fresh.source_images_.keys()


def test_a_fit_that_is_refused_leaves_the_earlier_model():
    clf = classifier(own_module()).fit(X, Y)
    kept = pickle.loads(pickle.dumps(clf))
    with pytest.raises(ValueError, match="labels"):
        clf.fit(X, Y[:-1])
    assert_same_answers(clf, kept)


@pytest.mark.parametrize(
    ("y", "weight", "message"),
    [
        (Y[:-1], None, "labels; they must be as many"),
        ([None, *Y[1:]], None, "NaN"),
        (np.arange(len(Y)), None, "Mix of label input types"),
        (Y, [1.0], "inconsistent numbers of samples"),
    ],
)
def test_a_score_checks_labels_before_it_reads_images(fitted, backbone_images, y, weight, message):
    with pytest.raises(ValueError, match=message):
        fitted.score(X, y, weight)
    assert not backbone_images


class Failing:
    """An augmentation that breaks down."""

    def __call__(self, image):
        raise RuntimeError("out of luck")


def test_a_fit_that_breaks_down_leaves_no_model_and_the_next_is_whole():
    clf = classifier(own_module()).fit(NEW_X, NEW_CODES)
    with pytest.raises(RuntimeError, match="out of luck"):
        clf.set_params(augmentation=Failing()).fit(X, Y)
    with pytest.raises(NotFittedError):
        clf.predict(X)
    with pytest.raises(NotFittedError):
        clf.coef_  # noqa: B018
    clf.set_params(augmentation="default").fit(X, Y)
    fresh = classifier(own_module()).fit(X, Y)
    assert_same_model(clf, fresh)
    assert clf.history[:, "stage"] == fresh.history[:, "stage"]


FIRST = ["warm-up", "joint", "projection", "last layer"]


@pytest.mark.parametrize("how", ["partial_fit", "warm_start"])
def test_training_goes_on_without_a_second_warm_up(how):
    clf = classifier(own_module(), warm_start=how == "warm_start").fit(X, Y)
    go_on = clf.partial_fit if how == "partial_fit" else clf.fit
    weight = clf.module_.backbone[3].weight.clone()
    go_on(NEW_X[:6], NAMES[NEW_CODES[:6]])
    assert clf.history[:, "stage"] == FIRST + FIRST[1:]
    assert not torch.equal(clf.module_.backbone[3].weight, weight)
    assert clf.classes_.tolist() == sorted(NAMES)
    assert (clf.prototypes_["source_index"] < 6).all()  # parts of the images of the last call
    assert sums(clf.explain(X, "all"), clf, 18) == pytest.approx(
        clf.decision_function(X), rel=1e-4, abs=1e-5
    )
    kept = clf.predict_proba(X)
    with pytest.raises(ValueError, match=r"did not see: \['kiwi'\]"):
        go_on(X, np.where(Y == "owl", "kiwi", Y))
    assert np.array_equal(clf.predict_proba(X), kept)


@pytest.mark.parametrize("how", ["partial_fit", "warm_start"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"image_size": 64}, "image_size is 64 now and was 32"),
        ({"resize": "squash"}, "resize is 'squash' now and was 'crop'"),
    ],
)
def test_a_fit_does_not_go_on_with_images_of_another_form(how, other, message):
    clf = classifier(own_module(), train_backbone=False, warm_start=how == "warm_start").fit(X, Y)
    expected = clf.explain(X[:2])
    go_on = clf.partial_fit if how == "partial_fit" else clf.fit
    clf.set_params(**other)
    with pytest.raises(ValueError, match=message):
        go_on(X, Y)
    pd.testing.assert_frame_equal(clf.explain(X[:2]), expected)


def frozen_in_part(layers):
    module = own_module()
    for layer in layers:
        module[layer].requires_grad_(False)
    return module


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_layers_that_a_user_froze_stay_as_they_are(warmup_epochs):
    module = frozen_in_part([0])
    clf = classifier(module, joint_epochs=2, warmup_epochs=warmup_epochs).fit(X, Y)
    clf.partial_fit(X, Y)
    for i in (0, 3):
        same = torch.equal(clf.module_.backbone[i].weight, module[i].weight)
        assert same is (i == 0)


def test_labels_that_are_one_string_are_refused():
    with pytest.raises(TypeError, match=r"y must hold a label .* got the string 'labels.csv'"):
        classifier().fit(X, "labels.csv")


def test_a_backbone_that_is_frozen_as_a_whole_is_noticed():
    with pytest.warns(UserWarning, match="No parameter of the backbone has requires_grad"):
        clf = classifier(frozen_in_part([0, 1, 3]), joint_epochs=1).fit(X, Y)
    assert torch.equal(clf.module_.backbone[3].weight, own_module()[3].weight)


def test_a_map_of_a_single_cell_is_noticed_unless_it_is_meant():
    whole = nn.Sequential(nn.AvgPool2d(32), nn.Conv2d(3, 8, 1))
    settings = {"train_backbone": False, "prototypes_per_class": 1}
    with pytest.warns(UserWarning, match="a single cell of an image of 32 pixels") as caught:
        classifier(whole, **settings).fit(X, Y)
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The backbone makes a single cell")
        classifier(whole, prototype_size="full", **settings).fit(X, Y)


@pytest.mark.parametrize(
    ("distinct", "size"),
    [(None, "full"), ("patches", (1, 1)), ("patches", "full"), ("images", (1, 1))],
)
def test_later_calls_need_images_for_the_prototypes_that_there_are(distinct, size):
    settings = {"train_backbone": False, "prototype_size": size}
    clf = classifier(own_module(), **settings, prototypes_per_class=2).fit(X, Y)
    few = np.sort(np.unique(Y, return_index=True)[1])  # one of each class
    clf.set_params(prototypes_per_class=5, distinct=distinct)
    if distinct == "images" or (distinct, size) == ("patches", "full"):
        with pytest.raises(ValueError, match=r"has 1 for 2 prototypes.* Set distinct=None"):
            clf.partial_fit(X[few], Y[few])
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*distinct patches only")
        assert clf.partial_fit(X[few], Y[few]).n_prototypes_ == 2 * len(few)


@pytest.mark.parametrize("classes", [["a"], [*np.unique(Y), "z"]])
def test_other_classes_than_those_of_y_are_refused_by_partial_fit(classes):
    fitted = classifier(own_module(), train_backbone=False).partial_fit(X, Y, classes=np.unique(Y))
    for clf in (classifier(own_module()), fitted):
        with pytest.raises(ValueError, match="classes must be those of y in the first call"):
            clf.partial_fit(X, Y, classes=classes)
    for same in (np.unique(Y)[::-1], set(Y), dict.fromkeys(Y).keys()):
        assert fitted.partial_fit(X, Y, classes=same).classes_.tolist() == sorted(set(Y))


@pytest.mark.parametrize("y", [[None, *Y[1:]], [7, *Y[1:]]])
def test_labels_that_are_no_classes_are_named_by_partial_fit(y):
    with pytest.raises(ValueError, match=r"only in y \[(None|7)\]"):
        classifier().partial_fit(X, y, classes=np.unique(Y))


def test_the_first_partial_fit_is_a_fit():
    clf = classifier(own_module()).partial_fit(X, Y)
    assert_same_model(clf, classifier(own_module()).fit(X, Y))


# ---- splits, and prototypes that collapse -----------------------------------------------------


class Remembered(ValidSplit):
    """A validation split that tells what it chose."""

    def __call__(self, dataset, y=None, groups=None):
        self.parts = super().__call__(dataset, y, groups)
        return self.parts


def test_validation_scores_are_those_of_the_validation_part():
    split = Remembered(3, stratified=True)
    clf = classifier(own_module(), train_split=split).fit(X, Y)
    train, valid = (np.asarray(part.indices) for part in split.parts)
    assert sorted([*train, *valid]) == list(range(18))
    assert "valid_acc" in clf.history[0]
    assert clf.history[-1, "valid_acc"] == np.mean(clf.predict(X[valid]) == Y[valid])
    codes = torch.from_numpy(np.searchsorted(clf.classes_, Y[valid]))
    inputs, _ = clf.get_dataset(X[valid]).__getitems__(range(6))
    with torch.no_grad():
        loss = clf.criterion_(clf.infer(inputs), codes)
    assert clf.history[-1, "valid_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_nothing_sees_the_validation_part():
    valid = np.arange(12, 18)

    def split(dataset, y=None, groups=None):
        return Subset(dataset, np.arange(12)), Subset(dataset, valid)

    other = X.copy()
    other[valid] = np.random.default_rng(5).integers(0, 256, other[valid].shape)
    one = classifier(own_module(), train_split=split).fit(X, Y)
    two = classifier(own_module(), train_split=split).fit(other, Y)
    assert_same_model(one, two)
    assert one.history[:, "train_loss"] == two.history[:, "train_loss"]
    assert one.history[:, "valid_loss"] != two.history[:, "valid_loss"]
    assert (one.prototypes_["source_index"] < 12).all()
    assert one.last_layer_result_.objective == two.last_layer_result_.objective


def test_every_row_of_the_history_is_in_the_log(capsys):
    """Early stopping ends no stage of one row, and its word does not keep the row from view."""
    stop = EarlyStopping("train_loss", patience=1, threshold=1e9)
    clf = classifier(own_module(), joint_epochs=5, callbacks=[stop], verbose=1).fit(X, Y)
    log = capsys.readouterr().out
    stages = clf.history[:, "stage"]
    assert stages == ["warm-up", "joint", "joint", "projection", "last layer"]
    shown = [line.split()[1] for line in log.splitlines() if line.strip()[:1].isdigit()]
    assert shown == ["warm-up", "joint", "joint", "projection", "last"]
    assert log.count("Stopping since") == 1


@pytest.mark.parametrize("method", ["predict", "explain", "transform", "similarity_maps"])
def test_questions_leave_the_generator_of_torch_alone(fitted, squares, method, monkeypatch):
    """So that a fit in another thread draws what it would alone."""
    before = torch.get_rng_state()
    with monkeypatch.context() as patched:
        for name in ("manual_seed", "set_rng_state"):
            patched.setattr(torch, name, pytest.fail)
        getattr(copy.deepcopy(fitted), method)(np.concatenate([squares[0]] * 3))
    assert torch.equal(before, torch.get_rng_state())


def test_the_last_layer_is_handed_out_as_a_copy(fitted, squares):
    before = fitted.decision_function(squares[0])
    fitted.coef_[:] = 0
    np.testing.assert_array_equal(fitted.decision_function(squares[0]), before)


def test_what_an_earlier_fit_left_is_gone():
    clf = classifier(own_module(), lambda_l1="cv", on_bad_image="skip").fit(X, Y)
    assert len(clf.last_layer_path_)
    clf.set_params(lambda_l1=1e-3, on_bad_image="raise").partial_fit(X, Y)
    assert not hasattr(clf, "last_layer_path_")
    assert not hasattr(clf, "skipped_")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"random_state": "a"}, "random_state must be None, an int >= 0"),
        ({"random_state": -1}, "random_state must be"),
        ({"random_state": 2**32}, r"random_state must be None, an int >= 0 and < 2\*\*32"),
        ({"callbacks": ["early"]}, "callbacks must be None"),
        ({"iterator_train__batch_size": 3}, "would be a second batch_size"),
    ],
)
def test_more_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        classifier(**wrong).fit(X, Y)


def test_names_of_files_need_not_be_utf_8(photos, tmp_path):
    paths = [os.fsdecode(os.fsencode(tmp_path) + b"/\xbc\xc5%d.png" % i) for i in range(len(X))]
    for path, new in zip(photos, paths, strict=True):
        shutil.copy(path, new)
    clf = classifier(own_module(), on_bad_image="skip")
    clf.fit([*paths, tmp_path / "gone.png"], [*Y, Y[0]])
    assert set(clf.prototypes_["source"]) <= set(paths)
    sheet = clf.explain([*paths[:2], os.fsdecode(b"\xbc.png")])
    assert list(dict.fromkeys(sheet["path"])) == [*paths[:2], os.fsdecode(b"\xbc.png")]
    assert len(compare(clf.explain(paths[:1], "top2")))
    assert set(nearest_patches(clf, paths[:3], 1)["path"]) <= set(paths)
    assert sparsity(clf, paths[:3])["path"].tolist() == paths[:3]
    folder = clf.save(tmp_path / "model")
    loaded = ProtoPNetClassifier.load(folder, backbone=own_module())
    assert loaded.prototypes_["source"].tolist() == clf.prototypes_["source"].tolist()
    clf.fit([*paths, os.fsdecode(b"\xbc.png")], [*Y, Y[0]])
    assert clf.skipped_["path"].tolist() == [os.fsdecode(b"\xbc.png")]


def test_an_image_without_an_answer_has_a_row_where_others_have_none(tmp_path):
    clf = classifier(own_module(), lambda_l1=1e3, on_bad_image="skip").fit(X, Y)
    paths = [tmp_path / "0.png", tmp_path / "gone.png"]
    PIL.Image.fromarray(X[0]).save(paths[0])
    sheet = clf.explain(paths)
    assert sheet["sample"].tolist() == [1]
    assert sheet["path"].tolist() == [str(paths[1])]
    assert sheet["source"].tolist() == ["(unreadable)"]
    assert (sheet["prototype"].dtype, sheet["is_predicted"].dtype) == ("Int64", "boolean")
    assert sheet.drop(columns=["sample", "path", "source"]).isna().all(axis=None)
    assert class_totals(sheet).empty
    with pytest.raises(ValueError, match="needs a sheet with rows"):
        compare(sheet)


def test_early_stopping_ends_a_stage_and_not_the_fit():
    stop = EarlyStopping(monitor="train_loss", patience=2, threshold=1e9)
    clf = classifier(own_module(), warmup_epochs=1, joint_epochs=9, callbacks=[stop]).fit(X, Y)
    stages = clf.history[:, "stage"]
    assert 1 <= stages.count("joint") < 9
    assert stages[-2:] == ["projection", "last layer"]
    assert clf.predict(X).shape == (18,)


def test_collapsed_prototypes_warn_and_are_counted():
    black, y = np.zeros((12, 40, 40), np.uint8), np.repeat(NAMES, 4)
    clf = classifier(own_module(), prototype_init="random", prototypes_per_class=4)
    with pytest.warns(UserWarning, match=r'12 prototypes .* distinct patches only.*"patches"'):
        clf.fit(black, y)
    assert clf.history[-2, "stage"] == "projection"
    assert clf.history[-2, "distinct_patches"] == 3
    assert clf.history[-2, "distinct_images"] == 3


@pytest.mark.parametrize("distinct", ["patches", "images"])
def test_distinct_prototypes_are_distinct_within_a_class(distinct):
    black, y = np.zeros((12, 40, 40), np.uint8), np.repeat(NAMES, 4)
    clf = classifier(own_module(), prototype_init="random", prototypes_per_class=4)
    clf.set_params(distinct=distinct).fit(black, y)
    cell = ["source_index"] if distinct == "images" else ["source_index", "row", "col"]
    assert not clf.prototypes_.duplicated(["class", *cell]).any()
    assert clf.history[-2, f"distinct_{distinct}"] == 12


def test_auto_keeps_no_more_prototypes_of_a_class_than_it_has_images_for(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    y, auto = np.repeat(NAMES, 4), {"prototypes_per_class": "auto", "train_backbone": False}
    auto |= {"memory": tmp_path, "lambda_l1": 1e-4}
    free = classifier(**auto).fit(noise, y)
    assert free.prototypes_["class"].value_counts().max() > 4
    clf = classifier(**auto, distinct="images").fit(noise, y)  # with a start of its own
    assert clf.prototypes_["class"].value_counts().max() == 4
    assert not clf.prototypes_.duplicated(["class", "source_index"]).any()


# ---- reading a fitted model -------------------------------------------------------------------


def test_prototypes_table_tells_of_every_prototype(model):
    table = model.prototypes_
    assert table.columns.tolist() == [
        *("prototype", "class", "source", "source_index", "row", "col"),
        *("x0", "y0", "x1", "y1", "moved", "weight", "strongest_share"),
    ]
    assert model.n_prototypes_ == len(table) == 6
    assert table["prototype"].tolist() == list(range(6))
    assert table["class"].tolist() == np.repeat(model.classes_, 2).tolist()
    assert np.array_equal(Y[table["source_index"]], table["class"])
    assert table["source"].tolist() == table["source_index"].astype(str).tolist()
    height, width = SHAPE
    assert (table["x0"] >= 0).all()
    assert (table["x0"] < table["x1"]).all()
    assert (table["x1"] <= width).all()
    assert (table["y0"] >= 0).all()
    assert (table["y0"] < table["y1"]).all()
    assert (table["y1"] <= height).all()
    assert (table["moved"] >= 0).all()
    assert table["strongest_share"].sum() == pytest.approx(1)
    strongest = model.transform(X).argmax(1)
    share = np.bincount(strongest, minlength=6) / 18
    np.testing.assert_allclose(table["strongest_share"], share, atol=1e-9)


def test_weight_of_a_prototype_is_its_last_layer_entry(model):
    assert model.coef_.shape == (3, 6)
    own = np.searchsorted(model.classes_, model.prototypes_["class"])
    assert np.array_equal(model.prototypes_["weight"], model.coef_[own, np.arange(6)])
    np.testing.assert_allclose(
        model.decision_function(X), model.transform(X) @ model.coef_.T, rtol=1e-4, atol=1e-5
    )


def test_a_prototype_is_most_similar_to_its_source_at_its_cell(model):
    table = model.prototypes_
    maps = model.similarity_maps(X)
    m, width = np.arange(6), maps.shape[3]
    flat = maps.reshape(18, 6, -1)
    at_source = flat[table["source_index"], m, table["row"] * width + table["col"]]
    np.testing.assert_allclose(at_source, flat.max((0, 2)), rtol=1e-3)


def test_similarity_maps_have_the_activations_as_their_maxima(model):
    maps = model.similarity_maps(NEW_X)
    side = 4 - model.prototype_size[0] + 1
    assert maps.shape == (9, 6, side, side)
    np.testing.assert_allclose(maps.max((2, 3)), model.transform(NEW_X), rtol=1e-4, atol=1e-5)
    sheet = model.explain(NEW_X, classes="all")
    there = maps[sheet["sample"], sheet["prototype"], sheet["row"], sheet["col"]]
    np.testing.assert_allclose(there, sheet["similarity"], rtol=1e-4, atol=1e-5)


def test_upsampled_similarity_maps_have_the_size_of_what_the_model_sees(model):
    height, width = SHAPE
    maps = model.similarity_maps(NEW_X, upsampled=True)
    assert len(maps) == 9
    assert all(one.shape == (6, min(height, width), min(height, width)) for one in maps)
    squashed = classifier(own_module(), resize="squash").fit(X, Y)
    images = [NEW_X[0], NEW_X[1][:30], NEW_X[2][:, :20]]
    maps = squashed.similarity_maps(images, upsampled=True)
    assert [one.shape[1:] for one in maps] == [(40, 48), (30, 48), (40, 20)]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3)])
def test_upsampled_maps_show_the_cells_that_patches_cover(size):
    clf = classifier(own_module(), prototype_size=size).fit(X, Y)
    maps, upsampled = clf.similarity_maps(NEW_X[:2]), clf.similarity_maps(NEW_X[:2], upsampled=True)
    cells = np.full((2, 6, 4, 4), -np.inf, np.float32)
    for row, col in np.ndindex(*maps.shape[2:]):
        covered = cells[..., row : row + size[0], col : col + size[1]]
        np.maximum(covered, maps[..., row : row + 1, col : col + 1], out=covered)
    side = min(SHAPE)
    for one, expected in zip(upsampled, torch.from_numpy(cells), strict=True):
        np.testing.assert_allclose(one, upsample(expected, side, side), atol=1e-6)


def test_transform_names_its_columns(model):
    names = model.get_feature_names_out()
    assert names.tolist() == [
        *("prototype0 (auk)", "prototype1 (auk)", "prototype2 (owl)"),
        *("prototype3 (owl)", "prototype4 (wren)", "prototype5 (wren)"),
    ]
    assert model.transform(NEW_X).shape == (9, 6)


def test_set_output_gives_a_frame_with_the_index_of_X(photos, reference):
    clf = pickle.loads(pickle.dumps(reference[0])).set_output(transform="pandas")
    frame = clf.transform(pd.DataFrame({"path": photos[:4]}, index=list("abcd")))
    assert frame.columns.tolist() == clf.get_feature_names_out().tolist()
    assert frame.index.tolist() == list("abcd")
    np.testing.assert_array_equal(frame, reference[0].transform(X[:4]))


def test_a_sheet_can_speak_for_any_classes(model):
    logits = model.decision_function(NEW_X)
    top2 = model.explain(NEW_X, classes="top2")
    for i, part in top2.groupby("sample"):
        best = model.classes_[np.argsort(-logits[i])[:2]]
        assert set(part["class"]) <= set(best)
        assert (part["is_predicted"] == (part["class"] == best[0])).all()
    everything = model.explain(NEW_X, classes="all")
    for labels in (["owl"], ["wren", "auk"], np.array(["owl", "auk"]), "owl"):
        sheet = model.explain(NEW_X, classes=labels)
        wanted = everything[everything["class"].isin(np.atleast_1d(labels))]
        pd.testing.assert_frame_equal(sheet, wanted.reset_index(drop=True))
    one, other = (model.explain(NEW_X, classes=c) for c in ({"owl", "auk"}, ["owl", "auk"]))
    pd.testing.assert_frame_equal(one, other)


def test_a_truncated_sheet_still_sums_to_the_logits(model):
    full = model.explain(NEW_X, classes="all")
    sheet = model.explain(NEW_X, classes="all", top=1)
    np.testing.assert_allclose(sums(sheet, model, 9), sums(full, model, 9), rtol=1e-9, atol=1e-12)
    assert sheet["rank"].max() == 2
    rest = sheet[sheet["rank"] == 2]
    assert (rest["source"] == "(rest)").all()
    assert rest["prototype"].isna().all()
    ranks = full.groupby(["sample", "class"])["contribution"]
    assert ranks.apply(lambda c: c.is_monotonic_decreasing).all()


def test_wrong_requests_to_explain_are_refused(model):
    with pytest.raises(ValueError, match=r"unknown 'kiwi'\. Known are 'auk', 'owl', 'wren'"):
        model.explain(NEW_X, classes=["owl", "kiwi"])
    with pytest.raises(ValueError, match="unknown 'predictd'"):
        model.explain(NEW_X, classes="predictd")
    with pytest.raises(ValueError, match="classes must"):
        model.explain(NEW_X, classes=[])
    for top in (0, -1, 2.5, "all"):
        with pytest.raises(ValueError, match=f"top must be an int >= 1, or None; got {top!r}"):
            model.explain(NEW_X, top=top)


@pytest.mark.parametrize("name", ["classes_", "coef_", "n_prototypes_", "prototypes_"])
def test_what_a_fit_finds_is_not_there_before_it(name):
    clf = classifier()
    assert not hasattr(clf, name)
    with pytest.raises(AttributeError, match=f"(not fitted yet|has no attribute '{name}')"):
        getattr(clf, name)


@pytest.mark.parametrize("prototype", [-1, 99, pd.NA, 1.5, "1"])
def test_images_of_prototypes_that_are_not_there_are_refused(model, prototype):
    with pytest.raises(IndexError, match=rf"prototype must be from 0 to \d+; got {prototype!r}"):
        model.source_image(prototype)


def test_labels_without_an_order_are_refused():
    kinds = np.array([Kind.A, Kind.B, Kind.C], dtype=object)
    with pytest.raises(TypeError, match="y holds labels of type Kind, which have no order"):
        classifier().fit(X, kinds[CODES])


class Kind(Enum):
    A, B, C = 1, 2, 3
