"""Where training starts: centred latents, and prototypes among the patches of their class.

The paper starts prototypes at random, which a few hundred images cannot make up for: fine-tuned
prototypes stay near where they start. N images, m prototypes, D channels, H x W cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.functional import unfold

from protoclf.features import FitData
from protoclf.last_layer import solve_last_layer
from protoclf.net import SkorchProtoPNet
from protoclf.network import Centre
from protoclf.prototype_layer import min_distances

_MAX_IMAGES = 256  # of a class, drawn at random where it has more
_MAX_PATCHES = 16_384
_CLUSTER_DIMENSIONS = 64
_CANDIDATES = 8  # for each prototype that is selected
_SELECTION_L1 = 3e-3  # for activations of at most 1
_SELECTION_TOL = 1e-4


@torch.no_grad()
def centre_latents(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the `Centre` of the add-on layers to the mean latent cell of the training images."""
    add_on = net.module_.eval().add_on
    if not (len(add_on) and isinstance(add_on[-1], Centre)):
        return
    means, counts = [], []
    for inputs, y in net.get_iterator(data.train_features, training=False):
        features = inputs["features"].to(net.device).float()
        means.append(add_on[:-1](features).mean((0, 2, 3)))  # (D,)
        counts.append(len(y))
    share = torch.tensor(counts, device=net.device) / sum(counts)  # (batches,)
    add_on[-1].mean.copy_((share @ torch.stack(means))[:, None, None])


@torch.no_grad()
def kmeans_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes of each class to the centres of k-means on its own patches."""
    centres, _ = _clusters(net, data, 1, 300, _centres)
    net.module_.prototypes.copy_(centres)


@torch.no_grad()
def selected_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes to those training patches that a sparse last layer makes use of.

    Candidates are the patches nearest to the centres of clusters, for each class several times as
    many as it is to have prototypes. One iteration of k-means makes clusters that differ more than
    those of many iterations, and does better. The last layer is solved for them with a strong
    penalty, and those of largest weight for their class stay; among those without weight, the ones
    that tell the class best from the others. Where the numbers of prototypes are "auto", those
    with weight stay.
    """
    module, train = net.module_, data.train_features
    candidates, owner = _clusters(
        net, data, _CANDIDATES, 1, _nearest_to_centres
    )  # (M, D, H1, W1), (M,)
    y = train.y.to(owner.device)
    distance = torch.cat([min_distances(z, candidates)[0] for z, _ in net.latents(train)])
    g = module.activations(distance)  # (N, M)
    penalty = _SELECTION_L1 * float(g.amax().clamp_min(1e-6))
    weight = solve_last_layer(
        g,
        y,
        owner,
        penalty,
        sample_weight=train.sample_weight,
        tol=_SELECTION_TOL,
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


def _clusters(
    net: SkorchProtoPNet,
    data: FitData,
    times: int,
    max_iter: int,
    represent: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Cluster each class's patches, `times` as many clusters as it is to have prototypes.

    By at most `max_iter` iterations of k-means. Returns a representative (M, D, H1, W1) of each
    cluster, and its class (M,).
    """
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    found, owner = [], []
    for c in module.owner.unique().tolist():
        patches = _class_patches(net, data, c, rng)  # (n, D H1 W1)
        wanted = int((module.owner == c).sum())
        k = min(len(patches), max(wanted, min(times * wanted, len(patches) // 4)))
        member = _kmeans(patches, k, max_iter, int(rng.integers(2**31)))  # (k, n)
        found.append(represent(patches, member))
        owner += [c] * k
    stacked = torch.cat(found)  # (M, D H1 W1)
    prototypes = module.scaled(stacked.view(-1, *module.prototypes.shape[1:]))
    return prototypes, torch.tensor(owner, device=net.device)


def _kmeans(patches: Tensor, k: int, max_iter: int, seed: int) -> Tensor:
    """Return which patches (n, K) are in which cluster, (k, n), each row adding up to 1.

    In many dimensions, clusters are found in the principal ones.
    """
    reduced = patches
    if min(patches.shape) > _CLUSTER_DIMENSIONS:
        _, _, axes = torch.pca_lowrank(patches, _CLUSTER_DIMENSIONS, niter=2)  # (K, 64)
        reduced = patches @ axes
    kmeans = KMeans(k, n_init=1, max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal patches make fewer clusters
        label = kmeans.fit_predict(reduced.cpu().numpy())
    member = torch.from_numpy(label == np.arange(k)[:, None]).to(patches)  # (k, n)
    return member / member.sum(1, keepdim=True).clamp_min(1)


def _centres(patches: Tensor, member: Tensor) -> Tensor:
    """Return the mean patch (k, K) of each cluster."""
    return member @ patches


def _nearest_to_centres(patches: Tensor, member: Tensor) -> Tensor:
    """Return the patch (k, K) of each cluster that is nearest to its mean."""
    distance = torch.cdist(_centres(patches, member), patches)  # (k, n)
    return patches[distance.where(member > 0, torch.inf).argmin(1)]


def _class_patches(net: SkorchProtoPNet, data: FitData, c: int, rng: np.random.Generator) -> Tensor:
    """Latent patches of a class's training images, as rows."""
    train = data.train_features
    images = _sample(np.flatnonzero(train.y.numpy() == c), _MAX_IMAGES, rng)
    parts: list[Tensor] = []
    for index in np.array_split(images, -(-len(images) // net.batch_size)):
        inputs, _ = train.__getitems__(index)
        z = net.module_.latents(inputs["features"].to(net.device))  # (n, D, H, W)
        rows = unfold(z, net.module_.prototype_size).transpose(1, 2)  # (n, L, D H1 W1)
        parts.append(rows.flatten(0, 1))
    patches = torch.cat(parts)
    return patches[torch.from_numpy(_sample(np.arange(len(patches)), _MAX_PATCHES, rng))]


def _sample(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(values) <= most:
        return values
    return np.sort(rng.choice(values, most, replace=False))
