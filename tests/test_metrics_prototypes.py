"""Sparsity, global size and distinctness: models whose answers are known, and plain loops."""

import numpy as np
import pytest
from colour_model import COLOURS, colour_model, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclf import ProtoPNetEnsemble
from protoclf.duplicates import distances_within_classes, repeated
from protoclf.editing import merge_duplicates
from protoclf.metrics import distinctness, global_size, sparsity

RED, BLUE = COLOURS["red"], COLOURS["blue"]
GREEN = (0, 255, 0)
FOUR = {"colours": [RED, BLUE, RED, BLUE], "owner": (0, 0, 1, 1)}


def one_spot():
    """A picture with red and blue, to which prototypes of either are as similar."""
    return picture({(2, 2): RED, (5, 5): BLUE})[None]


# ---- sparsity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "share", "size"),
    [
        ([9, 1, 0, 0], 0.9, 1),
        ([9, 1, 0, 0], 0.91, 2),
        ([8, 2, 0, 0], 0.9, 2),
        ([8, 0, -2, 0], 0.9, 2),  # what speaks against counts too
        ([1, 1, 1, 1], 0.5, 2),
        ([1, 1, 1, 1], 1.0, 4),
        ([5, 0, 0, 0], 1.0, 1),
    ],
)
def test_a_decision_of_known_contributions(weights, share, size):
    clf = colour_model(**FOUR, weight=[weights, [0] * 4])
    table = sparsity(clf, one_spot(), share=share)
    assert table["size"].tolist() == [size]
    assert table["n_rows"].tolist() == [np.count_nonzero(weights)]
    assert table["class"].tolist() == ["blue"]


def test_without_weights_nothing_is_read():
    table = sparsity(colour_model(**FOUR, weight=[[0] * 4] * 2), one_spot())
    assert table[["size", "n_rows"]].to_numpy().tolist() == [[0, 0]]


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.05, 1))
def test_sizes_are_those_of_sorting_each_sheet(fitted, squares, share):
    table = sparsity(fitted, squares[0], share=share).set_index("sample")
    for i, sheet in fitted.explain(squares[0]).groupby("sample"):
        parts = np.sort(sheet["contribution"].abs())[::-1]
        size = next(
            k for k in range(len(parts) + 1) if parts[:k].sum() >= share * parts.sum() - 1e-6
        )
        assert table.loc[i, "size"] == size
        assert table.loc[i, "n_rows"] == len(parts)
        assert table.loc[i, "class"] == sheet["class"].iloc[0]


# ---- global size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "size"), [([[1, 0, 0, 0], [0, 0, 1, -1]], 3), ([[0] * 4] * 2, 0), ([[1] * 4] * 2, 4)]
)
def test_global_size_counts_what_any_class_uses(weight, size):
    assert global_size(colour_model(**FOUR, weight=weight)) == size


# ---- distinctness -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colours", "distinct"),
    [
        ([RED, BLUE, RED, BLUE], [1, 1, 1, 1]),  # the same, but of another class
        ([RED, RED, RED, BLUE], [1, 0, 1, 1]),
        ([RED, RED, BLUE, BLUE], [1, 0, 1, 0]),
    ],
)
def test_prototypes_of_known_colours(colours, distinct):
    clf = colour_model(colours=colours, owner=(0, 0, 1, 1))
    table = distinctness(clf)
    assert table["distinct"].tolist() == distinct
    assert table["nearest"].tolist() == [1, 0, 3, 2]
    squares = np.square(np.subtract(colours[::2], colours[1::2]) / 127.5).sum(1)
    np.testing.assert_allclose(table["distance"], squares.repeat(2), atol=1e-5)


def test_one_of_a_class_has_no_neighbour():
    table = distinctness(colour_model())
    assert table["nearest"].isna().all()
    assert table["distance"].isna().all()
    assert table["distinct"].tolist() == [1, 1]


def test_a_chain_is_broken_as_merging_breaks_it():
    """Of a, b and c in steps of one, b repeats a, and c is as far as it may be from a."""
    colours = [(100, 0, 0), (110, 0, 0), (120, 0, 0), BLUE, GREEN, RED]
    clf = colour_model(colours=colours, owner=(0, 0, 0, 1, 1, 1))
    step = (10 / 127.5) ** 2
    for factor, distinct in ((0.9, [1, 1, 1]), (1.1, [1, 0, 1]), (4.4, [1, 0, 0])):
        table = distinctness(clf, max_distance=factor * step)
        assert table["distinct"].tolist() == [*distinct, 1, 1, 1]


@pytest.mark.parametrize("max_distance", [0.0, 1e-6, 0.5, 1.0])
def test_as_many_are_distinct_as_merging_leaves(fitted, max_distance):
    left = merge_duplicates(fitted, max_distance=max_distance).n_prototypes_
    assert distinctness(fitted, max_distance=max_distance)["distinct"].sum() == left


def test_of_many_prototypes_equal_ones_are_found_too():
    """Products of matrices would put 1e-15 between them."""
    rng = np.random.default_rng(0)
    colours = np.repeat(rng.integers(0, 256, (20, 3)), 2, axis=0)
    clf = colour_model(
        colours=[*colours.tolist(), BLUE], owner=[0] * 40 + [1], prototypes_per_class=1
    )
    first, second = distances_within_classes(clf.module_)
    assert first[0].tolist() == list(range(40))
    expected = [-1 if j % 2 == 0 else j - 1 for j in range(40)]
    assert repeated(first[1], 0).tolist() == expected
    assert second[0].tolist() == [40]
    assert repeated(second[1], 0).tolist() == [-1]


# ---- wrong use --------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(fitted, squares):
    with pytest.raises(ValueError, match="share must be a number > 0 and <= 1; got 0"):
        sparsity(fitted, squares[0], share=0)
    with pytest.raises(ValueError, match="max_distance must be a finite number >= 0"):
        distinctness(fitted, max_distance=-1)


def test_an_ensemble_is_refused_with_what_to_do(fitted, squares):
    ensemble = ProtoPNetEnsemble([("one", fitted)], verbose=0)
    ensemble.estimators_, ensemble.classes_ = [fitted], fitted.classes_
    with pytest.raises(TypeError, match=r"got ProtoPNetEnsemble.*ensemble.estimators_"):
        sparsity(ensemble, squares[0])
