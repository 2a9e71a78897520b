"""Where training starts: centred latents, and prototypes among the patches of their class.

The paper starts prototypes at random, which a few hundred images cannot make up for: fine-tuned
prototypes stay near where they start. N images, m prototypes, D channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from protoclf.concepts import ForbiddenPatches
from protoclf.features import Arrays, FitData
from protoclf.net import SkorchProtoPNet
from protoclf.network import Centre
from protoclf.prototype_layer import patches_of
from protoclf.stage_cache import remembered

_MAX_IMAGES = 256  # of a class, drawn at random where it has more
_MAX_PATCHES = 16_384
_CLUSTER_DIMENSIONS = 64


@torch.no_grad()
def centre_latents(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the `Centre` of the add-on layers to the mean latent cell of the training images."""
    add_on = net.module_.eval().add_on
    if not (len(add_on) and isinstance(add_on[-1], Centre)):
        return
    found = remembered(net, data, "centre", add_on.state_dict(), lambda: _mean_cell(net, data))
    add_on[-1].mean.copy_(torch.as_tensor(found["mean"], device=net.device)[:, None, None])


def _mean_cell(net: SkorchProtoPNet, data: FitData) -> Arrays:
    """Return the mean latent cell (D,) in front of the last add-on layer."""
    add_on = net.module_.add_on
    means, counts = [], []
    for inputs, y in net.get_iterator(data.train_features, training=False):
        features = inputs["features"].to(net.device).float()
        means.append(add_on[:-1](features).mean((0, 2, 3)))  # (D,)
        counts.append(len(y))
    share = torch.tensor(counts, device=net.device) / sum(counts)  # (batches,)
    return {"mean": share @ torch.stack(means)}


@torch.no_grad()
def kmeans_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes of each class to the centres of k-means on its own patches.

    In many dimensions, clusters are found in the principal ones.
    """
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    for c in module.owner.unique().tolist():
        patches = class_patches(net, data, c, rng).cpu().numpy()  # (n, D H1 W1)
        mine = module.owner == c
        k, seed = int(mine.sum()), int(rng.integers(2**31))
        reduced = patches
        if min(patches.shape) > _CLUSTER_DIMENSIONS:
            pca = PCA(_CLUSTER_DIMENSIONS, svd_solver="randomized", random_state=seed)
            reduced = pca.fit_transform(patches)
        label = KMeans(k, n_init=1, random_state=seed).fit_predict(reduced)
        member = (label == np.arange(k)[:, None]).astype(patches.dtype)  # (k, n)
        centres = torch.from_numpy(member @ patches / member.sum(1, keepdims=True).clip(1))
        like = module.prototypes[mine]
        module.prototypes[mine] = module.scaled(centres.to(like).view_as(like))


@torch.no_grad()
def restart_prototypes(
    net: SkorchProtoPNet,
    data: FitData,
    ids: Sequence[int],
    forbidden: ForbiddenPatches,
) -> None:
    """Move some prototypes to patches of their classes, unlike what is forbidden.

    Drawn as k-means++ draws its centres: with probabilities as the squared distance to the nearest
    of the forbidden patches, of the prototypes that stay and of those drawn before.
    """
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    generator = torch.Generator().manual_seed(net.seed_)
    moved = torch.zeros(len(module.owner), dtype=torch.bool, device=module.owner.device)
    moved[list(ids)] = True
    for c in module.owner[moved].unique().tolist():
        patches = class_patches(net, data, c, rng)  # (n, D H1 W1)
        stay = module.scaled_prototypes()[(module.owner == c) & ~moved].flatten(1)
        taken = torch.cat([stay, forbidden.patches[forbidden.owner == c].flatten(1)])
        nearest = torch.cdist(patches, taken).square().amin(1)  # (n,)
        for j in ((module.owner == c) & moved).nonzero()[:, 0].tolist():
            share = nearest.cpu().double().clamp_min(1e-12)  # of equal patches, any
            drawn = patches[int(torch.multinomial(share, 1, generator=generator))]
            module.prototypes[j] = drawn.view_as(module.prototypes[j])
            nearest = torch.minimum(nearest, (patches - drawn).square().sum(1))


def class_patches(net: SkorchProtoPNet, data: FitData, c: int, rng: np.random.Generator) -> Tensor:
    """Return latent patches (n, D H1 W1) of a class's training images, as rows."""
    images = _sample(np.flatnonzero(data.train_y.numpy() == c), _MAX_IMAGES, rng)
    prototypes = net.module_.prototypes
    parts: list[Tensor] = []
    rows, start = np.empty(0, int), 0
    for z in data.latents_of(images):
        patches = patches_of(z, prototypes)  # (n, L, K)
        if not parts:
            rows = _sample(np.arange(len(images) * patches.shape[1]), _MAX_PATCHES, rng)
        patches = patches.flatten(0, 1)
        here = rows[(rows >= start) & (rows < start + len(patches))] - start
        parts.append(patches[torch.from_numpy(here)])
        start += len(patches)
    return torch.cat(parts)


def _sample(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(values) <= most:
        return values
    return np.sort(rng.choice(values, most, replace=False))
