"""The classifier inside scikit-learn's searches, ensembles, curves and tables."""

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    PredefinedSplit,
    RandomizedSearchCV,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_score,
    learning_curve,
    permutation_test_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version
from skorch.callbacks import (
    BatchScoring,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    LRScheduler,
    ProgressBar,
)
from skorch.dataset import ValidSplit
from skorch.helper import predefined_split

from protoclf import ProtoPNetClassifier
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.labels import read_groups
from protoclf.last_layer import solve_last_layer
from protoclf.scorers import n_prototypes_scorer

FOLDS = StratifiedKFold(2)


def small(**parameters):
    """Frozen: a fit takes a tenth of a second."""
    torch.manual_seed(7)
    settings = {"train_backbone": False, "image_size": 16, "prototypes_per_class": 2}
    backbone = torch.nn.Conv2d(3, 8, 4, 4)
    settings |= {"random_state": 0, "verbose": 0}
    return ProtoPNetClassifier(backbone, **{**settings, **parameters})


@pytest.fixture(scope="module")
def paths(squares, tmp_path_factory):
    import PIL.Image

    folder = tmp_path_factory.mktemp("around")
    made = [str(folder / f"{i}.png") for i in range(len(squares[0]))]
    for path, pixels in zip(made, squares[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return np.array(made, dtype=object)


# ---- weights and groups -----------------------------------------------------------------------


def test_balanced_classes_are_weights_of_images(paths, squares):
    y = np.where(np.arange(24) < 18, "common", squares[1])
    share = pd.Series(y).map(pd.Series(y).value_counts())
    weight = (24 / (len(set(y)) * share)).to_numpy()
    balanced = small(class_weight="balanced").fit(paths, y)
    weighted = small().fit(paths, y, sample_weight=weight)
    plain = small().fit(paths, y)
    assert np.array_equal(balanced.coef_, weighted.coef_)
    assert not np.array_equal(balanced.coef_, plain.coef_)
    named = small(class_weight=dict(zip(y, weight, strict=True))).fit(paths, y)
    assert np.array_equal(named.coef_, weighted.coef_)
    twice = np.where(y == "common", 1, 2)
    both = small(class_weight="balanced").fit(paths, y, sample_weight=twice)
    assert np.array_equal(both.coef_, small().fit(paths, y, sample_weight=twice * weight).coef_)


def test_class_weights_reach_the_joint_loss(paths, squares):
    settings = {"train_backbone": True, "joint_epochs": 1, "augmentation": None, "batch_size": 24}
    weight = {"blue": 1.0, "green": 2.0, "red": 5.0}
    plain, weighted = (
        small(class_weight=w, prototype_init="random", **settings).fit(paths, squares[1])
        for w in (None, weight)
    )
    assert plain.history[0]["train_loss"] != weighted.history[0]["train_loss"]


@pytest.mark.parametrize("wrong", ["even", 2])
def test_a_wrong_class_weight_is_refused(paths, squares, wrong):
    with pytest.raises(ValueError, match='class_weight must be None, "balanced" or a dict'):
        small(class_weight=wrong).fit(paths, squares[1])


def test_weight_two_is_a_row_twice_in_the_last_layer():
    rng = np.random.default_rng(0)
    g, y = torch.from_numpy(rng.random((30, 6))), torch.arange(30) % 3
    owner, twice = torch.arange(6) % 3, torch.arange(30) % 4 == 0
    weighted = solve_last_layer(g, y, owner, 1e-2, sample_weight=1.0 + twice, tol=1e-9)
    doubled = solve_last_layer(
        torch.cat([g, g[twice]]), torch.cat([y, y[twice]]), owner, 1e-2, tol=1e-9
    )
    torch.testing.assert_close(weighted.weight, doubled.weight, atol=1e-5, rtol=1e-4)


@given(
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
    st.integers(0, 99),
    st.sampled_from([1e-1, 1e-2, 1e-3]),
)
@settings(max_examples=25, deadline=None)
def test_whole_weights_are_repeated_rows_in_the_last_layers_optimum(weights, seed, penalty):
    rng, times = np.random.default_rng(seed), torch.tensor(weights)
    g, y = torch.from_numpy(rng.random((12, 6))), torch.arange(12) % 3
    owner = torch.arange(6) % 3
    weighted = solve_last_layer(g, y, owner, penalty, sample_weight=times.double(), tol=1e-9)
    repeated = [rows.repeat_interleave(times, 0) for rows in (g, y)]
    expected = solve_last_layer(*repeated, owner, penalty, tol=1e-9)
    assert weighted.objective == pytest.approx(expected.objective, rel=1e-6)
    torch.testing.assert_close(weighted.weight, expected.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_weight_zero_is_as_good_as_left_out(paths, squares, trained):
    y, kept = squares[1], np.arange(24) % 4 != 0
    settings = {"train_backbone": trained, "joint_epochs": 1, "lambda_l1": "cv"}
    settings |= {"class_weight": "balanced"}
    weighted = small(**settings).fit(paths, y, sample_weight=2.0 * kept)
    without = small(**settings).fit(paths[kept], y[kept], sample_weight=np.full(kept.sum(), 2.0))
    assert np.array_equal(weighted.decision_function(paths), without.decision_function(paths))
    columns = ["class", "source", "row", "col", "weight"]
    pd.testing.assert_frame_equal(weighted.prototypes_[columns], without.prototypes_[columns])
    sources = weighted.prototypes_["source_index"]
    assert paths[sources].tolist() == weighted.prototypes_["source"].tolist()


def test_a_class_of_weight_zero_is_refused(paths, squares):
    weight = (squares[1] != "red").astype(float)
    with pytest.raises(ValueError, match=r"sample_weight is 0 for the whole of class \['red'\]"):
        small().fit(paths, squares[1], sample_weight=weight)


@pytest.mark.parametrize(("weight", "class_weight"), [(1e-50, None), (1e39, None), (1e-30, 1e-30)])
def test_weights_beyond_single_precision_are_refused(paths, squares, weight, class_weight):
    y = squares[1]
    classes = None if class_weight is None else {"red": class_weight}
    with pytest.raises(ValueError, match="beyond the numbers of float32"):
        small(class_weight=classes).fit(paths, y, sample_weight=np.where(y == "red", weight, 1.0))


def test_groups_reach_every_split_inside_fit(paths, squares, monkeypatch):
    seen = []

    class Watched(ValidSplit):
        def __call__(self, dataset, y=None, groups=None):
            seen.append(groups)
            return super().__call__(dataset, y, groups)

    groups = np.array([f"bird {i}" for i in np.arange(24) // 3])
    from protoclf import penalty

    splits = penalty.stratified_splits
    monkeypatch.setattr(
        penalty, "stratified_splits", lambda *args: seen.append(args[-1]) or splits(*args)
    )
    clf = small(lambda_l1="cv", train_split=Watched(GroupKFold(4)))
    clf.fit(paths, squares[1], groups=groups)
    of_split, of_penalty = seen
    assert (of_split == np.arange(24) // 3).all()
    assert len(np.unique(of_penalty)) == 6  # those that are not for validation
    path = clf.last_layer_path(paths, squares[1], [1e-3], folds=2, groups=groups)
    assert len(path) == 1


@pytest.mark.parametrize("dtype", ["Int64", "UInt64", "category"])
def test_long_ids_of_groups_stay_apart(dtype):
    ids = 2**60 + np.arange(6) // 2  # float64 would have one number for all of them
    groups = pd.Series(ids).astype(dtype)
    assert read_groups(groups, 6).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0] * 23, "X has 24 images and groups 23"),
        ([None] * 24, "some are missing"),
        ("a", "groups must hold one entry"),
    ],
)
def test_wrong_groups_are_refused(paths, squares, wrong, message):
    with pytest.raises(ValueError, match=message):
        small().fit(paths, squares[1], groups=wrong)


def test_a_file_that_stands_in_X_twice_is_held_out_as_a_whole(paths, squares):
    twice = np.tile(np.arange(24), 2)
    X, y = paths[twice], squares[1][twice]
    clf, told = (small(lambda_l1="cv").fit(X, y, groups=groups) for groups in (None, twice))
    scores = [model.last_layer_path_["cross_entropy"] for model in (clf, told)]
    np.testing.assert_array_equal(*scores)
    assert clf.lambda_l1_ == told.lambda_l1_
    split = small(lambda_l1="cv", train_split=ValidSplit(4)).fit(X, y)  # not refused
    assert len(split.activations_.g) == 36


# ---- searches ---------------------------------------------------------------------------------


def test_a_search_by_accuracy_and_sparsity(paths, squares):
    scoring = {"accuracy": "accuracy", "sparsity": n_prototypes_scorer}
    grid = {"prototypes_per_class": [1, 2], "lambda_l1": [1e-4, 1e-1]}
    search = GridSearchCV(small(), grid, scoring=scoring, refit="accuracy", cv=FOLDS)
    search.fit(paths, squares[1])
    results = pd.DataFrame(search.cv_results_)
    assert results["mean_test_sparsity"].between(-6, 0).all()
    by_penalty = results.groupby("param_lambda_l1")["mean_test_sparsity"].mean()
    assert by_penalty[1e-1] >= by_penalty[1e-4]
    best = search.best_estimator_
    assert n_prototypes_scorer(best) == -(best.coef_ != 0).any(0).sum()
    assert n_prototypes_scorer(make_pipeline("passthrough", best)) == n_prototypes_scorer(best)


@pytest.mark.slow  # many fits
@pytest.mark.parametrize("kind", [RandomizedSearchCV, HalvingGridSearchCV])
def test_other_searches(paths, squares, kind):
    grid = {"prototypes_per_class": [1, 2], "lambda_l1": [1e-4, 1e-2]}
    few = {"n_iter": 2} if kind is RandomizedSearchCV else {"min_resources": 48, "factor": 2}
    search = kind(small(), grid, cv=FOLDS, random_state=0, error_score="raise", **few)
    search.fit(np.tile(paths, 4), np.tile(squares[1], 4))
    assert set(search.best_params_) == set(grid)
    assert search.score(paths, squares[1]) > 0.5


def test_a_candidate_that_fails_costs_its_own_score_alone(paths, squares):
    search = GridSearchCV(small(), {"prototypes_per_class": [1, 0]}, cv=FOLDS, error_score=np.nan)
    with pytest.warns(UserWarning, match="fits failed|non-finite"):
        search.fit(paths, squares[1])
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, True]


def test_groups_and_weights_are_routed(paths, squares):
    import sklearn

    groups = np.arange(24) // 3
    with sklearn.config_context(enable_metadata_routing=True):
        clf = small(lambda_l1="cv").set_fit_request(sample_weight=True, groups=True)
        clf.set_score_request(sample_weight=False)
        scores = cross_val_score(
            clf,
            paths,
            squares[1],
            cv=GroupKFold(2),
            params={"groups": groups, "sample_weight": np.ones(24)},
            error_score="raise",
        )
    assert len(scores) == 2


@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.8"),
    reason="before 1.8 a search hands no weights to the score of a pipeline",
)
def test_weights_are_routed_through_a_pipeline_and_a_search(paths, squares):
    y, weight = squares[1], np.where(squares[1] == "red", 5.0, np.arange(24) % 4)
    given = {"sample_weight": weight, "groups": np.arange(24) // 6}
    with sklearn.config_context(enable_metadata_routing=True):
        clf = small().set_fit_request(sample_weight=True, groups=True)
        pipeline = make_pipeline("passthrough", clf.set_score_request(sample_weight=True))
        grid = {"protopnetclassifier__lambda_l1": [1e-3, 1e-2]}
        search = GridSearchCV(pipeline, grid, cv=GroupKFold(2), error_score="raise")
        search.fit(paths, y, **given)
    for i, (train, test) in enumerate(GroupKFold(2).split(paths, y, given["groups"])):
        part = (paths[train], y[train], weight[train], given["groups"][train])
        alone = small(lambda_l1=1e-2).fit(*part)
        score = alone.score(paths[test], y[test], weight[test])
        assert search.cv_results_[f"split{i}_test_score"][1] == pytest.approx(score)
    best = search.best_estimator_[-1]
    expected = small(lambda_l1=best.lambda_l1).fit(paths, y, weight, given["groups"])
    assert np.array_equal(best.coef_, expected.coef_)


def test_backbones_are_searched(paths, squares):
    backbones = ["small_cnn", torch.nn.Conv2d(3, 8, 4, 4)]
    search = GridSearchCV(small(), {"backbone": backbones}, cv=FOLDS, error_score="raise")
    search.fit(paths, squares[1])
    for backbone, score in zip(backbones, search.cv_results_["mean_test_score"], strict=True):
        alone = cross_val_score(small().set_params(backbone=backbone), paths, squares[1], cv=FOLDS)
        assert score == alone.mean()


# ---- around it --------------------------------------------------------------------------------


def test_a_path_column_beside_others(paths, squares):
    X, y = squares
    frame = pd.DataFrame({"photo": paths, "brightness": X.mean((1, 2, 3)), "n": np.arange(24)})
    table = ColumnTransformer(
        [("parts", small(), "photo"), ("numbers", StandardScaler(), ["brightness", "n"])]
    )
    model = make_pipeline(table, LogisticRegression()).fit(frame, y)
    assert model.score(frame, y) > 0.8
    assert model[0].get_feature_names_out()[0] == "parts__prototype0 (blue)"
    assert model[0].transform(frame).shape == (24, 8)


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration(paths, squares, method):
    model = CalibratedClassifierCV(small(), method=method, cv=FOLDS).fit(paths, squares[1])
    np.testing.assert_allclose(model.predict_proba(paths).sum(1), 1)
    assert model.score(paths, squares[1]) > 0.8


@pytest.mark.parametrize("voting", ["hard", "soft"])
def test_voting(paths, squares, voting):
    members = [("one", small(prototypes_per_class=1)), ("two", small(similarity="log"))]
    model = VotingClassifier(members, voting=voting).fit(paths, squares[1])
    assert model.score(paths, squares[1]) > 0.8


def test_bagging(paths, squares):
    model = BaggingClassifier(small(), n_estimators=2, max_samples=0.8, random_state=0)
    model.fit(paths.reshape(-1, 1), squares[1])
    assert model.score(paths.reshape(-1, 1), squares[1]) > 0.5


def test_stacking(paths, squares):
    members = [("one", small()), ("two", small(similarity="log"))]
    model = StackingClassifier(members, LogisticRegression(), cv=FOLDS).fit(paths, squares[1])
    assert model.score(paths, squares[1]) > 0.8


@pytest.mark.slow  # many fits
def test_curves_and_permutations(paths, squares):
    sizes, _, scores = learning_curve(
        small(), paths, squares[1], train_sizes=[0.5, 1.0], cv=FOLDS, error_score="raise"
    )
    assert scores.shape == (2, 2)
    assert sizes.tolist() == [6, 12]
    score, permuted, p = permutation_test_score(
        small(), paths, squares[1], cv=FOLDS, n_permutations=4, random_state=0
    )
    assert score > permuted.mean()
    assert p <= 0.4


# ---- skorch's own -----------------------------------------------------------------------------


def fitted_with_validation(callbacks, X, y):
    """Return a classifier that two joint epochs were validated of, and its history."""
    clf = small(
        train_backbone=True,
        joint_epochs=2,
        train_split=ValidSplit(3, stratified=True),
        callbacks=callbacks,
    )
    clf.fit(X, y)
    return clf, pd.DataFrame(clf.history.to_list())


def test_skorchs_callbacks_work(paths, squares, tmp_path):
    callbacks = [
        EarlyStopping(patience=1),
        Checkpoint(dirname=str(tmp_path), monitor="valid_loss_best"),
        EpochScoring("balanced_accuracy", name="balanced", lower_is_better=False),
        BatchScoring("accuracy", name="of_batches", lower_is_better=False),
        ProgressBar(),
    ]
    clf, history = fitted_with_validation(callbacks, paths, squares[1])
    assert {"stage", "balanced", "valid_loss"} <= set(history.columns)
    np.testing.assert_allclose(history["of_batches"], history["valid_acc"])
    assert history["stage"].iloc[-2:].tolist() == ["projection", "last layer"]
    assert (tmp_path / "params.pt").exists()
    assert clf.score(paths, squares[1]) > 0.5


@pytest.mark.parametrize("scoring", [None, lambda clf, X, y: clf.score(X, y)])
def test_callbacks_that_score_by_the_classifiers_own_score_see_the_accuracy(
    paths, squares, scoring
):
    mine = {"scoring": scoring, "lower_is_better": False}
    callbacks = [
        EpochScoring(**mine, name="of_epoch"),
        EpochScoring(**mine, name="of_train", on_train=True),
        BatchScoring(**mine, name="of_batches"),
    ]
    _, history = fitted_with_validation(callbacks, paths, squares[1])
    np.testing.assert_allclose(history["of_epoch"], history["valid_acc"])
    np.testing.assert_allclose(history["of_batches"], history["valid_acc"])
    assert history["of_train"].between(0, 1).all()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (EarlyStopping(), "'EarlyStopping' monitors 'valid_loss', and there is no validation"),
        (Checkpoint(), "'Checkpoint' monitors 'valid_loss_best', and there is no validation"),
        (EpochScoring("accuracy", use_caching=False), "shown no labels for 'accuracy'"),
        (EpochScoring(None, use_caching=False), "shown no labels for 'score'"),
        (LRScheduler("StepLR", step_size=1), "'LRScheduler' would not be heeded: lr_schedule"),
    ],
)
def test_callbacks_that_would_fail_or_not_be_heeded_are_refused(
    paths, squares, callback, message, monkeypatch
):
    monkeypatch.setattr(ProtoPNetClassifier, "fit_loop", None)
    with pytest.raises(ValueError, match=message):
        small(callbacks=[callback]).fit(paths, squares[1])


