"""Whether the most similar prototypes stay the same under JPEG and noise.

After Hoffmann et al., "This Looks Like That... Does it? Shortcomings of Latent Space Prototype
Interpretability in Deep Networks", ICML workshops 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from protoclf.metrics.perturbations import as_jpeg, with_noise
from protoclf.metrics.streams import image_batches, latents_of, opened, paths_of
from protoclf.rules import COUNT, NON_NEGATIVE, QUALITY, SEED

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def rank_stability(
    clf: ProtoPNetClassifier,
    X: Any,
    *,
    top: int = 5,
    quality: int = 20,
    noise: float = 0.2,
    clip: float = 0.25,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return whether the most similar prototypes stay the same under JPEG and noise.

    Only prototypes that some class uses count. The score is the mean of `kept`, for each of the
    two changes: from 0 to 1, where 1 is best. Two random orders have `top` divided by the number
    of these prototypes on average.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    top : int, default=5
        How many of the most similar prototypes are compared; all, if there are fewer.
    quality : int, default=20
        Quality of the JPEG, 1 to 95. The model's input is compressed.
    noise, clip : float, default=0.2, 0.25
        Standard deviation of the normal noise, and its largest absolute value, in ImageNet's
        standard deviations, as in `stability`.
    random_state : int, default=0
        An image has the same noise whatever the batch size.

    Returns
    -------
    DataFrame
        Two rows for each image:

        - sample, path
        - change : "jpeg" or "noise"
        - kept : share of the `top` most similar prototypes that are among them afterwards
        - correlation : Spearman's, of all similarities before and after, from -1 to 1; missing
          where all are equal
        - same_class : 1 if the same class is predicted, else 0

    Notes
    -----
    Hoffmann et al. show single prototypes that follow JPEG's traces in place of the bird; they
    define no score. QuanProto's rank change under noise (PRC) is how many places the most similar
    ones move on average, which grows with the number of prototypes.
    """
    COUNT.check(top=top)
    QUALITY.check(quality=quality)
    NON_NEGATIVE.check(noise=noise, clip=clip)
    SEED.check(random_state=random_state)
    dataset = opened(clf, X)
    used = (clf.module_.last_layer.weight != 0).any(0)  # (m,)
    paths, tables = paths_of(dataset), []
    for rows, images in image_batches(clf, dataset, "rank stability"):
        g, c = _similarities(clf, images, used)  # (n, m'), (n,)
        for change in ("jpeg", "noise"):
            if change == "jpeg":
                changed = as_jpeg(images, quality)
            else:
                changed = with_noise(images, rows.start, noise, clip, random_state)
            new_g, new_c = _similarities(clf, changed, used)
            columns = {
                "sample": np.arange(rows.start, rows.stop),
                "path": paths[rows],
                "change": change,
                "kept": kept(g, new_g, top),
                "correlation": _correlation(g, new_g),
                "same_class": (c == new_c).astype(float),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables).sort_values(["sample", "change"], ignore_index=True)


def kept(before: np.ndarray, after: np.ndarray, top: int) -> np.ndarray:
    """Return the share (n,) of each row's `top` highest of (n, m) that are the highest after.

    Of equal ones the first count as higher; NaN where m is 0.
    """
    top = min(top, before.shape[1])
    if not top:
        return np.full(len(before), np.nan)
    best = [np.argsort(-g, axis=1, kind="stable")[:, :top] for g in (before, after)]
    return (best[0][:, :, None] == best[1][:, None]).any(2).mean(1)


def _correlation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation (n,) of the rows of (n, m)."""
    if not before.shape[1]:
        return np.full(len(before), np.nan)
    ranks = [rankdata(g, axis=1) for g in (before, after)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.full(len(a), np.nan), where=norm > 0)


@torch.no_grad()
def _similarities(
    clf: ProtoPNetClassifier, images: Tensor, used: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarities (n, m') of the prototypes in use, and predicted classes (n,)."""
    logits, distance, _ = clf.module_.compare(latents_of(clf, images))
    g = clf.module_.activations(distance)[:, used]
    return g.cpu().numpy(), logits.argmax(1).cpu().numpy()
