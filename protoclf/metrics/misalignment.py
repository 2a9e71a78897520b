"""Whether a prototype stays where it is found when pixels elsewhere change.

Sacha et al., "Interpretability Benchmark for Evaluating Spatial Misalignment of Prototypical Parts
Explanations", AAAI 2024. n images of S x S pixels, H x W cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.localization import box_masks, highest, pair_boxes, pair_maps, upsample
from protoclf.metrics.perturbations import UNIT
from protoclf.metrics.streams import image_batches, latents_of, opened, paths_of
from protoclf.rules import COUNT, NON_NEGATIVE, PERCENTILE, SEED

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_HIGH = 90  # percentile of a map above which a prototype is found, before and after
_ROUNDING = 1e-5  # of a map's range


def spatial_misalignment(
    clf: ProtoPNetClassifier,
    X: Any,
    *,
    epsilon: float = 0.1,
    step_size: float = 0.01,
    n_steps: int = 20,
    margin: float = 10 / 224,
    percentile: float = 95,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return how far a prototype moves when the pixels outside of its box are attacked.

    In each image, the prototype with the highest contribution to the predicted class is attacked:
    by projected gradient descent on its similarity, in the pixels that are not in its box. If the
    prototype looked only at its box, nothing would change. If no prototype speaks for the class,
    there is nothing to attack, and the measured values are missing.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    epsilon, step_size : float, default=0.1, 0.01
        How far a pixel may change, in all and in one step, in ImageNet's standard deviations: 0.1
        is 6 of 255 grey levels.
    n_steps : int, default=20
        Steps, each a pass through the network and back.
    margin : float, default=10 / 224
        The box is this much larger on each side, as a share of the input's side.
    percentile : float, default=95
        Percentile of the box, as in `ProtoPNetClassifier.explain`.
    random_state : int, default=0
        Seed of the random start, uniform within `epsilon`.

    Returns
    -------
    DataFrame
        One row for each image:

        - sample, path, class, prototype, similarity : the predicted class, the prototype attacked,
          and its similarity before
        - location_change : 1 minus the overlap (intersection over union) of the highest tenths of
          its upsampled map before and after, from 0, best, to 1 (PLC)
        - activation_change : how much of its similarity is lost, as a share, 0 is best and 1 all of
          it; similarities below 0 count as 0, and the share is missing where there was none before
          (PAC). Where the random start raises it more than the attack lowers it, it is below 0
        - rank_change : how many more prototypes of other classes are more similar than it (PRC)
        - prediction_changed : 1 if another class is predicted, else 0; where all predictions were
          right, its mean is the loss of accuracy (AC)
        - attacked_share : share of the pixels that were free to change

    Notes
    -----
    The defaults are those of the functions in their code; its command line has 0.4, 0.01 and 40.
    That code attacks the prototype of the highest similarity, whatever its weight, upsamples maps
    linearly for the location, and lets pixels leave their range; here they stay in it. What
    QuanProto calls PLC is the distance between the most similar cells, under noise; its overlap of
    boxes that do not meet is not 0, since their sides are not cut off at 0 there.
    """
    NON_NEGATIVE.check(epsilon=epsilon, step_size=step_size, margin=margin)
    COUNT.check(n_steps=n_steps)
    PERCENTILE.check(percentile=percentile)
    SEED.check(random_state=random_state)
    dataset, side = opened(clf, X), clf.preprocessing_.image_size
    scale, tables = UNIT.to(clf.device), []
    for rows, images in image_batches(clf, dataset, "attacking"):
        before = _State(clf, latents_of(clf, images))
        c = before.logits.argmax(1)  # (n,)
        contribution, j = (before.g * clf.module_.last_layer.weight[c]).max(1)  # (n,), (n,)
        boxes = before.boxes(j, side, percentile)
        grow = margin * side * boxes.new_tensor([-1, -1, 1, 1])
        free = ~box_masks(boxes + grow, side)[:, None]  # (n, 1, S, S)
        starts = [np.random.default_rng((random_state, i)) for i in range(rows.start, rows.stop)]
        start = np.stack([rng.uniform(-1, 1, images.shape[1:]) for rng in starts])
        change = torch.from_numpy(start).to(images.device, torch.float32) * epsilon
        attacked = _attacked(clf, images, j, free * scale, change, epsilon, step_size, n_steps)
        after = _State(clf, latents_of(clf, attacked))
        table = _compared(clf, before, after, j, side).assign(
            attacked_share=free.float().mean((1, 2, 3)).cpu().numpy()
        )
        table.loc[(contribution <= 0).cpu().numpy(), table.columns != "class"] = pd.NA
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "path", paths_of(dataset))
    table.insert(0, "sample", np.arange(len(dataset)))
    return table


