"""ProtoPNet: backbone, add-on layers, prototype layer and last layer as one torch module.

Chen et al., "This Looks Like That", NeurIPS 2019, section 2.1 and figure 2. N images, C classes,
m prototypes, D latent channels, H x W cells.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclf.folding import Folds, folded, folded_copy
from protoclf.prototype_layer import distance_maps, min_distances, similarity, unit_length
from protoclf.torch_settings import without_autocast

PARTS = ("backbone", "add_on", "prototypes", "last_layer")

Outputs = tuple[Tensor, Tensor, Tensor]
"""logits (N, C), squared distance of each prototype's nearest patch (N, m), its cell (N, m)."""


class PrototypeSpec(NamedTuple):
    """What the prototypes of a network are, before any of them is known.

    Attributes
    ----------
    owner : sequence of int
        For each of the m prototypes, the class that owns it.
    n_classes : int
    size : (int, int)
        Rows and columns of cells, H1 x W1.
    similarity : {"log", "cosine"}
    """

    owner: Sequence[int]
    n_classes: int
    size: tuple[int, int]
    similarity: str


class ProtoPNet(nn.Module):
    """A network whose logits are weighted similarities to prototypes.

    Parameters
    ----------
    backbone : nn.Module
        Maps images (N, 3, S, S) to a feature map (N, channels, H, W).
    channels : int
        Channels of the feature map.
    spec : PrototypeSpec
    latent_dim : int or None
        Channels D behind the add-on layers; None leaves them out.
    normalization : (mean, std)
        Three numbers each, for pixels in [0, 1].
    discriminants : bool, default=False
        Whether `Discriminants` add a channel for each class. They are for features as they are:
        `latent_dim` is None.

    Attributes
    ----------
    half_precision : bool, default=False
        Whether the backbone computes in bfloat16, by autocast. What follows it never does, under
        autocast neither.
    channels_last : bool, default=False
        How images lie in memory on their way to the backbone.
    settled : tuple of str, default=()
        Batch-norm layers of the backbone that stay in evaluation mode: see `keep_statistics`.
    folds : tuple of (str, str), default=()
        Convolutions and the batch-norm layers that training may fold into them, where settled.
    frozen : tuple of str, default=()
        Parameters of the backbone that are never trained.
    images_at_once : int or None, default=None
        How many images the backbone takes in one go where no gradient is wanted; None for all.

    Notes
    -----
    With "cosine" similarity the add-on layers end in a `Centre`, latent cells and prototype cells
    are scaled to unit length, and the squared distance of two cells is 2 - 2 cos. For prototypes
    of several cells see `unit_length`.
    """

    half_precision: bool = False
    channels_last: bool = False
    settled: tuple[str, ...] = ()
    folds: Folds = ()
    frozen: tuple[str, ...] = ()
    images_at_once: int | None = None
    owner: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        spec: PrototypeSpec,
        latent_dim: int | None,
        normalization: tuple[Sequence[float], Sequence[float]],
        discriminants: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.latent_dim = latent_dim
        n_discriminants = spec.n_classes if discriminants else 0
        self.add_on = _add_on_layers(channels, latent_dim, spec.similarity, n_discriminants)
        shape = (len(spec.owner), latent_dim or channels + n_discriminants, *spec.size)
        self.prototypes = nn.Parameter(torch.rand(shape))  # the paper's start: uniform in [0, 1)
        self.last_layer = nn.Linear(len(spec.owner), spec.n_classes, bias=False)
        self.similarity = spec.similarity
        for name, values in zip(("mean", "std"), normalization, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.register_buffer("owner", torch.as_tensor(spec.owner))
        self.reset_last_layer()

    @torch.no_grad()
    def replace_prototypes(self, prototypes: Tensor, owner: Tensor, weight: Tensor) -> None:
        """Go on with other prototypes (m, D, H1, W1) of the classes `owner` (m,), any number.

        `weight` (C, m) becomes the last layer.
        """
        self.prototypes = nn.Parameter(prototypes, self.prototypes.requires_grad)
        self.owner = owner
        last_layer = nn.Linear(len(owner), self.last_layer.out_features, bias=False)
        last_layer.weight = nn.Parameter(weight, self.last_layer.weight.requires_grad)
        self.last_layer = last_layer

    @torch.no_grad()
    def reset_last_layer(self) -> None:
        """Set W to +1 for a class's own prototypes and to -0.5 for the others (section 2.2)."""
        classes = torch.arange(self.last_layer.out_features, device=self.owner.device)
        own = self.owner == classes[:, None]  # (C, m)
        self.last_layer.weight.copy_(torch.where(own, 1.0, -0.5))

    def forward(self, images: Tensor | None = None, features: Tensor | None = None) -> Outputs:
        """Return the outputs for images (N, 3, S, S) uint8, or for their backbone features."""
        if features is None:
            assert images is not None, "pass images or features"
            features = self.features(images)
        return self.compare(self.latents(features))

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's feature map (N, channels, H, W) of images (N, 3, S, S) in 0..255.

        In bfloat16 where the backbone computes so; channels come last in memory.
        """
        if self.images_at_once is None or torch.is_grad_enabled():
            return self._features(images)
        return torch.cat([self._features(part) for part in images.split(self.images_at_once)])

    def _features(self, images: Tensor) -> Tensor:
        scale, shift = 1 / (255 * self.std), self.mean / self.std
        lie = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = images.to(memory_format=lie) * scale - shift
        with self._precision(images.device), self._folded():
            features = self.backbone(pixels)
        return features.contiguous(memory_format=torch.channels_last)

    def with_folds(self, folds: Folds) -> ProtoPNet:
        """Return this network with a copy of the backbone for evaluation; all else is shared."""
        other = copy.copy(self)
        other._modules = self._modules | {"backbone": folded_copy(self.backbone, folds)}
        return other

    def _precision(self, device: torch.device) -> AbstractContextManager:
        if self.half_precision:
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        if torch.is_grad_enabled():  # an accelerator's, or a user's own
            return nullcontext()
        return without_autocast(device)  # features that are kept are what `precision` says

    def _folded(self) -> AbstractContextManager[None]:
        if self.training and torch.is_grad_enabled():  # by one thread: others see a fold too
            return folded(self.backbone, self.folds, self.settled)
        return nullcontext()

    @contextmanager
    def sharing_a_fold(self) -> Iterator[None]:
        """Fold once for all passes forward and back that training makes meanwhile."""
        folds = self.folds
        with folded(self.backbone, folds, self.settled, shared=True):
            self.folds = ()
            try:
                yield
            finally:
                self.folds = folds

    @contextmanager
    def taking(self, images_at_once: int | None) -> Iterator[None]:
        """Have passes without gradients take so many images at once meanwhile."""
        before, self.images_at_once = self.images_at_once, images_at_once
        try:
            yield
        finally:
            self.images_at_once = before

    def latents(self, features: Tensor) -> Tensor:
        """Return the latent map z (N, D, H, W)."""
        with without_autocast(features.device):
            return self.scaled(self.add_on(features.float()))

    def compare(self, z: Tensor) -> Outputs:
        """Return the outputs for latent maps z (N, D, H, W)."""
        distance, cell = self.nearest(z)
        return self.logits(distance), distance, cell

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return each prototype's distance to its nearest patch, and the cell: (N, m), (N, m).

        Of latent maps z (N, D, H, W).
        """
        with without_autocast(z.device):
            return min_distances(z, self.scaled_prototypes())

    def logits(self, distance: Tensor) -> Tensor:
        """Return the logits (N, C) for squared distances (N, m) to the nearest patches."""
        with without_autocast(distance.device):
            return self.last_layer(self.activations(distance))

    def activations(self, distance: Tensor) -> Tensor:
        """Return similarities g of squared distances, in any shape."""
        return similarity(distance, self.similarity)

    def similarity_maps(self, z: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Return the similarity of prototypes to every patch, (N, m, H - H1 + 1, W - W1 + 1).

        `index` picks prototypes; all by default.
        """
        return self.activations(distance_maps(z, self.scaled(self.prototypes[index])))

    def scaled_prototypes(self) -> Tensor:
        """Return the prototypes (m, D, H1, W1) as latents are compared with them."""
        return self.scaled(self.prototypes)

    def train_only(self, parts: Collection[str]) -> None:
        """Give gradients to these of `PARTS` and freeze the others."""
        for name in PARTS:
            getattr(self, name).requires_grad_(name in parts)
        for name in self.frozen:
            self.backbone.get_parameter(name).requires_grad_(False)

    def keep_statistics(self, keep: bool) -> None:
        """Let those batch-norm layers of the backbone that have statistics keep them, or not.

        A new layer has none, and learns them either way. Where they are kept, training sees the
        same latents as projection, last layer and predictions do. By the statistics of a batch,
        which holds few images, they would be others.
        """
        layers = self.backbone.named_modules()
        self.settled = tuple(name for name, layer in layers if keep and _has_statistics(layer))

    def train(self, mode: bool = True) -> ProtoPNet:
        """Set the training mode, but of no frozen backbone and of no settled batch-norm layer."""
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        for name in self.settled:
            self.backbone.get_submodule(name).eval()
        return self

    @property
    def discriminants(self) -> Discriminants | None:
        """The layer that adds discriminants to the features, if there is one."""
        first = next(iter(self.add_on), None)
        return first if isinstance(first, Discriminants) else None

    @property
    def prototype_size(self) -> tuple[int, int]:
        """Rows and columns of cells of a prototype, H1 and W1."""
        return self.prototypes.shape[2], self.prototypes.shape[3]

    def scaled(self, x: Tensor) -> Tensor:
        """Return latents or prototypes as they are compared: for cosines, of unit length."""
        if self.similarity != "cosine":
            return x
        rows, cols = self.prototype_size
        return unit_length(x, area=rows * cols)


class Discriminants(nn.Module):
    """Add a channel for each class: how much a latent cell speaks for it, by a linear function.

    `protoclf.discriminants` finds the functions. They are not trained by gradients.
    """

    weight: Tensor

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_classes, channels, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Return maps (N, channels + n_classes, H, W)."""
        return torch.cat([z, F.conv2d(z, self.weight)], dim=1)


class Centre(nn.Module):
    """Subtract a mean latent cell, so that a cosine tells apart cells that share a large mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Return centred maps (N, channels, H, W)."""
        return z - self.mean


def _has_statistics(layer: nn.Module) -> bool:
    """Return whether this is a batch-norm layer that has seen images, here or where it is from."""
    if not isinstance(layer, _BatchNorm):
        return False
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        return False
    return not (mean.eq(0).all() and variance.eq(1).all())


def _add_on_layers(
    channels: int, latent_dim: int | None, similarity: str, n_discriminants: int
) -> nn.Sequential:
    """Two 1 x 1 convolutions, and at the end the paper's sigmoid, or a `Centre` for cosines."""
    out = latent_dim or channels + n_discriminants
    last = nn.Sigmoid() if similarity == "log" else Centre(out)
    if latent_dim is None:
        first = [Discriminants(channels, n_discriminants)] if n_discriminants else []
        return nn.Sequential(*first, *([] if similarity == "log" else [last]))
    convolutions = [nn.Conv2d(n, latent_dim, 1) for n in (channels, latent_dim)]
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], last)
