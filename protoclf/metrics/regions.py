"""Where a prototype is found in an image: a square around its maximum, or its box.

Boxes are (x0, y0, x1, y1), in pixels of the model input. H x W cells, input of S x S pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoclf.localization import activation_boxes, pair_maps, upsample
from protoclf.network import ProtoPNet

_BLOCK = 2**22  # pixels of upsampled maps at a time
_ROUNDING = 1e-5  # of a map's range: closer pixels are equal, as are those of a patch's cells


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
        The side of a square, as a share of S, around the highest pixel of the similarity map,
        upsampled; what lies outside of the input is cut off. "box" is that of `explain`.
    percentile : float
        Of the box.
    """
    if not len(sample):
        return z.new_zeros(0, 4)
    maps = pair_maps(module, z, sample, prototype)  # (k, H, W)
    if isinstance(region, str):
        return activation_boxes(maps, image_size, percentile)
    centre, half = peaks(maps, image_size), region * image_size / 2  # (k, 2)
    return torch.cat([centre - half, centre + half], 1).clamp(0, image_size)


def peaks(maps: Tensor, image_size: int) -> Tensor:
    """Return the middles (k, 2), x and y, of the highest pixels of upsampled maps (k, H, W).

    Among pixels equally high the first, row by row.
    """
    size = max(1, _BLOCK // image_size**2)
    found = []
    for block in maps.split(size):
        pixels = upsample(block, image_size, image_size).flatten(1)  # (b, S S)
        low, high = pixels.aminmax(dim=1, keepdim=True)
        top = pixels >= high - _ROUNDING * (high - low)
        found.append(top.to(torch.uint8).argmax(1))
    index = torch.cat(found)
    return torch.stack([index % image_size, index // image_size], 1).to(maps.dtype) + 0.5
