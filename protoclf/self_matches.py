"""What the last layer should make of a prototype's own source image.

After the projection a prototype matches the image that it is a part of perfectly, as no new image
ever will. N images, m prototypes; `owner` (m,) is the class of each prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def replace_self_matches(
    g: Tensor,
    y: Tensor,
    owner: Tensor,
    source: Tensor,
    groups: Tensor | None = None,
    some: Tensor | None = None,
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
    some : Tensor of shape (m,), bool, optional
        The prototypes whose matches are replaced; all by default.

    Returns
    -------
    Tensor of shape (N, m)
        The median is over the other images of the image's class; where there are none, g stays.
    """
    replaced = are_self_matches(len(g), source, groups)
    result = g.masked_fill(replaced if some is None else replaced & some, torch.nan)
    for c in owner.unique():
        mine = owner == c
        part = result[:, mine]  # (N, k)
        for k in y[part.isnan().any(1)].unique():  # a group may hold images of several classes
            rows = y == k
            part[rows] = torch.where(part[rows].isnan(), _median(part[rows]), part[rows])
        result[:, mine] = part
    return torch.where(result.isnan(), g, result)


def are_self_matches(n: int, source: Tensor, groups: Tensor | None = None) -> Tensor:
    """Return which of n images are the sources of prototypes, or of their groups: (n, m)."""
    if groups is None:
        groups = torch.arange(n, device=source.device)
    return groups[:, None] == groups[source]


def rare_classes(y: Tensor, n_classes: int) -> Tensor:
    """Return which classes (C,), of y (N,), have fewer than half as many images as the mean class.

    Nearly all images of such a class may be sources, and few of the others': shown as they are, the
    last layer takes the class for easy, and new images of it are not found. Prototypes do not
    matter, so that an edit of them leaves the rule as it was.
    """
    images = torch.zeros(n_classes, dtype=torch.int64, device=y.device)
    images.index_add_(0, y, torch.ones_like(y))
    return 2 * n_classes * images < len(y)


def _median(values: Tensor) -> Tensor:
    """Return the lower median of each column (n, k), NaN left out: (k,).

    As `torch.nanmedian`, which has no deterministic form on GPUs.
    """
    known = (~values.isnan()).sum(0, keepdim=True)  # (1, k); sorted, NaN comes last
    return values.sort(0).values.gather(0, (known - 1).clamp_min(0) // 2)[0]
