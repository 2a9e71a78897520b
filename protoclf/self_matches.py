"""What the last layer should make of a prototype's own source image.

After the projection a prototype matches the image that it is a part of perfectly, as no new image
ever will. N images, m prototypes; `owner` (m,) is the class of each prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def replace_self_matches(g: Tensor, y: Tensor, owner: Tensor, source: Tensor) -> Tensor:
    """Replace each prototype's activation on its own source image by the median of its class.

    Parameters
    ----------
    g : Tensor of shape (N, m)
        Activations.
    y : Tensor of shape (N,), int64
        Class indices.
    owner : Tensor of shape (m,), int64
    source : Tensor of shape (m,), int64
        The source image of each prototype.

    Returns
    -------
    Tensor of shape (N, m)
        The median is over the other images of the class; where there are none, g stays.
    """
    result, prototype = g.clone(), torch.arange(len(owner), device=g.device)
    result[source, prototype] = torch.nan
    for c in owner.unique():
        mine = owner == c
        median = result[y == c][:, mine].nanmedian(0).values  # (k,)
        result[source[mine], prototype[mine]] = median
    return torch.where(result.isnan(), g, result)
