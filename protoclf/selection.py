"""A start of the prototypes at patches that a sparse last layer makes use of.

N images, m prototypes, L patches of K = D H1 W1 numbers an image, d principal components.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import unfold

from protoclf.features import FitData
from protoclf.last_layer import solve_last_layer
from protoclf.net import SkorchProtoPNet
from protoclf.projection import Sources, read_patches
from protoclf.prototype_layer import min_distances
from protoclf.storage import allocate

_COMPONENTS = 64
_SAMPLE = 4096  # patches that the components are found from
_MOST_PATCHES = 16_384  # of a class
_CANDIDATES = 8  # for each prototype
_L1 = 3e-3  # for activations of at most 1
_TOLERANCE = 1e-4


@torch.no_grad()
def selected_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes to those training patches that a sparse last layer makes use of.

    Candidates are patches of each class that differ from one another, several times as many as it
    is to have prototypes. The last layer is solved for them with a strong penalty, and those of
    largest weight for their class stay; among those without weight, the ones that tell the class
    best from the others. Where the numbers of prototypes are "auto", those with weight stay.
    """
    module, train = net.module_, data.train_features
    module.eval()
    rng = torch.Generator().manual_seed(net.seed_)
    y = train.y.to(net.device)
    image, cell, owner = _candidates(_reduced_patches(net, data, rng), y, module.owner, rng)
    candidates = _read(net, data, image, cell)  # (M, D, H1, W1)
    distance = torch.cat([min_distances(z, candidates)[0] for z, _ in net.latents(train)])
    g = module.activations(distance)  # (N, M)
    weight = solve_last_layer(
        *(g, y, owner, _L1 * float(g.amax().clamp_min(1e-6))),
        sample_weight=train.sample_weight,
        tol=_TOLERANCE,
        n_classes=module.last_layer.out_features,
    ).weight
    own = weight[owner, torch.arange(len(owner), device=owner.device)]  # (M,)
    counts = module.owner.bincount(minlength=len(weight))  # (C,)
    if net.prototypes_per_class == "auto":
        counts = owner[own > 0].bincount(minlength=len(weight)).clamp(min=1).minimum(counts)
    keep = _best(own, _contrast(g, y, owner), owner, counts.tolist())
    last_layer = module.last_layer.weight.new_zeros(len(weight), len(keep))
    net.replace_prototypes(candidates[keep], owner[keep], last_layer)
    module.reset_last_layer()


def _read(net: SkorchProtoPNet, data: FitData, image: Tensor, cell: Tensor) -> Tensor:
    """Return the patches (M, D, H1, W1) at these places."""
    places = Sources(image.cpu().numpy(), cell.cpu().numpy(), np.zeros(len(image)))
    like = net.module_.prototypes
    patches = like.new_empty(len(image), *like.shape[1:])
    found = read_patches(net.latents(data.train_features), places, net.module_.prototype_size)
    for index, read, _, _ in found:
        patches[torch.from_numpy(index)] = read
    return patches


