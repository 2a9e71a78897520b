"""The network as one function of images: similarities, last layer, and what is frozen."""

import math

import pytest
import torch
from torch import nn

from protoclf.backbones import SmallCNN
from protoclf.network import PARTS, Centre, ProtoPNet, PrototypeSpec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWNER = [0, 0, 1, 2, 2]
CELLS = (4, 4)  # of SmallCNN for images of 32 x 32
SIZES = [(1, 1), (2, 2), (1, 3), CELLS]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(size=(1, 1), similarity="log", latent_dim=6, backbone=None):
    """A network in evaluation mode, and five random images."""
    spec = PrototypeSpec(OWNER, 3, size, similarity)
    net = ProtoPNet(backbone or SmallCNN(8), 8, spec, latent_dim, IMAGENET).eval()
    if latent_dim is not None:  # no cell is all zeros, which has no cosine
        nn.init.normal_(net.add_on[2].bias)
    return net, torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)


def loop_similarity(net, z_i, p_j):
    """g_j(x_i) by the formulas: the largest similarity of any patch."""
    rows, cols = p_j.shape[1:]
    best = -math.inf
    for y in range(z_i.shape[1] - rows + 1):
        for x in range(z_i.shape[2] - cols + 1):
            distance, cosines = 0.0, 0.0
            for dy in range(rows):
                for dx in range(cols):
                    a, b = z_i[:, y + dy, x + dx], p_j[:, dy, dx]
                    distance += float(((a - b) ** 2).sum())
                    cosines += float(a @ b / (a.norm() * b.norm()))
            g = math.log((distance + 1) / (distance + 1e-4))
            best = max(best, g if net.similarity == "log" else cosines / (rows * cols))
    return best