class _State:
    """What the network makes of the latent maps of a batch."""

    @torch.no_grad()
    def __init__(self, clf: ProtoPNetClassifier, z: Tensor) -> None:
        self.module, self.z = clf.module_, z
        self.logits, distance, _ = self.module.compare(z)
        self.g = self.module.activations(distance)  # (n, m)

    @property
    def samples(self) -> Tensor:
        return torch.arange(len(self.z), device=self.z.device)

    @torch.no_grad()
    def boxes(self, j: Tensor, side: int, percentile: float) -> Tensor:
        """Return the box (n, 4) of prototype j (n,) in each image."""
        return pair_boxes(self.module, self.z, self.samples, j, side, percentile)

    @torch.no_grad()
    def high(self, j: Tensor, side: int) -> Tensor:
        """Return masks (n, S, S) of where prototype j (n,) is found in each image."""
        pixels = upsample(pair_maps(self.module, self.z, self.samples, j), side, side)
        spread = pixels.amax((1, 2)) - pixels.amin((1, 2))  # (n,)
        below = int(_HIGH / 100 * (side**2 - 1))
        bound = highest(pixels, side**2 - below) + _ROUNDING * spread
        return pixels > bound[:, None, None]


def _attacked(
    clf: ProtoPNetClassifier,
    images: Tensor,
    j: Tensor,
    scale: Tensor,
    change: Tensor,
    epsilon: float,
    step_size: float,
    n_steps: int,
) -> Tensor:
    """Return images (n, 3, S, S), float32, in which prototype j (n,) is less similar.

    `change` (n, 3, S, S) is where the descent starts; `scale` (n, 3, S, S) is how many grey levels
    a unit of it makes, 0 where nothing may change.
    """
    module = clf.module_

    def changed() -> Tensor:
        return (images + change * scale).clamp(0, 255)

    for _ in range(n_steps):
        change.requires_grad_()
        with torch.enable_grad():
            distance, _ = module.nearest(module.latents(module.features(changed())))
            g = module.activations(distance).gather(1, j[:, None])  # (n, 1)
            (slope,) = torch.autograd.grad(g.sum(), change)
        change = (change.detach() - step_size * slope.sign()).clamp(-epsilon, epsilon)
    return changed()


def _compared(
    clf: ProtoPNetClassifier, before: _State, after: _State, j: Tensor, side: int
) -> pd.DataFrame:
    """Return the columns from `class` to `prediction_changed`."""
    first, then = before.high(j, side), after.high(j, side)
    union = (first | then).sum((1, 2))
    kept = (first & then).sum((1, 2)) / union.clamp_min(1)
    location = torch.where(union > 0, 1 - kept, 0.0)
    g, new = (state.g.gather(1, j[:, None])[:, 0] for state in (before, after))  # (n,)
    others = clf.module_.owner != clf.module_.owner[j][:, None]  # (n, m)
    above = [
        ((state.g > own[:, None]) & others).sum(1) for state, own in ((before, g), (after, new))
    ]
    lost = 1 - new.clamp_min(0) / g
    columns = {
        "class": clf.classes_[before.logits.argmax(1).cpu().numpy()],
        "prototype": pd.array(j.cpu().numpy(), dtype="Int64"),
        "similarity": g,
        "location_change": location,
        "activation_change": torch.where(g > 0, lost, torch.nan),
        "rank_change": above[1] - above[0],
        "prediction_changed": before.logits.argmax(1) != after.logits.argmax(1),
    }
    return pd.DataFrame(
        {n: v.cpu().double().numpy() if isinstance(v, Tensor) else v for n, v in columns.items()}
    )
