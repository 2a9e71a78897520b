"""Pictures, and a classifier of some, that several test files read."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; for processes of tests as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers with threads would take turns

import numpy as np
import PIL.Image
import pytest
from hypothesis import settings

from protoclf import ProtoPNetClassifier
from protoclf.network import ProtoPNet

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it

settings.register_profile("ci", derandomize=True)  # the same examples in every run
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def picture():
    """A smooth colour picture without symmetry, 60 x 40 pixels."""
    y, x = np.mgrid[:40, :60]
    pixels = np.stack([4 * x, 6 * y, 120 + 2 * x - 3 * y], axis=-1).clip(0, 255)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def paths(tmp_path, picture):
    """Six readable files."""
    made = []
    for k in range(6):
        path = tmp_path / f"{k}.png"
        picture.rotate(9 * k).save(path)
        made.append(path)
    return made


@pytest.fixture(scope="session")
def squares():
    """24 noisy pictures of 60 x 40 pixels, each with a square in one of three colours; labels."""
    rng = np.random.default_rng(0)
    colours = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (230, 30, 30)}
    y = np.array(list(colours) * 8)
    X = rng.integers(60, 180, size=(len(y), 40, 60, 3), dtype=np.uint8)
    for pixels, label in zip(X, y, strict=True):
        top, left = rng.integers(0, 24), rng.integers(12, 32)
        pixels[top : top + 16, left : left + 16] = colours[label]
    return X, y


@pytest.fixture
def files(tmp_path, squares):
    """The pictures of `squares` as files; their paths, and labels."""
    X, y = squares
    paths = [str(tmp_path / f"{i}.png") for i in range(len(X))]
    for path, pixels in zip(paths, X, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return np.array(paths, dtype=object), y


@pytest.fixture(scope="session")
def fitted(squares):
    """A small classifier that went through all stages; to be read, not to be changed."""
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=48,
        prototypes_per_class=2,
        warmup_epochs=1,
        joint_epochs=1,
        augmented_views=0,
        batch_size=8,
        random_state=0,
        verbose=0,
    )
    return clf.fit(*squares)


@pytest.fixture
def backbone_images(monkeypatch):
    """Sizes of the batches of images that pass a ProtoPNet's backbone."""
    seen = []
    features = ProtoPNet.features

    def counted(self, images):
        seen.append(len(images))
        return features(self, images)

    monkeypatch.setattr(ProtoPNet, "features", counted)
    return seen