@pytest.mark.parametrize("similarity", ["log", "cosine"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_activations_are_those_of_loops_and_logits_are_their_weighted_sums(size, similarity):
    net, images = make(size, similarity)
    nn.init.normal_(net.last_layer.weight)
    z = net.add_on(net.features(images))  # (N, D, H, W), not scaled
    logits, distance, _ = net(images)
    g = net.activations(distance)
    for i in range(len(images)):
        for j in range(len(OWNER)):
            expected = loop_similarity(net, z[i], net.prototypes[j])
            assert g[i, j].item() == pytest.approx(expected, abs=1e-5)
        for c in range(3):
            total = sum(float(net.last_layer.weight[c, j] * g[i, j]) for j in range(len(OWNER)))
            assert logits[i, c].item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("similarity", ["log", "cosine"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_similarity_maps_hold_the_activations_at_the_cells_of_the_forward_pass(size, similarity):
    net, images = make(size, similarity)
    _, distance, cell = net(images)
    maps = net.similarity_maps(net.latents(net.features(images)))
    assert maps.shape == (5, 5, CELLS[0] - size[0] + 1, CELLS[1] - size[1] + 1)
    at_cell = maps.flatten(2).gather(2, cell[:, :, None])[:, :, 0]  # (N, m)
    torch.testing.assert_close(at_cell, net.activations(distance))
    torch.testing.assert_close(at_cell, maps.flatten(2).amax(2))
    picked = net.similarity_maps(net.latents(net.features(images)), torch.tensor([3, 1]))
    torch.testing.assert_close(picked, maps[:, [3, 1]])


def test_last_layer_starts_at_one_for_own_prototypes_and_minus_a_half_for_others():
    net, _ = make()
    expected = [[1.0 if owner == c else -0.5 for owner in OWNER] for c in range(3)]
    assert net.last_layer.weight.tolist() == expected
    assert net.last_layer.bias is None
    nn.init.normal_(net.last_layer.weight)
    net.reset_last_layer()
    assert net.last_layer.weight.tolist() == expected


def test_features_see_pixels_normalised_by_channel():
    net, images = make(backbone=nn.Identity())
    features = net.features(images)
    for channel, (mean, std) in enumerate(zip(*IMAGENET, strict=True)):
        for row, col in ((0, 0), (31, 5)):
            pixel = images[2, channel, row, col].item() / 255
            value = features[2, channel, row, col].item()
            assert value == pytest.approx((pixel - mean) / std, abs=1e-5)


@pytest.mark.parametrize("similarity", ["log", "cosine"])
@torch.no_grad()
def test_images_and_their_features_give_the_same_outputs(similarity):
    net, images = make((2, 2), similarity)
    from_images = net(images)
    from_features = net(features=net.features(images))
    assert all(map(torch.equal, from_images, from_features))


@pytest.mark.parametrize(("similarity", "last"), [("log", nn.Sigmoid), ("cosine", Centre)])
def test_add_on_layers_are_two_convolutions_and_end_as_the_similarity_needs(similarity, last):
    kinds = [type(layer) for layer in make(similarity=similarity)[0].add_on]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.Conv2d, last]


@torch.no_grad()
def test_without_add_on_layers_latents_are_the_backbones_features():
    net, images = make(latent_dim=None)
    assert net.prototypes.shape == (5, 8, 1, 1)
    assert torch.equal(net.latents(net.features(images)), net.features(images))


@pytest.mark.parametrize("parts", [(), ("add_on", "prototypes"), PARTS[:3], ("last_layer",), PARTS])
def test_train_only_gives_gradients_to_these_parts_alone(parts):
    net, images = make()
    net.train_only(parts)
    if parts:
        net(images)[0].square().sum().backward()
    for name, parameter in net.named_parameters():
        trained = name.split(".")[0] in parts
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained


def test_batch_norm_of_a_frozen_backbone_stays_frozen_in_training_mode():
    net, images = make()
    net.train_only(("add_on", "prototypes"))
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    expected = net.eval()(images)[0]
    logits = net.train()(images)[0]
    assert torch.equal(logits, expected)
    assert net.training
    assert net.add_on.training
    assert not any(module.training for module in net.backbone.modules())
    assert all(torch.equal(v, before[name]) for name, v in net.backbone.state_dict().items())


def test_batch_norm_of_a_trained_backbone_learns_in_training_mode_only():
    net, images = make()
    before = net.backbone[0][1].running_mean.clone()
    net.eval()(images)
    assert torch.equal(net.backbone[0][1].running_mean, before)
    net.train()(images)
    assert all(module.training for module in net.backbone.modules())
    assert not torch.equal(net.backbone[0][1].running_mean, before)


def seen_images(backbone):
    """Give the batch-norm layers of a backbone statistics of their own."""
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1)
    return backbone


def test_settled_batch_norm_trains_by_the_statistics_that_it_predicts_by():
    net, images = make(backbone=seen_images(SmallCNN(8)))
    net.keep_statistics(True)
    before = {name: value.clone() for name, value in net.backbone.named_buffers()}
    expected = net.eval()(images)[0]
    logits = net.train()(images)[0]
    assert torch.equal(logits, expected)
    assert all(torch.equal(v, before[name]) for name, v in net.backbone.named_buffers())
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.backbone.parameters())
    net.keep_statistics(False)
    assert all(module.training for module in net.train().modules())


def test_batch_norm_without_statistics_learns_them():
    net, images = make(backbone=nn.Sequential(seen_images(SmallCNN(4)), nn.BatchNorm2d(4)))
    net.backbone.append(nn.Conv2d(4, 8, 1))
    net.keep_statistics(True)
    settled = {
        name for name, layer in net.backbone[0].named_modules() if hasattr(layer, "momentum")
    }
    assert set(net.settled) == {f"0.{name}" for name in settled}
    before = {name: value.clone() for name, value in net.backbone.named_buffers()}
    net.train()(images)
    changed = {n for n, v in net.backbone.named_buffers() if not torch.equal(v, before[n])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_batch_norm_that_never_tracks_is_never_settled():
    net, _ = make(backbone=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=None)))
    net.backbone[1] = nn.BatchNorm2d(8, track_running_stats=False)
    net.keep_statistics(True)
    assert net.settled == ()


def select(net, index, similarity):
    """A network of these prototypes of another."""
    owner = [OWNER[j] for j in index]
    chosen = ProtoPNet(net.backbone, 8, PrototypeSpec(owner, 3, (2, 2), similarity), 6, IMAGENET)
    chosen.add_on = net.add_on
    chosen.prototypes = nn.Parameter(net.prototypes[index])
    chosen.last_layer.weight = nn.Parameter(net.last_layer.weight[:, index])
    return chosen.eval()


@pytest.mark.parametrize("similarity", ["log", "cosine"])
@torch.no_grad()
def test_logits_do_not_depend_on_the_order_of_prototypes(similarity):
    net, images = make((2, 2), similarity)
    permuted = select(net, [4, 2, 0, 3, 1], similarity)
    torch.testing.assert_close(permuted(images)[0], net(images)[0])


@pytest.mark.parametrize("similarity", ["log", "cosine"])
@torch.no_grad()
def test_logits_do_not_depend_on_prototypes_of_weight_zero(similarity):
    net, images = make((2, 2), similarity)
    net.last_layer.weight[:, [1, 3]] = 0
    fewer = select(net, [0, 2, 4], similarity)
    torch.testing.assert_close(fewer(images)[0], net(images)[0])
