"""Where in an image a prototype is found: from similarity maps to boxes.

Chen et al., NeurIPS 2019, section 2.3. Boxes are half-open (x0, y0, x1, y1), in pixels of the
model input. N images, m prototypes of H1 x W1 cells, H x W cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclf.network import ProtoPNet
from protoclf.prototype_layer import distance_maps
from protoclf.torch_settings import without_autocast

BLOCK = 2**22  # pixels of upsampled maps at a time
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
    prototypes = module.scaled_prototypes()
    maps = [
        module.activations(distance_maps(z[i : i + 1], prototypes[index]))[0]  # (k_i, H', W')
        for i, index in enumerate(prototype.split(counts))
        if len(index)
    ]
    return torch.cat(maps)


def covered_cells(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return for each cell the similarity of the best patch that covers it, (k, H, W).

    `maps` (k, H - H1 + 1, W - W1 + 1) are similarities to every patch, and `size` is (H1, W1).
    Maps, and with them what is returned, may have another dimension in front.
    """
    rows, cols = size
    padded = F.pad(maps, (cols - 1, cols - 1, rows - 1, rows - 1), value=-torch.inf)
    return F.max_pool2d(padded, size, stride=1)


def upsample(maps: Tensor, height: int, width: int) -> Tensor:
    """Upsample maps (k, H, W) bicubically, as the paper does, to (k, height, width)."""
    down = _bicubic(maps.shape[1], height, maps)  # (height, H)
    right = _bicubic(maps.shape[2], width, maps)  # (width, W)
    with without_autocast(maps.device):
        wide = maps @ right.T  # (k, H, width); the small product first
        return torch.bmm(down.expand(len(maps), -1, -1), wide)


@torch.no_grad()
def activation_boxes(maps: Tensor, image_size: int, percentile: float = 95) -> Tensor:
    """Return the smallest boxes (k, 4) around the high activations of maps (k, H, W).

    High are the pixels of at least this percentile of their map, upsampled to the model input
    (section 2.3).
    """
    maps = maps - maps.amin((1, 2), keepdim=True)  # so that a constant map stays so, to the bit
    side = int(image_size)
    below = int(np.ceil(round(percentile / 100 * (side**2 - 1), 6)))
    n_high = side**2 - below  # the first pixel at the percentile included
    blocks = maps.split(max(1, BLOCK // side**2))
    if maps.device.type != "cpu":
        return torch.cat([_boxes(upsample(block, side, side), n_high) for block in blocks])
    rows, columns = (_Lines.of(n, side, maps) for n in maps.shape[1:])
    return torch.cat([_boxes_near_peaks(block, rows, columns, n_high) for block in blocks])


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


def _boxes(pixels: Tensor, n_high: int) -> Tensor:
    """Return the boxes of upsampled maps (k, S, S), whose minima are 0."""
    columns, rows = pixels.amax(1), pixels.amax(2)  # (k, S) each
    threshold = highest(pixels, n_high) - ROUNDING * rows.amax(1)  # (k,)
    x0, x1 = _extent(columns >= threshold[:, None])
    y0, y1 = _extent(rows >= threshold[:, None])
    return torch.stack([x0, y0, x1, y1], dim=1).to(pixels.dtype)


def highest(maps: Tensor, n: int) -> Tensor:
    """Return the n-th highest value of each map (k, H, W): (k,)."""
    values = maps.flatten(1)
    if maps.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), -n, axis=1)[:, -n].copy())
    return values.topk(n, dim=1, sorted=False).values.amin(1)  # kthvalue is not deterministic


class _Lines(NamedTuple):
    """The pixels along one side of an image, and some lines among them, `at` (l,).

    `pixels` (S, H) interpolates the cells of a map. Whatever the map, a pixel is above the higher
    one of the lines that it is between by at most `excess` of the range that the cells have there.
    That range is at most `gain` times the map's.
    """

    pixels: np.ndarray
    at: np.ndarray
    excess: float
    gain: float

    @classmethod
    def of(cls, n_cells: int, side: int, like: Tensor) -> _Lines:
        pixels = _bicubic(n_cells, side, like).numpy()
        at = np.append(np.arange(0, side - 1, max(1, side // (4 * n_cells))), side - 1)
        linear = [np.interp(np.arange(side), at, of_cell) for of_cell in pixels[at].T]
        curved = pixels - np.stack(linear, axis=1)  # (S, H), whose rows sum to 0
        return cls(pixels, at, np.abs(curved).sum(1).max() / 2, np.abs(pixels).sum(1).max())

    def around(self, marked: Tensor) -> tuple[list[int], list[int]]:
        """First pixels, and those past the last, that are between marked lines (k, l) or beside."""
        first, past = (index.numpy() for index in _extent(marked))
        last = self.at[past.clip(max=len(self.at) - 1)]
        return self.at[(first - 1).clip(0)].tolist(), (last + 1).tolist()


def _boxes_near_peaks(maps: Tensor, rows: _Lines, columns: _Lines, n_high: int) -> Tensor:
    """Return what `_boxes` does, from the pixels alone that can be among the highest.

    Pixels on some lines tell a value that a little more than `n_high` pixels are above, and where
    these can be. Maps for which the guess is wrong are upsampled as a whole.
    """
    some = torch.from_numpy(rows.pixels[rows.at]).expand(len(maps), -1, -1)
    with without_autocast(maps.device):
        wide = maps @ torch.from_numpy(columns.pixels).T  # (k, H, S)
        coarse = torch.bmm(some, wide[:, :, columns.at])  # (k, l, l)
    values = coarse.flatten(1).numpy()
    side = len(rows.pixels)
    place = max(0, int(values.shape[1] * (1 - 1.25 * n_high / side**2)) - 3)
    low = np.partition(values, place, axis=1)[:, place]  # (k,)
    spread = maps.amax((1, 2)).numpy()  # (k,)
    slack = rows.excess * columns.gain + columns.excess * rows.gain + ROUNDING
    possible = torch.from_numpy(low - slack * spread)[:, None]
    of_rows = rows.around(coarse.amax(2) > possible)
    of_columns = columns.around(coarse.amax(1) > possible)
    boxes, buffer = np.empty((len(maps), 4)), np.empty(side**2, values.dtype)
    places = zip(wide.numpy(), low, ROUNDING * spread, *of_rows, *of_columns, strict=True)
    for k, (wide_k, least, rounding, y0, y1, x0, x1) in enumerate(places):
        pixels = buffer[: (y1 - y0) * (x1 - x0)].reshape(y1 - y0, x1 - x0)
        np.matmul(rows.pixels[y0:y1], wide_k[:, x0:x1], out=pixels)
        likely, threshold = pixels[pixels > least], least
        if len(likely) >= n_high:
            threshold = np.partition(likely, -n_high)[-n_high] - rounding
        if threshold > least:  # then all pixels from it on are here
            high = pixels >= threshold
            (y,), (x,) = high.any(1).nonzero(), high.any(0).nonzero()
            boxes[k] = x0 + x[0], y0 + y[0], x0 + x[-1] + 1, y0 + y[-1] + 1
        else:
            boxes[k] = _boxes(upsample(maps[k : k + 1], side, side), n_high)[0].numpy()
    return torch.from_numpy(boxes).to(maps.dtype)


def _extent(marked: Tensor) -> tuple[Tensor, Tensor]:
    """First marked index and the one past the last, for rows (k, S)."""
    marked = marked.to(torch.uint8)
    return marked.argmax(1), marked.shape[1] - marked.flip(1).argmax(1)
