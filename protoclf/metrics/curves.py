"""Deletion and insertion curves of the evidence that a scoring sheet sums up.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from protoclf.localization import covered_cells, upsample
from protoclf.metrics.masks import cover
from protoclf.metrics.streams import opened, paths_of
from protoclf.progress import with_bar
from protoclf.rules import COUNT, SEED

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_BLUR = 5 / 224  # standard deviation, of the input's side; its kernel ends at as much on each side


@torch.no_grad()
def deletion_insertion(
    clf: ProtoPNetClassifier,
    X: Any,
    *,
    n_steps: int = 20,
    n_controls: int = 1,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return areas under the probability as the evidence is deleted, or inserted, bit by bit.

    The evidence for the predicted class at a pixel is the sum of the similarity maps, upsampled,
    times the weights of the prototypes that speak for it. Pixels are deleted (set to the mean
    colour of the image), or inserted into a blurred image, in descending order of the evidence;
    the probability of the class, as a function of the share of pixels, has an area between 0
    and 1. A faithful order gives a small area for deletion and a large one for insertion.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    n_steps : int, default=20
        Number of steps in which all pixels are changed. Each is a run of the network.
    n_controls : int, default=1
        Number of random orders for each image: those of maps of random cells, upsampled.
    random_state : int, default=0

    Returns
    -------
    DataFrame
        One row for each image:

        - sample, path, class, probability : the predicted class
        - deletion, insertion : the areas; missing where no prototype speaks for the class
        - control_deletion, control_insertion : the same in random order, on average

        The scores are the means of ``control_deletion - deletion`` and of ``insertion -
        control_insertion``, from -1 to 1: above 0 is better than chance.

    Notes
    -----
    The published metrics are the areas alone, which say as much about how sure a network is as
    about its explanation. The code of RISE deletes to the mean of ImageNet in place of that of the
    image, and 224 pixels at a time; its blur is ours, a standard deviation of 5 pixels of 224.
    """
    COUNT.check(n_steps=n_steps, n_controls=n_controls)
    SEED.check(random_state=random_state)
    dataset = opened(clf, X)
    rows = []
    for i in with_bar(range(len(dataset)), "deleting", clf.verbose):
        image = dataset.__getitems__([i])[0]["images"][0].to(clf.device)  # (3, S, S)
        z = clf.module_.latents(clf.module_.features(image[None]))
        probability = clf.module_.compare(z)[0].softmax(1)[0]  # (C,)
        c = int(probability.argmax())
        draws = np.random.default_rng((random_state, i)).random((n_controls, *z.shape[2:]))
        maps = torch.cat([evidence(clf, z, c)[None], torch.from_numpy(draws).to(z)])
        areas = np.array([_areas(clf, image, m, c, n_steps) for m in maps])
        if not (clf.module_.last_layer.weight[c] > 0).any():
            areas[0] = np.nan
        rows.append([c, float(probability[c]), *areas[0], *areas[1:].mean(0)])
    columns = ["class", "probability", "deletion", "insertion"]
    columns += ["control_deletion", "control_insertion"]
    table = pd.DataFrame(rows, columns=columns)
    table["class"] = clf.classes_[table["class"].to_numpy(np.int64)]
    table.insert(0, "path", paths_of(dataset))
    table.insert(0, "sample", np.arange(len(dataset)))
    return table


def evidence(clf: ProtoPNetClassifier, z: Tensor, c: int) -> Tensor:
    """Return the evidence (H, W) for class c in a latent map (1, D, H, W).

    Where no prototype speaks for the class it is 0.
    """
    module = clf.module_
    used = (module.last_layer.weight[c] > 0).nonzero()[:, 0]  # (k,)
    if not len(used):
        return z.new_zeros(z.shape[2:])
    cells = covered_cells(module.similarity_maps(z, used)[0], module.prototype_size)  # (k, H, W)
    return (module.last_layer.weight[c, used][:, None, None] * cells).sum(0)


def _areas(
    clf: ProtoPNetClassifier, image: Tensor, cells: Tensor, c: int, n_steps: int
) -> tuple[float, float]:
    """Return the areas of deletion and insertion in the order of a map (H, W)."""
    side = image.shape[1]
    order = upsample(cells[None], side, side).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    counts = torch.linspace(0, side**2, n_steps + 1, device=order.device).round()  # (T + 1,)
    changed = (rank < counts[:, None]).unflatten(1, (side, side))  # (T + 1, S, S)
    deleted = cover(image, changed)
    inserted = torch.where(changed[:, None], image, _blurred(image))
    size = int(clf.batch_size)
    probability = torch.cat(
        [clf.module_(x)[0].softmax(1)[:, c] for x in deleted.split(size)]
        + [clf.module_(x)[0].softmax(1)[:, c] for x in inserted.split(size)]
    )
    areas = torch.trapezoid(probability.cpu().double().unflatten(0, (2, -1)), dim=1) / n_steps
    return float(areas[0]), float(areas[1])


def _blurred(image: Tensor) -> Tensor:
    sigma = _BLUR * image.shape[1]
    size = 2 * max(1, round(sigma)) + 1
    return gaussian_blur(image, [size, size], [sigma, sigma])
