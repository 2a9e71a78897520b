"""At home in scikit-learn: its contract, searches, pipelines and parameters."""

import copy
import io
import warnings

import joblib
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone, is_classifier
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import InputTags
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from skorch.callbacks import EpochScoring, PrintLog
from skorch.utils import is_dataset
from torch import nn
from torchvision.transforms import v2

from protoclf import ProtoPNetClassifier

# ---- the contract -----------------------------------------------------------------------------


class OnTables(ProtoPNetClassifier):
    """Takes rows of a table for images, as scikit-learn's checks need: a stripe for a feature."""

    def _fit_all(self, X, y, sample_weight, groups, first):
        validate_data(self, X, reset=first, skip_check_array=True)  # a table has features
        return super()._fit_all(as_images(X), y, sample_weight, groups, first)

    def get_dataset(self, X, y=None):
        if is_dataset(X):
            return X
        images = super().get_dataset(as_images(X), y)
        validate_data(self, X, reset=False, skip_check_array=True)
        return images

    def score(self, X, y=None, sample_weight=None):
        validate_data(self, X, reset=False, skip_check_array=True)
        return super().score(as_images(X), y, sample_weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags = InputTags()  # the checks shape their arrays after these
        return tags


def as_images(X):
    """Draw the rows of a table as pictures; what is no table of real numbers is left as it is."""
    if sparse.issparse(X):
        return X
    table = np.asarray(X)
    if table.ndim != 2 or 0 in table.shape or table.dtype.kind == "c":
        return X
    table = table.astype(float)
    grey = np.where(np.isfinite(table), 1 / (1 + np.exp(-table)), table)  # (n, features)
    n, features = grey.shape
    return np.broadcast_to(grey[:, None, :, None], (n, features, features, 3))


EXCUSED = {
    "check_no_attributes_set_in_init": (
        "skorch's nets set history_, initialized_ and virtual_params_ when they are made"
    ),
    "check_sample_weight_equivalence_on_dense_data": (
        "epochs draw batches of images, and k-means and projection count every image once: "
        "weights reach the joint loss and the last layer"
    ),
    "check_methods_sample_order_invariance": (
        "float32 sums round differently by the place in a batch; the check allows for 1e-9"
    ),
}

on_tables = OnTables(
    nn.AvgPool2d(4),
    image_size=16,
    resize="squash",
    prototype_size="full",
    similarity="log",
    prototypes_per_class=3,
    warmup_epochs=1,
    joint_epochs=0,
    verbose=0,
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checks repeat rows: prototypes collapse
@parametrize_with_checks([on_tables], expected_failed_checks=lambda estimator: EXCUSED)
def test_contract(estimator, check):
    check(estimator)


# ---- around the estimator ---------------------------------------------------------------------


def own_module():
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 2, 2), nn.ReLU())


