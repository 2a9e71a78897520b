"""Formats, colour modes and orientations."""

import numpy as np
import PIL.Image
import pytest

from protoclf.decoding import check_files, decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images

SIZE = (60, 40)  # of the picture: width, height
LEFT = (0, 0, 30, 40)  # the half of the picture that is transparent


def close(image, expected, tolerance=1):
    a, b = (np.asarray(x.convert("RGB"), dtype=int) for x in (image, expected))
    assert image.mode == "RGB"
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance


def as_mode(picture, mode):
    grey = np.asarray(picture.convert("L"))
    if mode == "I;16":
        return PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return PIL.Image.fromarray(grey.astype(np.int32) * 257)
    if mode == "F":
        return PIL.Image.fromarray(grey.astype(np.float32) / 255)
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGB", "bmp", 0),
        ("RGB", "jpg", 40),
        ("L", "png", 0),
        ("L", "jpg", 10),
        ("P", "png", 0),
        ("P", "gif", 0),
        ("1", "png", 0),
        ("LA", "png", 0),
        ("RGBA", "png", 0),
        ("I;16", "png", 0),
        ("I;16", "tif", 0),
        ("I", "tif", 0),
        ("F", "tif", 0),
        ("CMYK", "jpg", 40),
        ("CMYK", "tif", 0),
        ("YCbCr", "jpg", 40),
    ],
)
def test_formats(tmp_path, picture, mode, suffix, tolerance):
    image = as_mode(picture, mode)
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    expected = picture.convert("L") if mode[0] in "IF" else image
    images = Images([path])
    check_files(images)
    close(images.open(0), expected, tolerance)
    close(Images([image]).open(0), expected, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_is_white(tmp_path, picture, mode):
    base = picture if mode[0] == "R" else picture.convert("L").convert("RGB")
    alpha = PIL.Image.new("L", SIZE, 255)
    alpha.paste(0, LEFT)
    image = base.copy()
    image.putalpha(alpha)
    image = image.convert(mode.upper()).convert(mode)
    expected = base.copy()
    expected.paste("white", LEFT)
    close(Images([image]).open(0), expected)
    if mode.isupper():  # the others live in memory only
        image.save(tmp_path / "a.png")
        close(Images([tmp_path / "a.png"]).open(0), expected, 0)


def test_transparent_palette_entry_is_white(tmp_path, picture):
    image = picture.copy()
    image.paste("white", LEFT)
    image = image.quantize(64)
    expected = image.convert("RGB")
    index = image.getpixel((0, 0))
    palette = image.getpalette()
    palette[3 * index : 3 * index + 3] = [0, 0, 0]  # black, were it not transparent
    image.putpalette(palette)
    for suffix in ("png", "gif"):
        image.save(tmp_path / f"a.{suffix}", transparency=index)
        close(Images([tmp_path / f"a.{suffix}"]).open(0), expected, 0)


def test_transparent_colour_is_white(tmp_path, picture):
    image, expected = picture.copy(), picture.copy()
    image.paste((1, 2, 3), LEFT)
    expected.paste("white", LEFT)
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    close(Images([tmp_path / "a.png"]).open(0), expected, 0)


def test_half_transparent_is_mixed_with_white(tmp_path):
    PIL.Image.new("RGBA", (4, 4), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert Images([tmp_path / "a.png"]).open(0).getpixel((0, 0)) == (204, 224, 244)


def test_sixteen_bits_use_the_whole_range(tmp_path):
    PIL.Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(Images([tmp_path / "a.png"]).open(0))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    image = PIL.Image.fromarray(np.array([[257, 258, 32768]], np.uint16))
    image.save(tmp_path / "a.png", transparency=258)
    assert np.asarray(Images([tmp_path / "a.png"]).open(0))[0, :, 0].tolist() == [1, 255, 128]


def test_first_frame_of_an_animation(tmp_path, picture):
    frames = [picture.convert("P"), PIL.Image.new("P", SIZE, 3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    close(Images([tmp_path / "a.gif"]).open(0), frames[0], 0)


STORED_AS = {  # orientation -> how a camera held that way stores an upright picture
    1: [],
    2: [PIL.Image.Transpose.FLIP_LEFT_RIGHT],
    3: [PIL.Image.Transpose.ROTATE_180],
    4: [PIL.Image.Transpose.FLIP_TOP_BOTTOM],
    5: [PIL.Image.Transpose.TRANSPOSE],
    6: [PIL.Image.Transpose.ROTATE_90],
    7: [PIL.Image.Transpose.TRANSVERSE],
    8: [PIL.Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_exif_orientations_show_one_upright_picture(tmp_path, picture, suffix, resize):
    X = []
    big = picture.resize((600, 400), PIL.Image.Resampling.BICUBIC)
    for orientation, steps in STORED_AS.items():
        image = big
        for step in steps:
            image = image.transpose(step)
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        X.append(tmp_path / f"{orientation}.{suffix}")
        image.save(X[-1], exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    images = Images(X)
    tolerance = 20 if suffix == "jpg" else 0
    for i in range(8):
        close(images.open(i), big, tolerance)
    pixels, sizes = decode(images, Preprocessing(50, resize))  # small: JPEG drafts
    assert sizes.tolist() == [[600, 400]] * 8
    spread = (pixels.int() - pixels[:1].int()).abs()
    assert spread.max() <= (8 if suffix == "jpg" else 1)


def test_other_exif_data_is_ignored(tmp_path, picture):
    exif = PIL.Image.Exif()
    exif[0x0112] = 99
    picture.save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png", exif=b"Exif\x00\x00 not what it claims")
    images = Images([tmp_path / "a.png", tmp_path / "b.png"])
    assert images.open(0).size == images.open(1).size == SIZE
