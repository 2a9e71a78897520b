"""Backbone features, computed once for as long as the backbone stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset, Subset

from protoclf.augmentation import AugmentedDataset, ForEachImage, augmentation_of
from protoclf.feature_cache import CachedImages, FeatureCache, fingerprint
from protoclf.fingerprints import state_digest
from protoclf.image_dataset import Batch, Batches, ImageDataset, in_whole
from protoclf.messages import first_few
from protoclf.net import NotFinite, SkorchProtoPNet
from protoclf.progress import with_bar
from protoclf.recent_distances import RecentDistances
from protoclf.storage import allocate
from protoclf.torch_settings import random_numbers_from

_KEPT = ("features", "index", "sample_weight", "keys")

_VIEWS_BEHIND_TRAINED = 2  # which knows the images as they are

LATENT_BUDGET = 2**28
"""Bytes of latent maps that a fit keeps beside the features (256 MiB)."""

Arrays = Mapping[str, Tensor | np.ndarray]

ImagePart = ImageDataset | Subset
"""All images of a fit, or those of one part of it."""


class FeatureDataset(Batches):
    """Features (N, C, H, W) in place of the images that they were computed from.

    `index` (N,) says which images of X these are, and `known` whether each of them still held what
    its digest says when its features were computed.
    """

    takes_no_workers = True

    def __init__(
        self,
        features: Tensor,
        y: Tensor,
        sample_weight: Tensor | None,
        index: Tensor,
        known: bool = False,
    ) -> None:
        self.features = features
        self.y = y
        self.sample_weight = sample_weight
        self.index = index
        self.known = known

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, indices: ArrayLike) -> Batch:
        """Return a whole batch, as `ImageDataset` does, with "features" (n, C, H, W)."""
        index = torch.as_tensor(indices)
        rows = self.features.permute(0, 2, 3, 1)[index.to(self.features.device)]  # (n, H, W, C)
        inputs = {"features": rows.permute(0, 3, 1, 2), "index": self.index[index]}
        if self.sample_weight is not None:
            inputs["sample_weight"] = self.sample_weight[index]
        return inputs, self.y[index]


class FeatureViews(Batches):
    """Several `FeatureDataset` of the same images, one after the other."""

    takes_no_workers = True

    def __init__(self, views: list[FeatureDataset]) -> None:
        self.views = views

    def __len__(self) -> int:
        return sum(map(len, self.views))

    def __getitems__(self, indices: ArrayLike) -> Batch:
        """Return a whole batch, as each of them does; its images in the order of the views."""
        view, index = np.divmod(np.asarray(indices), len(self.views[0]))
        parts = [v.__getitems__(index[view == i]) for i, v in enumerate(self.views)]
        for own, _ in parts:  # for another view the device may have had no room
            own["features"] = own["features"].to(self.views[0].features.device)
        inputs = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        return inputs, torch.cat([y for _, y in parts])


def extract_features(net: SkorchProtoPNet, dataset: ImagePart | AugmentedDataset) -> FeatureDataset:
    """Run the backbone once over all images, in evaluation mode and without gradients."""
    images = dataset.dataset if isinstance(dataset, AugmentedDataset) else dataset
    whole, index = in_whole(images)
    others, y = whole.without_images(index)
    processes, n, rows, start, known = net.processes, len(index), None, 0, True
    own = processes.own_rows(n, net.batch_size)
    for inputs, _ in feature_batches(net, dataset, net.shows_progress, rows=own):
        batch = inputs["features"].permute(0, 2, 3, 1)  # (n, H, W, C), as it lies in memory
        if rows is None:
            shape = (len(own), *batch.shape[1:])
            rows = allocate(shape, batch.dtype, net.device, net.memory_folder)
        rows[start : start + len(batch)] = batch
        start += len(batch)
        known &= all(inputs.get("keys", [""]))  # of those that were not found by their digests
    assert rows is not None, "a data set has at least one image"
    _check_finite(rows, torch.from_numpy(index[own]))
    features = processes.in_order(rows, n).permute(0, 3, 1, 2)
    return FeatureDataset(features, y, others.get("sample_weight"), others["index"], known)


def _check_finite(rows: Tensor, index: Tensor) -> None:
    """Raise NotFinite for images whose features (n, H, W, C), or their squares, are not finite."""
    lengths = [torch.linalg.vector_norm(part.float(), dim=(1, 2, 3)) for part in rows.split(32)]
    bad = ~torch.cat(lengths).isfinite().cpu()  # (n,)
    if bad.any():
        raise NotFinite("The backbone's features are not finite, or their squares", index[bad])


def feature_batches(
    net: SkorchProtoPNet,
    dataset: Dataset,
    progress: bool = False,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield batches with the backbone's features in place of the images, on the net's device.

    Under `memory`, and while the backbone is as it was given, features are computed for those
    images only that no fit has seen before, in whatever process.
    """
    source = _Source(net, dataset, len(cast(Sized, dataset) if rows is None else rows))
    for inputs, y in _with_progress(net, source.dataset, progress, rows):
        with torch.no_grad():
            inputs["features"] = source.features(inputs)
        yield {n: v for n, v in inputs.items() if n in _KEPT}, y


