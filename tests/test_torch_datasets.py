"""Fits on torch's data sets are those on what the data sets hold."""

from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from sklearn.model_selection import cross_val_score
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import DatasetFolder, ImageFolder

from protoclf import ImageError, ProtoPNetClassifier, ProtoPNetEnsemble
from protoclf.editing import forbid, remove
from protoclf.metrics import deletion_score
from protoclf.nearest_patches import nearest_patches
from protoclf.report import write_report
from protoclf.torch_datasets import unpacked


def small():
    return ProtoPNetClassifier(
        "small_cnn",
        image_size=24,
        prototypes_per_class=1,
        train_backbone=False,
        random_state=0,
        verbose=0,
    )


@pytest.fixture(scope="module")
def expected(squares):
    X, y = squares
    return small().fit(X, np.unique(y, return_inverse=True)[1])


def test_tensors(squares, expected):
    X, y = squares
    codes = torch.from_numpy(np.unique(y, return_inverse=True)[1])
    dataset = TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2), codes)
    clf = small().fit(dataset)
    assert np.array_equal(clf.decision_function(X), expected.decision_function(X))
    assert clf.classes_.tolist() == [0, 1, 2]
    named = small().fit(dataset, y)
    assert named.classes_.tolist() == sorted(set(y))
    assert named.score(dataset, y) == named.score(X, y)  # labels, not indices
    half = small().fit(Subset(dataset, range(12)))
    assert half.prototypes_["source_index"].max() < 12


def test_partial_fit_takes_a_data_set_as_fit_does_and_reads_it_once(squares, expected):
    X, y = squares
    codes, read = np.unique(y, return_inverse=True)[1], []

    class Noted(Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, i):
            read.append(i)
            return X[i], int(codes[i])

    clf = small().partial_fit(Noted(), classes=range(3))
    assert read == list(range(len(X)))
    assert np.array_equal(clf.decision_function(X), expected.decision_function(X))


@pytest.mark.parametrize("classes", [None, [0, 1, 2]])
def test_partial_fit_asks_for_the_labels_of_plain_images(squares, classes):
    with pytest.raises(ValueError, match="requires y to be passed"):
        small().partial_fit(squares[0], classes=classes)


@pytest.fixture
def folder(squares, tmp_path):
    """The squares as torchvision reads them from a folder of class folders."""
    for i, (pixels, label) in enumerate(zip(*squares, strict=True)):
        (tmp_path / label).mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(tmp_path / label / f"{i:02}.png")
    return ImageFolder(tmp_path)


def test_a_folder_of_torchvision_is_read_by_its_paths(folder):
    clf = small().fit(folder)
    assert set(clf.prototypes_["source"]) <= {path for path, _ in folder.samples}
    half = ImageFolder(folder.root, transform=lambda image: image.resize((30, 20)))
    assert small().fit(half).source_image(0).shape == (20, 30, 3)


class Cropped(Dataset):
    """What people write by hand: paths that torchvision found, and a transform."""

    def __init__(self, folder):
        self.samples = folder.samples
        self.transform = lambda image: image.crop((0, 0, 30, 20))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return self.transform(PIL.Image.open(path)), label


class Inverted(ImageFolder):
    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return PIL.ImageOps.invert(image), label % 2


class Part(Subset):
    def __getitem__(self, i):
        return np.asarray(super().__getitem__(i)[0])[:20, :30], i % 2

    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    "made",
    [
        Cropped,
        lambda folder: Inverted(folder.root),
        lambda folder: Part(folder, range(20)),
        lambda folder: ImageFolder(folder.root, loader=lambda path: PIL.Image.new("L", (30, 20))),
        lambda folder: DatasetFolder(folder.root, np.load, (".npy",)),
    ],
    ids=["samples of its own", "own items", "own items of a part", "own loader", "own files"],
)
def test_fit_sees_what_a_data_set_of_a_user_holds(folder, made):
    for path, _ in folder.samples:
        np.save(path.replace(".png", ".npy"), np.asarray(PIL.Image.open(path))[:20])
    dataset = made(folder)
    clf = small().fit(dataset)
    images, labels = zip(*[dataset[i] for i in range(len(dataset))], strict=True)
    assert clf.classes_.tolist() == sorted(set(labels))
    for j, i in enumerate(clf.prototypes_["source_index"]):
        seen = images[i].convert("RGB") if isinstance(images[i], PIL.Image.Image) else images[i]
        assert np.array_equal(clf.source_image(j), seen)


def test_parts_of_a_folder_are_read_by_their_paths_too(folder):
    paths, codes = map(list, zip(*folder.samples, strict=True))
    part, rest = random_split(folder, [18, 6], torch.Generator().manual_seed(0))
    clf = small().fit(part)
    assert set(clf.prototypes_["source"]) <= {paths[i] for i in part.indices}
    nested = Subset(rest, [4, 1])
    chosen = [rest.indices[4], rest.indices[1]]
    assert clf.explain(nested)["path"].unique().tolist() == [paths[i] for i in chosen]
    assert clf.score(rest) == clf.score(
        [paths[i] for i in rest.indices], [codes[i] for i in rest.indices]
    )
    ensemble = ProtoPNetEnsemble([("a", clf)], verbose=0).fit(part)
    assert ensemble.score(rest) == clf.score(rest)
    with pytest.raises(ValueError, match="requires y"):
        clf.score(paths)


