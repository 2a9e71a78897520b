"""A start of the prototypes at patches that a sparse last layer makes use of.

N images, m prototypes of C classes, patches of K = D H1 W1 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from protoclf.activations import share_of_many
from protoclf.features import Arrays, FitData
from protoclf.initialization import class_patches
from protoclf.last_layer import solve_last_layer
from protoclf.net import SkorchProtoPNet
from protoclf.patch_search import with_progress
from protoclf.prototype_layer import min_distances, n_patches, patches_of
from protoclf.stage_cache import remembered
from protoclf.torch_settings import random_numbers_from, with_algebra

_COMPONENTS = 64
_SAMPLE = 1024  # patches of a class that its principal components are found from
_CANDIDATES = 8, 32  # for each prototype: at least, at most
_MANY = 8192  # candidates of all classes, that more than the least are not to exceed
_MANY_DISTANCES = 2**24  # from images to candidates, likewise
_FEWEST = 10  # prototypes: for fewer, candidates are as many as for so many, and found once
_MOST_PRODUCTS = 2**27  # of numbers, of an image with all candidates: a third of a small backbone's
_BLOCK = 2**22  # numbers in patches of images that are compared at once: 16 MiB
_AT_ONCE = 512  # candidates that such a block is compared with: few enough for the caches
_L1 = 3e-3  # for activations of at most 1, and up to ten classes
_TOLERANCE = 1 / 30  # of the penalty


@torch.no_grad()
def selected_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes to those training patches that a sparse last layer makes use of.

    Candidates are patches of each class that differ from one another, several times as many as it
    is to have prototypes. The last layer is solved for them with a strong penalty, and those of
    largest weight for their class stay; among those without weight, the ones that tell the class
    best from the others. Where the numbers of prototypes are "auto", those with weight stay; with
    distinct="images", no more than the class has images.
    """
    module = net.module_
    counts = module.owner.bincount(minlength=module.last_layer.out_features)  # (C,)
    numbers = counts.clamp_min(_FEWEST).tolist()
    what = "candidates", numbers, module.prototypes.shape[1:]
    state = {f"add_on.{name}": tensor for name, tensor in module.add_on.state_dict().items()}
    kept = remembered(net, data, what, state, lambda: _rated_candidates(net, data, numbers))
    found = {name: torch.as_tensor(value, device=net.device) for name, value in kept.items()}
    owner, weight = found["owner"], found["weight"]  # (M,), (M,)
    if net.prototypes_per_class == "auto":
        counts = owner[weight > 0].bincount(minlength=len(counts)).clamp(min=1).minimum(counts)
        if net.distinct == "images":  # the projection needs one for each
            counts = counts.minimum(data.train_y.bincount(minlength=len(counts)).to(counts))
    keep = _best(weight, found["contrast"], owner, counts.tolist())
    last_layer = module.last_layer.weight.new_zeros(len(counts), len(keep))
    net.replace_prototypes(found["prototypes"][keep], owner[keep], last_layer)
    module.reset_last_layer()


def _rated_candidates(net: SkorchProtoPNet, data: FitData, numbers: list[int]) -> Arrays:
    """Return patches that represent each class, and how good they are.

    "prototypes" (M, D, H1, W1), "owner" (M,), "weight" for their class (M,), "contrast" (M,).
    """
    candidates, owner = _candidates(net, data, numbers)
    g = net.module_.activations(_distances(net, data, candidates))  # (N, M)
    y = data.train_y.to(g.device)
    penalty = _L1 * share_of_many(len(numbers)) * float(g.amax().clamp_min(1e-6))
    weight = solve_last_layer(
        *(g, y, owner, penalty),
        sample_weight=data.train_weight,
        tol=_TOLERANCE * penalty,
        n_classes=len(numbers),
    ).weight  # (C, M)
    own = weight[owner, torch.arange(len(owner), device=owner.device)]
    rating = {"weight": own, "contrast": _contrast(g, y, owner, data.train_weight)}
    return {"prototypes": candidates, "owner": owner, **rating}


