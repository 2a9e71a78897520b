"""Linear discriminants of the classes: channels that tell patches apart by what they speak for.

All channels of a backbone that was trained for other images count alike in a cosine, whether they
tell the classes at hand apart or not. A ridge regression of the classes on the mean cells of the
training images knows which do. What it says of a cell is C more of its channels. N images, C
classes, D channels.

Hoerl and Kennard, "Ridge regression", Technometrics 1970. Regression on the classes finds the
directions of linear discriminant analysis: Hastie, Tibshirani and Friedman, "The Elements of
Statistical Learning", 2009, section 4.3 and exercise 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclf.features import Arrays, FitData
from protoclf.net import SkorchProtoPNet
from protoclf.stage_cache import remembered
from protoclf.torch_settings import with_algebra

_LEAST_DEVIATION = 0.1  # of a channel, as a share of what is usual: dead ones are not blown up


@torch.no_grad()
def find_discriminants(net: SkorchProtoPNet, data: FitData) -> None:
    """Set the `Discriminants` of the add-on layers, if there are any, for the training images."""
    layer = net.module_.discriminants
    if layer is None:
        return
    what = "discriminants", net.weight_of_discriminants()
    found = remembered(net, data, what, {}, lambda: _found(net, data))
    weight = torch.as_tensor(found["weight"], device=net.device)
    layer.weight.copy_(weight[..., None, None])


def _found(net: SkorchProtoPNet, data: FitData) -> Arrays:
    share, n_classes = net.weight_of_discriminants(), len(net.classes_)
    weight = discriminants(data.mean_cells, data.train_y, n_classes, share, data.train_weight)
    return {"weight": weight.float().to(net.device)}


def discriminants(
    x: Tensor, y: Tensor, n_classes: int, share: float | Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    """Return linear functions (C, D) of cells, by the mean cells x (N, D) of images.

    The ridge regression of 0 and 1, for another class and their own, on standardised means. Its
    penalty is the mean squared length of these. The functions are scaled so that the root mean
    square of what they say of x, centred, is `share` times that of x itself.
    """
    x, w = _centred(x, sample_weight)
    target = F.one_hot(y.to(x.device), n_classes).to(x)  # (N, C)
    target = target - (w * target).sum(0)
    variance = (w * x.square()).sum(0)  # (D,)
    deviation = (variance + _LEAST_DEVIATION**2 * variance.mean()).sqrt()
    deviation = deviation.where(deviation > 0, 1)
    rows = w.sqrt() * x / deviation  # (N, D), of squares that sum to the mean squared length
    penalty = rows.square().sum() / len(rows)
    penalty = penalty.where(penalty > 0, 1)
    of_class = _ridge(rows, w.sqrt() * target, penalty).T / deviation  # (C, D)
    found = _share(of_class, x, w)
    return share / found.where(found > 0, 1) * of_class


def share_of(functions: Tensor, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Return the `share` of linear functions (C, D) of cells: see `discriminants`."""
    return _share(functions, *_centred(x, sample_weight))


def _centred(x: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x (N, D) in float64, of mean 0, and weights (N, 1) that sum to 1."""
    x = with_algebra(x).double()
    w = torch.ones(len(x)) if sample_weight is None else sample_weight
    w = (w / w.sum()).to(x)[:, None]
    return x - (w * x).sum(0), w


def _share(functions: Tensor, x: Tensor, w: Tensor) -> Tensor:
    said = x @ functions.to(x).T  # (N, C)
    share = ((w * said.square()).sum() / (w * x.square()).sum()).sqrt()
    return share.nan_to_num()  # of equal cells


def _ridge(rows: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    """Return the coefficients (D, C) of the smallest |rows b - target|^2 + penalty |b|^2."""
    n, channels = rows.shape
    eye = penalty * torch.eye(min(n, channels), dtype=rows.dtype, device=rows.device)
    if n < channels:
        return rows.T @ torch.linalg.solve(rows @ rows.T + eye, target)
    return torch.linalg.solve(rows.T @ rows + eye, rows.T @ target)
