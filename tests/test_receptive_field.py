"""The cells of a feature map, and the pixels that each of them sees."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from protoclf.backbones import SmallCNN, build_backbone
from protoclf.receptive_field import measure


def _box(geometry, row, col, rows=1, cols=1):
    return tuple(int(v) for v in geometry.cell_box(row, col, rows, cols))


# The feature map


@pytest.mark.parametrize("module", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.LazyLinear(5))])
def test_a_module_without_a_feature_map(module):
    module(torch.zeros(1, 3, 16, 16))  # lazy layers take their size
    with pytest.raises(ValueError, match=r"feature map.*returned shape \(2, \d+\).*children"):
        measure(module, 16)


def test_a_module_that_returns_no_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="must return a tensor"):
        measure(Pair(), 16)


def test_an_image_that_is_too_small():
    net = nn.Sequential(*[nn.Conv2d(3, 3, 5) for _ in range(4)])
    assert measure(net, 17).height == 1
    with pytest.raises(ValueError, match="image_size=16"):
        measure(net, 16)


class _NoMeta(nn.Module):
    """Its forward leaves torch: nothing runs on the meta device, and no gradient flows."""

    def forward(self, x):
        return torch.from_numpy(x.detach().numpy()[:, :, ::2, ::4].copy())


def test_a_module_that_the_meta_device_cannot_run():
    geometry = measure(_NoMeta(), 16)
    assert (geometry.channels, geometry.height, geometry.width) == (3, 8, 4)
    assert geometry.stride == (2, 4)
    assert _box(geometry, 1, 1) == (0, 0, 16, 16)  # no gradient: no claim


# Receptive fields


class _FirstOfTwo(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("layers", "stride", "start", "size"),
    [
        ([nn.Conv2d(3, 4, 1)], 1, 0, 1),
        ([nn.Conv2d(3, 4, 3)], 1, 0, 3),
        ([nn.Conv2d(3, 4, 3, dilation=4)], 1, 0, 9),
        ([nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 4, -5, 11),
        ([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 5)], 2, -1, 13),
        ([nn.AvgPool2d(2), nn.MaxPool2d(3, 1, dilation=2)], 2, 0, 10),
        ([nn.MaxPool2d(3, 5, 0, 2, ceil_mode=True)], 5, 0, 5),
        ([nn.PixelUnshuffle(4)], 4, 0, 4),
        ([nn.AdaptiveMaxPool2d(12)], 4, 0, 4),
        ([_FirstOfTwo(nn.MaxPool2d(3, 2, 1, return_indices=True))], 2, -1, 3),
        ([nn.Conv2d(3, 4, 3, 3, groups=1), nn.ConvTranspose2d(4, 2, 3, 3)], 1, None, 3),
    ],
)
def test_fields_equal_those_computed_by_hand(layers, stride, start, size):
    geometry = measure(nn.Sequential(*layers), 48)
    assert geometry.stride == (stride, stride)
    assert geometry.receptive_field == (size, size)
    assert not geometry.global_context
    if start is not None:
        for i in range(geometry.height):
            lo, hi = start + stride * i, start + stride * i + size
            assert _box(geometry, i, 0)[1::2] == (max(lo, 0), min(hi, 48))
            assert _box(geometry, 0, i)[0::2] == (max(lo, 0), min(hi, 48))


@pytest.mark.parametrize(
    ("name", "size", "field"),
    [("vgg11", 224, 150), ("vgg16", 224, 212), ("resnet18", 448, 435), ("small_cnn", 128, 57)],
)
def test_fields_of_well_known_networks(name, size, field):
    with torch.device("meta"):
        net = build_backbone(name, weights=None)
    assert measure(net, size).receptive_field == (field, field)


def test_fields_by_brute_force():
    """Change each pixel of a random network's input in turn, and see which cells change."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(1, 0)),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.3),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.AvgPool2d(2, 1),
    )
    net = net.double().eval()
    x = torch.rand(1, 3, 15, 15, dtype=torch.float64)
    geometry = measure(net, 15)
    changed = np.zeros((15, 15, geometry.height, geometry.width), dtype=bool)
    with torch.no_grad():
        z = net(x)
        for i, j in np.ndindex(15, 15):
            other = x.clone()
            other[0, :, i, j] += 1
            changed[i, j] = (net(other) != z).any(dim=1)[0].numpy()
    for row, col in np.ndindex(geometry.height, geometry.width):
        ys, xs = np.nonzero(changed[:, :, row, col])
        assert _box(geometry, row, col) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


