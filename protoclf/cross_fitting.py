"""Training images as the last layer should see them: as if discriminants had never seen them.

What discriminants say of the images that they were found by is too good, and a last layer that
learned from it would trust them too much. So each training image is compared with the prototypes by
discriminants that were found by the images of the other folds ("cross-fitting"). Wolpert, "Stacked
generalization", Neural Networks 1992. N images, C classes, D channels, K folds, H x W cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclf.discriminants import discriminants, share_of
from protoclf.features import Arrays, FeatureDataset, FitData
from protoclf.fingerprints import described
from protoclf.net import SkorchProtoPNet
from protoclf.splits import stratified_splits
from protoclf.stage_cache import remembered
from protoclf.torch_settings import without_autocast

_FOLDS = 5
_LEAST_COSINE = 0.9  # of discriminants of nearly the same images; of others it was 0.3


def latents_as_if_new(
    net: SkorchProtoPNet,
    data: FitData,
    views: FeatureDataset | None = None,
    rows: Sequence[int] | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return latent maps and classes of the training images, or of some rows, or of `views`.

    As if each image were new to the discriminants. Where there are none, latents are as they are;
    also behind a backbone that was trained since they were found, and of images that are new to
    them, as those of a `partial_fit` may be.
    """
    layer = net.module_.discriminants
    if layer is None or net.backbone_trained_:
        return data.train_latents(rows) if views is None else net.latents(views, rows)
    what = "discriminants by folds", described(data.groups)
    found = remembered(net, data, what, layer.state_dict(), lambda: _found(net, data, layer.weight))
    features = data.train_features if views is None else views
    return _latents_by_folds(net, features, layer.weight, found, rows)


def _found(net: SkorchProtoPNet, data: FitData, of_all: Tensor) -> Arrays:
    """Find discriminants without each of K folds, as long as those of all (C, D, 1, 1).

    "weight" (K, C, D); "fold" (N,), which is K for images that are in no fold; "mean" (D,) of all
    cells. There is no fold if those of all are not of these images.
    """
    x, y, w = data.mean_cells, data.train_y, data.train_weight
    splits = stratified_splits(y.numpy(), _FOLDS, net.seed_, data.groups, each_class_in_all=False)
    n_classes, share = len(net.classes_), share_of(of_all[..., 0, 0], x, w)
    of_these = discriminants(x, y, n_classes, share, w).to(of_all)
    if F.cosine_similarity(of_these.flatten(), of_all.flatten(), dim=0) < _LEAST_COSINE:
        splits = []
    fold, weight = np.full(len(x), len(splits)), [x.new_empty(0, n_classes, x.shape[1])]
    for k, (others, held_out) in enumerate(splits):
        fold[held_out] = k
        of_others = None if w is None else w[others]
        functions = discriminants(x[others], y[others], n_classes, share, of_others)
        weight.append(functions.to(x)[None])
    return {"weight": torch.cat(weight), "fold": fold, "mean": x.mean(0)}


@torch.no_grad()
def _latents_by_folds(
    net: SkorchProtoPNet,
    features: FeatureDataset,
    of_all: Tensor,
    found: Arrays,
    rows: Sequence[int] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latent maps, by the discriminants of each image's fold, or of all (C, D, 1, 1)."""
    module, add_on = net.module_, net.module_.add_on
    by_folds = torch.as_tensor(found["weight"], device=of_all.device)[..., None, None]
    weight = torch.cat([by_folds, of_all[None]])  # (K + 1, C, D, 1, 1)
    mean = torch.as_tensor(found["mean"], device=of_all.device)[:, None, None]
    shift = ((of_all - weight) * mean).sum((2, 3, 4))  # (K + 1, C): of the mean all say the same
    fold = np.asarray(found["fold"])[slice(None) if rows is None else rows]
    batches, _ = net.batches_to_evaluate(features, rows)
    start = 0
    for inputs, y in batches:
        z = inputs["features"].to(net.device).float()
        with without_autocast(z.device):
            shape = (len(z), len(of_all), *z.shape[2:])
            said = torch.empty(shape, device=z.device, memory_format=torch.channels_last)
            here = fold[start : start + len(y)]
            for k in np.unique(here):
                mine = torch.from_numpy(np.flatnonzero(here == k)).to(z.device)
                said[mine] = F.conv2d(z[mine], weight[k], shift[k])
            yield module.scaled(add_on[1:](torch.cat([z, said], dim=1))), y
        start += len(y)
