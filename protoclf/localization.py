"""Where in an image a prototype is found: from similarity maps to boxes.

Chen et al., NeurIPS 2019, section 2.3. Boxes are half-open (x0, y0, x1, y1), in pixels of the
model input. N images, m prototypes of H1 x W1 cells, H x W cells.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclf.network import ProtoPNet
from protoclf.torch_settings import without_autocast

BLOCK = 2**22  # pixels of upsampled maps at a time
_SAMPLING = 61  # pixels; prime, so that a sample meets all columns of a map
ROUNDING = 1e-5  # of a map's range: closer pixels are equal, as are those of a patch's cells


def pair_boxes(
    module: ProtoPNet,
    z: Tensor,
    sample: Tensor,
    prototype: Tensor,
    image_size: int,
    percentile: float,
) -> Tensor:
    """Boxes (k, 4), in pixels of the model input, of k pairs of a sample and a prototype."""
    m = len(module.prototypes)
    pairs, inverse = torch.unique(sample * m + prototype, return_inverse=True)
    if not len(pairs):
        return z.new_zeros(0, 4)
    cells = pair_maps(module, z, pairs // m, pairs % m)
    return activation_boxes(cells, image_size, percentile)[inverse]


def pair_maps(module: ProtoPNet, z: Tensor, sample: Tensor, prototype: Tensor) -> Tensor:
    """Similarity of each cell, (k, H, W), for k pairs as in `pair_patches`."""
    return covered_cells(pair_patches(module, z, sample, prototype), module.prototype_size)


def pair_patches(module: ProtoPNet, z: Tensor, sample: Tensor, prototype: Tensor) -> Tensor:
    """Similarity of each patch, (k, H - H1 + 1, W - W1 + 1), for k pairs of sample and prototype.

    Pairs are sorted by sample.
    """
    counts = torch.bincount(sample, minlength=len(z)).tolist()
    maps = [
        module.similarity_maps(z[i : i + 1], index)[0]  # (k_i, H', W')
        for i, index in enumerate(prototype.split(counts))
        if len(index)
    ]
    return torch.cat(maps)


def covered_cells(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread the similarity of patches over the cells that they cover.

    Parameters
    ----------
    maps : Tensor of shape (k, H - H1 + 1, W - W1 + 1), or with another dimension in front
        Similarity of one prototype to every patch, for k maps.
    size : (H1, W1)
        Cells of a patch.

    Returns
    -------
    Tensor of shape (k, H, W), or with that dimension
        For each cell, the similarity of the best patch that covers it.
    """
    rows, cols = size
    padded = F.pad(maps, (cols - 1, cols - 1, rows - 1, rows - 1), value=-torch.inf)
    return F.max_pool2d(padded, size, stride=1)