CUTS = {  # the first layers of a network: several cells whose fields lie within 128 pixels
    "resnet18": lambda net: net[:6],
    "vgg11": lambda net: net.features[:12],
    "small_cnn": lambda net: net,
    "efficientnet_b0": lambda net: net.features[:4],
    "convnext_tiny": lambda net: net.features[:2],
    "densenet121": lambda net: net.features[:5],
    "mobilenet_v3_small": lambda net: net.features[:4],
    "shufflenet_v2_x0_5": lambda net: net[:3],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("convnext_tiny", "vgg11") else [])
        for name in CUTS
    ],
)
def test_boxes_equal_what_the_network_really_sees(name):
    """NaN outside a box leaves its cell alone; NaN on any side of it reaches the cell."""
    with torch.device("meta"):
        net = CUTS[name](build_backbone(name, weights=None)).double().eval()
    geometry = measure(net, 128)
    net = _with_random_weights(net)
    for gate in [m for m in net.modules() if hasattr(m, "scale_activation")]:
        gate.forward = lambda x: x  # boxes leave out squeeze-and-excitation
    assert geometry.receptive_field[0] < 128 - 2 * geometry.stride[0]
    last = geometry.height - 1
    for row, col in [(0, 0), (last // 2, last // 2 - 1), (1, last)]:
        _assert_sees_exactly(net, row, col, _box(geometry, row, col))


def _with_random_weights(net):
    net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.normal_(p)
    for b in net.buffers():
        b.fill_(1)
    return net


def _assert_sees_exactly(net, row, col, box):
    x0, y0, x1, y1 = box
    x = torch.rand(3, 128, 128, dtype=torch.float64).repeat(5, 1, 1, 1)
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    x[0, :, ~inside] = torch.nan
    x[1, :, y0], x[2, :, y1 - 1], x[3, :, :, x0], x[4, :, :, x1 - 1] = [torch.nan] * 4
    with torch.no_grad():
        seen = net(x)[:, :, row, col].isnan().any(dim=1)
    assert seen.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm((4, 30, 30))],
    ids=lambda layer: type(layer).__name__,
)
def test_normalisation_over_the_image_is_global_context(layer):
    geometry = measure(nn.Sequential(nn.Conv2d(3, 4, 3), layer), 32)
    assert geometry.global_context
    assert geometry.receptive_field == (3, 3)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), None])
def test_a_squeeze_and_excitation_gate_is_global_context(pool):
    class Gate(nn.Module):
        def forward(self, x):
            squeezed = x.mean((2, 3), keepdim=True) if pool is None else pool(x)
            return x * squeezed.sigmoid()

    geometry = measure(nn.Sequential(nn.Conv2d(3, 4, 3), Gate()), 32)
    assert geometry.global_context
    assert geometry.receptive_field == (3, 3)
    assert measure(build_backbone("mobilenet_v3_small", None), 32).global_context
    assert not measure(build_backbone("mobilenet_v2", None), 32).global_context


def test_attention_and_global_pooling_see_the_whole_image():
    class Attention(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)  # (N, cells, C)
            return (
                nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
                .transpose(1, 2)
                .reshape(x.shape)
            )

    for layer in (Attention(), nn.AdaptiveAvgPool2d(1)):
        geometry = measure(nn.Sequential(nn.Conv2d(3, 4, 3, 2), layer), 33)
        assert geometry.receptive_field == (33, 33)


