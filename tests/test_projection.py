"""The projection's search for sources, against loops over all patches of all images."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclf.projection import find_sources, read_patches

SIZES = [(1, 1), (2, 2), (1, 3), (3, 4)]  # of a prototype, on a map of 3 x 4
OWNER = [0, 0, 0, 1, 2, 2]
Y = [1, 0, 2, 0, 2, 1, 0, 2, 1]


def make(size=(1, 1), y=Y, owner=OWNER, D=4, seed=0, levels=None):
    """Latent maps, classes, prototypes and owners; values are whole numbers below `levels`."""
    rng = np.random.default_rng(seed)
    z, p = rng.random((len(y), D, 3, 4)), rng.random((len(owner), D, *size))
    if levels:
        z, p = np.floor(levels * z), np.floor(levels * p)
    tensors = (torch.tensor(values, dtype=torch.float32) for values in (z, p))
    return *tensors, torch.tensor(y), torch.tensor(owner)


def search(z, p, y, owner, distinct=None, batch_size=4):
    return find_sources(
        zip(z.split(batch_size), y.split(batch_size), strict=True), p, owner, distinct
    )


def candidates(z, p_j, y, c):
    """(distance, image, cell) of every patch of class c, in the order of images and cells."""
    rows, cols = p_j.shape[1:]
    found = []
    for i in range(len(z)):
        if y[i] != c:
            continue
        corners = itertools.product(range(3 - rows + 1), range(4 - cols + 1))
        for cell, (top, left) in enumerate(corners):
            patch = z[i, :, top : top + rows, left : left + cols]
            found.append((float(((patch - p_j) ** 2).sum()), i, cell))
    return found


def smallest_sum(z, p, y, owner, c, what):
    """Brute force: the smallest sum of distances of a class's prototypes to distinct things."""
    mine = [candidates(z, p[j], y, c) for j in range(len(p)) if owner[j] == c]
    things = []  # for each prototype, what may be taken -> its distance
    for patches in mine:
        best = {}
        for distance, image, cell in patches:
            key = image if what == "images" else (image, cell)
            best[key] = min(distance, best.get(key, np.inf))
        things.append(best)
    choices = itertools.permutations(things[0], len(things))
    return min(sum(best[k] for best, k in zip(things, keys, strict=True)) for keys in choices)


@pytest.mark.parametrize("size", SIZES)
def test_sources_are_the_nearest_own_class_patches_of_loops(size):
    z, p, y, owner = make(size)
    sources = search(z, p, y, owner)
    for j, c in enumerate(OWNER):
        distance, image, cell = min(candidates(z, p[j], y, c))
        assert (sources.image[j], sources.cell[j]) == (image, cell)
        assert sources.distance[j] == pytest.approx(distance, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 999), batch_size=st.integers(1, 9))
def test_of_equally_near_patches_the_first_image_then_the_first_cell_is_taken(
    size, seed, batch_size
):
    z, p, y, owner = make(size, D=1, seed=seed, levels=2)  # many ties
    sources = search(z, p, y, owner, batch_size=batch_size)
    for j, c in enumerate(OWNER):
        distance, image, cell = min(candidates(z, p[j], y, c))  # tuples compare in just that order
        assert (sources.image[j], sources.cell[j]) == (image, cell)
        assert sources.distance[j] == pytest.approx(distance)


def test_nearer_patches_of_other_classes_are_not_taken():
    z, p, y, owner = make()
    for j, c in enumerate(OWNER):
        z[int((y != c).nonzero()[0]), :, 1, 1] = p[j, :, 0, 0]  # at a distance of 0
    sources = search(z, p, y, owner)
    assert y[sources.image].tolist() == OWNER
    for j, c in enumerate(OWNER):
        assert sources.distance[j] == pytest.approx(min(candidates(z, p[j], y, c))[0], rel=1e-5)


@pytest.mark.parametrize("distinct", ["patches", "images"])
@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), levels=st.sampled_from([None, 3]))
def test_distinct_sources_have_the_smallest_sum_of_distances_by_brute_force(
    size, distinct, seed, levels
):
    z, p, y, owner = make(size, seed=seed, levels=levels)
    p[1:3] = p[0]  # prototypes of class 0 want the same patch
    sources = search(z, p, y, owner, distinct)
    for c in range(3):
        mine = owner.numpy() == c
        images, cells = sources.image[mine].tolist(), sources.cell[mine].tolist()
        taken = images if distinct == "images" else list(zip(images, cells, strict=True))
        assert len(set(taken)) == mine.sum()
        expected = smallest_sum(z, p, y, OWNER, c, distinct)
        assert sources.distance[mine].sum() == pytest.approx(expected, rel=1e-5)
    for j, c in enumerate(OWNER):  # and each distance is that of its patch
        there = {(image, cell): d for d, image, cell in candidates(z, p[j], y, c)}
        expected = there[sources.image[j], sources.cell[j]]
        assert sources.distance[j] == pytest.approx(expected, rel=1e-5)


def test_without_distinct_equal_prototypes_share_a_patch():
    z, p, y, owner = make()
    p[1] = p[0]
    sources = search(z, p, y, owner)
    assert (sources.image[1], sources.cell[1]) == (sources.image[0], sources.cell[0])


@pytest.mark.parametrize("distinct", [None, "patches", "images"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_sources_do_not_depend_on_how_images_are_split_into_batches(size, distinct):
    z, p, y, owner = make(size, D=1, levels=2)
    expected = search(z, p, y, owner, distinct, batch_size=9)
    for batch_size in (1, 2, 5):
        sources = search(z, p, y, owner, distinct, batch_size)
        assert all(map(np.array_equal, sources, expected))


@pytest.mark.parametrize("distinct", [None, "patches", "images"])
def test_the_order_of_prototypes_and_of_classes_is_free(distinct):
    z, p, y, owner = make()
    order = [4, 0, 3, 5, 2, 1]
    expected = search(z, p, y, owner, distinct)
    sources = search(z, p[order], y, owner[order], distinct)
    for values, wanted in zip(sources, expected, strict=True):
        assert values.tolist() == wanted[order].tolist()


def test_one_pass_over_the_images():
    z, p, y, owner = make()
    passes = []

    def batches():
        passes.append("begun")
        yield z, y

    find_sources(batches(), p, owner, "patches")
    assert passes == ["begun"]


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_read_at_their_sources_batch_by_batch(size):
    z, p, y, owner = make(size)
    sources = search(z, p, y, owner)
    seen = []
    for index, patches, batch, sample in read_patches(
        zip(z.split(4), y.split(4), strict=True), sources, size
    ):
        assert patches.shape == (len(index), *p.shape[1:])
        for j, patch, i in zip(index, patches, sample.tolist(), strict=True):
            top, left = divmod(int(sources.cell[j]), 4 - size[1] + 1)
            expected = z[sources.image[j], :, top : top + size[0], left : left + size[1]]
            assert torch.equal(patch, expected)
            assert torch.equal(batch[i], z[sources.image[j]])
        seen += index.tolist()
    assert sorted(seen) == list(range(len(p)))


def test_fewer_patches_than_distinct_prototypes_are_refused():
    z, p, y, owner = make()
    images = torch.tensor([int((y == c).nonzero()[0]) for c in range(3)])
    with pytest.raises(ValueError, match=r'distinct="patches" takes .* Give more images'):
        search(z[images, :, :1, :1], p, y[images], owner, "patches")
