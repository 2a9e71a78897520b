"""The projection of a network's prototypes onto its training images, and what else one pass finds.

Chen et al., NeurIPS 2019, section 2.2, stage 2. N images, m prototypes, H x W cells.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from protoclf.concepts import ForbiddenPatches
from protoclf.cross_fitting import latents_as_if_new
from protoclf.features import Arrays, FitData
from protoclf.localization import activation_boxes, covered_cells
from protoclf.net import SkorchProtoPNet
from protoclf.progress import with_bar
from protoclf.projection import Sources, find_sources, read_patches


@torch.no_grad()
def project(net: SkorchProtoPNet, data: FitData, distinct: str | None) -> Arrays:
    """Move every prototype onto the nearest latent patch of its class that is not forbidden.

    Returns
    -------
    mapping
        - "image", "row", "col" (m,) : the patch that each prototype is now
        - "moved" (m,) : squared distance to it before
        - "box" (m, 4) : where it is active in that image, in pixels of the input
        - "prototypes" (m, D, H1, W1)
        - "distance" (N, m) : of all training images, as if they were new to the discriminants
    """
    module, n, concepts = net.module_, len(data.train_features), net.concepts_
    own = net.processes.own_rows(n, net.batch_size)
    forbidden = None
    if concepts is not None and concepts.forbidden.any():
        forbidden = ForbiddenPatches(concepts, module, net.batch_size).distance
    sources = find_sources(
        data.train_latents(own),
        module.scaled_prototypes(),
        module.owner,
        distinct,
        gather=lambda rows: net.processes.in_order(rows, n),
        forbidden=forbidden,
    )
    cells = _take_patches(net, data, sources)
    net.agree()
    distance = image_distances(net, latents_as_if_new(net, data, rows=own), n)
    row, col = np.divmod(sources.cell, cells.shape[2] - module.prototype_size[1] + 1)
    return {
        **{"image": sources.image, "row": row, "col": col, "moved": sources.distance},
        "box": activation_boxes(cells, net.image_size).cpu().double().numpy(),
        **{"prototypes": module.prototypes, "distance": distance},
    }


@torch.no_grad()
def image_distances(
    net: SkorchProtoPNet, latents: Iterable[tuple[Tensor, Tensor]], n: int
) -> Tensor:
    """Return squared distances (n, m) of images to all prototypes.

    `latents` are those of this process's rows of the n.
    """
    distance = torch.cat([net.module_.nearest(z)[0] for z, _ in with_progress(net, latents, n)])
    return net.processes.in_order(distance, n)


def view_activations(net: SkorchProtoPNet, data: FitData, as_if_new: bool = False) -> Tensor | None:
    """Return the activations (V, N, m) of views of the training images; None where V is 0.

    Perhaps as if the images were new to the discriminants.
    """
    views = []
    for view in data.view_features:
        latents = latents_as_if_new(net, data, view) if as_if_new else net.latents(view)
        views.append(net.module_.activations(image_distances(net, latents, len(view))))
    return torch.stack(views) if views else None


def with_progress(
    net: SkorchProtoPNet, latents: Iterable[tuple[Tensor, Tensor]], n: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Show a bar while batches of n images are compared with many prototypes."""
    batches = -(-n // net.batch_size)
    return with_bar(latents, "distances", net.shows_progress, batches)


def _take_patches(net: SkorchProtoPNet, data: FitData, sources: Sources) -> Tensor:
    """Write the chosen patches into the prototypes; return where each is active (m, H, W)."""
    module, order, maps = net.module_, [], []
    batches = read_patches(data.train_latents(), sources, module.prototype_size)
    for index, patches, z, sample in batches:
        module.prototypes[torch.from_numpy(index)] = patches
        for i in np.unique(sample).tolist():
            mine = index[sample == i]  # (k,), the prototypes of one image
            order.append(mine)
            maps.append(module.similarity_maps(z[i : i + 1], torch.from_numpy(mine))[0])
    cells = covered_cells(torch.cat(maps), module.prototype_size)  # (m, H, W)
    return cells[torch.from_numpy(np.concatenate(order).argsort()).to(cells.device)]
