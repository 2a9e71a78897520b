"""Pictures that several test files read."""

import numpy as np
import PIL.Image
import pytest


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
