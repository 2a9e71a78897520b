"""Intervals, the random baseline, the table of all metrics, and scorers."""

import copy
import doctest
import importlib
import pickle
import pkgutil
from dataclasses import replace

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from colour_model import COLOURS, colour_model, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch.utils.data import Dataset

from protoclf import ProtoPNetClassifier, metrics
from protoclf.datasets import make_birds
from protoclf.features import FitData
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.last_layer import solve_last_layer
from protoclf.metrics import (
    bootstrap_interval,
    interpretability_report,
    random_prototypes,
    rank_stability,
)
from protoclf.nearest_patches import nearest_patches, purity
from protoclf.patch_search import view_activations
from protoclf.scorers import MetricScorer, n_prototypes_scorer
from protoclf.self_matches import replace_self_matches

MODULES = [m.name for m in pkgutil.iter_modules(metrics.__path__, "protoclf.metrics.")]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A classifier of birds, new birds, and where their parts are."""
    root = tmp_path_factory.mktemp("birds")
    X, y, _ = make_birds(root / "train", 6, 64)
    X_new, y_new, parts = make_birds(root / "test", 3, 64, start=6)
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=64,
        prototypes_per_class=3,
        joint_epochs=4,
        batch_size=16,
        lr=5e-3,
        backbone_lr=5e-3,
        random_state=0,
        verbose=0,
    )
    return clf.fit(X, y), X_new, y_new, parts


# ---- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [50, 400])
def test_an_interval_is_about_that_of_the_normal_distribution(n):
    values = np.random.default_rng(0).normal(3, 2, n)
    low, high = bootstrap_interval(values, n_resamples=4000)
    half = 1.96 * values.std() / n**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    draws = rng.exponential(1, (400, 60))
    intervals = np.array([bootstrap_interval(v, level=0.8, n_resamples=200) for v in draws])
    covered = ((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).mean()
    assert 0.72 < covered < 0.86


def test_groups_are_drawn_as_a_whole():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(30), 4)
    values = rng.normal(size=30)[groups]  # the same four times: no more than 30 numbers
    together = bootstrap_interval(values, groups, n_resamples=3000)
    alone = bootstrap_interval(values[::4], n_resamples=3000)
    np.testing.assert_allclose(together, alone, atol=0.03)
    apart = bootstrap_interval(values, n_resamples=3000)
    assert np.diff(apart) < 0.6 * np.diff(together)


def test_groups_weigh_by_their_number_of_values():
    """Against the same resamples, one after the other."""
    values, groups = np.array([1.0, 2, 3, 10]), np.array(["a", "a", "a", "b"])
    low, high = bootstrap_interval(values, groups, level=1.0, n_resamples=500)
    assert (low, high) == (2, 10)  # all of one group
    middle = bootstrap_interval(values, groups, level=1e-9, n_resamples=501)[0]
    assert middle == pytest.approx(4)  # one of each


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
    scale=st.floats(0.1, 10),
    shift=st.floats(-10, 10),
)
def test_intervals_move_with_the_values(values, scale, shift):
    values = np.array(values)
    low, high = bootstrap_interval(values, n_resamples=50)
    assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
    moved = bootstrap_interval(scale * values + shift, n_resamples=50)
    np.testing.assert_allclose(moved, [scale * low + shift, scale * high + shift], atol=1e-6)


def test_missing_values_are_left_out_and_one_group_has_no_interval():
    values = np.array([1.0, 2, np.nan, 4])
    assert bootstrap_interval(values) == bootstrap_interval([1.0, 2, 4])
    assert np.isnan(bootstrap_interval([1.0, 2], ["a", "a"])).all()
    assert np.isnan(bootstrap_interval([np.nan, 2])).all()
    with pytest.raises(ValueError, match="level must be a number > 0 and <= 1"):
        bootstrap_interval(values, level=0)
    for wrong in (([1.0, np.inf],), ([1.0, 2], ["a", None])):
        with pytest.raises(ValueError, match="values must be finite or missing, and the group"):
            bootstrap_interval(*wrong)


# ---- prototypes at random patches -------------------------------------------------------------


def test_they_are_patches_of_images_of_their_classes(birds):
    clf, X, y, _ = birds
    before = clf.predict_proba(X)
    drawn = random_prototypes(clf, X, y)
    table = drawn.prototypes_
    assert table["class"].tolist() == clf.prototypes_["class"].tolist()
    assert (y[table["source_index"]] == table["class"]).all()
    assert table["source"].tolist() == [X[i] for i in table["source_index"]]
    maps = drawn.similarity_maps(X)
    for j, row in table.iterrows():
        assert maps[row["source_index"], j, row["row"], row["col"]] == pytest.approx(1, abs=1e-5)
    assert table[["row", "col"]].drop_duplicates().shape[0] > 8
    own = drawn.explain([X[i] for i in table["source_index"]], "all")
    own = own[own["sample"] == own["prototype"]].drop_duplicates("sample")
    boxes = table.loc[own["sample"], ["x0", "y0", "x1", "y1"]]
    assert (boxes.to_numpy() == own[["x0", "y0", "x1", "y1"]].to_numpy()).all()
    np.testing.assert_array_equal(clf.predict_proba(X), before)  # as it was


def test_their_last_layer_is_optimal_without_matches_of_themselves(birds):
    clf, X, y, _ = birds
    clf = copy.deepcopy(clf).set_params(class_weight={clf.classes_[0]: 3.0})
    clf.last_layer_result_ = replace(clf.last_layer_result_, lambda_l2=0.1)
    drawn = random_prototypes(clf, X, y)
    codes = torch.from_numpy(np.searchsorted(clf.classes_, y))
    g, owner = torch.from_numpy(drawn.transform(X)).double(), drawn.module_.owner
    source = torch.tensor(drawn.prototypes_["source_index"].tolist())
    g = replace_self_matches(g, codes, owner, source)
    data = FitData(drawn, ImageDataset(Images(X), drawn.preprocessing_, codes), None)
    views = view_activations(drawn, data).double()  # as in the fit: the backbone was trained
    assert len(views) == 2
    views = [replace_self_matches(view, codes, owner, source) for view in views]
    shown = torch.cat([g, *views]), codes.repeat(3), owner
    weight = np.where(y == clf.classes_[0], 3.0, 1.0)
    alone = solve_last_layer(*shown, clf.lambda_l1_, np.tile(weight, 3), lambda_l2=0.1)
    assert drawn.last_layer_result_.objective == pytest.approx(alone.objective, rel=1e-3)
    table = drawn.prototypes_
    assert (table["weight"] == drawn.coef_[owner, np.arange(len(owner))]).all()


def test_seeds_draw_other_patches(birds):
    clf, X, y, _ = birds
    where = ["source_index", "row", "col"]
    first, again, other = (
        random_prototypes(clf, X, y, random_state=s).prototypes_[where] for s in (0, 0, 1)
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_a_class_without_images_draws_from_all(fitted, squares):
    X, y = squares
    some = y != "red"
    drawn = random_prototypes(fitted, X[some], y[some])
    assert drawn.n_prototypes_ == fitted.n_prototypes_
    assert drawn.source_image(5).shape == (40, 60, 3)
    assert "red" in set(drawn.prototypes_["class"])


def test_larger_prototypes_are_drawn_too(squares):
    X, y = squares
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=48,
        prototypes_per_class=2,
        prototype_size=(2, 3),
        joint_epochs=0,
        class_weight="balanced",
        random_state=0,
        verbose=0,
    ).fit(X, y)
    drawn = random_prototypes(clf, X, y)
    maps = drawn.similarity_maps(X)
    for j, row in drawn.prototypes_.iterrows():
        assert maps[row["source_index"], j, row["row"], row["col"]] == pytest.approx(1, abs=1e-5)


# ---- the table --------------------------------------------------------------------------------


SEED = {"random_state": 1}


@pytest.fixture(scope="module")
def report(birds):
    clf, X, y, parts = birds
    return interpretability_report(clf, X, y, parts, n_perturbed=6, n_resamples=100, **SEED)


def test_the_table_holds_what_each_function_says(birds, report):
    clf, X, y, parts = birds
    masks = metrics.PartMasks(clf, X, parts)
    ranks = metrics.rank_stability(clf, X, **SEED).groupby("change")["kept"].mean()
    expected = {
        "accuracy": clf.score(X, y),
        "global size": metrics.global_size(clf),
        "sparsity": metrics.sparsity(clf, X)["size"].mean(),
        "distinctness": metrics.distinctness(clf)["distinct"].mean(),
        "class purity": purity(nearest_patches(clf, X, 10, y)).mean(),
        "rank stability, JPEG": ranks["jpeg"],
        "rank stability, noise": ranks["noise"],
        "consistency": metrics.consistency(clf, X, y, parts)["consistent"].mean(),
        "stability": metrics.stability(clf, X, y, parts, **SEED)["stable"].mean(),
        "part purity": metrics.part_purity(clf, X, parts)["purity"].mean(),
        "pointing": metrics.pointing(clf, X, masks)["inside"].mean(),
        "object coverage": metrics.object_coverage(clf, X, masks)["coverage"].mean(),
    }
    for name, value in expected.items():
        assert report.loc[name, "value"] == pytest.approx(value), name
    drawn = random_prototypes(clf, X, y, **SEED)
    baseline = metrics.consistency(drawn, X, y, parts)["consistent"].mean()
    assert report.loc["consistency", "baseline"] == pytest.approx(baseline)
    assert report.loc["accuracy", ["baseline", "baseline_low", "baseline_high"]].isna().all()
    counted = metrics.sparsity(clf, X)
    interval = bootstrap_interval(counted["size"], counted["sample"], n_resamples=100, **SEED)
    assert tuple(report.loc["sparsity", ["low", "high"]]) == interval


def test_what_runs_often_runs_on_some_images(birds, report):
    clf, X, y, _ = birds
    assert (report["unit"] != "sample").sum() == 6
    few = ["box deletion", "deletion", "insertion", "location change", "activation change"]
    assert (report.loc[few, "n"] == 6).all()
    assert report.loc["sparsity", "n"] == len(X)
    index = np.sort(np.random.default_rng(1).permutation(len(X))[:6])
    some = [X[i] for i in index]
    boxes = metrics.deletion_score(clf, some, **SEED)
    curves = metrics.deletion_insertion(clf, some, **SEED)
    moved = metrics.spatial_misalignment(clf, some, **SEED)
    expected = [
        boxes["similarity_drop"] - boxes["control_similarity_drop"],
        curves["control_deletion"] - curves["deletion"],
        curves["insertion"] - curves["control_insertion"],
        moved["location_change"],
        moved["activation_change"],
    ]
    for name, values in zip(few, expected, strict=True):
        assert report.loc[name, "value"] == pytest.approx(values.mean()), name
    alone = interpretability_report(clf, X, y, metrics=["deletion"], n_perturbed=6, **SEED)
    assert alone.index.tolist() == ["deletion"]
    assert alone.loc["deletion", "value"] == report.loc["deletion", "value"]


def test_values_lie_in_their_intervals(report):
    assert report.index[report["low"].isna()].tolist() == ["global size"]
    # a baseline need not have boxes to delete
    for prefix, value, least in (("", "value", 12), ("baseline_", "baseline", 8)):
        rows = report[report[f"{prefix}low"].notna()]
        assert len(rows) > least
        assert (rows[f"{prefix}low"] <= rows[value] + 1e-9).all()
        assert (rows[f"{prefix}high"] >= rows[value] - 1e-9).all()
    assert set(report["better"]) == {"higher", "lower"}


def test_the_baseline_may_draw_from_the_training_images(birds):
    clf, X, y, parts = birds
    rows = {"metrics": ["accuracy", "consistency"], "n_resamples": 2, "random_state": 3}
    table = interpretability_report(clf, X[::2], y[::2], parts, draw_from=(X, y), **rows)
    drawn = random_prototypes(clf, X, y, random_state=3)
    assert table.loc["accuracy", "baseline"] == drawn.score(X[::2], y[::2])
    consistent = metrics.consistency(drawn, X[::2], y[::2], parts)["consistent"].mean()
    assert table.loc["consistency", "baseline"] == pytest.approx(consistent)


def test_what_the_data_do_not_allow_is_left_out(birds):
    clf, X, y, parts = birds
    points = parts[["path", "part"]].assign(x=parts["x0"], y=parts["y0"])
    few = {"n_perturbed": 1, "n_resamples": 2}
    plain = interpretability_report(clf, X[::3], y[::3], **few).index
    assert not {"consistency", "pointing"} & set(plain)
    pointed = interpretability_report(clf, X[::3], y[::3], points, **few).index
    assert set(pointed) - set(plain) == {"consistency", "stability", "part purity"}


def test_masks_that_are_given_are_used_beside_boxes_of_parts(birds):
    clf, X, y, parts = birds
    masks = [np.ones(PIL.Image.open(path).size[::-1]) for path in X]
    rows = {"metrics": ["pointing"], "n_resamples": 2}
    assert interpretability_report(clf, X, y, parts, masks, **rows)["value"].item() == 1


def test_a_data_set_of_torch_is_taken_too(birds, report):
    clf, X, y, _ = birds
    pairs = list(zip([PIL.Image.open(path) for path in X], y, strict=True))

    class Birds(Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, i):
            return pairs[i]

    rows = {"metrics": ["deletion", "sparsity"], "n_perturbed": 6, "n_resamples": 2, **SEED}
    table = interpretability_report(clf, Birds(), y, **rows)
    for name in rows["metrics"]:
        assert table.loc[name, "value"] == pytest.approx(report.loc[name, "value"])
    assert (
        MetricScorer("deletion", n_perturbed=6, **SEED)(clf, Birds(), y)
        == table.loc["deletion", "value"]
    )


def test_sizes_may_be_numbers_of_numpy_and_images_an_index(birds):
    clf, X, y, _ = birds
    other = copy.deepcopy(clf).set_params(batch_size=np.int64(5))
    wanted = {"metrics": ["box deletion", "deletion"], "n_perturbed": 4, "n_resamples": 20}
    table = interpretability_report(other, pd.Index(X), y, **wanted)
    expected = interpretability_report(clf, X, y, **wanted)
    pd.testing.assert_series_equal(table["value"], expected["value"], rtol=1e-4)
    rank_stability(clf, X[:2], quality=np.int64(50))


def test_labels_that_no_class_has_are_refused(birds):
    clf, X, y, _ = birds
    with pytest.raises(ValueError, match="classes that the first fit did not see"):
        interpretability_report(clf, X, np.zeros(len(y)), metrics=["accuracy"], draw_from=(X, y))


def test_a_baseline_says_over_how_many_it_is():
    clf = colour_model(weight=[[0, 0], [0, 1]], colours=[COLOURS["blue"], COLOURS["red"]])
    X = np.stack([picture({(2, 5): COLOURS["red"]})] * 3 + [picture({(1, 1): COLOURS["blue"]})] * 3)
    y = ["red"] * 3 + ["blue"] * 3
    table = interpretability_report(clf, X, y, masks=np.ones((6, 32, 32)), n_resamples=2)
    drawn = random_prototypes(clf, X, y)
    for model, column in ((clf, "n"), (drawn, "baseline_n")):
        boxes = metrics.pointing(model, X, np.ones((6, 32, 32)))
        assert table.loc["pointing", column] == boxes["sample"].nunique()
    assert pd.isna(table.loc["accuracy", "baseline_n"])


def test_a_model_that_uses_no_prototype_has_no_boxes():
    idle = colour_model(weight=[[0, 0], [0, 0]])
    X = np.stack([picture({(2, 5): COLOURS["red"]}), picture({(0, 0): COLOURS["blue"]})])
    table = interpretability_report(idle, X, ["red", "blue"], masks=np.ones((2, 32, 32)))
    assert table.loc["global size", "value"] == table.loc["object coverage", "value"] == 0
    without = ["rank stability, JPEG", "rank stability, noise", "box deletion", "deletion"]
    without += ["insertion", "location change", "activation change", "pointing"]
    assert table.index[table["value"].isna()].tolist() == without
    assert (table.loc[without, "n"] == 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metrics": ["sparseness"]}, r"metrics must be a list of names among \['accuracy'"),
        ({"metrics": "sparsity"}, "metrics must be a list of names"),
        ({"metrics": ["consistency"]}, "'consistency' needs parts, which are not given"),
        ({"metrics": ["pointing"]}, "'pointing' needs masks"),
        ({"n_perturbed": 0}, "n_perturbed must be an int >= 1"),
        ({"level": 2}, "level must be a number > 0 and <= 1"),
        ({"draw_from": ["a.png", "b.png", "c.png"]}, "draw_from must be a pair"),
    ],
)
def test_wrong_arguments_are_refused(fitted, squares, wrong, message):
    with pytest.raises(ValueError, match=message):
        interpretability_report(fitted, *squares, **wrong)


# ---- scorers ----------------------------------------------------------------------------------


def test_scorers_are_the_rows_of_the_table_and_more_is_better(birds, report):
    clf, X, y, _ = birds
    for name in ("sparsity", "distinctness", "class purity", "activation change"):
        sign = 1 if report.loc[name, "better"] == "higher" else -1
        scorer = MetricScorer(name, n_perturbed=6, **SEED)
        assert scorer(clf, X, y) == pytest.approx(sign * report.loc[name, "value"]), name
        assert pickle.loads(pickle.dumps(scorer)) == scorer
    assert MetricScorer("global size")(clf, X, y) == n_prototypes_scorer(clf)
    pipeline = make_pipeline("passthrough", clf)
    assert MetricScorer("sparsity")(pipeline, X, y) == MetricScorer("sparsity")(clf, X, y)


def test_scorers_show_a_classifier_what_its_pipeline_shows_it(fitted, squares):
    X, y = squares
    turned = make_pipeline(FunctionTransformer(np.rot90, kw_args={"axes": (1, 2)}), fitted)
    for name in ("sparsity", "accuracy"):
        score, seen = MetricScorer(name), np.rot90(X, axes=(1, 2))
        assert score(turned, X, y) == score(fitted, seen, y)
    assert score(turned, X, y) == turned.score(X, y)
    table = pd.DataFrame({"size": range(len(X)), "position": range(len(X))})
    columns = FunctionTransformer(lambda frame: X[frame["position"]])
    assert score(make_pipeline(columns, fitted), table, y) == score(fitted, X, y)


def test_a_search_for_short_sheets(fitted, squares):
    scoring = {"accuracy": "accuracy", "few": MetricScorer("sparsity")}
    small = clone(fitted).set_params(joint_epochs=0, warmup_epochs=0, prototypes_per_class=3)
    grid = {"lambda_l1": [1e-5, 1e-1]}
    search = GridSearchCV(small, grid, scoring=scoring, refit="few", cv=2, error_score="raise")
    results = pd.DataFrame(search.fit(*squares).cv_results_)
    assert (results["mean_test_few"] <= 0).all()
    assert search.best_params_ == {"lambda_l1": 1e-1}


@pytest.mark.parametrize("name", ["consistency", "pointing", "nonsense"])
def test_scorers_of_what_needs_labels_of_parts_are_refused(name):
    with pytest.raises(ValueError, match="name must be one of"):
        MetricScorer(name)


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