def test_a_loader_that_leaves_no_batch_is_refused(paths, squares):
    clf = small(warmup_epochs=1, batch_size=32, iterator_train__drop_last=True)
    with pytest.raises(ValueError, match="no batch to train on: there are 24 images, and batch"):
        clf.fit(paths, squares[1])


def test_labels_that_are_objects_are_scored_as_they_were_fitted(paths):
    y = pd.Series([3, 1, 7] * 8).astype(object)
    clf = small().fit(paths, y)
    assert clf.score(paths, y) == clf.score(paths, y.astype(int))
    assert np.isfinite(cross_val_score(small(), paths, y, cv=2)).all()


def test_fits_in_threads_are_those_one_after_the_other(paths, squares):
    settings = {"train_backbone": True, "joint_epochs": 2}
    members = [small(**settings, random_state=seed) for seed in (0, 1)]
    expected = [clone(member).fit(paths, squares[1]) for member in members]
    fits = (delayed(clone(member).fit)(paths, squares[1]) for member in members)
    found = Parallel(n_jobs=2, backend="threading")(fits)
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.coef_, other.coef_)


def test_weights_alone_are_neither_written_nor_read_where_the_table_would_be_lost(
    paths, squares, tmp_path
):
    clf = small(callbacks=[Checkpoint(monitor=None, dirname=str(tmp_path / "during"))])
    clf.fit(paths, squares[1]).partial_fit(paths, squares[1])  # callbacks may, during a fit
    assert (tmp_path / "during" / "params.pt").exists()
    with pytest.raises(ValueError, match=r"save\(folder\) writes both"):
        clf.save_params(f_params=tmp_path / "params.pt")
    with pytest.raises(ValueError, match="table of prototypes"):
        clf.load_params(f_params=tmp_path / "params.pt")
    assert not list(tmp_path.glob("*.pt"))


