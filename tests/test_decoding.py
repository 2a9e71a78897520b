"""Many images at a time: files that cannot be read, reduced scales, threads."""

import os
import pickle
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from tqdm import tqdm

from protoclf import decoding, progress
from protoclf.decoding import check_files, decode
from protoclf.geometry import Preprocessing
from protoclf.image_errors import ImageError
from protoclf.images import Images

# ---- files that cannot be read ------------------------------------------------------------


def damage(tmp_path, picture):
    """Return {name of a bad file: a word of the reason}."""
    for name in ("whole.jpg", "whole.png"):
        picture.resize((500, 300)).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    PIL.Image.fromarray(np.full((4, 4), 300.0, np.float32)).save(tmp_path / "float.tif")
    PIL.Image.fromarray(np.full((4, 4), 10**6, np.int32)).save(tmp_path / "deep.tif")
    PIL.Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "dark.tif")
    return {
        "cut-whole.jpg": "truncated",
        "cut-whole.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "folder.jpg": "directory",
        "missing.jpg": "no such file",
        "float.tif": "divide by 255",
        "deep.tif": "65535",
        "dark.tif": "save the image with 8 bits",
        "whole.jpg/below.jpg": "no such file",
        "nul\0byte.jpg": "null byte",
    }


def test_each_bad_file_is_named(tmp_path, picture):
    for name, reason in damage(tmp_path, picture).items():
        images = Images([tmp_path / "whole.jpg", str(tmp_path / name)])
        for read in (images.open, lambda _, x=images: decode(x, Preprocessing(8))):
            with pytest.raises(ImageError) as caught:
                read(1)
            message = str(caught.value)
            assert "1 image(s)" in message
            assert "position 1, " + repr(images.paths[1]) in message
            assert reason in message
            (failure,) = caught.value.failures
            assert failure.position == 1
            assert failure.path == images.paths[1]


def test_all_bad_files_stand_in_one_error(tmp_path, picture):
    bad = damage(tmp_path, picture)
    names = [str(tmp_path / name) for name in bad]
    whole = str(tmp_path / "whole.jpg")
    X = [whole, *names, whole, str(tmp_path / "missing too.jpg")]
    with pytest.raises(ImageError) as caught:
        decode(Images(X), Preprocessing(8))
    assert [f.position for f in caught.value.failures] == [*range(1, len(bad) + 1), len(X) - 1]
    message = str(caught.value)
    assert f"{len(bad) + 1} image(s) of X cannot be read" in message
    assert all(f"position {k}, " in message for k in range(1, 6))
    assert f"and {len(bad) - 4} more" in message
    assert len(pickle.loads(pickle.dumps(caught.value)).failures) == len(bad) + 1


def test_check_files_sees_what_headers_tell(tmp_path, picture):
    bad = damage(tmp_path, picture)
    names = [str(tmp_path / name) for name in bad]
    with pytest.raises(ImageError) as caught:
        check_files(Images([str(tmp_path / "whole.jpg"), *names]))
    found = [bad[os.path.relpath(f.path, tmp_path)] for f in caught.value.failures]
    assert found == ["empty", "not an image", "directory"] + ["no such file"] * 2 + ["null byte"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [2000, 1500, 100])  # Pillow warns, warns, raises
def test_decompression_bomb(paths, monkeypatch, limit):
    images = Images(paths[:1])
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    for read in (images.open, lambda _: check_files(images)):
        with pytest.raises(ImageError, match=r"position 0, .*MAX_IMAGE_PIXELS = " + str(limit)):
            read(0)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    check_files(images)


# ---- files that can -----------------------------------------------------------------------


def test_draft_is_used_and_differs_little(tmp_path, picture):
    big = picture.resize((1203, 811), PIL.Image.Resampling.BICUBIC)
    big.save(tmp_path / "a.jpg", quality=95)
    images, preprocessing = Images([tmp_path / "a.jpg"]), Preprocessing(64)
    stored = images.read(0, 64)
    assert stored.scale == 0.25
    assert stored.rgb.size == (301, 203)  # at least twice the model input
    assert stored.size == (1203, 811)
    assert images.read(0, 500).scale == 1
    pixels, _ = decode(images, preprocessing)
    difference = np.abs(pixels[0].numpy().astype(int) - preprocessing(images.open(0)))
    assert difference.max() <= 4


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3), (3000, 5), (7, 7)])
def test_tiny_and_extreme_images(tmp_path, resize, size):
    path = tmp_path / "a.jpg"
    PIL.Image.new("RGB", size, (10, 200, 30)).save(path)
    pixels, sizes = decode(Images([path]), Preprocessing(32, resize))
    assert sizes.tolist() == [list(size)]
    assert (pixels[0].float().mean((1, 2)) - torch.tensor([10.0, 200, 30])).abs().max() < 4


def test_decode_is_the_same_for_any_number_of_threads(paths, monkeypatch):
    images, preprocessing = Images(paths * 5), Preprocessing(24)
    monkeypatch.setattr(decoding, "_n_threads", lambda: 1)
    one, sizes = decode(images, preprocessing)
    for threads in (2, 7):
        monkeypatch.setattr(decoding, "_n_threads", partial(int, threads))
        again, sizes_again = decode(images, preprocessing, show=False)
        assert torch.equal(one, again)
        assert np.array_equal(sizes, sizes_again)
    for i in range(6):
        assert np.array_equal(one[i], preprocessing(images.open(i)))


def test_decode_some_into_a_given_tensor(paths):
    images, preprocessing = Images(paths), Preprocessing(8)
    everything, _ = decode(images, preprocessing)
    out = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    part, sizes = decode(images, preprocessing, [4, 1], out=out[2:4])
    assert part.data_ptr() == out[2:].data_ptr()
    assert torch.equal(out[2:4], everything[[4, 1]])
    assert not out[:2].any()
    assert sizes.shape == (2, 2)


def test_progress_bar_only_where_slow(paths, capfd, monkeypatch):
    images = Images(paths)
    decode(images, Preprocessing(8))
    check_files(images)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setattr(progress, "tqdm", lambda *args, **how: tqdm(*args, **how | {"delay": 0}))
    decode(images, Preprocessing(8))
    captured = capfd.readouterr()
    assert "decoding images" in captured.err
    assert captured.out == ""
    decode(images, Preprocessing(8), show=False)
    assert capfd.readouterr().err == ""


def test_a_pil_image_given_twice_is_decoded_safely(paths):
    with PIL.Image.open(paths[1]) as image:
        pixels, _ = decode(Images([image] * 40), Preprocessing(16))
    assert (pixels == pixels[0]).all()
