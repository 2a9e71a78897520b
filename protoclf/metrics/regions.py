"""Where a prototype is found in an image: a square around its maximum, or its box.

Boxes are (x0, y0, x1, y1), in pixels of the model input. H x W cells, input of S x S pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoclf.localization import BLOCK, ROUNDING, pair_boxes, pair_patches, upsample
from protoclf.network import ProtoPNet


def pair_regions(
    module: ProtoPNet,
    z: Tensor,
    sample: Tensor,
    prototype: Tensor,
    image_size: int,
    region: float | str,
    percentile: float,
) -> Tensor:
    """Return the regions (k, 4) of k pairs of a sample and a prototype, sorted by sample.

    Parameters
    ----------
    module : ProtoPNet
    z : Tensor of shape (n, D, H, W)
        Latent maps.
    sample, prototype : Tensor of shape (k,), int64
    image_size : int
        Side S of the model input.
    region : float or "box"
        The side of a square, as a share of S, whose middle is that of the most similar patch: the
        highest pixel of the similarity map, upsampled. What lies outside of the input is cut off.
        "box" is that of `explain`.
    percentile : float
        Of the box.
    """
    if isinstance(region, str):
        return pair_boxes(module, z, sample, prototype, image_size, percentile)
    if not len(sample):
        return z.new_zeros(0, 4)
    patches = pair_patches(module, z, sample, prototype)  # (k, H - H1 + 1, W - W1 + 1)
    cells, half = (z.shape[2], z.shape[3]), region * image_size / 2
    centre = _peaks(patches, cells, image_size)
    return torch.cat([centre - half, centre + half], 1).clamp(0, image_size)


def _peaks(patches: Tensor, cells: tuple[int, int], image_size: int) -> Tensor:
    """Return where in the input (k, 2), x and y, patches are most similar, by their middles.

    Among pixels equally high the first, row by row. Upsampled, the similarities of `patches`
    (k, H - H1 + 1, W - W1 + 1) cover what the middles of patches can lie in; `cells` is (H, W).
    """
    shape, (height, width) = patches.shape[1:], cells
    rows, cols = (
        round(n * image_size / of) if n > 1 else 1 for n, of in zip(shape, cells, strict=True)
    )
    found = []
    for block in patches.split(max(1, BLOCK // (rows * cols))):
        pixels = upsample(block, rows, cols).flatten(1)  # (b, rows cols)
        low, high = pixels.aminmax(dim=1, keepdim=True)
        top = pixels >= high - ROUNDING * (high - low)
        found.append(top.to(torch.uint8).argmax(1))
    index = torch.cat(found)
    sides = ((index % cols, cols, shape[1], width), (index // cols, rows, shape[0], height))
    middles = [  # that of a patch of H1 = of - n + 1 cells is (H1 - 1) / 2 behind its first cell's
        (pixel.to(patches.dtype) + 0.5) * (n * image_size / (of * n_pixels))
        + (of - n) / 2 * image_size / of
        for pixel, n_pixels, n, of in sides
    ]
    return torch.stack(middles, 1)