@pytest.mark.slow
def test_functional_code_of_a_user_is_measured():
    """Hand-written swish, layer normalisation over channels, saturating activations, in place."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = nn.functional.pad(x, (1, 0, 1, 0))[:, :, 1:, 1:]
            y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
            y = torch.relu(y * torch.sigmoid(y))
            x = x + nn.functional.conv2d(y, self.conv.weight, padding=1)
            x += nn.functional.hardsigmoid(x)
            return x.clamp(0, 6)

    geometry = measure(nn.Sequential(*[Block() for _ in range(20)]), 96)
    assert geometry.receptive_field == (41, 41)


def test_weights_of_zero_and_images_of_zero_do_not_matter():
    net = SmallCNN()
    for p in net.parameters():
        nn.init.zeros_(p)
    assert measure(net, 96).receptive_field == (57, 57)


def test_boxes_of_arrays_and_of_patches():
    geometry = measure(SmallCNN(), 128)
    rows, cols = np.mgrid[:15, :14]
    x0, y0, x1, y1 = geometry.cell_box(rows, cols, rows=2, cols=3)
    assert x0.shape == (15, 14)
    for row, col in np.ndindex(15, 14):
        corners = [_box(geometry, row + i, col + j) for i in (0, 1) for j in (0, 2)]
        lows, highs = np.min(corners, axis=0), np.max(corners, axis=0)
        found = (x0[row, col], y0[row, col], x1[row, col], y1[row, col])
        assert found == (*lows[:2], *highs[2:])
    assert _box(geometry, 0, 0, 16, 16) == (0, 0, 128, 128)


@pytest.mark.parametrize("cell", [(-1, 0), (16, 0), (0, 16), (15, 0, 2, 1), (0, 0, 0, 1)])
def test_cells_outside_the_map_are_refused(cell):
    with pytest.raises(IndexError, match="leaves the 16 cells"):
        measure(SmallCNN(), 128).cell_box(*cell)


def test_a_module_whose_field_cannot_be_measured_warns():
    class Stubborn(nn.Module):
        def forward(self, x):
            return x.float().conj_physical() if x.dtype == torch.float32 else x.no_such_method()

    geometry = measure(Stubborn(), 8)
    with pytest.warns(UserWarning, match="could not be measured"):
        assert _box(geometry, 3, 3) == (0, 0, 8, 8)


def test_a_geometry_is_a_value():
    net = SmallCNN()
    geometry = measure(net, 64)
    assert geometry == measure(net, 64)
    assert geometry != measure(net, 72)
    copied = pickle.loads(pickle.dumps(geometry))
    assert copied == geometry
    assert copied.receptive_field == geometry.receptive_field
    assert len(pickle.dumps(geometry)) < 100_000  # the architecture, without the weights


def test_measuring_leaves_the_random_state_alone():
    net = SmallCNN()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measure(net, 64).cell_box(0, 0)
    assert torch.equal(torch.rand(2), expected)


# Devices


@pytest.mark.parametrize("name", ["resnet18", "small_cnn"])
def test_all_runs_under_fake_tensors_on_cuda(name):
    with FakeTensorMode(), torch.device("cuda"):
        net = build_backbone(name, weights=None)
        z = net(torch.empty(2, 3, 64, 64, device="cuda"))
        geometry = measure(net, 64)
        box = _box(geometry, 1, 1)
    assert z.device.type == "cuda"
    assert tuple(z.shape[1:]) == (geometry.channels, geometry.height, geometry.width)
    assert box == _box(measure(build_backbone(name, weights=None), 64), 1, 1)


def test_measuring_under_no_grad_and_another_default_device():
    net = SmallCNN()
    with torch.inference_mode(), torch.device("meta"):
        assert measure(net, 128).receptive_field == (57, 57)
