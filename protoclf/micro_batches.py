"""A training batch taken in pieces: the same step, in the memory of one piece.

Gradients of sums are sums of gradients, so that a batch whose images do not see each other in the
backbone needs no more memory than its largest piece. Of the joint loss only the patch cost looks
at several images at once, and only at those of a class: pieces hold whole classes.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Share(NamedTuple):
    """How much of its batch a piece is.

    Attributes
    ----------
    images : float or Tensor
        Of the images, by their weights.
    prototypes : float or Tensor
        Of the prototypes that have images of their class in the batch.
    """

    images: float | Tensor = 1.0
    prototypes: float | Tensor = 1.0


WHOLE = Share()


def pieces_by_class(y: Tensor, size: int) -> list[Tensor]:
    """Divide a batch of classes y (N,) into pieces of about `size` images; return their positions.

    No class is in several pieces: one of many images makes a larger piece.
    """
    classes, class_of_image, counts = y.unique(return_inverse=True, return_counts=True)
    n_pieces = min(math.ceil(len(y) / size), len(classes))
    filled = [0] * n_pieces
    piece_of_class = torch.empty_like(classes)
    for c in counts.argsort(descending=True, stable=True).tolist():  # the largest first
        emptiest = filled.index(min(filled))
        piece_of_class[c] = emptiest
        filled[emptiest] += int(counts[c])
    piece = piece_of_class[class_of_image]  # (N,)
    return [(piece == k).nonzero()[:, 0] for k in range(n_pieces)]


def images_stay_apart(backbone: nn.Module, image_size: int) -> bool:
    """Return whether the feature map of an image has nothing of the other images of its batch.

    Batch-norm layers keep their statistics meanwhile. Tried out in training mode on a copy: no
    gradient may lead from one image to the features of another, whatever dropout draws.
    """
    probe = copy.deepcopy(backbone).cpu().train()
    for layer in probe.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            images = torch.randn(2, 3, image_size, image_size, requires_grad=True)
            first = probe(images)[0]
            (gradient,) = torch.autograd.grad((first * torch.randn_like(first)).sum(), images)
    except Exception:  # whatever a user's module raises; autograd does where no gradient leads back
        return False
    return not gradient[1].any()


def learns_statistics(module: nn.Module) -> bool:
    """Return whether a batch-norm layer goes by the images of each batch."""
    return any(isinstance(layer, _BatchNorm) and layer.training for layer in module.modules())
