"""Where training starts: centred latents, and prototypes among the patches of their class.

The paper starts prototypes at random, which a few hundred images cannot make up for: fine-tuned
prototypes stay near where they start. N images, m prototypes, D channels, H x W cells.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
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
_CANDIDATES = 4  # for each prototype that is selected
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
        means.append(add_on[:-1](inputs["features"].to(net.device)).mean((0, 2, 3)))  # (D,)
        counts.append(len(y))
    share = torch.tensor(counts, device=net.device) / sum(counts)  # (batches,)
    add_on[-1].mean.copy_((share @ torch.stack(means))[:, None, None])


@torch.no_grad()
def kmeans_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes of each class to the centres of k-means on its own patches."""
    centres, _ = _cluster_centres(net, data, 1)
    net.module_.prototypes.copy_(centres)


@torch.no_grad()
def selected_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes to those k-means centres that a sparse last layer makes use of.

    Each class gets several times as many centres as it is to have prototypes. The last layer is
    solved for them with a strong penalty, and the centres of largest weight for their class stay;
    among those without weight, the ones that tell the class best from the others.
    """
    module, train = net.module_, data.train_features
    centres, owner = _cluster_centres(net, data, _CANDIDATES)  # (M, D, H1, W1), (M,)
    y = train.y.to(owner.device)
    distance = torch.cat([min_distances(z, centres)[0] for z, _ in net.latents(train)])
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
    keep = _best(own, _contrast(g, y, owner), owner, module.owner)
    module.prototypes.copy_(centres[keep])


def _contrast(g: Tensor, y: Tensor, owner: Tensor) -> Tensor:
    """Mean activation (M,) on images of the own class minus that on all images."""
    mine = (y[:, None] == owner).to(g.dtype)  # (N, M)
    return (g * mine).sum(0) / mine.sum(0) - g.mean(0)


def _best(weight: Tensor, contrast: Tensor, owner: Tensor, wanted: Tensor) -> Tensor:
    """Return indices of the best candidates, for each class as many as `wanted` (m,) names it."""
    order = np.lexsort((-contrast.cpu().numpy(), -weight.cpu().numpy(), owner.cpu().numpy()))
    classes, first = np.unique(owner.cpu().numpy(), return_index=True)
    counts = torch.bincount(wanted).cpu().numpy()
    best = [order[f : f + counts[c]] for c, f in zip(classes, first, strict=True)]
    return torch.from_numpy(np.concatenate(best)).to(owner.device)


def _cluster_centres(net: SkorchProtoPNet, data: FitData, times: int) -> tuple[Tensor, Tensor]:
    """Centres of k-means on each class's patches, `times` its prototypes, and their classes."""
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    centres, owner = [], []
    for c in module.owner.unique().tolist():
        patches = _class_patches(net, data, c, rng)  # (n, D H1 W1)
        wanted = int((module.owner == c).sum())
        k = max(wanted, min(times * wanted, len(patches) // 4))
        seed = int(rng.integers(2**31))
        centres.append(_kmeans(patches, k, seed))
        owner += [c] * k
    stacked = torch.from_numpy(np.concatenate(centres)).to(module.prototypes)  # (M, D H1 W1)
    prototypes = module.scaled(stacked.view(-1, *module.prototypes.shape[1:]))
    return prototypes, torch.tensor(owner, device=net.device)


def _kmeans(patches: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Return k centres; in many dimensions, clusters are found in the principal ones."""
    reduced = patches
    if min(patches.shape) > _CLUSTER_DIMENSIONS:
        pca = PCA(_CLUSTER_DIMENSIONS, svd_solver="randomized", random_state=seed)
        reduced = pca.fit_transform(patches)
    label = KMeans(k, n_init=1, random_state=seed).fit_predict(reduced)
    member = (label == np.arange(k)[:, None]).astype(patches.dtype)  # (k, n)
    return member @ patches / member.sum(1, keepdims=True).clip(1)


def _class_patches(
    net: SkorchProtoPNet, data: FitData, c: int, rng: np.random.Generator
) -> np.ndarray:
    """Latent patches of a class's training images, as rows."""
    train = data.train_features
    images = _sample(np.flatnonzero(train.y.numpy() == c), _MAX_IMAGES, rng)
    parts: list[Tensor] = []
    for index in np.array_split(images, -(-len(images) // net.batch_size)):
        inputs, _ = train.__getitems__(index)
        z = net.module_.latents(inputs["features"].to(net.device))  # (n, D, H, W)
        rows = unfold(z, net.module_.prototype_size).transpose(1, 2)  # (n, L, D H1 W1)
        parts.append(rows.flatten(0, 1).cpu())
    patches = torch.cat(parts).numpy()
    return patches[_sample(np.arange(len(patches)), _MAX_PATCHES, rng)]


def _sample(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(values) <= most:
        return values
    return np.sort(rng.choice(values, most, replace=False))