def upsample(maps: Tensor, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """Upsample maps (k, H, W) bicubically, as the paper does, to (k, height, width)."""
    down = _bicubic(maps.shape[1], height, maps)  # (height, H)
    right = _bicubic(maps.shape[2], width, maps)  # (width, W)
    with without_autocast(maps.device):
        wide = maps @ right.T  # (k, H, width); the small product first
        return torch.bmm(down.expand(len(maps), -1, -1), wide, out=out)


@torch.no_grad()
def activation_boxes(maps: Tensor, image_size: int, percentile: float = 95) -> Tensor:
    """Return the smallest boxes around the high activations of upsampled maps.

    Parameters
    ----------
    maps : Tensor of shape (k, H, W)
        Similarities of cells.
    image_size : int
        Side S of the model input, to which the maps are upsampled.
    percentile : float, default=95
        High are the pixels of at least this percentile of their map (section 2.3).

    Returns
    -------
    Tensor of shape (k, 4)
        Pixels of the model input.
    """
    maps = maps - maps.amin((1, 2), keepdim=True)  # so that a constant map stays so, to the bit
    size = max(1, BLOCK // int(image_size) ** 2)
    pixels = maps.new_empty(min(size, len(maps)), image_size, image_size)  # once: it costs time
    blocks = [
        _boxes(upsample(block, image_size, image_size, out=pixels[: len(block)]), percentile)
        for block in maps.split(size)
    ]
    return torch.cat(blocks)


def box_masks(boxes: Tensor, side: int) -> Tensor:
    """Return bool masks (k, S, S) of half-open boxes (k, 4), x0, y0, x1, y1 in pixels."""
    at = torch.arange(side, device=boxes.device)
    x0, y0, x1, y1 = boxes.T[..., None]  # (k, 1) each
    columns, rows = (at >= x0) & (at < x1), (at >= y0) & (at < y1)  # (k, S)
    return rows[:, :, None] & columns[:, None, :]


def _bicubic(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """Return the matrix (n_out, n_in) of bicubic interpolation along one side."""
    eye = torch.eye(n_in, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(eye, (n_out, n_in), mode="bicubic", align_corners=False)[0, 0]


def _boxes(maps: Tensor, percentile: float) -> Tensor:
    n = maps.shape[1:].numel()
    rank = int(np.ceil(round(percentile / 100 * (n - 1), 6)))  # the first at the percentile
    columns, rows = maps.amax(1), maps.amax(2)  # (k, S) each
    threshold = order_statistic(maps, rank, rows, columns) - ROUNDING * rows.amax(1)  # (k,)
    x0, x1 = _extent(columns >= threshold[:, None])
    y0, y1 = _extent(rows >= threshold[:, None])
    return torch.stack([x0, y0, x1, y1], dim=1).to(maps.dtype)


def order_statistic(maps: Tensor, rank: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the value of each map (k, H, W) that has `rank` others below it: (k,).

    `rows` (k, H) and `columns` (k, W) are their maxima.
    """
    if maps.device.type != "cpu":  # of kthvalue GPUs have no deterministic form
        values = maps.flatten(1)
        return values.topk(values.shape[1] - rank, dim=1, sorted=False).values.amin(1)
    n_above = maps.shape[1:].numel() - rank  # itself included
    low, high = _around(maps, n_above)  # (k,) each
    y0, y1 = _extent(rows > low[:, None])
    x0, x1 = _extent(columns > low[:, None])
    found = [
        _select(values, values[top:bottom, left:right], below, above, n_above)
        for values, top, bottom, left, right, below, above in zip(
            maps.numpy(), *(each.tolist() for each in (y0, y1, x0, x1, low, high)), strict=True
        )
    ]
    return torch.tensor(found, dtype=maps.dtype)


def _around(maps: Tensor, n_above: int) -> Tensor:
    """Return two values (2, k), from a sample, likely around each map's `n_above`-th highest."""
    sample = maps.flatten(1)[:, ::_SAMPLING].numpy()  # (k, s)
    n, share = sample.shape[1], n_above / maps.shape[1:].numel()
    from_top = np.array([1.4 * share * n + 2, 0.7 * share * n - 2], int)
    places = (n - 1 - from_top).clip(0, n - 1)
    return torch.from_numpy(np.partition(sample, places, axis=1)[:, places].T.copy())


def _select(values: np.ndarray, region: np.ndarray, low: float, high: float, n_above: int) -> float:
    """Return the `n_above`-th highest of the values; those above `low` are all in the region."""
    above = region[region > low]
    between = above[above <= high]
    place = len(above) - n_above
    if not 0 <= place < len(between):  # a sample that misled, or many equal values
        return float(np.partition(values.ravel(), -n_above)[-n_above])
    between.partition(place)
    return float(between[place])


def _extent(marked: Tensor) -> tuple[Tensor, Tensor]:
    """First marked index and the one past the last, for rows (k, S)."""
    marked = marked.to(torch.uint8)
    return marked.argmax(1), marked.shape[1] - marked.flip(1).argmax(1)