# ---- what must not pass in silence ------------------------------------------------------------


@pytest.mark.parametrize("split", [ValidSplit(3), ValidSplit(3, stratified=True)])
def test_a_validation_split_that_takes_groups_apart_is_refused(paths, squares, split):
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 4))
    with pytest.raises(ValueError, match=r"train_split takes \d groups apart"):
        small(train_split=split).fit(paths, squares[1], groups=groups)


@pytest.mark.filterwarnings("error:.*groups")
def test_a_split_that_happens_to_keep_groups_together_does_not_warn_of_them(paths, squares):
    groups = np.repeat([0, 1, 2], 8)
    small(train_split=ValidSplit(3)).fit(paths, squares[1], groups=groups)


def test_listed_positions_are_refused_where_images_are_left_out_in_front_of_others(paths, squares):
    weight = np.ones(24)
    clf = small(train_split=ValidSplit([(np.arange(12), np.arange(12, 20))]))
    weight[22:] = 0
    clf.fit(paths, squares[1], sample_weight=weight)
    weight[9] = 0
    with pytest.raises(ValueError, match="the image at position 9 of X is left out"):
        clf.fit(paths, squares[1], sample_weight=weight)


@pytest.mark.parametrize("splitter", [GroupKFold(4), StratifiedGroupKFold(4)])
def test_a_splitter_that_is_shown_too_little_is_refused_with_what_to_do(paths, squares, splitter):
    y, groups = squares[1], np.arange(24) // 3
    of_groups = isinstance(splitter, StratifiedGroupKFold)  # which needs y beside them
    with pytest.raises(ValueError, match=r"if fit was given them.* ValidSplit\(\[next\("):
        small(train_split=ValidSplit(splitter)).fit(paths, y, groups=groups if of_groups else None)
    train, valid = next(splitter.split(paths, y, groups))
    clf = small(train_split=ValidSplit([(train, valid)])).fit(paths, y, groups=groups)
    assert len(clf.activations_.g) == len(train)


