"""Folds of training images: stratified, groups in one piece, and none without a class."""

import warnings

import numpy as np
import pytest

from protoclf.splits import stratified_splits


@pytest.mark.parametrize("folds", [2, 4, 10])
def test_no_split_takes_a_group_apart(folds):
    y = np.repeat([0, 1, 2], 12)
    groups = np.arange(36) // 2 % 9
    splits = stratified_splits(y, folds, 0, groups)
    assert len(splits) == min(folds, 9)
    for train, test in splits:
        assert not set(groups[train]) & set(groups[test])
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(36))
    assert stratified_splits(y, folds, 0, np.zeros(36)) == []


@pytest.mark.parametrize("groups", [None, np.r_[np.arange(20) // 2, 10], np.r_[:20, 0]])
def test_the_only_image_of_a_class_is_held_out_with_its_group_alone(groups):
    y = np.repeat([0, 1, 2], [10, 10, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = stratified_splits(y, 4, 0, groups)
    assert len(splits) == 4
    for train, test in splits:
        assert (20 in test) == (groups is not None and groups[20] in groups[test[test < 20]])
        assert sorted([*train, *test]) == list(range(21))


def test_copies_of_the_only_image_of_a_class_are_learned_from_in_each_fold():
    y = np.repeat([0, 1, 2], [10, 10, 3])
    splits = stratified_splits(y, 4, 0, np.r_[:20, 20, 20, 20])
    assert len(splits) == 4
    assert all({20, 21, 22} <= set(train) for train, _ in splits)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_small_class_may_be_held_out_in_some_folds_alone(grouped):
    y = np.repeat([0, 1], [20, 2])
    groups = np.arange(22) if grouped else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = stratified_splits(y, 5, 0, groups, each_class_in_all=False)
        assert len(stratified_splits(y, 5, 0, groups)) == 2
    assert len(splits) == 5
    assert sum((y[test] == 1).any() for _, test in splits) == 2
    assert all((y[train] == c).any() for train, _ in splits for c in (0, 1))
