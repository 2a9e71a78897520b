"""X in every form."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from scipy import sparse

from protoclf.decoding import check_files, decode
from protoclf.geometry import Preprocessing
from protoclf.image_errors import ImageError
from protoclf.images import Images, conflicting_labels
from protoclf.source_files import SourceFile


def error_of(X, *words):
    with pytest.raises(ImageError) as caught:
        Images(X)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        np.array,
        lambda p: [Path(q) for q in p],
        lambda p: np.array(p, dtype=object),
        lambda p: np.array([Path(q) for q in p], dtype=object)[:, None],
        lambda p: np.array(p)[:, None],
        lambda p: [[q] for q in p],
        lambda p: pd.Series(p, index=range(10, 10 + len(p))),
        lambda p: pd.Series(p, dtype="string"),
        lambda p: pd.Series(p, dtype=object),
        lambda p: pd.Series(p, dtype="category"),
        lambda p: pd.Series([Path(q) for q in p]),
        lambda p: pd.DataFrame({"file": p}),
        lambda p: pd.DataFrame({"file": p}, dtype="category"),
    ],
)
def test_every_form_of_paths(paths, wrap):
    given = [str(path) for path in paths]
    images = Images(wrap(given))
    assert images.paths == given
    assert all(type(path) is str for path in images.paths)
    assert len(images) == len(given)
    check_files(images)
    assert images.open(2).size == PIL.Image.open(given[2]).size


def test_paths_stay_as_given(tmp_path, picture, monkeypatch):
    name = "셔츠 사진 1.png"
    (tmp_path / "한글 폴더").mkdir()
    picture.save(tmp_path / "한글 폴더" / name)
    monkeypatch.chdir(tmp_path)
    images = Images([Path("한글 폴더", name), f"./한글 폴더/{name}"])
    assert images.paths == [os.path.join("한글 폴더", name), f"./한글 폴더/{name}"]
    assert images.open(0).tobytes() == images.open(1).tobytes() == picture.tobytes()


def test_every_form_of_pixels():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (4, 9, 7, 3), dtype=np.uint8)
    expected = decode(Images(colour), Preprocessing(5))[0]
    pil = [PIL.Image.fromarray(image) for image in colour]
    floats = colour / 255
    for X in (
        list(colour),
        pil,
        tuple(pil),
        floats,
        floats.astype(np.float32),
        list(floats),
        torch.from_numpy(colour),
        [torch.from_numpy(image) for image in colour],
        np.asfortranarray(colour),
    ):
        images = Images(X)
        assert images.paths is None
        pixels, sizes = decode(images, Preprocessing(5))
        assert torch.equal(pixels, expected)
        assert sizes.tolist() == [[7, 9]] * 4
        check_files(images)  # nothing to check


def test_grey_pixels_and_unequal_sizes():
    grey = np.arange(2 * 5 * 6, dtype=np.uint8).reshape(2, 5, 6)
    assert np.array_equal(np.asarray(Images(grey).open(1)), np.repeat(grey[1][..., None], 3, -1))
    images = Images([np.zeros((3, 8), np.uint8), np.full((5, 2, 3), 0.5)])
    pixels, sizes = decode(images, Preprocessing(4))
    assert sizes.tolist() == [[8, 3], [2, 5]]
    assert pixels[0].unique().tolist() == [0]
    assert pixels[1].unique().tolist() == [128]


def test_take_shares_pixels_and_remembers_positions(paths):
    array = np.zeros((6, 4, 4, 3), np.uint8)
    images = Images(array)
    subset = images.take([4, 1]).take([1, 0, -1])
    assert subset.positions.tolist() == [1, 4, 1]
    assert subset._items is images._items
    assert np.shares_memory(images._items, array)
    by_path = Images(paths).take(np.array([True, False, True, False, False, True]))
    assert by_path.paths == [str(paths[k]) for k in (0, 2, 5)]
    assert len(by_path.take([])) == 0


def test_errors_of_a_subset_name_the_position_in_X(paths):
    paths[4].write_bytes(b"")
    with pytest.raises(ImageError, match=r"position 4, .*4\.png.*empty"):
        Images(paths).take([5, 4]).open(1)


class NotAnImage:
    pass


@pytest.mark.parametrize(
    ("X", "words"),
    [
        ("a.png", ["single path", "'a.png'", "list"]),
        (Path("a.png"), ["single path", "list"]),
        (PIL.Image.new("L", (2, 2)), ["single image", "list"]),
        ([], ["Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is required."]),
        (np.empty((0, 3)), ["0 sample(s) (shape=(0, 3))"]),
        (np.empty((5, 0)), ["0 feature(s) (shape=(5, 0)) while a minimum of 1 is required."]),
        (pd.Series([], dtype=object), ["0 sample(s)"]),
        (np.zeros((10, 4)), ["Expected images", "(10, 4)"]),
        (np.zeros(10), ["Expected images", "Reshape your data"]),
        (np.zeros((10, 4)).tolist(), ["Expected images", "(10, 4)"]),
        ([1, 2, 3], ["Expected images", "Reshape your data"]),
        ([[1, 2], [3]], ["unequal lengths"]),
        ([2**70, 2**70], ["Expected images"]),
        (np.zeros((2, 3, 8, 8)), ["transpose(0, 2, 3, 1)"]),
        (np.zeros((2, 8, 8, 4)), ["alpha", "X[..., :3]"]),
        (np.zeros((2, 8, 8, 1)), ["X[..., 0]"]),
        (np.zeros((2, 8, 8, 2)), ["last"]),
        (np.zeros((2, 8, 8, 3, 1)), ["Expected images", "(2, 8, 8, 3, 1)"]),
        (np.zeros((2, 0, 8, 3)), ["no pixels"]),
        (np.zeros((480, 640, 3)), ["one image in colour", "list"]),
        (np.zeros((2, 8, 8, 3), np.int64), ["int64", "uint8"]),
        (np.zeros((2, 8, 8, 3), bool), ["bool", "uint8"]),
        (np.zeros((2, 8, 8, 3), complex), ["Complex data not supported"]),
        (np.zeros((2, 8), complex), ["Complex data not supported"]),
        ([np.zeros((8, 8, 3)), np.zeros((3, 8, 8, 8))], ["Expected images", "(1, 3, 8, 8, 8)"]),
        ([np.zeros((8, 8)), np.zeros((8, 8), int)], ["position 1", "int64"]),
        (sparse.csr_matrix((3, 4)), ["sparse"]),
        (sparse.csr_array((3, 4)), ["sparse"]),
        (["a.png", None], ["position 1", "None"]),
        (["a.png", np.nan], ["position 1", "nan"]),
        (pd.Series(["a.png", "b.png", None], dtype="string"), ["position 2", "missing"]),
        (pd.Series(["a.png", None]), ["position 1", "missing"]),
        (["a.png", 3], ["position 1", "int"]),
        (np.array(["a.png", NotAnImage()], dtype=object), ["position 1", "NotAnImage"]),
        ([b"a.png"], ["position 0", "bytes"]),
        (["a.png", np.zeros((4, 4))], ["mixes", "a path at position 0", "ndarray", "position 1"]),
        ([PIL.Image.new("L", (2, 2)), "a.png"], ["mixes", "a path at position 1"]),
        (np.array([["a", "b"]]), ["Expected images", "(1, 2)"]),
        (np.array("a.png"), ["single value", "list"]),
        (pd.DataFrame({"file": ["a"], "label": [1]}), ["file", "label", "Select the one"]),
        ((path for path in ["a.png"]), ["generator", "list(X)"]),
        ({"a.png": 1}, ["dict"]),
    ],
)
def test_wrong_X_is_refused(X, words):
    error_of(X, *words)


def test_wrong_float_pixels_name_the_position():
    X = np.zeros((5, 4, 4, 3), np.float32)
    X[3, 1, 1, 0] = np.nan
    error_of(X, "position 3", "NaN")
    X[2, 0, 0, 0] = -np.inf
    error_of(list(X), "position 2", "infinite")
    X[1] = 200
    error_of(X, "position 1", "[0, 1]", "200", "divide by 255")
    error_of(-np.ones((2, 4, 4)), "position 0", "-1", "use (X + 1) / 2")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("https://example.org/a.jpg", "so download it first"),
        ("~/a.jpg", "expanduser"),
        ("a.jpg", "relative paths start at"),
    ],
)
def test_a_missing_file_says_what_may_be_wrong_with_its_name(path, word):
    with pytest.raises(ImageError, match=word):
        Images([path]).open(0)


def test_images_are_found_though_the_working_folder_is_gone(paths, monkeypatch):
    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert SourceFile(str(paths[0])).opened(0).ndim == 3
    with pytest.raises(ImageError, match="start at a folder that is gone"):
        Images(["a.jpg"]).open(0)


def test_a_bad_pil_image_is_refused_at_once(tmp_path, picture):
    picture.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with PIL.Image.open(tmp_path / "cut.png") as image:
        error_of([picture, image], "position 1", "truncated")


def test_what_the_system_refuses_is_named_and_not_taken_for_damage(paths, tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, reason in (("loop.png", "cannot be read (Too many levels"), ("a\0.png", "null byte")):
        images = Images([*paths, tmp_path / name])
        conflicting_labels(images, range(7))
        with pytest.raises(ImageError) as caught:
            images.open(6)
        assert "position 6" in str(caught.value)
        assert reason in str(caught.value)


def test_a_file_has_one_label_by_whatever_path(paths, tmp_path):
    (tmp_path / "link.png").symlink_to(paths[1])
    images = Images([*paths, tmp_path / "link.png"])
    conflicting_labels(images, [0, 1, 2, 3, 4, 5, 1])
    with pytest.raises(ImageError, match="two labels"):
        conflicting_labels(images, [0, 1, 2, 3, 4, 5, 0])
    gone = Images([*paths[:2], tmp_path / "gone.png", tmp_path / "." / "gone.png"])
    with pytest.raises(ImageError, match="gone"):
        conflicting_labels(gone, [0, 1, 2, 3])


def test_conflicting_labels(paths):
    images = Images([*paths, os.path.join(paths[0].parent, ".", "1.png")])
    conflicting_labels(images, [0, 1, 2, 3, 4, 5, 1])
    conflicting_labels(Images(np.zeros((2, 3, 4))), [0, 1])
    with pytest.raises(ImageError) as caught:
        conflicting_labels(images, pd.Series(list("abcdefg")))
    for word in ("1.png", "'b'", "position 1", "'g'", "position 6"):
        assert word in str(caught.value)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_sizes_are_those_of_the_upright_picture(tmp_path, picture, kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    picture.save(path, kind, **({} if kind == "GIF" else {"exif": exif}))
    images = Images([path])
    assert images.size(0) == images.open(0).size


def test_sizes_of_arrays_and_pictures(picture):
    assert Images([picture]).size(0) == (60, 40)
    assert Images(np.zeros((1, 5, 7, 3), np.uint8)).size(0) == (7, 5)
    assert Images([np.zeros((4, 9), np.uint8)]).size(0) == (9, 4)


def test_digests_tell_contents_apart(tmp_path, picture):
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    picture.rotate(90).save(tmp_path / "c.png")
    images = Images([tmp_path / name for name in ("a.png", "b.png", "c.png")])
    assert images.digest(0) == images.digest(1) != images.digest(2)
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    forms = [pixels, pixels.reshape(1, 4, 2, 3), pixels + 1, (pixels / 255).astype(np.float32)]
    assert len({Images(form).digest(0) for form in forms}) == 4
    palette = picture.convert("P")
    other = palette.copy()
    other.putpalette(palette.getpalette()[::-1])
    pictures = Images([picture, picture.convert("L"), palette, other])
    assert len({pictures.digest(i) for i in range(4)}) == 4


def test_size_and_digest_name_a_file_that_is_gone(tmp_path):
    images = Images([tmp_path / "gone.png"])
    for question in (images.size, images.digest):
        with pytest.raises(ImageError, match=r"position 0, .*gone\.png.*no such file"):
            question(0)


def test_arrays_of_pyarrow_hold_paths_too(paths):
    pyarrow = pytest.importorskip("pyarrow")
    names = [str(path) for path in paths]
    assert Images(pyarrow.array(names)).paths == names
    assert Images(pyarrow.chunked_array([names[:2], names[2:]])).paths == names
