"""Batches of images, and their augmentation."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from protoclf.geometry import Preprocessing
from protoclf.image_dataset import AugmentedDataset, ImageDataset, augmentation_of
from protoclf.images import ImageError, Images


def dataset_of(paths, **options):
    options = {"y": np.arange(len(paths)), "sample_weight": np.linspace(0, 1, len(paths))} | options
    return ImageDataset(Images(paths), Preprocessing(16), **options)


@pytest.mark.parametrize("keep", [False, True])
def test_dataset_batch_equals_singles(paths, keep):
    dataset = dataset_of(paths, keep=keep)
    assert len(dataset) == 6
    inputs, target = dataset.__getitems__([5, 0, 2])
    assert inputs["images"].dtype == torch.uint8
    assert inputs["images"].shape == (3, 3, 16, 16)
    assert inputs["sample_weight"].dtype == torch.float32
    assert target.tolist() == [5, 0, 2]
    assert target.dtype == torch.int64
    singles, labels = ImageDataset.collate([dataset[i] for i in (5, 0, 2)])
    assert torch.equal(labels, target)
    assert all(torch.equal(singles[name], inputs[name]) for name in inputs)
    assert (dataset.pixels is not None) == keep
    if keep:
        assert dataset.sizes.tolist() == [[60, 40]] * 6
        assert copy.copy(dataset).pixels is dataset.pixels


def test_dataset_without_labels_and_with_wrong_ones(paths):
    inputs, target = dataset_of(paths, y=None, sample_weight=None)[1]
    assert set(inputs) == {"images", "size"}
    assert inputs["size"].tolist() == [60, 40]
    assert target.item() == 0
    with pytest.raises(ValueError, match=r"y must have shape \(6,\)"):
        dataset_of(paths, y=[1, 2])
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(6,\)"):
        dataset_of(paths, sample_weight=np.ones((6, 2)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_in_a_loader(paths, num_workers):
    plain = Subset(dataset_of(paths), [3, 1, 2, 0, 5])
    dataset = AugmentedDataset(plain, v2.RandomVerticalFlip(1.0))
    loader = DataLoader(
        pickle.loads(pickle.dumps(dataset)),
        batch_size=2,
        collate_fn=ImageDataset.collate,
        num_workers=num_workers,
    )
    batches = list(loader)
    assert [target.tolist() for _, target in batches] == [[3, 1], [2, 0], [5]]
    expected = plain.__getitems__(range(5))[0]["images"].flip(-2)
    assert torch.equal(torch.cat([inputs["images"] for inputs, _ in batches]), expected)


def test_a_loader_reports_a_bad_file(paths):
    paths[3].write_bytes(b"no image")
    loader = DataLoader(dataset_of(paths), batch_size=6, collate_fn=ImageDataset.collate)
    with pytest.raises(ImageError, match=r"position 3, .*3\.png") as caught:
        next(iter(loader))
    again = ImageError(str(caught.value))  # how torch brings an error from a worker back
    assert str(again) == str(caught.value)


@pytest.mark.parametrize("keep", [False, True])
def test_augmentation_is_random_per_image_and_reproducible(paths, keep):
    plain = dataset_of([paths[0]] * 6, keep=keep)
    dataset = AugmentedDataset(plain, augmentation_of("default", 16))
    torch.manual_seed(1)
    first = dataset.__getitems__(range(6))[0]["images"]
    second = dataset.__getitems__(range(6))[0]["images"]
    torch.manual_seed(1)
    again = dataset.__getitems__(range(6))[0]["images"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert all(not torch.equal(first[0], image) for image in first[1:])
    assert first.shape == (6, 3, 16, 16)
    images = plain.__getitems__(range(6))[0]["images"]
    assert (images == images[0]).all()  # what is kept stays as it was


def test_default_augmentation_is_mild(picture):
    torch.manual_seed(0)
    image = torch.from_numpy(Preprocessing(64)(picture).copy())
    augment = augmentation_of("default", 64)
    for _ in range(20):
        result = augment(image)
        assert result.dtype == torch.uint8
        assert result.shape == image.shape
        assert abs(result.float().mean() / image.float().mean() - 1) < 0.35


def test_augmentation_of():
    flip = v2.RandomHorizontalFlip()
    assert augmentation_of(None, 8) is None
    assert augmentation_of(flip, 8) is flip
    for wrong in ("strong", 3, v2.RandomHorizontalFlip):
        with pytest.raises(TypeError, match="augmentation must be None, 'default', or a callable"):
            augmentation_of(wrong, 8)


@pytest.mark.parametrize(
    ("augmentation", "error", "word"),
    [
        (v2.ToDtype(torch.float32), ValueError, "float32"),
        (v2.CenterCrop(4), ValueError, r"\(3, 4, 4\)"),
        (v2.ToPILImage(), TypeError, "PIL"),
    ],
)
def test_a_wrong_augmentation_is_named(paths, augmentation, error, word):
    with pytest.raises(error, match=word):
        AugmentedDataset(dataset_of(paths), augmentation).__getitems__([0])