def _candidates(net: SkorchProtoPNet, data: FitData, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Return patches (M, D, H1, W1) that represent each class, and their classes (M,)."""
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    draws = torch.Generator().manual_seed(net.seed_)
    each = _candidates_each(sum(numbers), len(data.train_y))
    found, owner = [], []
    for c, number in enumerate(numbers):
        patches = class_patches(net, data, c, rng)  # (n, K)
        k = min(len(patches), max(number, min(each * number, len(patches) // 4)))
        found.append(patches[_representatives(patches, k, min(k, number), draws)])
        owner += [c] * len(found[-1])
    candidates = torch.cat(found).view(-1, *module.prototypes.shape[1:])
    return candidates, torch.tensor(owner, device=candidates.device)


def _distances(net: SkorchProtoPNet, data: FitData, candidates: Tensor) -> Tensor:
    """Return squared distances (N, M) of all images to the candidates, perhaps approximate ones.

    Where that saves half of the work, in the principal components of the candidates alone; of a
    backbone that computes in bfloat16, by products in bfloat16. That is enough to choose by.
    """
    flat = candidates.flatten(1)  # (M, K)
    L = n_patches(data.train_features.features, candidates)
    axes = _axes_that_save_work(flat, L, len(data.train_y))
    latents = (z for z, _ in with_progress(net, data.train_latents(), len(data.train_y)))
    in_half_precision = net.module_.half_precision and net.module_.similarity == "cosine"
    if axes is None and not in_half_precision:
        return torch.cat([min_distances(z, candidates)[0] for z in latents])
    dtype = torch.bfloat16 if in_half_precision else flat.dtype
    return _rough_distances(latents, candidates, axes, dtype)


def _rough_distances(
    latents: Iterable[Tensor], candidates: Tensor, axes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return squared distances (N, M) by products along axes (K, d), or of all numbers.

    Those are z.p - ||z||^2 / 2, which loses little to rounding: of unit vectors that are alike it
    is about 0.5.
    """
    flat = candidates.flatten(1)  # (M, K)
    centre = 0 if axes is None else flat.mean(0)  # (K,)
    points = flat - centre  # (M, K)
    squares = points.square().sum(1)  # (M,)
    points = (points if axes is None else points @ axes).to(dtype)  # (M, d)
    scores = []
    for batch in latents:
        L = n_patches(batch, candidates)
        for z in batch.split(max(1, _BLOCK // (L * max(flat.shape[1], _AT_ONCE)))):
            rows = patches_of(z, candidates).flatten(0, 1) - centre  # (n L, K)
            half_squares = rows.square().sum(1, keepdim=True).div_(2).to(dtype)  # (n L, 1)
            rows = (rows if axes is None else rows @ axes).to(dtype)  # (n L, d)
            best = [
                torch.addmm(half_squares, rows, p.T, beta=-1).view(len(z), L, -1).amax(1)
                for p in points.split(_AT_ONCE)
            ]
            scores.append(torch.cat(best, 1).to(flat))  # (n, M)
    return torch.cat(scores).mul_(-2).add_(squares).clamp_min_(0)


def _axes_that_save_work(candidates: Tensor, L: int, n_images: int) -> Tensor | None:
    """Return principal axes (K, d) of candidates (M, K), or None where they save less than half.

    Without axes to meet all candidates takes a patch M K products. Along d axes it takes d (K + M),
    `_MOST_PRODUCTS` for all patches of an image, and to find the axes some for each candidate.
    """
    m, size = candidates.shape
    d = max(_MOST_PRODUCTS // (L * (m + size)), _COMPONENTS)
    found = (6 * m * size + 8 * (m + size) * d) * d
    along = n_images * L * (m + size) * d
    if 2 * (found + along) >= n_images * L * m * size:
        return None
    return _principal_axes(candidates, d)


def _candidates_each(m: int, n: int) -> int:
    """Return how many candidates there are for each of m prototypes, for n images.

    Many make the start better, and cost as their number times that of the images.
    """
    return int(np.clip(min(_MANY // m, _MANY_DISTANCES // (m * n)), *_CANDIDATES))


def _representatives(patches: Tensor, k: int, least: int, draws: torch.Generator) -> Tensor:
    """Return indices of `least` to k patches (n, K), the middle ones of clusters.

    The clusters are those of one iteration of k-means in the principal components: more of them
    make clusters more alike, and accuracy no better.
    """
    n = len(patches)
    some = torch.randperm(n, generator=draws)[:_SAMPLE] if n > _SAMPLE else torch.arange(n)
    sample = patches[some.to(patches.device)]  # every k-th may always be of one column of the map
    points = patches @ _principal_axes(sample, _COMPONENTS)  # (n, d)
    centres = points[_spread(points, k, draws)]  # (k, d)
    for space in (points, patches):
        label = torch.cdist(points, centres).argmin(1)  # (n,)
        total = space.new_zeros(k, space.shape[1]).index_add_(0, label, space)
        centres = total / label.bincount(minlength=k).clamp_min(1)[:, None]  # at last (k, K)
    order = (patches - centres[label]).square().sum(1).argsort(stable=True)  # (n,)
    order = order[label[order].argsort(stable=True)]  # by cluster, the middle first
    first = torch.ones_like(label, dtype=torch.bool)
    first[1:] = label[order][1:] != label[order][:-1]
    index = order[first]
    if len(index) < least:  # equal patches: any will do
        index = torch.cat([index, order[~first][: least - len(index)]])
    return index


def _principal_axes(patches: Tensor, most: int) -> Tensor:
    """Return the first principal axes (K, d) of patches (n, K); where K is at most `most`, all."""
    n, size = patches.shape
    if size <= most:
        return torch.eye(size, dtype=patches.dtype, device=patches.device)
    x = with_algebra(patches)
    with random_numbers_from(0, x.device):  # pca_lowrank takes no generator
        return torch.pca_lowrank(x, min(most, n), niter=2)[2].to(patches.device)


def _spread(points: Tensor, k: int, draws: torch.Generator) -> Tensor:
    """Return indices of k points (n, d), the seeds of k-means++ (Arthur and Vassilvitskii, 2007).

    Each is drawn with probability proportional to the squared distance to those before it; of a
    few draws the one that brings all points nearest, as scikit-learn does it.
    """
    n, trials = len(points), 2 + int(math.log(k))
    squares = points.square().sum(1)  # (n,)
    first = torch.randint(n, (1,), generator=draws).to(points.device)
    nearest = (points - points[first]).square().sum(1)  # (n,)
    chosen = [first]
    for draw in torch.rand(k - 1, trials, generator=draws).to(points):
        sums = nearest.cumsum(0)
        index = torch.searchsorted(sums, draw * sums[-1]).clamp_max(n - 1)  # (trials,)
        distance = squares[index, None] + squares - 2 * points[index] @ points.T  # (trials, n)
        distance = torch.minimum(distance.clamp_min_(0), nearest)
        best = distance.sum(1).argmin(0, keepdim=True)  # (1,); a number would wait for the device
        nearest = distance.index_select(0, best)[0]
        chosen.append(index.index_select(0, best))
    return torch.cat(chosen)


def _contrast(g: Tensor, y: Tensor, owner: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Mean activation (M,) on images of the own class minus that on all images."""
    weight = torch.ones(len(g)) if sample_weight is None else sample_weight  # (N,)
    weight = weight.to(g)[:, None]
    mine = (y[:, None] == owner) * weight  # (N, M)
    return (g * mine).sum(0) / mine.sum(0) - (g * weight).sum(0) / weight.sum()


def _best(weight: Tensor, contrast: Tensor, owner: Tensor, counts: list[int]) -> Tensor:
    """Return indices of the best candidates, `counts[c]` of each class c."""
    order = np.lexsort((-contrast.cpu().numpy(), -weight.cpu().numpy(), owner.cpu().numpy()))
    classes, first = np.unique(owner.cpu().numpy(), return_index=True)
    best = [order[f : f + counts[c]] for c, f in zip(classes, first, strict=True)]
    return torch.from_numpy(np.concatenate(best)).to(owner.device)
