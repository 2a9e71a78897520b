"""Patches that prototypes must not look like, or should: what further training heeds.

After Bontempelli et al., "Concept-level Debugging of Part-Prototype Networks", ICLR 2023
(ProtoPDebug). Patches are given by images and places, not by latents: the backbone moves while it
trains, and a patch is embedded anew in each step, both alone on a plain ground, so that it cannot
hide behind what is around it, and where it was found. F patches, m prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from protoclf.localization import box_masks
from protoclf.network import ProtoPNet
from protoclf.prototype_layer import distance_maps

_BATCH = 8  # patches in each step
_SAME_PATCH = 1e-4  # squared distance of latents, which batches of other sizes round otherwise


@dataclass(frozen=True)
class Concepts:
    """Patches of training images, each of a class.

    Attributes
    ----------
    images : Tensor of shape (F, 3, S, S), uint8
        The model's inputs that hold the patches.
    box : Tensor of shape (F, 4), int64
        The patches, in pixels of the model's input.
    row, col : Tensor of shape (F,), int64
        Their latent cells; of a larger patch, the upper left one.
    owner : Tensor of shape (F,), int64
        For prototypes of which class they are meant.
    forbidden : Tensor of shape (F,), bool
        Whether these must not look like the patch; otherwise one of them should.
    weight : Tensor of shape (F,), float32
        Weight of the patch in the loss.
    """

    images: Tensor
    box: Tensor
    row: Tensor
    col: Tensor
    owner: Tensor
    forbidden: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Concepts:
        """Return some of the patches, by index or mask."""
        return Concepts(*(getattr(self, field.name)[index] for field in fields(self)))

    def with_others(self, others: Concepts) -> Concepts:
        """Return these patches and then the others."""
        pairs = ((getattr(self, f.name), getattr(others, f.name)) for f in fields(self))
        return Concepts(*map(torch.cat, pairs))

    def cost(self, module: ProtoPNet) -> Tensor:
        """Return what some patches, drawn at random, add to the joint loss: a scalar.

        A forbidden patch costs the mean similarity, where above 0, of its class's prototypes, as a
        share of the largest similarity there is; any other patch the smallest squared distance to
        one of them, as in the cluster cost. Both are summed over the patch alone and the patch
        where it was found.
        """
        drawn = self.take(torch.randint(len(self), (min(_BATCH, len(self)),)))
        distance = torch.stack(drawn._distances(module))  # (2, k, m)
        device = distance.device
        own = module.owner == drawn.owner.to(device)[:, None]  # (k, m)
        share = module.activations(distance) / module.activations(distance.new_zeros(()))
        alike = (share.clamp_min(0) * own).sum(2) / own.sum(1)  # (2, k)
        apart = distance.masked_fill(~own, torch.inf).amin(2)
        costs = torch.where(drawn.forbidden.to(device), alike, apart).sum(0)
        return (drawn.weight.to(device) * costs).mean()

    def _distances(self, module: ProtoPNet) -> tuple[Tensor, Tensor]:
        """Squared distances of prototypes to the patches alone, and in their places, (F, m)."""
        device = module.owner.device
        images = torch.cat([self.alone(), self.images]).to(device)
        training = module.training
        module.eval()  # batch norm must not take plain grounds for pictures
        z = module.latents(module.features(images))
        module.train(training)
        n = len(self)
        return module.nearest(z[:n])[0], module.nearest(self._patches(module, z[n:]))[0]

    def alone(self) -> Tensor:
        """Return the patches on grounds of their images' mean colours, (F, 3, S, S), uint8."""
        patch = box_masks(self.box, self.images.shape[-1])  # (F, S, S)
        ground = self.images.float().mean((2, 3), keepdim=True).to(torch.uint8)
        return torch.where(patch[:, None], self.images, ground)

    def _patches(self, module: ProtoPNet, z: Tensor) -> Tensor:
        """Cut the patches (F, D, H1, W1) out of the latent maps of their images."""
        rows, cols = module.prototype_size
        places = zip(self.row.tolist(), self.col.tolist(), strict=True)
        cut = [z[i, :, r : r + rows, c : c + cols] for i, (r, c) in enumerate(places)]
        return torch.stack(cut)

    @torch.no_grad()
    def embedded(self, module: ProtoPNet, batch_size: int) -> Tensor:
        """Return the latent patches in their places, (F, D, H1, W1)."""
        module.eval()
        parts = []
        for index in torch.arange(len(self), device="cpu").split(int(batch_size)):
            some = self.take(index)
            z = module.latents(module.features(some.images.to(module.owner.device)))
            parts.append(some._patches(module, z))
        return torch.cat(parts)


class ForbiddenPatches:
    """How near patches of latent maps are to what is forbidden for their class."""

    def __init__(self, concepts: Concepts, module: ProtoPNet, batch_size: int) -> None:
        concepts = concepts.take(concepts.forbidden)
        self.patches = concepts.embedded(module, batch_size)
        self.owner = concepts.owner.to(self.patches.device)

    def among(self, module: ProtoPNet) -> list[int]:
        """Return the prototypes that are one of the patches that their class may not have."""
        distance = self.distance(module.scaled_prototypes(), module.owner)[:, 0]  # (m,)
        return (distance <= _SAME_PATCH).nonzero()[:, 0].tolist()

    @torch.no_grad()
    def distance(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the squared distance of each patch to the nearest forbidden one, (n, L).

        `z` (n, D, H, W) are maps of images of the classes y (n,). Infinite for classes for which
        nothing is forbidden.
        """
        to_each = distance_maps(z, self.patches).flatten(2)  # (n, F, L)
        others = y.to(self.owner.device)[:, None] != self.owner  # (n, F)
        return to_each.masked_fill(others[:, :, None], torch.inf).amin(1)
