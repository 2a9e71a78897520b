"""Projection of prototypes onto latent training patches ("push").

Chen et al., NeurIPS 2019, section 2.2, stage 2: p_j becomes the nearest latent patch among the
training images of its own class. N images, m prototypes, D channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from warnings import warn

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from protoclf.prototype_layer import n_patches, own_class_distances


class Sources(NamedTuple):
    """Where each of the m prototypes comes from.

    Attributes
    ----------
    image : ndarray of shape (m,), int64
        Position of the image among those that were searched.
    cell : ndarray of shape (m,), int64
        Flat index of the patch in the map of (H - H1 + 1) x (W - W1 + 1) patches.
    distance : ndarray of shape (m,)
        Squared L2 distance that the projection moves the prototype.
    """

    image: np.ndarray
    cell: np.ndarray
    distance: np.ndarray


@torch.no_grad()
def find_sources(
    latents: Iterable[tuple[Tensor, Tensor]],
    prototypes: Tensor,
    owner: Tensor,
    distinct: str | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    forbidden: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Sources:
    """Find the training patch that each prototype is projected onto, in one pass.

    Parameters
    ----------
    latents : iterable of (z, y)
        Batches of latent maps (n, D, H, W) with their class indices (n,).
    prototypes : Tensor of shape (m, D, H1, W1)
    owner : Tensor of shape (m,), int64
        The class of each prototype.
    distinct : {None, "patches", "images"}
        None: each takes the nearest patch of its class; among equally near ones the first image,
        then the first cell. Otherwise no two prototypes of a class share a patch, or an image;
        the sum of the distances is the smallest possible.
    gather : callable
        Where several processes each search a part of the images: from one's rows to those of all,
        in the order of the images.
    forbidden : callable, optional
        From z and y to the squared distance (n, L) of each patch to what is forbidden for the
        class. A prototype takes no patch that is as near to that as to itself, unless none other
        is left for it, which warns.

    Returns
    -------
    Sources
    """
    slots = _slots(owner)  # (C, K)
    distances, cells, bars, targets = [], [], [], []
    for z, y in latents:
        y = y.to(z.device)
        own = prototypes[slots[y]]  # (n, K, D, H1, W1)
        L = n_patches(z, own)
        k = min(slots.shape[1], L) if distinct == "patches" else 1
        searched = k if forbidden is None else L
        distance, cell = own_class_distances(z, own, searched)  # (n, K, k or L) each
        barred = torch.zeros_like(cell, dtype=torch.bool)
        if forbidden is not None:
            near = forbidden(z, y)[:, None].expand_as(distance).gather(2, cell)
            barred = near <= distance
            order = distance.masked_fill(barred, torch.inf).argsort(dim=2, stable=True)[:, :, :k]
            distance, cell, barred = (t.gather(2, order) for t in (distance, cell, barred))
        distances.append(distance)
        cells.append(cell)
        bars.append(barred.to(torch.uint8))  # which any process group can gather
        targets.append(y)
    parts = (distances, cells, bars, targets)
    d, where, bar, codes = (gather(torch.cat(part)).cpu().numpy() for part in parts)
    return _choose(d, where, bar, codes, owner.cpu().numpy(), distinct)


@torch.no_grad()
def read_patches(
    latents: Iterable[tuple[Tensor, Tensor]], sources: Sources, size: tuple[int, int]
) -> Iterator[tuple[np.ndarray, Tensor, Tensor, np.ndarray]]:
    """Yield the patches at their sources, for each batch that holds some.

    Parameters
    ----------
    latents : iterable of (z, y)
        The batches of the search: then a prototype equals its patch bit for bit.
    sources : Sources
    size : (int, int)
        Rows and columns of cells of a patch, H1 and W1.

    Yields
    ------
    index : ndarray of shape (k,)
        The prototypes whose sources are in this batch.
    patches : Tensor of shape (k, D, H1, W1)
    z : Tensor of shape (n, D, H, W)
        The batch.
    sample : ndarray of shape (k,), int64
        Where in the batch the source of each is.
    """
    rows, cols = size
    start = 0
    for z, y in latents:
        index = np.flatnonzero((sources.image >= start) & (sources.image < start + len(y)))
        if len(index):
            row, col = np.divmod(sources.cell[index], z.shape[3] - cols + 1)
            sample = sources.image[index] - start
            patches = [
                z[i, :, r : r + rows, c : c + cols]
                for i, r, c in zip(sample.tolist(), row.tolist(), col.tolist(), strict=True)
            ]
            yield index, torch.stack(patches), z, sample
        start += len(y)


def _slots(owner: Tensor) -> Tensor:
    """Return the prototypes of each class (C, K); short rows repeat their first one."""
    groups = [torch.nonzero(owner == c).flatten() for c in range(int(owner.max()) + 1)]
    width = max(map(len, groups))
    rows = [g if len(g) else owner.new_zeros(1) for g in groups]
    return torch.stack([torch.cat([g, g[:1].expand(width - len(g))]) for g in rows])


def _choose(
    distance: np.ndarray,
    cell: np.ndarray,
    barred: np.ndarray,
    y: np.ndarray,
    owner: np.ndarray,
    distinct: str | None,
) -> Sources:
    """Choose among the candidates (N, K, k) of every image."""
    m = len(owner)
    sources = Sources(np.zeros(m, np.int64), np.zeros(m, np.int64), np.zeros(m))
    choose = {None: _nearest, "patches": _distinct_patches, "images": _distinct_images}[distinct]
    for c in np.unique(owner):
        mine, images = np.flatnonzero(owner == c), np.flatnonzero(y == c)
        d, where, bar = (a[images, : len(mine)] for a in (distance, cell, barred != 0))  # (n, K, k)
        slot = np.arange(len(mine))
        image, rank = choose(_with_barred_last(d, bar) if bar.any() else d, where)  # (K,), (K,)
        n_barred = np.count_nonzero(bar[image, slot, rank])
        if n_barred:
            warn(
                f"Too few patches of class number {c} are unlike what is forbidden: {n_barred} of "
                f"its {len(mine)} prototypes were projected onto the nearest patches, whatever "
                "they show. Forbid fewer of them, or give forbid a higher weight or more epochs.",
                UserWarning,
                stacklevel=2,
            )
        sources.image[mine] = images[image]
        sources.cell[mine] = where[image, slot, rank]
        sources.distance[mine] = d[image, slot, rank]
    return sources


def _with_barred_last(d: np.ndarray, barred: np.ndarray) -> np.ndarray:
    """Lengthen the distances (n, K, k) of barred candidates, so that as few as can be are taken."""
    d = d.astype(np.float64)
    return d + barred * (1 + d.shape[1] * d.max())


def _nearest(distance: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = distance[:, :, 0].argmin(0)  # (K,), the first of equals
    return image, np.zeros_like(image)


def _distinct_images(distance: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slot, image = linear_sum_assignment(distance[:, :, 0].T)
    return image[slot.argsort()], np.zeros_like(image)


def _distinct_patches(distance: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign patches; the K nearest of each of K prototypes are enough for an optimum."""
    n, n_slots, k = distance.shape
    flat = distance.transpose(1, 0, 2).reshape(n_slots, n * k)  # (K, n k)
    best = flat.argsort(axis=1, kind="stable")[:, :n_slots]  # (K, at most K)
    patch = np.arange(n)[:, None, None] * (cell.max() + 1) + cell  # (n, K, k)
    patch = np.take_along_axis(patch.transpose(1, 0, 2).reshape(n_slots, n * k), best, axis=1)
    patches, column = np.unique(patch, return_inverse=True)
    if len(patches) < n_slots:
        raise ValueError(
            f'distinct="patches" takes as many patches as prototypes of each class; a class has '
            f"{n_slots} prototypes, and its images {len(patches)} patches. Give more images, or "
            "set distinct=None."
        )
    cost = np.full((n_slots, len(patches)), np.inf)
    rows = np.arange(n_slots)[:, None]
    column = column.reshape(patch.shape)
    cost[rows, column] = np.take_along_axis(flat, best, axis=1)
    _, chosen = linear_sum_assignment(cost)
    pick = (column == chosen[:, None]).argmax(1)  # (K,)
    image, rank = np.divmod(best[np.arange(n_slots), pick], k)
    return image, rank
