"""Boxes between the originals and the model input, and where the pixels go."""

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageDraw

from protoclf.decoding import decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images

_T = PIL.Image.Transpose
resizes = st.sampled_from(["crop", "squash"])
sizes_of_images = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@settings(deadline=None)
@given(
    st.integers(1, 512),
    resizes,
    st.lists(sizes_of_images, min_size=1, max_size=4),
    st.lists(st.floats(-10, 600), min_size=4, max_size=4),
)
def test_boxes_round_trip(image_size, resize, sizes, box):
    preprocessing = Preprocessing(image_size, resize)
    boxes = np.tile(box, (len(sizes), 1))
    there = preprocessing.to_original(boxes, sizes)
    assert np.allclose(preprocessing.to_input(there, sizes), boxes, atol=1e-6)
    whole = np.tile([0.0, 0, image_size, image_size], (len(sizes), 1))
    assert np.allclose(preprocessing.to_original(whole, sizes), preprocessing.region(sizes))


@settings(deadline=None)
@given(st.integers(1, 300), resizes, sizes_of_images, st.data())
def test_whole_pixels_contain_the_box(image_size, resize, size, data):
    x0, y0 = (data.draw(st.integers(0, image_size - 1)) for _ in "xy")
    x1, y1 = (data.draw(st.integers(start + 1, image_size)) for start in (x0, y0))
    preprocessing = Preprocessing(image_size, resize)
    exact = preprocessing.to_original([[x0, y0, x1, y1]], [size])[0]
    box = preprocessing.to_original_pixels([[x0, y0, x1, y1]], [size])[0]
    assert box.dtype == np.int64
    assert (box[:2] >= 0).all()
    assert (box[2:] <= size).all()
    assert (box[2:] > box[:2]).all()
    assert (box[:2] <= exact[:2] + 1e-5).all()
    assert (box[2:] >= exact[2:] - 1e-5).all()
    assert (np.abs(box - exact) < 1 + 1e-5).all()


def test_whole_pixels_ignore_float_dust():
    preprocessing = Preprocessing(3, "squash")
    boxes = preprocessing.to_original_pixels([[1, 1, 2, 2], [-5, -5, -4, -4]], [[30, 33], [6, 6]])
    assert boxes.tolist() == [[10, 11, 20, 22], [0, 0, 1, 1]]
    assert preprocessing.to_original_pixels([3, 3, 4, 4], (6, 6)).tolist() == [5, 5, 6, 6]


def centroid(pixels):
    """Centre of the bright spot in uint8 (3, S, S), in pixels; pixel k covers [k, k + 1)."""
    light = pixels.double().mean(0)
    light = torch.where(light > 40, light, 0.0)
    grid = torch.arange(light.shape[0], dtype=torch.float64) + 0.5
    total = light.sum()
    return np.array([float((light.sum(0) @ grid) / total), float((light.sum(1) @ grid) / total)])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(
    ("orientation", "step"), [(1, None), (3, _T.ROTATE_180), (6, _T.ROTATE_90)]
)
def test_a_painted_spot_is_found_where_it_was(tmp_path, suffix, resize, orientation, step):
    rng = np.random.default_rng(0)
    shapes = [(64, 64), (301, 200), (200, 333), (807, 611), (611, 1203), (1501, 399), (33, 47)]
    X, centres, side = [], [], 56
    for k, (width, height) in enumerate(shapes):
        half = max(2, min(width, height) // 12)
        low = (np.array([width, height]) - min(width, height)) / 2  # inside the crop
        room = min(width, height) - 4 * half
        corner = (low + half + rng.uniform(0, 1, 2) * room).astype(int)
        image = PIL.Image.new("RGB", (width, height))
        ImageDraw.Draw(image).rectangle([*corner, *(corner + 2 * half - 1)], fill="white")
        centres.append(corner + half)
        image = image if step is None else image.transpose(step)  # as a turned camera stores it
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        X.append(tmp_path / f"{k}.{suffix}")
        image.save(X[-1], exif=exif)
    preprocessing = Preprocessing(side, resize)
    pixels, sizes = decode(Images(X), preprocessing)
    assert sizes.tolist() == [list(shape) for shape in shapes]
    for image, size, centre in zip(pixels, sizes, centres, strict=True):
        found = centroid(image)
        back = preprocessing.to_original(np.tile(found, 2), size)[:2]
        assert (np.abs(back - centre) < 0.15 * np.array(size) / side + 0.1).all()


def test_wrong_preprocessing():
    for wrong in ({"image_size": 0}, {"image_size": 2.5}, {"image_size": True}):
        with pytest.raises(ValueError, match="image_size must be an integer >= 1"):
            Preprocessing(**wrong)
    with pytest.raises(ValueError, match="'crop' or 'squash'; got 'fit'"):
        Preprocessing(224, "fit")
    assert Preprocessing(np.int64(8)) == Preprocessing(8)