def test_searches_say_what_to_give_them(squares):
    X, y = squares
    codes = torch.from_numpy(np.unique(y, return_inverse=True)[1])
    dataset = TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2), codes)
    with pytest.raises(ImageError, match=r"X holds pairs.*folder\.samples"):
        cross_val_score(small(), dataset, codes.numpy(), cv=2, error_score="raise")


class Photos(Dataset):
    """Pairs of a PIL image and a label."""

    def __init__(self, squares):
        self.squares = squares

    def __len__(self):
        return len(self.squares[1])

    def __getitem__(self, i):
        return PIL.Image.fromarray(self.squares[0][i]), str(self.squares[1][i])


class InBatches(Photos):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_what_was_fitted_to_a_data_set_answers_it(squares):
    X = squares[0]
    photos = Photos(squares)
    clf = small().fit(photos)
    assert clf.classes_.tolist() == ["blue", "green", "red"]
    assert clf.predict(photos).tolist() == clf.predict(X).tolist()
    for method in ("predict_proba", "decision_function", "transform", "similarity_maps"):
        answer = getattr(clf, method)
        assert np.array_equal(answer(photos), answer(X)), method
    pd.testing.assert_frame_equal(clf.explain(Subset(photos, [3, 1])), clf.explain(X[[3, 1]]))
    in_batches = InBatches(squares)
    again = small().fit(in_batches)
    assert np.array_equal(again.decision_function(in_batches), clf.decision_function(X))


def test_whatever_takes_images_takes_a_data_set(squares, tmp_path):
    X, y = squares
    photos = Photos(squares)
    clf = small().set_params(prototypes_per_class=2).fit(X, y)
    found = nearest_patches(clf, photos, y=y, k=2)
    pd.testing.assert_frame_equal(found, nearest_patches(clf, X, y=y, k=2))
    assert forbid(clf, [0], photos, y, k=1).coef_.shape == clf.coef_.shape
    removed, expected = (remove(clf, [0], X=images, y=y).coef_ for images in (photos, X))
    assert np.array_equal(removed, expected)
    pd.testing.assert_frame_equal(deletion_score(clf, photos), deletion_score(clf, X))
    assert write_report(clf, photos, y, tmp_path / "report.html").stat().st_size > 1000
    ensemble = ProtoPNetEnsemble([("a", clf)], verbose=0).fit(photos)
    assert ensemble.predict(photos).tolist() == clf.predict(X).tolist()
    few = Subset(photos, [3, 1])
    pd.testing.assert_frame_equal(ensemble.explain(few), ensemble.explain(X[[3, 1]]))
    path = clf.last_layer_path(photos, None, [1e-2], 2)  # labels of the data set
    assert path["accuracy"].equals(clf.last_layer_path(X, y, [1e-2], 2)["accuracy"])
    assert forbid(clf, [0], photos, None, k=1, epochs=0).n_prototypes_ == clf.n_prototypes_


class OneBuffer(Photos):
    """Fills the same array for each image, as torch's loaders allow."""

    buffer = np.empty((40, 60, 3), np.uint8)

    def __getitem__(self, i):
        self.buffer[:] = self.squares[0][i]
        return self.buffer, int(i % 3)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_images_that_share_a_buffer_are_told_apart(squares, as_tensor):
    dataset = OneBuffer(squares)
    if as_tensor:
        dataset.buffer = torch.empty(3, 40, 60, dtype=torch.uint8)
        dataset.squares = torch.from_numpy(squares[0]).permute(0, 3, 1, 2), squares[1]
    images, labels = unpacked(dataset, None)
    assert np.array_equal(np.stack(images), squares[0])
    assert labels == [i % 3 for i in range(24)]


class Lazy(Photos):
    def __getitem__(self, i):
        return PIL.Image.open(self.squares[0][i]), self.squares[1][i]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux only")
def test_files_of_lazy_images_are_closed(files):
    before = len(list(Path("/proc/self/fd").iterdir()))
    images, _ = unpacked(Lazy(files), None)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + len(images) // 2


def test_a_label_is_a_single_one(squares):
    X, y = squares
    one_hot = torch.eye(3)[torch.arange(24) % 3]
    dataset = TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2), one_hot)
    with pytest.raises(ImageError, match=r"shape \(3,\)"):
        small().fit(dataset)
    assert unpacked(dataset, y)[1] is y


class Stream(IterableDataset):
    def __iter__(self):
        yield np.zeros((8, 8, 3), np.uint8), 0


def test_other_data_sets_are_refused(squares):
    with pytest.raises(ImageError, match="map-style"):
        small().fit(Stream())
    with pytest.raises(ImageError, match="map-style"):
        small().fit(*squares).predict(Stream())
    with pytest.raises(ImageError, match="pairs"):
        small().fit(TensorDataset(torch.zeros(4, 3, 8, 8)))
