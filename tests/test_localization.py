"""From similarity maps to boxes, against loops and NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protoclf import localization
from protoclf.localization import activation_boxes, covered_cells, pair_boxes, upsample
from protoclf.network import ProtoPNet, PrototypeSpec

UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def box_of(pixels, percentile, rounding):
    """The half-open box around the pixels of at least the percentile, less the rounding."""
    threshold = np.percentile(pixels, percentile, method="higher") - rounding * np.abs(pixels).max()
    rows, cols = np.nonzero(pixels >= threshold)
    return np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])


def assert_are_boxes(boxes, pixels, percentile=95):
    """Each box is that of the percentile; a pixel at the very rounding may be in it or not."""
    for box, values in zip(boxes.numpy(), pixels, strict=True):
        inner, outer = (box_of(values, percentile, rounding) for rounding in (0.98e-5, 1.02e-5))
        assert (outer[:2] <= box[:2]).all()
        assert (box[:2] <= inner[:2]).all()
        assert (inner[2:] <= box[2:]).all()
        assert (box[2:] <= outer[2:]).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 5)])
def test_covered_cells_hold_the_best_patch_that_covers_them(size):
    rows, cols = size
    height, width = 4, 5
    maps = torch.randn(3, height - rows + 1, width - cols + 1)
    cells = covered_cells(maps, size)
    assert cells.shape == (3, height, width)
    for k, y, x in np.ndindex(3, height, width):
        over = [
            maps[k, top, left].item()
            for top in range(maps.shape[1])
            for left in range(maps.shape[2])
            if top <= y < top + rows and left <= x < left + cols
        ]
        assert cells[k, y, x].item() == max(over)


@pytest.mark.parametrize("shape", [(7, 7), (3, 5), (1, 1), (8, 1)])
@pytest.mark.parametrize("target", [(224, 224), (17, 40), (8, 8), (5, 2)])
def test_upsample_is_bicubic_interpolation(shape, target):
    maps = torch.randn(2, *shape)
    expected = F.interpolate(maps[None], target, mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(upsample(maps, *target), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@example(side=6, image_size=1, levels=None, percentile=95, seed=227)  # bicubic dips below 0
@given(
    side=st.integers(1, 7),
    image_size=st.integers(1, 40) | st.sampled_from([100, 224]),
    levels=st.sampled_from([None, 2]),
    percentile=st.sampled_from([95, 50, 0, 100]),
    seed=st.integers(0, 999),
)
def test_activation_boxes_are_those_of_the_percentile(side, image_size, levels, percentile, seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(3, side, side))
    maps = torch.tensor(maps if levels is None else np.floor(levels * maps), dtype=torch.float32)
    maps -= maps.amin((1, 2), keepdim=True)
    boxes = activation_boxes(maps, image_size, percentile)
    pixels = upsample(maps, image_size, image_size).numpy()
    assert_are_boxes(boxes, pixels, percentile)


@given(n_cells=st.integers(1, 14), side=st.integers(1, 300), seed=st.integers(0, 999))
def test_lines_bound_what_is_between_them(n_cells, side, seed):
    cells = np.random.default_rng(seed).normal(size=n_cells) ** 3
    lines = localization._Lines.of(n_cells, side, torch.empty(0, dtype=torch.float64))
    pixels, spread = lines.pixels @ cells, np.ptp(cells)
    after = np.searchsorted(lines.at, np.arange(side))
    higher = np.maximum(pixels[lines.at][after], pixels[lines.at][(after - 1).clip(0)])
    assert (pixels <= higher + lines.excess * spread + 1e-9).all()
    assert np.ptp(pixels) <= lines.gain * spread + 1e-9


def test_pixels_far_from_the_peaks_are_not_computed_one_by_one(monkeypatch):
    maps = torch.randn(50, 7, 7, generator=torch.Generator().manual_seed(0))
    maps -= maps.amin((1, 2), keepdim=True)
    pixels = upsample(maps, 224, 224).numpy()
    monkeypatch.setattr(localization, "upsample", None)
    assert_are_boxes(activation_boxes(maps, 224), pixels)


@pytest.mark.parametrize("image_size", [10, 48, 101])
def test_boxes_are_those_of_numpys_default_percentile(image_size):
    """It interpolates between the values of two pixels, and no pixel lies between them."""
    maps = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    maps -= maps.amin((1, 2), keepdim=True)
    for box, pixels in zip(
        activation_boxes(maps, image_size), upsample(maps, image_size, image_size), strict=True
    ):
        pixels = pixels.numpy().astype(np.float64)
        rows, cols = np.nonzero(pixels >= np.percentile(pixels, 95) - 1e-5 * pixels.max())
        assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]


@pytest.mark.parametrize(("factor", "number"), [(1, -1e4), (1, 1e4), (1e-6, 0), (1e6, 0)])
def test_the_range_of_a_map_changes_no_box(factor, number):
    maps = torch.rand(5, 7, 7, dtype=torch.float64)
    assert torch.equal(activation_boxes(factor * maps + number, 64), activation_boxes(maps, 64))


@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("image_size", [1, 64, 101])
def test_box_of_a_constant_map_is_the_whole_image(side, image_size):
    values = torch.tensor([0.0, 0.1, -3.7, 9.2])[:, None, None]
    boxes = activation_boxes(values.expand(4, side, side), image_size)
    assert boxes.tolist() == [[0, 0, image_size, image_size]] * 4


def test_pixels_of_a_column_are_equally_high_whatever_rounding_makes_of_them():
    maps = torch.tensor([0.0, 0.1, 1.2, 0.3, 0.4, 0.5, 0.6]).expand(1, 7, 7)
    _, y0, _, y1 = activation_boxes(maps, 12)[0].tolist()  # 5 % is half a column
    assert (y0, y1) == (0, 12)


def test_box_of_one_bright_cell_lies_around_it():
    for row, col in np.ndindex(6, 6):
        maps = torch.zeros(1, 6, 6)
        maps[0, row, col] = 1
        x0, y0, x1, y1 = activation_boxes(maps, 60)[0].tolist()
        assert x0 <= 10 * col + 5 < x1
        assert y0 <= 10 * row + 5 < y1
        assert (x1 - x0) * (y1 - y0) <= 20 * 20


def test_boxes_do_not_depend_on_how_maps_are_split_into_blocks(monkeypatch):
    maps = torch.randn(7, 5, 5)
    expected = activation_boxes(maps, 30)
    monkeypatch.setattr(localization, "BLOCK", 30 * 30 * 2)
    assert torch.equal(activation_boxes(maps, 30), expected)
    assert activation_boxes(maps[:0], 30).shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (6, 6)])
@torch.no_grad()
def test_pair_boxes_are_those_of_each_pairs_own_map(size):
    torch.manual_seed(0)
    spec = PrototypeSpec([0, 0, 1, 1], 2, size, "cosine")
    net = ProtoPNet(torch.nn.Identity(), 3, spec, None, UNIT)
    z = net.latents(torch.rand(3, 3, 6, 6))
    sample = torch.tensor([2, 0, 0, 2, 2, 0])  # none of the second, and one pair twice
    prototype = torch.tensor([1, 3, 0, 0, 1, 2])
    boxes = pair_boxes(net, z, sample, prototype, 50, 95)
    for i, j, box in zip(sample, prototype, boxes, strict=True):
        cells = covered_cells(net.similarity_maps(z)[i, j][None], size)
        assert torch.equal(box, activation_boxes(cells, 50)[0])
    assert pair_boxes(net, z, sample[:0], prototype[:0], 50, 95).shape == (0, 4)
