"""Which prototypes repeat another one of their class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from protoclf.network import ProtoPNet


@torch.no_grad()
def distances_within_classes(module: ProtoPNet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the prototypes (k,) of each class, and the squared distances between them (k, k).

    As latents are compared, in float64 and by differences: 0 between equal ones.
    """
    p, owner = module.scaled_prototypes().flatten(1).cpu().double(), module.owner.cpu().numpy()
    for c in np.unique(owner):
        mine = np.flatnonzero(owner == c)
        between = torch.cdist(p[mine], p[mine], compute_mode="donot_use_mm_for_euclid_dist")
        yield mine, between.square().numpy()


def repeated(distance: np.ndarray, max_distance: float) -> np.ndarray:
    """Return which earlier one each of k repeats, (k,); -1 where it is the first of its kind.

    Going through them in order, one repeats the first within `max_distance` that repeats none.
    `distance` is (k, k).
    """
    found = np.full(len(distance), -1)
    for i in range(len(distance)):
        alike = (distance[i, :i] <= max_distance) & (found[:i] < 0)
        if alike.any():
            found[i] = alike.argmax()
    return found