@pytest.mark.parametrize("last", [-1, 0])
def test_a_validation_split_of_images_that_are_left_out_is_refused(paths, squares, last):
    fold, weight = np.full(24, -1), np.ones(24)
    fold[:6], fold[-1], weight[9] = 0, last, 0
    clf = small(train_split=ValidSplit(PredefinedSplit(fold)))
    with pytest.raises(ValueError, match="train_split names position 23, and the fit has 23"):
        clf.fit(paths, squares[1], sample_weight=weight)
    left = weight > 0
    some = small(train_split=ValidSplit(PredefinedSplit(fold[left])))
    assert len(some.fit(paths[left], squares[1][left]).activations_.g) == (fold[left] < 0).sum()


def test_a_split_by_masks_is_refused(paths, squares):
    held_out = np.arange(24) < 6
    clf = small(train_split=ValidSplit([(~held_out, held_out)]))
    with pytest.raises(ValueError, match=r"by a mask: np.flatnonzero\(mask\) gives them"):
        clf.fit(paths, squares[1])
    clf.set_params(train_split=ValidSplit([(np.flatnonzero(~held_out), np.flatnonzero(held_out))]))
    assert len(clf.fit(paths, squares[1]).activations_.g) == 18


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("cv", [PredefinedSplit(np.full(24, -1)), [(np.arange(24), [])]])
def test_a_validation_part_without_images_is_refused(paths, squares, cv, trained):
    clf = small(train_split=ValidSplit(cv), train_backbone=trained, joint_epochs=1)
    with pytest.raises(ValueError, match="train_split leaves no image to validate on"):
        clf.fit(paths, squares[1])


