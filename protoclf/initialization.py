"""Where prototypes start: at the k-means centres of their class's latent patches.

The paper starts them at random, which a few hundred images cannot make up for: fine-tuned
prototypes stay near where they start.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import unfold

from protoclf.features import FitData
from protoclf.net import SkorchProtoPNet

_MAX_IMAGES = 256  # of a class, drawn at random where it has more
_MAX_PATCHES = 16_384


@torch.no_grad()
def kmeans_prototypes(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the prototypes of each class to the centres of k-means on its own patches."""
    module, rng = net.module_.eval(), np.random.default_rng(net.seed_)
    for c in module.owner.unique().tolist():
        mine = module.owner == c
        patches = _class_patches(net, data, c, rng)  # (n, D H1 W1)
        k = int(mine.sum())
        seed = int(rng.integers(2**31))
        centres = KMeans(k, n_init=1, random_state=seed).fit(patches).cluster_centers_
        shape = module.prototypes[mine].shape  # (k, D, H1, W1)
        module.prototypes[mine] = torch.from_numpy(centres).to(module.prototypes).view(shape)


def _class_patches(
    net: SkorchProtoPNet, data: FitData, c: int, rng: np.random.Generator
) -> np.ndarray:
    """Latent patches of a class's training images, as rows."""
    train, size = data.train_features, tuple(net.module_.prototypes.shape[2:])
    images = _sample(np.flatnonzero(train.y.numpy() == c), _MAX_IMAGES, rng)
    parts: list[Tensor] = []
    for index in np.array_split(images, -(-len(images) // net.batch_size)):
        inputs, _ = train.__getitems__(index)
        z = net.module_.latents(inputs["features"].to(net.device))  # (n, D, H, W)
        parts.append(unfold(z, size).transpose(1, 2).flatten(0, 1).cpu())  # (n L, D H1 W1)
    patches = torch.cat(parts).numpy()
    return patches[_sample(np.arange(len(patches)), _MAX_PATCHES, rng)]


def _sample(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(values) <= most:
        return values
    return np.sort(rng.choice(values, most, replace=False))
