"""Several ProtoPNets as one: sums of logits and one sheet, against loops over the members."""

import base64
import io
import pickle
import re

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from test_sklearn import as_images
from torch import nn

from protoclf import ImageError, ProtoPNetClassifier, ProtoPNetEnsemble
from protoclf.editing import prune
from protoclf.explanation import REST, SHEET_COLUMNS, SOURCE_BOX
from protoclf.gallery import plot_prototypes
from protoclf.metrics import sparsity
from protoclf.nearest_patches import nearest_patches
from protoclf.onnx_export import export_onnx
from protoclf.plotting import plot_explanation
from protoclf.report import write_report
from protoclf.sheets import class_totals, compare
from protoclf.styling import style_sheet

COLUMNS = [*SHEET_COLUMNS[:2], "member", *SHEET_COLUMNS[2:]]
CHOICES = ["predicted", "top2", "all", ["red"], ["green", "blue"]]


def own_module():
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 2, 2), nn.ReLU())


def member(backbone="small_cnn", **parameters):
    settings = {
        "image_size": 32,
        "prototypes_per_class": 2,
        "joint_epochs": 1,
        "batch_size": 8,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier(backbone, **{**settings, **parameters})


def ensemble_of(**members):
    return ProtoPNetEnsemble(list(members.items()), verbose=0)


@pytest.fixture(scope="module")
def unfitted():
    """Three members of different backbones, sizes of maps and numbers of prototypes."""
    return ensemble_of(
        small=member(),
        own=member(own_module(), image_size=48, prototypes_per_class=3, lambda_l1=1e-3),
        squashed=member(
            resize="squash", similarity="log", prototype_size=(2, 2), random_state=1, lambda_l1=1e-5
        ),
    )


@pytest.fixture(scope="module")
def image_paths(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    paths = [str(folder / f"{i}.png") for i in range(len(squares[0]))]
    for path, pixels in zip(paths, squares[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="module")
def ensemble(unfitted, image_paths, squares):
    """To be read, not to be changed."""
    return clone(unfitted).fit(image_paths, squares[1])


@pytest.fixture(scope="module")
def new_images():
    """Noise: the members disagree about it."""
    return np.random.default_rng(5).integers(0, 255, (12, 50, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def two_classes(squares):
    X, y = squares
    members = {"a": member(), "b": member(own_module(), random_state=1)}
    return ensemble_of(**members).fit(X, y == "red"), X


def logits_of(ensemble, X):
    """The members' logits, added up one by one."""
    total = np.zeros((len(X), len(ensemble.classes_)))
    for clf in ensemble.estimators_:
        logits = clf.decision_function(X)
        for i in range(len(X)):
            for c in range(len(ensemble.classes_)):
                total[i, c] += logits[i, c]
    return total


# ---- answers ----------------------------------------------------------------------------------


def test_logits_are_the_sums_of_the_members(ensemble, new_images):
    logits = logits_of(ensemble, new_images)
    np.testing.assert_allclose(ensemble.decision_function(new_images), logits, atol=1e-4)
    exp = np.exp(logits)
    np.testing.assert_allclose(
        ensemble.predict_proba(new_images), exp / exp.sum(1, keepdims=True), atol=1e-5
    )
    best = ensemble.classes_[logits.argmax(1)]
    assert ensemble.predict(new_images).tolist() == best.tolist()
    assert ensemble.score(new_images, best) == 1
    own = np.array([clf.predict(new_images) for clf in ensemble.estimators_])
    assert (own != own[0]).any()  # or nothing is shown


@pytest.mark.parametrize(
    "use",
    [
        lambda ensemble, X: plot_explanation(ensemble, X[0]),
        lambda ensemble, X: plot_prototypes(ensemble),
        lambda ensemble, X: write_report(ensemble, X),
        lambda ensemble, X: export_onnx(ensemble, "model.onnx"),
        lambda ensemble, X: nearest_patches(ensemble, X),
        lambda ensemble, X: prune(ensemble),
        lambda ensemble, X: sparsity(ensemble, X),
    ],
)
def test_what_takes_one_classifier_leads_to_the_members(
    ensemble, new_images, use, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="members of an ensemble"):
        use(ensemble, new_images)
    assert not list(tmp_path.iterdir())


def test_members_are_fitted_as_they_would_be_alone(ensemble, unfitted, image_paths, squares):
    for name, given in unfitted.estimators:
        assert not hasattr(given, "prototypes_")
        alone = clone(given).fit(image_paths, squares[1])
        fitted = ensemble.named_estimators_[name]
        assert np.array_equal(
            fitted.decision_function(image_paths), alone.decision_function(image_paths)
        )
    assert ensemble.estimators_ == list(ensemble.named_estimators_.values())
    assert ensemble.classes_.tolist() == ["blue", "green", "red"]


def test_sample_weights_reach_every_member(squares):
    X, y = squares
    weight = np.r_[np.ones(12), np.zeros(12)]
    given = ensemble_of(a=member(), b=member(own_module()))
    fitted = clone(given).fit(X, y, sample_weight=weight)
    for (_, one), two in zip(given.estimators, fitted.estimators_, strict=True):
        alone = clone(one).fit(X, y, sample_weight=weight)
        assert np.array_equal(alone.coef_, two.coef_)


def test_two_classes_have_one_logit(two_classes):
    ensemble, X = two_classes
    expected = sum(clf.decision_function(X) for clf in ensemble.estimators_)
    np.testing.assert_allclose(ensemble.decision_function(X), expected, atol=1e-4)
    assert ensemble.predict(X).tolist() == (expected > 0).tolist()
    sheet = ensemble.explain(X, [True])
    by_sample = sheet.groupby("sample")
    proba = ensemble.predict_proba(X)
    assert by_sample["probability"].first().to_numpy() == pytest.approx(proba[:, 1])
    assert by_sample["is_predicted"].first().tolist() == ensemble.predict(X).tolist()


def test_activations_stand_side_by_side(ensemble, new_images):
    activations = ensemble.transform(new_images)
    start = 0
    for clf in ensemble.estimators_:
        own = clf.transform(new_images)
        assert np.array_equal(activations[:, start : start + own.shape[1]], own)
        start += own.shape[1]
    assert activations.shape == (len(new_images), start)
    assert start == ensemble.n_prototypes_ == 6 + 9 + 6
    logits = ensemble.decision_function(new_images)
    np.testing.assert_allclose(activations @ ensemble.coef_.T, logits, atol=1e-4)
    names = ensemble.get_feature_names_out()
    assert names[[0, 6, 20]].tolist() == [
        *("small__prototype0 (blue)", "own__prototype6 (blue)", "squashed__prototype20 (red)")
    ]
    copy = pickle.loads(pickle.dumps(ensemble)).set_output(transform="pandas")
    assert copy.transform(new_images).columns.tolist() == names.tolist()


# ---- the sheet --------------------------------------------------------------------------------


def sheet_by_loops(ensemble, X, classes):
    """Rows of the members' own sheets, one image and class at a time, put in order."""
    logits = ensemble.decision_function(X)
    rows = []
    for i in range(len(X)):
        ranking = np.argsort(-logits[i])
        codes = {"predicted": ranking[:1], "top2": ranking[:2], "all": ranking}.get(
            classes if isinstance(classes, str) else None,
            [c for c in ranking if ensemble.classes_[c] in classes],
        )
        for c in codes:
            found, first = [], 0
            for name, clf in ensemble.named_estimators_.items():
                own = clf.explain(X[i : i + 1], [ensemble.classes_[c]])
                for row in own.to_dict("records"):
                    found.append({**row, "member": name, "prototype": row["prototype"] + first})
                first += clf.n_prototypes_
            found.sort(key=lambda row: -row["contribution"])
            for rank, row in enumerate(found):
                of_ensemble = {"logit": logits[i, c], "is_predicted": c == ranking[0]}
                probability = np.exp(logits[i, c]) / np.exp(logits[i]).sum()
                of_ensemble |= {"probability": probability, "sample": i, "rank": rank + 1}
                rows.append({**row, **of_ensemble})
    return pd.DataFrame(rows)[COLUMNS]


@pytest.mark.parametrize("classes", CHOICES, ids=str)
def test_the_sheet_is_that_of_the_members_put_together(ensemble, new_images, classes):
    X = new_images[:6]
    sheet, expected = ensemble.explain(X, classes), sheet_by_loops(ensemble, X, classes)
    assert sheet.columns.tolist() == COLUMNS
    numbers = ["similarity", "weight", "contribution", "logit", "probability"]
    np.testing.assert_allclose(sheet[numbers], expected[numbers], rtol=1e-4, atol=1e-5)
    rest = [name for name in COLUMNS if name not in numbers]
    pd.testing.assert_frame_equal(sheet[rest], expected[rest], check_dtype=False)


@pytest.mark.parametrize("classes", CHOICES, ids=str)
@pytest.mark.parametrize("top", [None, 1, 3, 100])
def test_contributions_sum_to_the_logits_of_the_ensemble(ensemble, new_images, classes, top):
    sheet = ensemble.explain(new_images, classes, top)
    logits = ensemble.decision_function(new_images)
    code = {label: c for c, label in enumerate(ensemble.classes_)}
    for (i, label), rows in sheet.groupby(["sample", "class"]):
        assert rows["contribution"].sum() == pytest.approx(logits[i, code[label]], abs=1e-3)
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
    expected = {"predicted": 1, "top2": 2, "all": 3}
    per_sample = expected[classes] if isinstance(classes, str) else len(classes)
    assert len(sheet.groupby(["sample", "class"])) == per_sample * len(new_images)


@pytest.mark.parametrize("top", [1, 4])
def test_truncation_keeps_the_highest_of_all_members(ensemble, new_images, top):
    whole = ensemble.explain(new_images, "top2")
    short = ensemble.explain(new_images, "top2", top)
    kept = whole[whole["rank"] <= top]
    named = short[short["source"] != REST]
    assert named["member"].tolist() == kept["member"].tolist()
    assert named["prototype"].tolist() == kept["prototype"].tolist()
    np.testing.assert_allclose(
        named[["x0", "x1", "similarity"]].astype(float), kept[["x0", "x1", "similarity"]], rtol=1e-5
    )
    rest = short[short["source"] == REST]
    assert (rest["rank"] == top + 1).all()
    assert rest[["member", "prototype"]].isna().all(axis=None)
    hidden = whole[whole["rank"] > top].groupby(["sample", "class"], sort=False)["contribution"]
    np.testing.assert_allclose(rest["contribution"], hidden.sum(), atol=1e-4)


def test_a_sheet_names_paths_and_the_files_of_sources(ensemble, image_paths):
    sheet = ensemble.explain(image_paths[:5], "top2")
    assert sheet["path"].tolist() == [image_paths[i] for i in sheet["sample"]]
    assert set(sheet["source"]) <= set(image_paths)
    assert set(sheet["member"]) == {"small", "own", "squashed"}
    assert sheet["sample"].is_monotonic_increasing


def test_gradient_boxes_are_those_of_the_members(two_classes):
    ensemble, X = two_classes
    sheet = ensemble.explain(X[:2], attribution="gradient", percentile=90)
    first = ensemble.estimators_[0].n_prototypes_
    for row in sheet.to_dict("records"):
        clf = ensemble.named_estimators_[row["member"]]
        own = clf.explain(
            X[[row["sample"]]], [row["class"]], attribution="gradient", percentile=90
        ).set_index("prototype")
        found = own.loc[row["prototype"] - (first if row["member"] == "b" else 0)]
        assert [row[k] for k in ("x0", "y0", "x1", "y1")] == found[
            ["x0", "y0", "x1", "y1"]
        ].tolist()


def test_any_form_of_images_is_explained(ensemble, image_paths, squares):
    expected = ensemble.explain(image_paths[:4]).drop(columns="path")
    pictures = [PIL.Image.fromarray(pixels) for pixels in squares[0][:4]]
    forms = [tuple(image_paths[:4]), np.array(image_paths[:4]), pd.Series(image_paths[:4])]
    forms += [pd.DataFrame({"file": image_paths[:4]}, index=[7, 1, 3, 2]), squares[0][:4]]
    forms += [pictures, torch.from_numpy(squares[0][:4])]
    for form in forms:
        pd.testing.assert_frame_equal(ensemble.explain(form).drop(columns="path"), expected)


def test_a_wrong_class_or_setting_of_a_sheet_is_refused(ensemble, new_images):
    with pytest.raises(ValueError, match="the unknown 'pink'"):
        ensemble.explain(new_images, ["pink"])
    with pytest.raises(ValueError, match="top must be"):
        ensemble.explain(new_images, top=0)


# ---- what reads sheets ------------------------------------------------------------------------


def test_totals_and_comparisons_hold(ensemble, new_images):
    totals = class_totals(ensemble.explain(new_images, "all"))
    np.testing.assert_allclose(totals["total"], totals["logit"], atol=1e-3)
    best = np.sort(ensemble.decision_function(new_images), axis=1)
    sheet = ensemble.explain(new_images, "top2")
    table = compare(sheet)
    difference = table.groupby("sample")["difference"].sum()
    np.testing.assert_allclose(difference, best[:, -1] - best[:, -2], atol=1e-3)
    assert not table.duplicated(["sample", "prototype"]).any()
    assert len(table) == len(sheet.drop_duplicates(["sample", "member", "prototype"]))
    with pytest.raises(ValueError, match="compare needs whole sheets"):
        compare(ensemble.explain(new_images, "top2", top=2))


def test_prototypes_are_numbered_through(ensemble, image_paths):
    table = ensemble.prototypes_
    assert table["prototype"].tolist() == list(range(ensemble.n_prototypes_))
    for row in table.to_dict("records"):
        clf = ensemble.named_estimators_[row["member"]]
        own = clf.prototypes_.iloc[row["member_prototype"]]
        for name in ("class", "source", "row", "col", "x0", "weight"):
            assert row[name] == own[name]
        c = list(ensemble.classes_).index(row["class"])
        assert ensemble.coef_[c, row["prototype"]] == pytest.approx(row["weight"])
        image = ensemble.source_image(row["prototype"])
        assert np.array_equal(image, np.asarray(PIL.Image.open(row["source"])))
        assert np.array_equal(image, ensemble.source_image(row["member_prototype"], row["member"]))
    with pytest.raises(ValueError, match="member must be one of"):
        ensemble.source_image(0, "large")
    for wrong in (-1, len(table), pd.NA):
        with pytest.raises(IndexError, match=f"from 0 to {len(table) - 1}; got {wrong}"):
            ensemble.source_image(wrong)


def test_a_styled_sheet_shows_the_sources_of_all_members(ensemble, image_paths):
    sheet = ensemble.explain(image_paths[:1], top=2)
    assert style_sheet(ensemble, sheet).to_html().count("training patch") == 2


def test_parquet_and_pickle_change_nothing(ensemble, new_images, tmp_path):
    sheet = ensemble.explain(new_images, "top2", top=2)
    sheet.to_parquet(tmp_path / "sheet.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sheet.parquet"), sheet)
    copy = pickle.loads(pickle.dumps(ensemble))
    pd.testing.assert_frame_equal(copy.explain(new_images, "top2", top=2), sheet)


# ---- fitting ----------------------------------------------------------------------------------


def counting(monkeypatch):
    fits = []
    monkeypatch.setattr(ProtoPNetClassifier, "fit", lambda self, *given: fits.append(self))
    return fits


@pytest.mark.parametrize(
    ("estimators", "message"),
    [
        ([], "one or more pairs"),
        ("small_cnn", "one or more pairs"),
        ([ProtoPNetClassifier()], "at position 0"),
        ([("a", member()), ("b", "drop")], "at position 1 it has \\('b', 'drop'\\)"),
        ([("a", nn.Identity())], "at position 0"),
        ([("", member())], "at position 0"),
        ([("a", member()), ("a", member())], "not unique"),
        ([("n_jobs", member())], "conflict with constructor arguments"),
        ([("a__b", member())], "must not contain __"),
        ([("a", member()), ("b", member(lambda_sep=-1))], "Member 'b': lambda_sep must be"),
        ([("a", member()), ("b", member(random_state=2**32))], "Member 'b': random_state must be"),
        (
            [("a", member()), ("b", member(prototypes_per_class=9, distinct="images"))],
            "Member 'b': .* fewer training",
        ),
        (
            [("a", member()), ("b", member(prototypes_per_class={"red": 1}))],
            "Member 'b': .*missing",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_any_member_is(
    estimators, message, squares, monkeypatch
):
    fits = counting(monkeypatch)
    with pytest.raises(ValueError, match=message):
        ProtoPNetEnsemble(estimators).fit(*squares)
    assert not fits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_weight": [-1.0] * 24}, "Negative values"),
        ({"sample_weight": "no red"}, r"sample_weight is 0 for the whole of class \['red'\]"),
        ({"sample_weight": "one red"}, "Member 'b': .*'red' has 1 for 2 prototypes"),
        ({"sample_weight": [1e-50] * 24}, "Member 'a': .*beyond the numbers of float32"),
        ({"groups": [0] * 23}, "X has 24 images and groups 23"),
    ],
)
def test_weights_and_groups_are_checked_before_any_member_is_fitted(
    given, message, squares, monkeypatch
):
    X, y = squares
    red = y == "red"
    weights = {"no red": ~red, "one red": ~red | (red.cumsum() == 1)}
    if isinstance(given.get("sample_weight"), str):
        given = {"sample_weight": weights[given["sample_weight"]].astype(float)}
    members = {"a": member(own_module(), joint_epochs=0, prototypes_per_class=1)}
    ensemble = ensemble_of(**members).fit(X, y)
    fits = counting(monkeypatch)
    ensemble.set_params(estimators=[*ensemble.estimators, ("b", member(distinct="images"))])
    with pytest.raises(ValueError, match=message):
        ensemble.fit(X, y, **given)
    assert not fits
    assert ensemble.score(X, y) > 0  # the earlier one is there


def test_a_wrong_augmentation_is_refused_before_any_member_is_fitted(squares, monkeypatch):
    fits = counting(monkeypatch)
    with pytest.raises(TypeError, match="Member 'b': augmentation must be"):
        ensemble_of(a=member(), b=member(augmentation="mild")).fit(*squares)
    assert not fits


def test_a_broken_file_is_named_before_any_member_is_fitted(
    image_paths, squares, tmp_path, monkeypatch
):
    fits = counting(monkeypatch)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given = [*image_paths[:5], str(broken), *image_paths[6:]]
    with pytest.raises(ImageError, match="position 5"):
        ensemble_of(a=member()).fit(given, squares[1])
    assert not fits


def test_a_failed_fit_leaves_no_earlier_one(squares, monkeypatch):
    ensemble = ensemble_of(a=member(own_module(), joint_epochs=0)).fit(*squares)

    def fail(*given):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ProtoPNetClassifier, "fit", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        ensemble.fit(*squares)
    with pytest.raises(NotFittedError):
        ensemble.predict(squares[0])


def test_progress_names_the_members(squares, capsys):
    given = ensemble_of(a=member(own_module(), joint_epochs=0), b=member(joint_epochs=0))
    given.fit(*squares)
    assert capsys.readouterr().out == ""
    given.set_params(verbose=1).fit(*squares)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["Member 'a' is fitted, 1 of 2.", "Member 'b' is fitted, 2 of 2."]


@pytest.fixture
def one_thread():
    """As joblib's processes have it: sums round by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow  # starts processes
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", ["paths", "arrays"])
def test_processes_fit_the_same_members(form, unfitted, image_paths, squares, capsys):
    X = image_paths if form == "paths" else np.repeat(np.repeat(squares[0], 3, axis=1), 3, axis=2)
    expected = clone(unfitted).fit(X, squares[1])
    parallel = clone(unfitted).set_params(n_jobs=2, verbose=1).fit(X, squares[1])
    assert "Member 'squashed' is fitted, 3 of 3." in capsys.readouterr().out
    np.testing.assert_allclose(
        parallel.decision_function(X), expected.decision_function(X), rtol=1e-4, atol=1e-4
    )
    assert parallel.prototypes_["source"].tolist() == expected.prototypes_["source"].tolist()
    pd.testing.assert_frame_equal(parallel.explain(X[:3]), expected.explain(X[:3]), rtol=1e-3)


# ---- the contract of scikit-learn -------------------------------------------------------------


class OnTables(ProtoPNetEnsemble):
    """Takes rows of a table for images, as scikit-learn's checks need."""

    def fit(self, X, y, sample_weight=None):
        validate_data(self, X, skip_check_array=True)  # a table has features
        return super().fit(as_images(X), y, sample_weight)

    def _logits(self, X):
        return super()._logits(self._images(X))

    def transform(self, X):
        return super().transform(self._images(X))

    def score(self, X, y=None, sample_weight=None):
        return super().score(self._images(X), y, sample_weight)

    def _images(self, X):
        check_is_fitted(self)
        images = as_images(X)
        if images is not X:
            validate_data(self, X, reset=False, skip_check_array=True)
        return images

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.three_d_array = False
        tags.input_tags.two_d_array, tags.input_tags.string = True, False
        return tags


EXCUSED = {
    "check_sample_weight_equivalence_on_dense_data": "as for a single classifier: test_sklearn.py",
    "check_methods_sample_order_invariance": "as for a single classifier: test_sklearn.py",
}


def on_table(**parameters):
    settings = {"image_size": 16, "resize": "squash", "prototype_size": "full", "similarity": "log"}
    settings |= {"prototypes_per_class": 2, "joint_epochs": 0}
    return member(nn.AvgPool2d(4), **settings, **parameters)


on_tables = OnTables([("a", on_table(warmup_epochs=1)), ("b", on_table())], verbose=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checks repeat rows: prototypes collapse
@pytest.mark.slow  # fits of two members; those of one are in test_sklearn.py
@parametrize_with_checks([on_tables], expected_failed_checks=lambda estimator: EXCUSED)
def test_contract(estimator, check):
    check(estimator)


def test_parameters_are_stored_untouched_and_set_by_nested_names():
    first, second = member(), member()
    given = [("first", first), ("second", second)]
    ensemble = ProtoPNetEnsemble(given, n_jobs=2)
    assert ensemble.get_params(deep=False) == {"estimators": given, "n_jobs": 2, "verbose": 1}
    assert ensemble.estimators is given
    params = ensemble.set_params(first__lr=0.5, second__optimizer__weight_decay=0.1).get_params()
    assert params["first"] is first
    assert first.lr == params["first__lr"] == 0.5
    assert params["second__optimizer__weight_decay"] == 0.1
    third = member()
    ensemble.set_params(second=third, verbose=0)
    assert ensemble.estimators == [("first", first), ("second", third)]
    with pytest.raises(ValueError, match="Did you mean 'lambda_clst'"):
        ensemble.set_params(first__lambda_cluster=0)
    for wrong, near in {"n_job": "n_jobs", "frist__lr": "first__lr", "secnd": "second"}.items():
        with pytest.raises(ValueError, match=f"has no parameter '{wrong}'. Did you mean '{near}'"):
            ensemble.set_params(**{wrong: 1})
    copy = clone(ensemble)
    assert copy.estimators[0][1] is not first
    assert copy.get_params()["first__lr"] == 0.5
    assert is_classifier(ensemble)
    assert "first" in ensemble._repr_html_()
    assert repr(ProtoPNetEnsemble([])) == "ProtoPNetEnsemble(estimators=[])"


def test_an_unfitted_ensemble_says_so():
    ensemble = ensemble_of(a=member())
    for name in ("prototypes_", "coef_", "n_prototypes_", "classes_"):
        assert not hasattr(ensemble, name)
    X = np.zeros((1, 20, 20, 3))
    for use in (ensemble.predict, ensemble.explain, ensemble.transform):
        with pytest.raises(NotFittedError, match="ProtoPNetEnsemble instance is not fitted"):
            use(X)


@pytest.mark.slow  # many fits
def test_cross_validation_and_searches_of_nested_parameters(squares, image_paths):
    y = squares[1]
    given = ensemble_of(a=member(own_module(), joint_epochs=0), b=member(joint_epochs=0))
    folds = StratifiedKFold(2)
    scores = cross_val_score(given, image_paths, y, cv=folds, error_score="raise")
    for score, (train, test) in zip(scores, folds.split(image_paths, y), strict=True):
        fold = clone(given).fit([image_paths[i] for i in train], y[train])
        assert score == fold.score([image_paths[i] for i in test], y[test])
    grid = {"a__prototypes_per_class": [1, 2]}
    search = GridSearchCV(given, grid, cv=folds, error_score="raise").fit(image_paths, y)
    best = search.best_estimator_
    assert best.n_prototypes_ == 3 * search.best_params_["a__prototypes_per_class"] + 6


def test_members_of_different_images_are_shown_beside_their_own(fitted, squares):
    X, y = squares
    members = [("a", clone(fitted).fit(X[:12], y[:12])), ("b", clone(fitted).fit(X[12:], y[12:]))]
    ensemble = ProtoPNetEnsemble.of_fitted(members, verbose=0)
    sheet = ensemble.explain(X[:2], "all")
    html = style_sheet(ensemble, sheet, X[:2], side=96).to_html()
    found = re.findall(r'alt="training patch" src="data:image/png;base64,([^"]+)"', html)
    assert len(found) == len(sheet)
    for row, data in zip(sheet.to_dict("records"), found, strict=True):
        x0, y0, x1, y1 = (row[side] for side in SOURCE_BOX)
        expected = ensemble.source_image(row["prototype"])[y0:y1, x0:x1]
        patch = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        np.testing.assert_array_equal(patch, expected)


def test_an_ensemble_of_fitted_members_is_that_which_fits_them(fitted, squares):
    again = clone(fitted).set_params(random_state=1).fit(*squares)
    ensemble = ProtoPNetEnsemble.of_fitted([("a", fitted), ("b", again)], verbose=0)
    X = squares[0]
    logits = fitted.decision_function(X) + again.decision_function(X)
    np.testing.assert_allclose(ensemble.decision_function(X), logits, rtol=1e-6)
    assert ensemble.estimators_ == [fitted, again]
    assert set(ensemble.explain(X[:2])["member"]) == {"a", "b"}


def test_fitted_members_must_agree_on_the_classes(fitted, squares):
    X, y = squares
    other = clone(fitted).fit(X, np.char.upper(y))
    with pytest.raises(ValueError, match="same classes: 'a' has"):
        ProtoPNetEnsemble.of_fitted([("a", fitted), ("b", other)])
    with pytest.raises(NotFittedError):
        ProtoPNetEnsemble.of_fitted([("a", fitted), ("b", clone(fitted))])
    numbers, flags = (clone(fitted).fit(X, kind(y == "red")) for kind in (np.int64, np.bool_))
    with pytest.raises(ValueError, match="same classes: 'a' has"):
        ProtoPNetEnsemble.of_fitted([("a", numbers), ("b", flags)])


def test_members_may_have_any_name(fitted, squares):
    made = ensemble_of(self=member(), data=member(random_state=1))
    assert list(made.fit(*squares).named_estimators_) == ["self", "data"]
    assert list(ProtoPNetEnsemble.of_fitted([("self", fitted)]).named_estimators_) == ["self"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.bool_, np.float32])
def test_labels_of_any_type_stand_beside_an_image_without_an_answer(squares, dtype, image_paths):
    (_, y), paths = squares, image_paths
    made = ensemble_of(a=member(on_bad_image="skip"), b=member(on_bad_image="skip", random_state=1))
    made.fit(paths, (y == "red").astype(dtype))
    whole, sheet = made.explain(paths[:2]), made.explain([paths[0], "gone.png", paths[1]])
    assert sheet["class"].dropna().tolist() == whole["class"].tolist()
    assert sheet["logit"].dropna().tolist() == pytest.approx(whole["logit"].tolist())
    assert len(made.explain(pd.Index(paths[:2]))) == len(whole)
