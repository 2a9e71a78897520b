"""Batches of images, and their augmentation."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from protoclf.augmentation import AugmentedDataset, augmentation_of
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.image_errors import ImageError
from protoclf.images import Images


def dataset_of(paths, keep=False, **options):
    options = {"y": np.arange(len(paths)), "sample_weight": np.linspace(0, 1, len(paths))} | options
    dataset = ImageDataset(Images(paths), Preprocessing(16), **options)
    if keep:
        dataset.keep()
    return dataset


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
    assert dataset.sizes([4, 5, 0]).tolist() == [[60, 40]] * 3
    if keep:
        assert copy.copy(dataset).pixels is dataset.pixels


def test_the_size_of_an_image_is_read_once(paths, monkeypatch):
    dataset, read, size = dataset_of(paths), [], Images.size

    def noting(self, i):
        read.append(i)
        return size(self, i)

    monkeypatch.setattr(Images, "size", noting)
    for _ in range(2):
        assert dataset.sizes([2, 0, 2, 2, 0]).tolist() == [[60, 40]] * 5
    assert sorted(read) == [0, 2]


def test_the_data_set_of_some_images_shares_their_pixels(paths):
    dataset = dataset_of(paths, keep=True)
    part = dataset.of(np.array([4, 1, 5]), [0, 1, 2], None)
    inner = part.of(np.array([2, 0]), [0, 1], None)
    assert inner.pixels is part.pixels is dataset.pixels
    expected = dataset.decoded(np.array([5, 4]))
    assert torch.equal(inner.decoded(np.array([0, 1])), expected)
    assert not torch.equal(expected[0], expected[1])


def test_dataset_without_labels_and_with_wrong_ones(paths):
    inputs, target = dataset_of(paths, y=None, sample_weight=None)[1]
    assert set(inputs) == {"images", "index"}
    assert target.item() == 0
    with pytest.raises(ValueError, match=r"y must have shape \(6,\)"):
        dataset_of(paths, y=[1, 2])
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(6,\)"):
        dataset_of(paths, sample_weight=np.ones((6, 2)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_in_a_loader(paths, num_workers):
    plain = Subset(dataset_of(paths), [3, 1, 2, 0, 5])
    dataset = AugmentedDataset(plain, augmentation_of(v2.RandomVerticalFlip(1.0)))
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


def test_what_could_not_be_read_before_it_was_decoded_is_never_known(paths, tmp_path):
    dataset = dataset_of(paths, on_bad_image="skip")
    name, hidden = Path(paths[0]), tmp_path / "hidden"
    digests = dataset.digests

    def appearing(*args, **kwargs):
        name.rename(hidden)
        found = digests(*args, **kwargs)
        hidden.rename(name)
        return found

    dataset.digests = appearing
    dataset.keep(folder=tmp_path)
    assert not dataset.failed([0, 1]).any()
    assert all(digests([0, 1]))  # whatever these files hold by now
    assert dataset.unchanged(np.array([0, 1])).tolist() == [False, True]
    assert dataset.of(np.array([1, 0]), [0, 0], None).unchanged(np.array([0, 1])).tolist() == [
        True,
        False,
    ]