@pytest.mark.parametrize("how", ["one group", "one image a class"])
def test_a_penalty_that_cannot_be_chosen_is_refused(paths, squares, how):
    clf = small(lambda_l1="cv", prototypes_per_class=1)
    X, y, groups = paths, squares[1], np.zeros(24)
    if how == "one image a class":
        X, y, groups = X[:3], y[:3], None
    with pytest.raises(ValueError, match='lambda_l1="cv" needs a class of two images'):
        clf.fit(X, y, groups=groups)


def test_class_weights_by_labels_that_look_like_numbers(paths):
    y = np.array(["0", "1", "007"] * 8)
    clf = small(class_weight={"0": 5.0, "007": 0.5}).fit(paths, y)
    weight = np.array([5.0, 1.0, 0.5] * 8)
    assert np.array_equal(clf.coef_, small().fit(paths, y, sample_weight=weight).coef_)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pink": 1.0}, r"class_weight names labels that y does not have: \['pink'\]"),
        ({"red": -1.0}, "class_weight must hold finite weights > 0"),
        (np.ones(3), "class_weight must be None"),
    ],
)
def test_class_weights_that_cannot_be_are_refused(paths, squares, wrong, message):
    with pytest.raises(ValueError, match=message):
        small(class_weight=wrong).fit(paths, squares[1])


