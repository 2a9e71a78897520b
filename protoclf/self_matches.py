"""What the last layer should make of a prototype's own source image.

After the projection a prototype matches the image that it is a part of perfectly, as no new image
ever will. N images, m prototypes; `owner` (m,) is the class of each prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def replace_self_matches(
    g: Tensor, y: Tensor, owner: Tensor, source: Tensor, groups: Tensor | None = None
) -> Tensor:
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
    groups : Tensor of shape (N,), int64, optional
        Of images that are much alike: those of the source's are replaced too.

    Returns
    -------
    Tensor of shape (N, m)
        The median is over the other images of the class; where there are none, g stays.
    """
    if groups is None:
        groups = torch.arange(len(g), device=g.device)
    result = g.masked_fill(groups[:, None] == groups[source], torch.nan)
    for c in owner.unique():
        mine = owner == c
        median = _median(result[y == c][:, mine])  # (k,)
        result[:, mine] = torch.where(result[:, mine].isnan(), median, result[:, mine])
    return torch.where(result.isnan(), g, result)


def _median(values: Tensor) -> Tensor:
    """Return the lower median of each column (n, k) but for NaN, as `nanmedian`: (k,).

    Of which GPUs have no deterministic form.
    """
    known = (~values.isnan()).sum(0, keepdim=True)  # (1, k); sorted, NaN comes last
    return values.sort(0).values.gather(0, (known - 1).clamp_min(0) // 2)[0]
