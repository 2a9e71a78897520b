"""Edited classifiers: what goes, what stays, and a last layer that is optimal for it."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline

from protoclf.editing import (
    EDIT_COLUMNS,
    encourage,
    forbid,
    keep,
    merge_duplicates,
    prune,
    remove,
)
from protoclf.last_layer import solve_last_layer
from protoclf.nearest_patches import nearest_patches, purity


@pytest.fixture(scope="module")
def three_each(fitted, squares):
    """Three prototypes a class, and weights that are not 0."""
    return clone(fitted).set_params(prototypes_per_class=3, lambda_l1=1e-5).fit(*squares)


def codes(clf, y):
    return torch.from_numpy((y[:, None] == clf.classes_).argmax(1))


def assert_consistent(clf, X):
    """The sheet, the table and the network of an edited classifier say the same."""
    sheet, logits = clf.explain(X, "all"), clf.decision_function(X)
    totals = sheet.groupby(["sample", "class"])["contribution"].sum()
    for (i, label), total in totals.items():
        assert total == pytest.approx(logits[i, clf.classes_.tolist().index(label)], abs=1e-4)
    table = clf.prototypes_
    assert table["prototype"].tolist() == list(range(clf.n_prototypes_))
    assert clf.coef_.shape == (3, clf.n_prototypes_)
    owner = clf.module_.owner.numpy()
    assert table["class"].tolist() == clf.classes_[owner].tolist()
    np.testing.assert_array_equal(table["weight"], clf.coef_[owner, np.arange(len(owner))])
    g = clf.transform(X)
    own = g[table["source_index"], np.arange(len(owner))]
    np.testing.assert_allclose(own, 1, atol=1e-6)  # every prototype is still its patch
    strongest = np.bincount(g.argmax(1), minlength=len(owner)) / len(X)
    np.testing.assert_allclose(table["strongest_share"], strongest)


def test_what_is_removed_is_gone_and_the_rest_is_solved_anew(three_each, squares):
    X, y = squares
    before = three_each.decision_function(X)
    edited = remove(three_each, [1, 5], reason="looks at the sky")
    stays = [0, 2, 3, 4, 6, 7, 8]
    assert_consistent(edited, X)
    np.testing.assert_allclose(edited.transform(X), three_each.transform(X)[:, stays], atol=1e-5)
    sources = three_each.prototypes_.iloc[stays]
    assert edited.prototypes_["source_index"].tolist() == sources["source_index"].tolist()
    g = torch.from_numpy(edited.transform(X)).double()
    places = codes(edited, y), edited.module_.owner
    alone = solve_last_layer(g, *places, 1e-5, lambda_l2=three_each.last_layer_result_.lambda_l2)
    np.testing.assert_allclose(edited.coef_, alone.weight, atol=2e-2)
    assert edited.last_layer_result_.residual < 1e-6
    assert edited.last_layer_result_.objective == pytest.approx(alone.objective, rel=1e-5)
    np.testing.assert_array_equal(three_each.decision_function(X), before)  # as it was
    assert three_each.n_prototypes_ == 9
    assert not hasattr(three_each, "edits_")


def test_the_record_says_what_went_and_why(three_each):
    once = remove(three_each, [8, 1], reason="sky")
    twice = remove(once, [0])
    record = twice.edits_
    assert record.columns.tolist() == EDIT_COLUMNS
    assert record["step"].tolist() == [1, 1, 2]
    assert record["prototype"].tolist() == [1, 8, 0]
    assert record["reason"].tolist() == ["sky", "sky", ""]
    assert record["class"].tolist() == ["blue", "red", "blue"]
    assert len(once.edits_) == 2


def test_keep_is_removing_the_others(three_each, squares):
    kept, removed = keep(three_each, [0, 4, 8]), remove(three_each, [1, 2, 3, 5, 6, 7])
    np.testing.assert_array_equal(kept.coef_, removed.coef_)
    assert kept.edits_["action"].unique().tolist() == ["keep"]
    assert_consistent(kept, squares[0])


def test_an_edited_classifier_is_a_classifier(three_each, squares):
    X, y = squares
    edited = remove(three_each, [2])
    again = pickle.loads(pickle.dumps(edited))
    np.testing.assert_array_equal(again.predict_proba(X), edited.predict_proba(X))
    assert again.edits_.equals(edited.edits_)
    refitted = clone(edited).fit(X, y)
    assert refitted.n_prototypes_ == 9
    assert not hasattr(edited.fit(X, y), "edits_")
    assert edited.n_prototypes_ == 9


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([9], "ids must name prototypes that the classifier has, from 0 to 8; got 9"),
        (range(20, 40), r"got 20, 21, 22, 23, 24, and 15 more"),
        (np.arange(9) == 3, r"np\.flatnonzero\(mask\) gives them"),
        ([-1], "ids must name"),
        ([1.5], "ids must name"),
        (range(9), "Keep a prototype of each class: none would be left of 'blue', 'green', 'red'"),
        ([0, 1, 2], "Keep a prototype of each class: none would be left of 'blue'\\."),
    ],
)
def test_edits_that_cannot_be_are_refused(three_each, ids, message):
    with pytest.raises(ValueError, match=message):
        remove(three_each, ids)


def test_the_first_few_of_many_classes_without_a_prototype_are_named(fitted, squares):
    y = np.arange(len(squares[0])) // 2
    clf = clone(fitted).set_params(prototypes_per_class=1).fit(squares[0], y)
    with pytest.raises(ValueError, match=r"left of 0, 1, 2, 3, 4, and \d+ more\."):
        keep(clf, [clf.n_prototypes_ - 1])


def test_all_edits_take_images_and_labels_in_one_order():
    for edit in (remove, keep, prune, merge_duplicates, forbid, encourage):
        parameters = inspect.signature(edit).parameters.values()
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert [name for name in names if name != "ids"] == ["clf", "X", "y"]


def test_each_removed_prototype_may_have_a_reason_of_its_own(three_each):
    record = remove(three_each, [8, 1, 2], reason={8: "sky", 1: "twig"}).edits_
    assert record["reason"].tolist() == ["twig", "", "sky"]
    assert keep(three_each, range(8), reason={8: "sky"}).edits_["reason"].tolist() == ["sky"]


def test_a_reason_is_a_text(three_each):
    with pytest.raises(
        TypeError, match="reason must be a str, or a dict of one for each id; got None"
    ):
        remove(three_each, [0], reason=None)


def test_nothing_removed_is_the_same_model(three_each, squares):
    same = keep(three_each, range(9))
    np.testing.assert_allclose(same.coef_, three_each.coef_, atol=1e-3)
    assert len(same.edits_) == 0


@pytest.mark.parametrize(("k", "t"), [(1, 1), (4, 1), (4, 3), (6, 3), (6, 6)])
def test_pruning_goes_by_the_nearest_images(three_each, squares, k, t):
    X, y = squares
    shares = purity(nearest_patches(three_each, X, k, y))
    own = (shares * k).round().astype(int)
    pruned = prune(three_each, k=k, t=t)
    gone = set(pruned.edits_["prototype"])
    best = {own[three_each.prototypes_["class"] == c].idxmax() for c in three_each.classes_}
    assert gone == set(own.index[own < t]) - best
    for row in pruned.edits_.to_dict("records"):
        text = f"{own[row['prototype']]} of the {k} nearest images are of its class, fewer than {t}"
        assert row["reason"] == text
    assert_consistent(pruned, X)


def test_pruning_by_weight(three_each):
    weight = three_each.prototypes_["weight"]
    least = float(weight.median())
    pruned = prune(three_each, min_weight=least)
    best = weight.groupby(three_each.prototypes_["class"]).idxmax()
    assert set(pruned.edits_["prototype"]) == set(weight.index[weight < least]) - set(best)


def test_duplicates_are_merged(three_each, squares):
    twice = remove(three_each, [])
    with torch.no_grad():
        twice.module_.prototypes[4] = twice.module_.prototypes[3]
        twice.activations_.g[:, 4] = twice.activations_.g[:, 3]
    merged = merge_duplicates(twice)
    assert merged.edits_["prototype"].tolist() == [4]
    assert merged.edits_["reason"].tolist() == ["the same as prototype 3"]
    assert merge_duplicates(three_each, max_distance=5).n_prototypes_ == 3
    assert_consistent(merged, squares[0])


@pytest.mark.parametrize(
    ("edit", "wrong", "message"),
    [
        (prune, {"k": 0}, "k must be an int >= 1"),
        (prune, {"t": 1.5}, "t must be an int >= 1"),
        (prune, {"min_weight": -1}, "min_weight must be"),
        (merge_duplicates, {"max_distance": -1}, "max_distance must be"),
    ],
)
def test_wrong_arguments_are_refused(three_each, edit, wrong, message):
    with pytest.raises(ValueError, match=message):
        edit(three_each, **wrong)


def test_other_images_can_stand_in_for_the_activations(three_each, squares):
    X, y = squares
    expected = remove(three_each, [0])
    bare = remove(three_each, [])
    del bare.activations_
    with pytest.raises(ValueError, match="holds no activations of training images: pass X, y"):
        remove(bare, [0])
    edited = remove(bare, [0], X, y)
    np.testing.assert_allclose(edited.coef_, expected.coef_, atol=1e-3)
    with pytest.raises(ValueError, match="holds no activations"):
        remove(edited, [1])


def test_no_image_is_read_and_the_backbone_does_not_run(three_each, backbone_images):
    prune(three_each)
    remove(three_each, [3])
    assert backbone_images == []


@pytest.mark.parametrize("per_class", [2, "auto"])
def test_activations_are_those_of_the_training_images(fitted, squares, per_class):
    clf = clone(fitted).set_params(prototypes_per_class=per_class).fit(*squares)
    np.testing.assert_allclose(clf.activations_.g, clf.transform(squares[0]), atol=1e-5)
    assert clf.activations_.owner.equal(clf.module_.owner.cpu())


def test_other_images_have_the_weights_of_their_classes(fitted, squares):
    X, y = squares
    weighted = clone(fitted).set_params(class_weight={"blue": 50.0}).fit(X, y)
    assert np.abs(weighted.coef_ - fitted.coef_).max() > 0.1
    again = keep(weighted, range(weighted.n_prototypes_), X=X, y=y)
    np.testing.assert_allclose(again.coef_, weighted.coef_, atol=0.05)
    path = weighted.last_layer_path(X, y, [weighted.lambda_l1_], folds=0)
    np.testing.assert_allclose(path["weight"][0], weighted.coef_, atol=0.05)


def test_edits_do_not_mind_the_output_format(three_each, squares):
    X, y = squares
    framed = remove(three_each, []).set_output(transform="pandas")
    assert remove(framed, [0], X=X, y=y).n_prototypes_ == 8
    assert len(framed.last_layer_path(X, y, [1e-3], folds=0)) == 1


def test_an_edit_keeps_the_penalties_of_the_fit(fitted, squares):
    clf = clone(fitted).set_params(lambda_l1=1e-3, lambda_l2=1e-2).fit(*squares)
    result = remove(clf.set_params(lambda_l1=0.1, lambda_l2=0.0), []).last_layer_result_
    assert (result.lambda_l1, result.lambda_l2) == (1e-3, 1e-2)
    np.testing.assert_allclose(result.weight, clf.coef_, atol=1e-3)


def test_an_edit_forgets_the_path_of_the_penalty(fitted, squares):
    clf = clone(fitted).set_params(lambda_l1="cv").fit(*squares)
    assert not hasattr(remove(clf, [0]), "last_layer_path_")


def test_an_edit_solves_the_last_layer_on_the_same_views(fitted, squares):
    clf = clone(fitted).set_params(augmented_views=1).fit(*squares)
    assert clf.activations_.views.shape == (1, *clf.activations_.g.shape)
    np.testing.assert_allclose(remove(clf, []).coef_, clf.coef_, atol=1e-6)
    one_less = remove(clf, [0])
    assert one_less.activations_.views.equal(clf.activations_.views[..., 1:])
    assert one_less.last_layer_result_.objective >= clf.last_layer_result_.objective - 1e-6


def test_training_images_that_are_given_anew_have_the_same_views(fitted, squares):
    clf = clone(fitted).set_params(augmented_views=2, lambda_l1=1e-3).fit(*squares)
    again = keep(clf, range(clf.n_prototypes_), X=squares[0], y=squares[1])
    np.testing.assert_allclose(again.coef_, clf.coef_, atol=1e-4)
    path = clf.last_layer_path(*squares, [1e-3], folds=0)
    np.testing.assert_allclose(path["weight"][0], clf.coef_, atol=1e-4)
    assert path["objective"][0] == pytest.approx(clf.last_layer_result_.objective, rel=1e-5)


def test_the_path_sees_the_views_that_a_fit_without_some_images_sees(fitted, squares):
    X, y = squares
    weight = np.where(np.arange(len(X)) % 5 == 1, 0.0, 1.0)
    clf = clone(fitted).set_params(augmented_views=2, lambda_l1=1e-3)
    clf.fit(X, y, sample_weight=weight)
    path = clf.last_layer_path(X, y, [1e-3], folds=0, sample_weight=weight)
    np.testing.assert_allclose(path["weight"][0], clf.coef_, atol=1e-4)


def test_classes_of_few_images_need_all_of_them(fitted, squares):
    X, y = squares
    few = np.r_[np.flatnonzero(y == "blue")[:2], np.flatnonzero(y != "blue")]
    clf = clone(fitted).fit(X[few], y[few])
    own = prune(clf, k=6, t=3).edits_
    blue = own[own["class"] == "blue"]["reason"]
    assert not blue.str.startswith("2 of").any()


@pytest.mark.parametrize("edit", [prune, merge_duplicates, lambda clf: remove(clf, [0])])
def test_only_a_fitted_classifier_is_edited(fitted, edit):
    with pytest.raises(NotFittedError):
        edit(clone(fitted))


def test_images_and_labels_go_together(three_each, squares):
    with pytest.raises(ValueError, match="X and y go together"):
        prune(three_each, y=squares[1])
    with pytest.raises(ValueError, match="t must be at most k; got t=3 and k=2"):
        prune(three_each, k=2)


def test_images_in_place_of_the_activations_are_of_all_classes(three_each, squares):
    X, y = squares
    with pytest.raises(ValueError, match=r"X has no image of \['red'\]"):
        remove(three_each, [0], X=X[y != "red"], y=y[y != "red"])


@pytest.mark.parametrize("edit", [remove, keep, prune, merge_duplicates])
def test_what_holds_a_classifier_is_not_edited(fitted, squares, edit):
    rest = ([0],) if edit in (remove, keep) else ()
    before = fitted.prototypes_.copy()
    with pytest.raises(TypeError, match=r"pipeline\[-1\], best_estimator_ of a search"):
        edit(make_pipeline("passthrough", fitted), *rest)
    with pytest.raises(TypeError, match=r"frozen\.estimator"):
        edit(FrozenEstimator(fitted), *rest)
    assert fitted.prototypes_.equals(before)