def classifier(**parameters):
    settings = {
        "image_size": 32,
        "prototypes_per_class": 2,
        "warmup_epochs": 1,
        "joint_epochs": 1,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier(own_module(), **{**settings, **parameters})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Paths of 24 pictures with a square in the colour of their class, and labels."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    y = np.array(["blue", "green", "red"] * 8)
    paths = []
    for i, label in enumerate(y):
        pixels = rng.integers(60, 180, (32, 32, 3), dtype=np.uint8)
        top, left = rng.integers(0, 16, 2)
        pixels[top : top + 16, left : left + 16] = 0
        pixels[top : top + 16, left : left + 16, ["red", "green", "blue"].index(label)] = 255
        paths.append(str(folder / f"{i}.png"))
        PIL.Image.fromarray(pixels).save(paths[-1])
    return paths, y


GRID = {"prototypes_per_class": [1, 2], "lambda_clst": [0, 0.8], "lambda_sep": [0.0, 0.08]}
FOLDS = StratifiedKFold(2)


@pytest.fixture(scope="module")
def searched(photos):
    return GridSearchCV(classifier(), GRID, cv=FOLDS, n_jobs=1, error_score="raise").fit(*photos)


def test_grid_search_fits_every_candidate_as_it_would_be_fitted_alone(searched, photos):
    X, y = photos
    results = pd.DataFrame(searched.cv_results_)
    assert len(results) == 8
    train, test = next(FOLDS.split(X, y))
    for _, row in results.iloc[[0, 5]].iterrows():
        alone = classifier(**row["params"]).fit(np.array(X)[train], y[train])
        assert alone.score(np.array(X)[test], y[test]) == row["split0_test_score"]
    best = searched.best_estimator_
    assert best.get_params()["lambda_sep"] == searched.best_params_["lambda_sep"]
    assert best.n_prototypes_ == 3 * searched.best_params_["prototypes_per_class"]
    refitted = classifier(**searched.best_params_).fit(X, y)
    assert np.array_equal(searched.predict_proba(X), refitted.predict_proba(X))


@pytest.mark.slow
def test_grid_search_with_two_processes_finds_the_same(searched, photos):
    parallel = GridSearchCV(classifier(), GRID, cv=FOLDS, n_jobs=2, error_score="raise")
    parallel.fit(*photos)
    scores = [search.cv_results_["mean_test_score"] for search in (searched, parallel)]
    np.testing.assert_array_equal(*scores)
    assert parallel.best_params_ == searched.best_params_


def test_cross_validation_scores_each_image_by_a_model_that_did_not_see_it(photos):
    X, y = photos
    clf = classifier()
    scores = cross_val_score(clf, X, y, cv=FOLDS)
    predicted = cross_val_predict(clf, X, y, cv=FOLDS)
    assert not hasattr(clf, "prototypes_")
    logarithm = cross_val_predict(clf, X, y, cv=FOLDS, method="predict_log_proba")
    for score, (train, test) in zip(scores, FOLDS.split(X, y), strict=True):
        fold = classifier().fit([X[i] for i in train], y[train])
        expected = fold.predict([X[i] for i in test])
        assert np.array_equal(predicted[test], expected)
        assert np.array_equal(fold.classes_[logarithm[test].argmax(1)], expected)
        assert score == np.mean(expected == y[test])


def read_pixels(paths):
    return np.stack([np.asarray(PIL.Image.open(path)) for path in paths])


def test_a_pipeline_gives_what_its_classifier_gives(photos):
    X, y = photos
    alone = classifier().fit(X, y)
    plain = Pipeline([("nothing", "passthrough"), ("net", classifier())]).fit(X, y)
    read = make_pipeline(FunctionTransformer(read_pixels), classifier()).fit(X, y)
    column = make_pipeline(FunctionTransformer(lambda frame: frame["file"]), classifier())
    frame = pd.DataFrame({"file": X, "size": 32})
    for pipeline, given in ((plain, X), (read, X), (column.fit(frame, y), frame)):
        assert np.array_equal(pipeline.predict(given), alone.predict(X))
        assert np.array_equal(pipeline.decision_function(given), alone.decision_function(X))
        assert pipeline.score(given, y) == alone.score(X, y)
        assert pipeline.classes_.tolist() == alone.classes_.tolist()
    weight = np.r_[np.ones(12), np.zeros(12)]
    plain.fit(X, y, net__sample_weight=weight)
    weighted = classifier().fit(X, y, sample_weight=weight)
    assert np.array_equal(plain.decision_function(X), weighted.decision_function(X))


def test_parameters_of_a_step_are_searched_by_their_nested_names(photos):
    pipeline = Pipeline([("nothing", "passthrough"), ("net", classifier())])
    grid = {"net__prototypes_per_class": [1, 2], "net__optimizer__weight_decay": [0.0, 0.1]}
    search = GridSearchCV(pipeline, grid, cv=FOLDS, error_score="raise").fit(*photos)
    assert set(search.best_params_) == set(grid)
    assert search.best_score_ > 0.5


def test_activations_feed_another_estimator(photos):
    X, y = photos
    tree = make_pipeline(classifier(), DecisionTreeClassifier(random_state=0)).fit(X, y)
    activations = tree[0].transform(X)
    assert activations.shape == (24, 6)
    alone = DecisionTreeClassifier(random_state=0).fit(activations, y)
    assert np.array_equal(tree.predict(X), alone.predict(activations))
    assert tree.score(X, y) > 0.9
    names = tree[:-1].get_feature_names_out()
    assert names[:2].tolist() == ["prototype0 (blue)", "prototype1 (blue)"]
    frame = tree[:-1].set_output(transform="pandas").transform(X)
    assert frame.columns.tolist() == names.tolist()


def test_fit_transform_is_fit_and_transform(photos):
    X, y = photos
    assert np.array_equal(classifier().fit_transform(X, y), classifier().fit(X, y).transform(X))


def test_joblib_dumps_a_pipeline(photos):
    X, y = photos
    pipeline = make_pipeline("passthrough", classifier()).fit(X, y)
    file = io.BytesIO()
    joblib.dump(pipeline, file)
    file.seek(0)
    assert np.array_equal(joblib.load(file).predict_proba(X), pipeline.predict_proba(X))


# ---- parameters -------------------------------------------------------------------------------


def test_parameters_are_stored_as_they_were_given():
    given = {
        "prototype_size": [1, 1],
        "normalization": (np.zeros(3), np.ones(3)),
        "device": "auto",
        "callbacks": [],
        "random_state": np.random.RandomState(0),
        "optimizer": torch.optim.SGD,
        "warm_start": True,
    }
    clf = classifier(**given)
    params = clf.get_params(deep=False)
    assert all(params[name] is value for name, value in given.items())
    assert is_classifier(clf)
    with pytest.raises(Exception, match="not fitted"):
        check_is_fitted(clf)


def test_clone_copies_every_parameter_and_no_fit(photos):
    nested = {"optimizer__weight_decay": 0.1, "iterator_train__num_workers": 0}
    clf = classifier(lambda_sep=0.5, callbacks__print_log=None, **nested).fit(*photos)
    copied = clone(clf)
    ours, theirs = clf.get_params(deep=False), copied.get_params(deep=False)
    assert ours.keys() == theirs.keys()
    assert copied.get_params()["optimizer__weight_decay"] == 0.1
    assert copied.get_params(deep=False)["callbacks__print_log"] is None
    assert copied.lambda_sep == 0.5
    assert copied.backbone is not clf.backbone
    assert not hasattr(copied, "prototypes_")


@pytest.mark.parametrize("kind", [v2.ColorJitter(0.1), v2.RandomRotation(5), v2.RandomErasing()])
def test_transforms_with_a_get_params_of_their_own_are_parameters(photos, kind):
    clf = classifier(augmentation=kind)
    assert clf.get_params()["augmentation"] is kind
    copied = clone(clf.fit(*photos))
    assert type(copied.augmentation) is type(kind)
    assert copied.augmentation is not kind
    assert not hasattr(copied, "prototypes_")
    assert np.isfinite(cross_val_score(clf, *photos, cv=FOLDS, error_score="raise")).all()
    assert "ProtoPNetClassifier" in clf._repr_html_()


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_metadata_that_a_method_does_not_take_is_refused(method):
    ask = getattr(classifier(), f"set_{method}_request")
    words = f"{method} takes no metadata 'sample_weights', but .* mean 'sample_weight'"
    with config_context(enable_metadata_routing=True):
        with pytest.raises(TypeError, match=words):
            ask(sample_weights=True)
        assert "sample_weights" not in str(ask(sample_weight=True).get_metadata_routing())


def test_clones_keep_requests_of_metadata(photos):
    with config_context(enable_metadata_routing=True):
        asking = classifier().set_fit_request(groups=True)
        assert clone(asking)._get_metadata_request().fit.requests["groups"] is True


def test_numbers_of_numpy_are_numbers(photos):
    names = ("image_size", "batch_size", "micro_batch_size", "prototypes_per_class", "cycles")
    values = {"image_size": 32, "batch_size": 8, "micro_batch_size": 3, "cycles": 1}
    values |= {"prototypes_per_class": 2}
    expected = classifier(**values).fit(*photos)
    given = {n: np.int64(v) if n in names else v for n, v in values.items()}
    clf = classifier(**given).fit(*photos)
    pd.testing.assert_frame_equal(clf.explain(photos[0]), expected.explain(photos[0]))


def test_what_is_set_after_a_fit_counts_in_the_next_training(photos):
    X, y = photos
    clf = classifier().fit(X, y)
    plain = copy.deepcopy(clf).partial_fit(X, y)
    before = plain.module_.prototypes
    for changed in (
        {"lambda_clst": 50.0},
        {"lambda_sep": 5.0},
        {"lambda_patch": 50.0},
        {"optimizer": torch.optim.SGD},
        {"optimizer__weight_decay": 10.0},
    ):
        other = copy.deepcopy(clf).set_params(**changed)
        assert other.get_params()[next(iter(changed))] == next(iter(changed.values()))
        assert clone(other).get_params()[next(iter(changed))] == next(iter(changed.values()))
        state = other.partial_fit(X, y).module_.backbone.state_dict()
        kept = plain.module_.backbone.state_dict()
        assert any(not torch.equal(state[name], kept[name]) for name in kept), changed
        assert torch.equal(plain.module_.prototypes, before)
    decay = {group["part"]: group["weight_decay"] for group in other.optimizer_.param_groups}
    assert decay == {"backbone": 10.0, "add_on": 10.0, "prototypes": 0.0}


def test_nested_parameters_reach_skorch(photos):
    clf = classifier(optimizer=torch.optim.SGD, optimizer__momentum=0.9)
    clf.set_params(
        optimizer__weight_decay=0.25,
        iterator_train__drop_last=True,
        iterator_valid__num_workers=0,
        callbacks__print_log=None,
        batch_size=5,
    )
    params = clf.get_params()
    assert params["optimizer__weight_decay"] == 0.25
    assert params["optimizer__momentum"] == 0.9
    assert params["iterator_train__drop_last"] is True
    clf.fit(*photos)
    assert type(clf.optimizer_) is torch.optim.SGD
    assert {group["momentum"] for group in clf.optimizer_.param_groups} == {0.9}
    decay = {group["part"]: group["weight_decay"] for group in clf.optimizer_.param_groups}
    assert decay["backbone"] == 0.25
    assert len(clf.history[0, "batches"]) == 4  # of five each; the remaining four are dropped
    assert "print_log" not in [name for name, callback in clf.callbacks_ if callback is not None]


def test_loader_workers_change_nothing(photos):
    X, y = photos
    workers = classifier(iterator_train__num_workers=1, iterator_valid__num_workers=1)
    workers.fit(X[:12], y[:12])
    plain = classifier(augmentation=None).fit(X[:12], y[:12])
    workers.set_params(augmentation=None).fit(X[:12], y[:12])
    np.testing.assert_allclose(workers.predict_proba(X), plain.predict_proba(X), rtol=1e-5)


def test_callbacks_see_every_stage(photos):
    X, y = photos
    scoring = EpochScoring("accuracy", name="train_acc", on_train=True, lower_is_better=False)
    clf = classifier(callbacks=[("train_acc", scoring)]).fit(X, y)
    stages = ["warm-up", "joint", "projection", "last layer"]
    assert clf.history[:, "stage"] == stages
    assert all(0 <= value <= 1 for value in clf.history[:, "train_acc"])
    assert clf.history[-1, "train_acc"] == clf.score(X, y)


def test_setting_parameters_of_a_fitted_model_leaves_its_answers(photos):
    X, y = photos
    clf = classifier().fit(X, y)
    answers = clf.predict_proba(X)
    for name, value in {
        "prototypes_per_class": 5,
        "similarity": "log",
        "lambda_l1": 1.0,
        "warmup_epochs": 9,
        "backbone": "small_cnn",
        "random_state": 5,
        "lr": 0.1,
        "optimizer": torch.optim.SGD,
        "optimizer__weight_decay": 0.5,
        "callbacks": [],
        "callbacks__train_loss__name": "loss",
        "iterator_valid": torch.utils.data.DataLoader,
        "train_split": None,
        "verbose": 0,
        "warm_start": False,
        "compile": False,
        "iterator_train__num_workers": 0,
    }.items():
        clf.set_params(**{name: value})
        assert np.array_equal(clf.predict_proba(X), answers), name


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(ProtoPNetClassifier()) == "ProtoPNetClassifier()"
    clf = ProtoPNetClassifier("small_cnn", lambda_sep=0.1, device="auto", warm_start=True)
    assert repr(clf) == "ProtoPNetClassifier(backbone='small_cnn', lambda_sep=0.1, warm_start=True)"
    clf.set_params(optimizer__weight_decay=0.1)
    assert "optimizer__weight_decay=0.1" in repr(clf)
    assert "small_cnn" in clf._repr_html_()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"callbacks": 3}, 'callbacks must be None, "disable" or a list'),
        ({"train_split": 5}, "train_split must be callable"),
        ({"optimizer": "adam"}, "optimizer must be a class of optimizers"),
        ({"iterator_train": 3}, "iterator_train must be a class of loaders"),
        ({"warm_start": "no"}, "warm_start must be True or False"),
        ({"iterator_train__num_worker": 1}, "Did you mean 'iterator_train__num_workers'"),
        ({"optimizer__weight_deca": 1}, "Did you mean 'optimizer__weight_decay'"),
        ({"optimizer__lr": 0.1}, "lr is the learning rate of add-on layers"),
        ({"iterator_valid__shuffle": True}, "answers are in the order of X"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You set iterator_valid__shuffle")
def test_wrong_parameters_of_skorch_are_refused_by_fit(photos, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier(train_backbone=False, **wrong).fit(*photos)


@pytest.mark.parametrize("name", ["shuffle", "drop_last"])
def test_no_loader_loses_images_or_their_order_after_the_fit(photos, name):
    clf = classifier(train_backbone=False, warmup_epochs=0).fit(*photos)
    clf.set_params(**{f"iterator_valid__{name}": True})
    with pytest.raises(ValueError, match="one for each image"):
        clf.predict(photos[0])


def test_an_unknown_callback_is_named():
    with pytest.raises(ValueError, match=r"no callback 'print_lok'; there are \['epoch_timer'"):
        classifier().set_params(callbacks__print_lok=None)


def test_callbacks_set_after_a_fit_are_in_use_in_the_next(photos):
    scoring = EpochScoring("accuracy", name="mine", on_train=True, lower_is_better=False)
    for go_on in (ProtoPNetClassifier.fit, ProtoPNetClassifier.partial_fit):
        clf = classifier().fit(*photos).set_params(callbacks=[scoring])
        assert "mine" in go_on(clf, *photos).history[-1]


def test_a_callback_can_be_turned_off_and_on_after_a_fit(photos, capsys):
    clf = classifier(train_backbone=False, warmup_epochs=0).fit(*photos)
    for _ in range(2):
        clf.set_params(callbacks__print_log=None)
    clf.set_params(verbose=1).partial_fit(*photos)
    assert "last layer" not in capsys.readouterr().out
    clf.set_params(callbacks__print_log=PrintLog).partial_fit(*photos)
    assert "last layer" in capsys.readouterr().out


def test_an_unknown_parameter_of_a_search_is_named(photos):
    search = GridSearchCV(classifier(), {"lambda_cluster": [0, 1]}, cv=FOLDS)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="Did you mean 'lambda_clst'"):
        search.fit(*photos)