def _reduced_patches(net: SkorchProtoPNet, data: FitData, rng: torch.Generator) -> Tensor:
    """Return all patches (N, L, d) in their principal components; where K is small, as they are."""
    train = data.train_features
    size = net.module_.prototype_size
    each = max(1, _SAMPLE // len(train))  # patches of an image
    sample = []
    for z, _ in net.latents(train):
        rows = unfold(z, size).transpose(1, 2)  # (n, L, K)
        index = torch.randint(rows.shape[1], (len(rows), each), generator=rng).to(z.device)
        sample.append(rows[torch.arange(len(rows), device=z.device)[:, None], index].flatten(0, 1))
    axes = _principal_axes(torch.cat(sample))  # (K, d)
    reduced, start = torch.empty(0), 0
    for z, y in net.latents(train):
        part = unfold(z, size).transpose(1, 2) @ axes  # (n, L, d)
        if start == 0:
            reduced = allocate((len(train), *part.shape[1:]), part.dtype, part.device)
        reduced[start : start + len(y)] = part
        start += len(y)
    return reduced


def _principal_axes(sample: Tensor) -> Tensor:
    """Return the first principal axes (K, d) of rows (n, K), or all where they are few."""
    d = min(_COMPONENTS, *sample.shape)
    if sample.shape[1] <= _COMPONENTS:
        return torch.eye(sample.shape[1], dtype=sample.dtype, device=sample.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pca_lowrank draws from the global generator
        return torch.pca_lowrank(sample, d, niter=2)[2]


def _candidates(
    patches: Tensor, y: Tensor, owner: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose patches that represent each class; return image, cell and class of each (M,)."""
    n_patches = patches.shape[1]
    parts = []
    for c, wanted in enumerate(owner.bincount().tolist()):
        images = (y == c).nonzero()[:, 0]
        rows = (images[:, None] * n_patches + torch.arange(n_patches, device=y.device)).flatten()
        order = torch.randperm(len(rows), generator=rng)[:_MOST_PATCHES].sort().values
        rows = rows[order.to(y.device)]
        points = patches.flatten(0, 1)[rows.to(patches.device)]  # (n, d)
        k = min(len(rows), max(wanted, min(_CANDIDATES * wanted, len(rows) // 4)))
        chosen = rows[_representatives(points, k, wanted, rng).to(y.device)]
        parts.append(torch.stack([chosen // n_patches, chosen % n_patches, chosen * 0 + c]))
    image, cell, classes = torch.cat(parts, dim=1)
    return image, cell, classes


def _representatives(points: Tensor, k: int, least: int, rng: torch.Generator) -> Tensor:
    """Return indices of `least` to k points, one near the middle of each cluster.

    The clusters are those around k seeds of k-means++ (Arthur and Vassilvitskii, 2007). No
    iteration of k-means follows: it makes the clusters more alike, and accuracy no better.
    """
    seeds = points[_spread(points, k, rng)]  # (k, d)
    label = torch.cdist(points, seeds).argmin(1)  # (n,)
    total = torch.zeros_like(seeds).index_add_(0, label, points)
    mean = total / label.bincount(minlength=k).clamp_min(1)[:, None]
    distance = (points - mean[label]).square().sum(1)  # (n,)
    order = distance.argsort(stable=True)
    order = order[label[order].argsort(stable=True)]  # by cluster, the middle first
    first = torch.ones_like(label, dtype=torch.bool)
    first[1:] = label[order][1:] != label[order][:-1]
    index = order[first]
    if len(index) < least:  # equal patches: any will do
        index = torch.cat([index, order[~first][: least - len(index)]])
    return index


def _spread(points: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Return k indices, drawn one by one with probability proportional to squared distance.

    Of a few draws each time the one that brings all points nearest, as scikit-learn does it.
    """
    n, trials = len(points), 2 + int(math.log(k))
    squares = points.square().sum(1)  # (n,)
    chosen = [torch.randint(n, (1,), generator=rng).to(points.device)]
    nearest = (squares + squares[chosen[0]] - 2 * points @ points[chosen[0]].T[:, 0]).clamp_min(0)
    draws = torch.rand(k, trials, generator=rng).to(points)
    for draw in draws[1:]:
        sums = nearest.cumsum(0)
        index = torch.searchsorted(sums, draw * sums[-1]).clamp_max(n - 1)  # (trials,)
        distance = squares[index, None] + squares - 2 * points[index] @ points.T  # (trials, n)
        distance = torch.minimum(distance.clamp_min_(0), nearest)
        best = distance.sum(1).argmin()
        nearest = distance[best]
        chosen.append(index[best : best + 1])
    return torch.cat(chosen)


def _contrast(g: Tensor, y: Tensor, owner: Tensor) -> Tensor:
    """Mean activation (M,) on images of the own class minus that on all images."""
    mine = (y[:, None] == owner).to(g.dtype)  # (N, M)
    return (g * mine).sum(0) / mine.sum(0) - g.mean(0)


def _best(weight: Tensor, contrast: Tensor, owner: Tensor, counts: list[int]) -> Tensor:
    """Return indices of the best candidates, `counts[c]` of each class c."""
    order = np.lexsort((-contrast.cpu().numpy(), -weight.cpu().numpy(), owner.cpu().numpy()))
    classes, first = np.unique(owner.cpu().numpy(), return_index=True)
    best = [order[f : f + counts[c]] for c, f in zip(classes, first, strict=True)]
    return torch.from_numpy(np.concatenate(best)).to(owner.device)
