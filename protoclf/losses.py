"""The joint loss of ProtoPNet: cross-entropy, cluster, separation and patch cost.

Chen et al., NeurIPS 2019, section 2.2, stage 1; the patch cost is R1 of Li et al., "Deep Learning
for Case-Based Reasoning through Prototypes", AAAI 2018. N images, C classes, m prototypes; `owner`
(m,) is the class of each prototype. Means over images are weighted where weights are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclf.micro_batches import WHOLE, Share
from protoclf.network import Outputs


def cluster_cost(
    distance: Tensor, y: Tensor, owner: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return Clst: the mean smallest distance (N, m) to a prototype of the image's own class."""
    return _mean(_smallest(distance, y[:, None] == owner), weight)


def separation_cost(
    distance: Tensor, y: Tensor, owner: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return Sep: minus the mean smallest distance (N, m) to a prototype of another class."""
    return -_mean(_smallest(distance, y[:, None] != owner), weight)


def patch_cost(distance: Tensor, y: Tensor, owner: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean smallest distance (N, m) of a prototype to an image of its own class.

    That is how far a projection onto this batch would move the prototypes. Those whose class has
    no image in it, or only images of weight 0, are left out.
    """
    among = _counting(y, owner, weight)  # (N, m)
    nearest = distance.masked_fill(~among, torch.inf).amin(0)  # (m,)
    found = among.any(0)  # (m,)
    return torch.where(found, nearest, 0).sum() / found.sum().clamp_min(1)


class ProtoPNetLoss(nn.Module):
    """Cross-entropy + lambda_clst * Clst + lambda_sep * Sep + lambda_patch * patch cost.

    Parameters
    ----------
    owner : Tensor of shape (m,), int64
        The class that owns each prototype.
    lambda_clst, lambda_sep, lambda_patch : float
        Weights of the three costs.
    """

    owner: Tensor

    def __init__(
        self, owner: Tensor, lambda_clst: float, lambda_sep: float, lambda_patch: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("owner", owner)
        self.lambda_clst = lambda_clst
        self.lambda_sep = lambda_sep
        self.lambda_patch = lambda_patch

    def forward(
        self, outputs: Outputs, y: Tensor, weight: Tensor | None = None, share: Share = WHOLE
    ) -> Tensor:
        """Return the loss of a batch, a scalar, or a piece's share of it; y (N,) has classes."""
        logits, distance, _ = outputs
        loss = _mean(F.cross_entropy(logits, y, reduction="none"), weight)
        if self.lambda_clst:
            loss = loss + self.lambda_clst * cluster_cost(distance, y, self.owner, weight)
        if self.lambda_sep:
            loss = loss + self.lambda_sep * separation_cost(distance, y, self.owner, weight)
        loss = share.images * loss
        if self.lambda_patch:
            cost = patch_cost(distance, y, self.owner, weight)
            loss = loss + share.prototypes * self.lambda_patch * cost
        return loss

    def shares(
        self, pieces: Sequence[Tensor], y: Tensor, weight: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Share]]:
        """Yield pieces of a batch, positions in it, with their shares: their losses add up."""
        among = _counting(y, self.owner, weight)  # (N, m)
        weight = torch.ones(len(y), device=y.device) if weight is None else weight
        images, prototypes = _sum(weight), among.any(0).sum().clamp_min(1)
        for piece in pieces:
            found = among[piece].any(0).sum()
            yield piece, Share(weight[piece].sum() / images, found / prototypes)


def _counting(y: Tensor, owner: Tensor, weight: Tensor | None) -> Tensor:
    """Return which images are of a prototype's class and of a weight above 0, (N, m)."""
    own = y[:, None] == owner
    return own if weight is None else own & (weight[:, None] > 0)


def _smallest(distance: Tensor, among: Tensor) -> Tensor:
    """Smallest distance of each image among the marked prototypes (N,).

    Masked with infinity: a product with a 0/1 mask would answer 0 for the prototypes left out.
    """
    return distance.masked_fill(~among, torch.inf).amin(1)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    return (weight * values).sum() / _sum(weight)


def _sum(weight: Tensor) -> Tensor:
    return weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)  # a batch of weight 0 costs 0
