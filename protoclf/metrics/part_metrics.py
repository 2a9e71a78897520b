"""Whether a prototype keeps to one labelled part, from image to image and under noise.

Huang et al., "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype
Networks", ICCV 2023. m prototypes, K parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from protoclf.features import latent_batches
from protoclf.metrics.part_labels import PartLabels
from protoclf.metrics.perturbations import with_noise
from protoclf.metrics.regions import pair_regions
from protoclf.metrics.streams import image_batches, latents_of, opened_with_labels
from protoclf.rules import NON_NEGATIVE, PERCENTILE, REGION, SEED, SHARE

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def consistency(
    clf: ProtoPNetClassifier,
    X: Any,
    y: ArrayLike,
    parts: pd.DataFrame,
    *,
    region: float | str = 72 / 224,
    threshold: float = 0.8,
    percentile: float = 95,
) -> pd.DataFrame:
    """Return whether each prototype is found at the same part in the images of its class.

    For each image x of the class of prototype j, o_j(x) says which of the K parts lie in the
    region where j is found. Summed over the images, and divided by the number of them in which
    each part is to be seen, that gives the frequency of each part. A prototype is consistent if
    the highest frequency is at least `threshold`. The score is the share of consistent
    prototypes: the mean of `consistent`, from 0 to 1, where 1 is best.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X, y : images and labels
        As in its `fit`; new images, as a rule.
    parts : DataFrame
        Where parts are: see `protoclf.metrics.PartLabels`.
    region : float or "box", default=72 / 224
        Where a prototype is found: a square around the highest pixel of its similarity map, whose
        side is that share of the input's side (72 of 224 pixels in the paper), cut off at the
        border; or the box of `explain`.
    threshold : float, default=0.8
        As in the paper.
    percentile : float, default=95
        Of the box.

    Returns
    -------
    DataFrame
        One row for each prototype:

        - prototype, class
        - n_images : images of its class
        - part, frequency : the part of the highest frequency, among equals the first by name
        - consistent : 1 or 0; missing, as is `frequency`, where no image of its class in X shows
          a part

    Notes
    -----
    Huang et al., ICCV 2023. Their code (EvalProtoPNet) measures on the birds of CUB, cut out by
    their boxes and squashed to 224 x 224 pixels. CaBRNet's takes the middle of the most similar
    cell for the place of a prototype, in pixels of the original image, and its row for its x. A
    part that `resize="crop"` cuts off counts as not to be seen. Where no image of a class shows a
    part, the code of Huang et al. has 0.
    """
    REGION.check(region=region)
    PERCENTILE.check(percentile=percentile)
    SHARE.check(threshold=threshold)
    dataset, codes = opened_with_labels(clf, X, y)
    labels = PartLabels(parts, dataset)
    m = clf.n_prototypes_
    hits, seen = np.zeros((m, len(labels.names))), np.zeros((m, len(labels.names)))
    for rows, z in latent_batches(clf, dataset, bool(clf.verbose)):
        sample, prototype = _own_pairs(clf, codes[rows])
        boxes = _regions(clf, z, sample, prototype, region, percentile)
        image, j = sample.numpy() + rows.start, prototype.numpy()
        np.add.at(hits, j, labels.inside(boxes, image))
        np.add.at(seen, j, labels.visible[image])
    frequency = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    highest = frequency.max(1)
    table = _by_prototype(clf, codes)
    known = (seen > 0).any(1)
    table["part"] = pd.Series(labels.names[frequency.argmax(1)], dtype=object).where(highest > 0)
    table["frequency"] = np.where(known, highest, np.nan)
    table["consistent"] = np.where(known, highest >= threshold, np.nan)
    return table


def stability(
    clf: ProtoPNetClassifier,
    X: Any,
    y: ArrayLike,
    parts: pd.DataFrame,
    *,
    region: float | str = 72 / 224,
    noise: float = 0.2,
    clip: float = 0.25,
    percentile: float = 95,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return how often noise leaves a prototype at the same parts.

    For each image x of the class of prototype j, o_j(x) says which parts lie in the region where
    j is found. Stability is the share of these images with o_j(x + noise) = o_j(x), all parts
    alike. The score is the mean over the prototypes, from 0 to 1, where 1 is best.

    Parameters
    ----------
    clf, X, y, parts, region, percentile
        As in `consistency`.
    noise, clip : float, default=0.2, 0.25
        Standard deviation of the normal noise, and its largest absolute value, in ImageNet's
        standard deviations: 58, 57 and 57 of 255 grey levels for red, green and blue.
    random_state : int, default=0
        An image has the same noise whatever the batch size.

    Returns
    -------
    DataFrame
        One row for each prototype: prototype, class, n_images, and `stable`, the share; missing
        where X holds no image of its class.

    Notes
    -----
    Huang et al., ICCV 2023, with the noise of their code (EvalProtoPNet), whose networks take
    images that are normalised as ImageNet's. An earlier version of that code did not clip the
    noise, and took two sets of parts for the same if they had as many. QuanProto's stability is
    another one, the share of parts in both regions among those in either. A prototype that is at no
    part, before and after, counts as stable.
    """
    REGION.check(region=region)
    PERCENTILE.check(percentile=percentile)
    NON_NEGATIVE.check(noise=noise, clip=clip)
    SEED.check(random_state=random_state)
    dataset, codes = opened_with_labels(clf, X, y)
    labels = PartLabels(parts, dataset)
    equal = np.zeros(clf.n_prototypes_)
    for rows, images in image_batches(clf, dataset, "stability"):
        sample, prototype = _own_pairs(clf, codes[rows])
        noisy = with_noise(images, rows.start, noise, clip, random_state)
        found = []
        for shown in (images, noisy):
            boxes = _regions(clf, latents_of(clf, shown), sample, prototype, region, percentile)
            found.append(labels.inside(boxes, sample.numpy() + rows.start))
        np.add.at(equal, prototype.numpy(), (found[0] == found[1]).all(1))
    table = _by_prototype(clf, codes)
    n = table["n_images"].to_numpy(float)
    table["stable"] = np.divide(equal, n, out=np.full(len(n), np.nan), where=n > 0)
    return table


def _own_pairs(clf: ProtoPNetClassifier, codes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the pairs (k,), (k,) of an image of a batch and a prototype of its class."""
    own = torch.from_numpy(codes)[:, None] == clf.module_.owner.cpu()  # (n, m)
    sample, prototype = torch.nonzero(own, as_tuple=True)
    return sample, prototype


@torch.no_grad()
def _regions(
    clf: ProtoPNetClassifier,
    z: Tensor,
    sample: Tensor,
    prototype: Tensor,
    region: float | str,
    percentile: float,
) -> np.ndarray:
    sample, prototype = sample.to(z.device), prototype.to(z.device)
    side = clf.preprocessing_.image_size
    boxes = pair_regions(clf.module_, z, sample, prototype, side, region, percentile)
    return boxes.cpu().numpy()


def _by_prototype(clf: ProtoPNetClassifier, codes: np.ndarray) -> pd.DataFrame:
    """Return prototypes and classes, and how many images X holds of each class."""
    n_images = np.bincount(codes, minlength=len(clf.classes_))  # (C,)
    table = clf.prototypes_[["prototype", "class"]].copy()
    return table.assign(n_images=n_images[clf.module_.owner.cpu().numpy()])
