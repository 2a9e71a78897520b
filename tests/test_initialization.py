"""Where training starts, against means and bounds of the class's patches computed by loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from protoclf import ProtoPNetClassifier, initialization, selection
from protoclf.features import FitData
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.initialization import centre_latents, kmeans_prototypes, restart_prototypes
from protoclf.prototype_layer import min_distances, patches_of
from protoclf.selection import selected_prototypes

STARTS = [kmeans_prototypes, selected_prototypes]
SIZES = [(1, 1), (2, 2), (1, 3), (4, 4)]  # of a prototype, on a map of 4 x 4


@pytest.fixture
def initialized(squares):
    """Make a net, initialised as a fit does it, with its training data."""

    def make(seed=0, **parameters):
        settings = {"image_size": 32, "prototypes_per_class": 2, "latent_dim": None}
        settings |= {"similarity": "log", "batch_size": 7, "verbose": 0, "device": "cpu"}
        torch.manual_seed(0)
        net = ProtoPNetClassifier(nn.Conv2d(3, 5, 8, 8), **(settings | parameters))
        net.classes_inferred_, y = np.unique(squares[1], return_inverse=True)
        net.seed_ = seed
        dataset = ImageDataset(Images(squares[0]), Preprocessing(net.image_size), y).keep()
        return net.initialize(), FitData(net, dataset, None)

    return make


@torch.no_grad()
def class_patches(net, data, c):
    """All latent patches of the training images of a class (n, D, H1, W1), by loops."""
    rows, cols = net.module_.prototype_size
    z = net.module_.latents(data.train_features.features)
    found = []
    for i in np.flatnonzero(data.train_features.y == c):
        for top in range(z.shape[2] - rows + 1):
            for left in range(z.shape[3] - cols + 1):
                found.append(z[i, :, top : top + rows, left : left + cols])
    return torch.stack(found)


@pytest.mark.parametrize("size", SIZES)
def test_the_centre_of_one_cluster_is_the_mean_patch_of_the_class(initialized, size):
    net, data = initialized(prototype_size=size, prototypes_per_class=1)
    kmeans_prototypes(net, data)
    for c, prototype in enumerate(net.module_.prototypes):
        expected = class_patches(net, data, c).mean(0)
        torch.testing.assert_close(prototype, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_prototypes_start_among_the_patches_of_their_class(initialized, start, size):
    net, data = initialized(prototype_size=size)
    start(net, data)
    prototypes = net.module_.prototypes.detach()
    assert prototypes.shape == (6, 5, *size)
    assert len(prototypes.flatten(1).unique(dim=0)) == 6
    for c, prototype in zip(net.module_.owner.tolist(), prototypes, strict=True):
        patches = class_patches(net, data, c)
        assert (prototype >= patches.amin(0) - 1e-5).all()
        assert (prototype <= patches.amax(0) + 1e-5).all()


def test_kmeans_centres_are_the_means_of_the_patches_nearest_to_them(initialized):
    net, data = initialized()
    kmeans_prototypes(net, data)
    for c in range(3):
        centres = net.module_.prototypes[net.module_.owner == c].detach().flatten(1)
        patches = class_patches(net, data, c).flatten(1)
        nearest = torch.cdist(patches, centres).argmin(1)
        for k, centre in enumerate(centres):
            spread = patches.std(0)
            assert ((patches[nearest == k].mean(0) - centre).abs() < 0.1 * spread).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("similarity", ["log", "cosine"])
@torch.no_grad()
def test_few_candidates_are_rated_by_their_distances(initialized, size, similarity):
    net, data = initialized(prototype_size=size, similarity=similarity, precision="float32")
    net.prepare_processor()
    z = net.module_.latents(data.train_features.features)
    candidates = torch.cat([z[:3, :, : size[0], : size[1]], torch.randn(4, 5, *size)])
    distance = selection._distances(net, data, candidates)
    assert torch.equal(distance, torch.cat([min_distances(a, candidates)[0] for a in z.split(7)]))
    assert (distance[:3, :3].diag() == 0).all()


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_cosines_of_a_backbone_in_bfloat16_are_rated_in_bfloat16(initialized, monkeypatch, size):
    monkeypatch.setattr(selection, "_AT_ONCE", 2)
    net, data = initialized(prototype_size=size, similarity="cosine", precision="bfloat16")
    net.prepare_processor()
    z = net.module_.latents(data.train_features.features)
    others = torch.randn(4, 5, *size, generator=torch.Generator().manual_seed(0))
    candidates = torch.cat([z[:3, :, : size[0], : size[1]], net.module_.scaled(others)])
    rough = selection._distances(net, data, candidates)
    exact = min_distances(z, candidates)[0]
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().max() < 0.02  # of at most 4: 3 digits of a cosine


@pytest.mark.parametrize("block", [1, 2**20])
def test_cells_of_nothing_are_rated_in_bfloat16_as_otherwise(monkeypatch, block):
    monkeypatch.setattr(selection, "_BLOCK", block)
    z = torch.zeros(3, 2, 2, 2)
    z[1, :, 0, 0] = torch.tensor([0.6, 0.8])
    z[2] = z[1, :, :1, :1] / 2
    for size in ((1, 1), (2, 2)):
        candidates = z[..., : size[0], : size[1]]
        rough = selection._rough_distances([z], candidates, None, torch.bfloat16)
        exact = min_distances(z, candidates)[0]
        assert (rough - exact).abs().max() < 0.02


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
@pytest.mark.parametrize("block", [1, 300])
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-4), ("bfloat16", 0.05)])
@torch.no_grad()
def test_many_candidates_are_rated_by_distances_in_their_principal_components(
    initialized, monkeypatch, size, block, precision, error
):
    monkeypatch.setattr(selection, "_AT_ONCE", 4)
    monkeypatch.setattr(selection, "_BLOCK", block)
    net, data = initialized(prototype_size=size, similarity="cosine", precision=precision)
    net.prepare_processor()
    candidates = torch.randn(9, 5, *size, generator=torch.Generator().manual_seed(0))
    candidates = net.module_.scaled(candidates)
    flat = candidates.flatten(1)
    axes = selection._principal_axes(flat, 2)  # (K, 2)
    monkeypatch.setattr(selection, "_axes_that_save_work", lambda *sizes: axes)
    distance = selection._distances(net, data, candidates)
    for i, z in enumerate(net.module_.latents(data.train_features.features)):
        patches = patches_of(z[None], candidates)[0] - flat.mean(0)
        for j, p in enumerate(flat - flat.mean(0)):
            product = (patches @ axes) @ (p @ axes)
            expected = patches.square().sum(1) + p.square().sum() - 2 * product
            assert distance[i, j] == pytest.approx(float(expected.amin()), rel=error, abs=error)


@torch.no_grad()
def test_components_that_hold_the_candidates_change_no_distance(initialized, monkeypatch):
    net, data = initialized()
    copies = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    z = [torch.einsum("kc,nchw->nkhw", copies, own) for own, _ in data.train_latents()]
    monkeypatch.setattr(data, "train_latents", lambda: [(own, None) for own in z])
    candidates = torch.cat([own.permute(0, 2, 3, 1)[:, 1, 2] for own in z])[..., None, None]
    axes = selection._principal_axes(candidates.flatten(1), 5)
    monkeypatch.setattr(selection, "_axes_that_save_work", lambda *sizes: axes)
    rough = selection._distances(net, data, candidates)
    expected = min_distances(torch.cat(z), candidates)[0]
    torch.testing.assert_close(rough, expected, rtol=1e-3, atol=1e-5 * float(expected.amax()))


@pytest.mark.parametrize(
    ("m", "size", "n_patches", "n_images", "d"),
    [
        (3200, 1280, 49, 600, None),  # ten classes: all channels
        (16_000, 1280, 49, 6000, 158),
        (16_000, 1280, 49, 10, None),  # to find axes would take longer
        (1600, 11_520, 25, 300, None),  # ... and to go along them, where candidates are few
        (3200, 11_520, 25, 6000, 364),
        (100_000, 2048, 196, 6000, 64),
    ],
)
def test_axes_are_found_where_they_save_half_of_the_work(
    monkeypatch, m, size, n_patches, n_images, d
):
    monkeypatch.setattr(selection, "_principal_axes", lambda patches, most: most)
    candidates = torch.empty(m, size, device="meta")
    assert selection._axes_that_save_work(candidates, n_patches, n_images) == d
    if d is not None:
        with_axes = (n_images * n_patches + 6 * m) * d * (m + size)
        assert with_axes < n_images * n_patches * m * size


@pytest.mark.parametrize("start", STARTS)
def test_the_start_depends_on_the_seed_and_on_nothing_else(initialized, start):
    prototypes = []
    for seed in (0, 0, 1):
        net, data = initialized(seed)
        torch.manual_seed(len(prototypes))
        np.random.seed(len(prototypes))  # noqa: NPY002 (the global state must not matter)
        start(net, data)
        prototypes.append(net.module_.prototypes.detach().clone())
    assert torch.equal(prototypes[0], prototypes[1])
    assert not torch.equal(prototypes[0], prototypes[2])


@pytest.mark.parametrize("start", STARTS)
def test_classes_may_have_unequal_numbers_of_prototypes(initialized, start):
    counts = {"blue": 3, "green": 1, "red": 2}
    net, data = initialized(prototypes_per_class=counts)
    start(net, data)
    assert net.module_.prototypes.shape[0] == 6
    for c, prototype in zip(net.module_.owner.tolist(), net.module_.prototypes, strict=True):
        patches = class_patches(net, data, c)
        assert ((prototype >= patches.amin(0) - 1e-5) & (prototype <= patches.amax(0) + 1e-5)).all()


@pytest.mark.parametrize("latent_dim", [None, 6])
@torch.no_grad()
def test_cosines_start_from_latents_that_are_centred(initialized, latent_dim):
    net, data = initialized(similarity="cosine", latent_dim=latent_dim)
    before = net.module_.add_on(data.train_features.features)
    centre_latents(net, data)
    after = net.module_.add_on(data.train_features.features)
    mean = before.mean((0, 2, 3))
    torch.testing.assert_close(after, before - mean[:, None, None], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_papers_similarity_has_no_centre(initialized):
    net, data = initialized()
    before = net.module_.latents(data.train_features.features)
    centre_latents(net, data)
    assert torch.equal(net.module_.latents(data.train_features.features), before)


def test_of_many_images_and_patches_some_are_drawn(initialized, monkeypatch):
    monkeypatch.setattr(initialization, "_MAX_IMAGES", 5)
    monkeypatch.setattr(initialization, "_MAX_PATCHES", 40)
    net, data = initialized(batch_size=2)
    every = class_patches(net, data, 1).flatten(1)  # 16 of each image
    drawn = initialization.class_patches(net, data, 1, np.random.default_rng(0))
    place = torch.cdist(drawn, every).argmin(1)
    assert torch.equal(drawn, every[place])
    assert len(place.unique()) == 40
    assert len((place // 16).unique()) == 5


@torch.no_grad()
def test_prototypes_restart_unlike_what_is_forbidden_what_stays_and_one_another(
    initialized, monkeypatch
):
    kinds = torch.eye(5)[:4]
    monkeypatch.setattr(initialization, "class_patches", lambda *_: kinds.repeat(9, 1))
    for seed in range(5):
        net, data = initialized(seed, prototypes_per_class={"blue": 3, "green": 1, "red": 1})
        net.module_.prototypes[0] = kinds[0][:, None, None]
        forbidden = SimpleNamespace(
            patches=kinds[1:3, :, None, None], owner=torch.tensor([0, 1])
        )  # the third kind for another class alone
        restart_prototypes(net, data, [1, 2], forbidden)
        found = net.module_.prototypes[1:3].flatten(1)
        assert sorted(found.argmax(1).tolist()) == [2, 3]
        assert (found.amax(1) == 1).all()
