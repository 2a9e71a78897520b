"""Backbone features, computed once for as long as the backbone stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from protoclf.image_dataset import AugmentedDataset, Batch, ImageDataset, augmentation_of
from protoclf.net import SkorchProtoPNet
from protoclf.storage import allocate

ImagePart = ImageDataset | Subset
"""All images of a fit, or those of one part of it."""


class FeatureDataset(Dataset):
    """Features (N, C, H, W) in place of the images that they were computed from.

    Parameters
    ----------
    features : Tensor of shape (N, C, H, W)
    y : Tensor of shape (N,), int64
        Class indices.
    sample_weight : Tensor of shape (N,) or None
    """

    in_memory = True

    def __init__(self, features: Tensor, y: Tensor, sample_weight: Tensor | None) -> None:
        self.features = features
        self.y = y
        self.sample_weight = sample_weight

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, indices: ArrayLike) -> Batch:
        """Return a whole batch: {"features": (n, C, H, W)[, "sample_weight": (n,)]}, y (n,)."""
        index = torch.as_tensor(indices)
        inputs = {"features": self.features[index.to(self.features.device)]}
        if self.sample_weight is not None:
            inputs["sample_weight"] = self.sample_weight[index]
        return inputs, self.y[index]


def extract_features(net: SkorchProtoPNet, dataset: ImagePart) -> FeatureDataset:
    """Run the backbone once over all images, in evaluation mode and without gradients."""
    module = net.module_.eval()
    features, targets, weights, start = None, [], [], 0
    for inputs, y in _with_progress(net, dataset):
        with torch.no_grad():
            batch = module.features(inputs["images"].to(net.device))  # (n, C, H, W)
        if features is None:
            features = allocate((len(dataset), *batch.shape[1:]), batch.dtype, net.device)
        features[start : start + len(y)] = batch
        start += len(y)
        targets.append(y)
        weights.extend([inputs["sample_weight"]] if "sample_weight" in inputs else [])
    assert features is not None, "a data set has at least one image"
    return FeatureDataset(features, torch.cat(targets), torch.cat(weights) if weights else None)


def _with_progress(net: SkorchProtoPNet, dataset: ImagePart) -> Iterable[Batch]:
    batches = net.get_iterator(dataset, training=False)
    return tqdm(batches, "features", delay=2, leave=False, disable=not net.verbose)


class FitData:
    """The training and the validation part of one fit, as images and as features.

    Parameters
    ----------
    net : SkorchProtoPNet
    train, valid : ImageDataset or a Subset of one
        Batches of images; `valid` may be None.
    """

    def __init__(self, net: SkorchProtoPNet, train: ImagePart, valid: ImagePart | None) -> None:
        self.net = net
        self.train_images = train
        self.valid_images = valid
        self.train_distance = torch.empty(0, 0)  # (N, m), once prototypes are projected
        self._train_features: FeatureDataset | None = None
        self._valid_features: FeatureDataset | None = None

    @property
    def augmented_train_images(self) -> ImagePart | AugmentedDataset:
        """The training images, transformed at random where the net is set to do so."""
        augmentation = augmentation_of(self.net.augmentation, self.net.image_size)
        if augmentation is None:
            return self.train_images
        return AugmentedDataset(self.train_images, augmentation)

    @property
    def train_features(self) -> FeatureDataset:
        """Features of the training images under the backbone as it is now."""
        if self._train_features is None:
            self._train_features = extract_features(self.net, self.train_images)
        return self._train_features

    @property
    def valid_features(self) -> FeatureDataset | None:
        """Features of the validation images under the backbone as it is now."""
        if self._valid_features is None and self.valid_images is not None:
            self._valid_features = extract_features(self.net, self.valid_images)
        return self._valid_features

    def forget_features(self) -> None:
        """Drop the features: the backbone has changed."""
        self._train_features = self._valid_features = None