@pytest.mark.parametrize("wrong", [[1.0] * 23, [-1.0] * 24])
def test_weights_of_the_path_are_checked(paths, squares, wrong):
    clf = small().fit(paths, squares[1])
    with pytest.raises(ValueError, match="sample_weight"):
        clf.last_layer_path(paths, squares[1], [1e-3], sample_weight=wrong)


def test_a_scorer_of_an_unfitted_classifier(paths):
    with pytest.raises(NotFittedError):
        n_prototypes_scorer(small())


def test_a_validation_set_of_other_images_is_refused_before_training(squares):
    X, y = squares
    other = ImageDataset(Images(X[:6]), Preprocessing(32), np.arange(6) % 2)
    clf = ProtoPNetClassifier("small_cnn", image_size=32, verbose=0)
    clf.set_params(prototypes_per_class=1, train_split=predefined_split(other))
    with pytest.raises(ValueError, match=r"train_split must divide .* ValidSplit\(PredefinedSplit"):
        clf.fit(X, y)
    assert not clf.history
    fold = np.where(np.arange(len(y)) < 6, 0, -1)
    clf.set_params(train_split=ValidSplit(PredefinedSplit(fold)), joint_epochs=1).fit(X, y)
    assert np.isfinite(clf.history[0, "valid_loss"])