def latent_batches(
    net: SkorchProtoPNet, dataset: Dataset, progress: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yield which images a batch holds, and their latent maps z (n, D, H, W).

    Raises
    ------
    FloatingPointError
        If a map or its squares are not finite, as `distance_batches` does for distances.
    """
    first = 0
    for inputs, y in feature_batches(net, dataset, progress):
        with torch.no_grad():
            z = net.module_.latents(inputs["features"])
        _refuse_unless(torch.linalg.vector_norm(z, dim=(1, 2, 3)).isfinite(), dataset, first)
        yield slice(first, first + len(y)), z
        first += len(y)


def distance_batches(
    net: SkorchProtoPNet, dataset: Dataset, progress: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield which images a batch holds (n,), and what `ProtoPNet.nearest` finds for them.

    Under `memory` those that this process has found a short while ago are not computed again.

    Raises
    ------
    FloatingPointError
        Behind the last batch, for images that have a distance of NaN, or none that is finite.
    """
    known = [torch.empty(0, dtype=torch.bool, device=net.device)]
    module, source = net.module_, _Source(net, dataset, len(cast(Sized, dataset)))
    recent = None if source.store is None else RecentDistances(source.store, module)
    for inputs, _ in _with_progress(net, source.dataset, progress):
        digests: Any = inputs.get("digests", [])
        with torch.no_grad():
            found = None if recent is None else recent.get(digests)
            if found is None:
                found = module.nearest(module.latents(source.features(inputs)))
                if recent is not None:
                    recent.put(digests, *found)
        known.append(found[0].isfinite().any(1) & ~found[0].isnan().any(1))
        yield inputs["index"], *found
    _refuse_unless(torch.cat(known), dataset)  # now, as no batch is to wait for it


def _refuse_unless(finite: Tensor, dataset: Dataset, first: int = 0) -> None:
    """Raise FloatingPointError that names the images, from number `first` on, which are not.

    But for those that could not be read: what stands in for them may be anything.
    """
    if finite.all():
        return
    whole, index = in_whole(dataset)
    bad = index[first + (~finite).nonzero()[:, 0].cpu().numpy()]
    names = [f"number {i}" for i in bad.tolist()]
    if isinstance(whole, ImageDataset):
        names = [whole.images.name(i) for i in bad[~whole.failed(bad)].tolist()]
    if not names:
        return
    raise FloatingPointError(
        f"The network makes NaN or infinity of the images {first_few(names)}, so that there is no "
        'answer for them. precision="float32" may help; otherwise leave them out.'
    )


class _Source:
    """Where the features of a data set come from: a cache, the backbone, or features themselves.

    Attributes
    ----------
    dataset : Dataset
        What a loader is to read.
    store : FeatureCache or None
    """

    def __init__(self, net: SkorchProtoPNet, dataset: Dataset, n_images: int) -> None:
        self.net, self.dataset = net, dataset
        self.store: FeatureCache | None = None
        module = net.module_.eval()
        self._module = cache(lambda: net.module_to_evaluate(n_images))  # once it is needed
        folder = None if net.backbone_trained_ else net.memory_folder
        if folder is not None and isinstance(dataset, ImagePart):
            self.store = FeatureCache(folder, module, net.preprocessing_)
            self.dataset = CachedImages(dataset, self.store)

    def features(self, inputs: dict[str, Any]) -> Tensor:
        """Return the features (n, C, H, W) of a batch, on the net's device."""
        if self.store is not None:
            return self._completed(self.store, inputs)
        if "images" in inputs:
            return self._module().features(inputs["images"].to(self.net.device))
        return inputs["features"].to(self.net.device)  # in a file where the device had no room

    def _completed(self, store: FeatureCache, inputs: dict[str, Any]) -> Tensor:
        """Compute the features that a batch of `CachedImages` lacks, and keep them."""
        missing, cached = inputs["missing"], inputs["cached"]
        parts = list(cached)
        if len(missing):
            computed = self._module().features(inputs["images"].to(self.net.device))  # (k, C, h, w)
            store.write(inputs["keys"], computed)
            if not cached:
                return computed
            parts += list(computed.cpu())
        rows = torch.stack([part.permute(1, 2, 0) for part in parts])  # (n, h, w, C)
        if len(missing):
            found = torch.ones(len(rows), dtype=torch.bool)
            found[missing] = False
            rows = rows[torch.cat([found.nonzero()[:, 0], missing]).argsort()]
        return rows.to(self.net.device).permute(0, 3, 1, 2)


def _with_progress(
    net: SkorchProtoPNet,
    dataset: Dataset,
    progress: bool = False,
    rows: Sequence[int] | None = None,
) -> Iterable[Batch]:
    batches, total = net.batches_to_evaluate(dataset, rows)  # a thread would fork workers that fail
    bar = with_bar(batches, "features", progress, total)
    return _read_ahead(bar) if _reads_files(dataset) else bar


def _reads_files(dataset: Dataset) -> bool:
    if isinstance(dataset, ImagePart):
        return in_whole(dataset)[0].pixels is None
    return isinstance(dataset, CachedImages)


def _read_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches while a thread reads the next one.

    For decoding, which needs neither the interpreter nor torch. A thread that computes with torch
    has a pool of OpenMP threads of its own, which would compete with the backbone's.
    """
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


class FitData:
    """The training and the validation part of one fit, as images and as features.

    Parameters
    ----------
    net : SkorchProtoPNet
    train, valid : ImageDataset or a Subset of one
        Batches of images; `valid` may be None.
    groups : ndarray of shape (N,), optional
        What images of the training part belong together.

    Attributes
    ----------
    train_distance : Tensor of shape (N, m)
        Of the training images to the prototypes; there is none before the projection.
    """

    train_distance: Tensor

    def __init__(
        self,
        net: SkorchProtoPNet,
        train: ImagePart,
        valid: ImagePart | None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.net = net
        self.train_images = train
        self.valid_images = valid
        self.groups = groups
        self._train_features: FeatureDataset | None = None
        self._valid_features: FeatureDataset | None = None
        self._view_features: list[FeatureDataset] | None = None
        self._kept_latents: tuple[str, list[tuple[Tensor, Tensor]]] = ("", [])
        self._mean_cells: Tensor | None = None

    @property
    def train_y(self) -> Tensor:
        """Class indices (N,) of the training images."""
        whole, index = in_whole(self.train_images)
        return whole.y[index]

    @property
    def train_weight(self) -> Tensor | None:
        """Weights (N,) of the training images."""
        whole, index = in_whole(self.train_images)
        return None if whole.sample_weight is None else whole.sample_weight[index]

    @cached_property
    def image_digests(self) -> list[str]:
        """What the training images held when this was first asked."""
        whole, index = in_whole(self.train_images)
        return whole.digests(index)

    @cached_property
    def backbone_fingerprint(self) -> str:
        """What features depend on beside the images, for the backbone as it was given."""
        return fingerprint(self.net.module_, self.net.preprocessing_)

    @property
    def augmented_train_images(self) -> ImagePart | AugmentedDataset:
        """The training images, transformed at random where the net is set to do so."""
        augmentation = augmentation_of(self.net.augmentation)
        if augmentation is None:
            return self.train_images
        device = "cpu" if isinstance(augmentation, ForEachImage) else self.net.device
        return AugmentedDataset(self.train_images, augmentation, device)

    @property
    def train_features(self) -> FeatureDataset:
        """Features of the training images under the backbone as it is now."""
        if self._train_features is None:
            self._train_features = extract_features(self.net, self.train_images)
        return self._train_features

    @property
    def mean_cells(self) -> Tensor:
        """The mean feature cell (N, D) of each training image."""
        if self._mean_cells is None:
            batches = self.net.get_iterator(self.train_features, training=False)
            features = (inputs["features"].to(self.net.device) for inputs, _ in batches)
            self._mean_cells = torch.cat([f.float().mean((2, 3)) for f in features])
        return self._mean_cells

    def train_latents(self, rows: Sequence[int] | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Latent maps and classes of the training images, or of some rows, in the same batches.

        Computed once for as long as the add-on layers stay as they are, if they have room.
        """
        module, features = self.net.module_, self.train_features
        shape = features.features.shape
        channels = module.prototypes.shape[1]
        size = 4 * len(features) * channels * shape[2:].numel()  # float32
        if size > LATENT_BUDGET or (rows is not None and len(rows) < len(features)):
            return self.net.latents(features, rows)
        state = state_digest(module.add_on.state_dict())
        if self._kept_latents[0] != state:
            self._kept_latents = ("", [])  # two at once may be too many
            self._kept_latents = (state, list(self.net.latents(features)))
        return self._kept_latents[1]

    def latents_of(self, images: np.ndarray) -> Iterator[Tensor]:
        """Yield latent maps (n, D, H, W) of some training images, in their ascending order."""
        batches = self.train_latents()
        if isinstance(batches, list):
            start = 0
            for z, y in batches:
                here = images[(images >= start) & (images < start + len(y))] - start
                if len(here):
                    yield z[torch.from_numpy(here)]
                start += len(y)
            return
        for index in np.array_split(images, -(-len(images) // self.net.batch_size)):
            inputs, _ = self.train_features.__getitems__(index)
            with torch.no_grad():
                yield self.net.module_.latents(inputs["features"].to(self.net.device))

    def forget_latents(self) -> None:
        """Make room: gradient steps follow."""
        self._kept_latents = ("", [])

    @property
    def view_features(self) -> list[FeatureDataset]:
        """Features of the training images, transformed at random `augmented_views` times."""
        if self._view_features is None:
            count = self.net.augmented_views
            if isinstance(count, str):  # "auto"
                count = _VIEWS_BEHIND_TRAINED if self.net.backbone_trained_ else 0
            self._view_features = self._transformed(count)
        return self._view_features

    def _transformed(self, count: int) -> list[FeatureDataset]:
        augmented, device = self.augmented_train_images, torch.device(self.net.device)
        if not count or augmented is self.train_images:
            return []
        with random_numbers_from(self.net.seed_, device):  # the same again after an interruption
            return [extract_features(self.net, augmented) for _ in range(count)]

    @property
    def features_to_learn_from(self) -> Dataset:
        """Those of the training images and of their transforms."""
        if not self.view_features:
            return self.train_features
        return FeatureViews([self.train_features, *self.view_features])

    @property
    def valid_features(self) -> FeatureDataset | None:
        """Features of the validation images under the backbone as it is now."""
        if self._valid_features is None and self.valid_images is not None:
            self._valid_features = extract_features(self.net, self.valid_images)
        return self._valid_features

    def forget_features(self) -> None:
        """Drop the features: the backbone has changed."""
        self._train_features = self._valid_features = self._view_features = None
        self._mean_cells = None
        self.forget_latents()
