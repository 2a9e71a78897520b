"""Random transforms of a batch of images."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from protoclf import ProtoPNetClassifier
from protoclf.augmentation import AugmentedDataset, _crops, augment_mildly, augmentation_of
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images


def dataset_of(paths):
    return ImageDataset(Images(paths), Preprocessing(16), np.arange(len(paths)))


def test_the_default_is_random_per_image_and_reproducible(paths):
    plain = dataset_of([paths[0]] * 6)
    plain.keep()
    dataset = AugmentedDataset(plain, augmentation_of("default"))
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


def test_the_default_is_mild(picture):
    torch.manual_seed(0)
    image = torch.from_numpy(Preprocessing(64)(picture).copy())
    result = augment_mildly(image.expand(40, -1, -1, -1))
    assert result.shape == (40, 3, 64, 64)
    assert result.min() >= 0
    assert result.max() <= 255
    assert ((result.mean((1, 2, 3)) / image.float().mean() - 1).abs() < 0.35).all()


def test_the_default_shows_most_of_an_image_flipped_or_not():
    side, n = 50, 300
    ramp = torch.arange(side).float().expand(n, 3, side, side)  # each pixel says its column
    torch.manual_seed(0)
    shown = augment_mildly(ramp)
    # brightness scales both ends alike, contrast moves both: ratios of differences stay
    rises = shown[:, 0, 25, -1] > shown[:, 0, 25, 0]
    assert 0.4 < rises.float().mean() < 0.6
    assert (shown[:, 0] - shown[:, 0, :1]).abs().max() < 1e-3  # rows are not mixed
    reach = (shown[:, 0, 25, -1] - shown[:, 0, 25, 0]).abs() / (side - 1)
    # at least sqrt(0.75 * 0.9) of the width at four fifths of both factors, at most all at 1.2
    assert reach.min() > 0.82 * 0.64 - 0.03
    assert 1.25 < reach.max() < 1.44  # by one of the factors alone, at most 1.2


def test_the_default_crops_three_quarters_to_all_of_the_area_at_any_place():
    side = 100
    torch.manual_seed(0)
    y, x, height, width = np.array(_crops(500, side)).T
    area, ratio = height * width / side**2, width / height
    assert 0.73 < area.min() < 0.77
    assert 0.97 < area.max() <= 1
    assert area.mean() == pytest.approx(0.875, abs=0.01)
    assert 0.88 < ratio.min() < 0.92
    assert 1.09 < ratio.max() < 1.14
    for start, size in ((y, height), (x, width)):
        assert ((start >= 0) & (start <= side - size)).all()
        place = start[size < 95] / (side - size[size < 95])
        assert (place.min(), place.max()) == (0, 1)
        assert place.mean() == pytest.approx(0.5, abs=0.05)


def test_one_pixel_images_stay():
    images = torch.full((3, 3, 1, 1), 100, dtype=torch.uint8)
    assert augment_mildly(images).shape == (3, 3, 1, 1)


def test_augmentation_of():
    assert augmentation_of(None) is None
    flip = augmentation_of(v2.RandomVerticalFlip(1.0))
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    assert torch.equal(flip(images), images.flip(2))
    for wrong in ("strong", 3, v2.RandomHorizontalFlip):
        with pytest.raises(TypeError, match="augmentation must be None, 'default', or a callable"):
            augmentation_of(wrong)


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
        AugmentedDataset(dataset_of(paths), augmentation_of(augmentation)).__getitems__([0])


def test_loader_workers_augment(paths):
    dataset = AugmentedDataset(dataset_of(paths), augmentation_of(v2.RandomVerticalFlip(1.0)))
    loader = DataLoader(dataset, batch_size=6, collate_fn=ImageDataset.collate, num_workers=1)
    ((inputs, _),) = list(loader)
    assert torch.equal(
        inputs["images"], dataset.dataset.__getitems__(range(6))[0]["images"].flip(2)
    )


def test_a_module_can_be_a_parameter(squares):
    clf = ProtoPNetClassifier("small_cnn", augmentation=v2.RandomHorizontalFlip(1.0), verbose=0)
    clf.set_params(augmentation=v2.RandomVerticalFlip(1.0), image_size=16, joint_epochs=1)
    clf.set_params(prototypes_per_class=1).fit(*squares)
    assert isinstance(clone(clf).augmentation, v2.RandomVerticalFlip)
