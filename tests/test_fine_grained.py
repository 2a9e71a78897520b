"""Readers of CUB-200-2011, Stanford Cars and Stanford Dogs, on tiny trees of the same layout."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from scipy.io import loadmat, savemat

from protoclf import ImageError, ProtoPNetClassifier
from protoclf.explanation import BOX
from protoclf.fine_grained import crops, read_cars, read_cub, read_dogs
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.metrics import PartLabels

SIZE = (60, 40)  # width and height


def write_photo(path, seed=0):
    """Write pixels that tell where they are: red is x, green is y."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    pixels = np.stack([4 * x, 6 * y, np.full_like(x, 20 * seed)], axis=2).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def corner(path):
    """Return x and y of the first pixel of a crop, as its colours tell."""
    red, green, _ = np.asarray(PIL.Image.open(path))[0, 0].astype(float)
    return round(red / 4), round(green / 6)


# CUB-200-2011 -------------------------------------------------------------------------------------

CUB = {
    "classes.txt": ["1 001.Black_footed_Albatross", "2 002.Laysan_Albatross"],
    "images.txt": [
        "1 001.Black_footed_Albatross/Black_0001_796111.jpg",
        "2 001.Black_footed_Albatross/Black_0002_55.jpg",
        "3 002.Laysan_Albatross/Laysan_0001_545.jpg",
        "4 002.Laysan_Albatross/Laysan_0002_1027.jpg",
    ],
    "image_class_labels.txt": ["1 1", "2 1", "3 2", "4 2"],
    "train_test_split.txt": ["1 0", "2 1", "3 1", "4 0"],
    "bounding_boxes.txt": [
        *("1 10.0 5.0 30.0 20.0", "2 0.0 0.0 60.0 40.0"),
        *("3 20.0 10.0 50.0 25.0", "4 1.0 2.0 3.0 4.0"),  # the first reaches beyond the photo
    ],
    "parts/parts.txt": ["1 back", "2 left eye"],
    "parts/part_locs.txt": [
        *("1 1 12.0 7.5 1", "1 2 0.0 0.0 0", "2 1 59.0 39.0 1", "2 2 30.0 20.0 1"),
        *("3 1 21.0 34.0 1", "3 2 19.0 20.0 1", "4 1 1.0 2.0 1", "4 2 4.0 3.0 1"),
    ],
}


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for name, lines in CUB.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(lines) + "\n")
    for i, line in enumerate(CUB["images.txt"]):
        write_photo(root / "images" / line.split()[1], seed=i)
    return root


@pytest.mark.parametrize("inside", [True, False])
def test_cub_as_it_is(cub, inside):
    images, parts = read_cub(cub if inside else cub.parent)
    assert images.columns.tolist() == ["path", "class", "split", *BOX]
    assert images["class"].tolist() == ["Black footed Albatross"] * 2 + ["Laysan Albatross"] * 2
    assert images["split"].tolist() == ["test", "train", "train", "test"]
    assert images[BOX].to_numpy().tolist() == [
        [10, 5, 40, 25],
        [0, 0, 60, 40],
        [20, 10, 70, 35],
        [1, 2, 4, 6],
    ]
    assert all(Path(path).is_file() for path in images["path"])
    assert parts.columns.tolist() == ["path", "class", "part", "x", "y", "visible"]
    assert parts["part"].tolist() == ["back", "left eye"] * 4
    assert parts["path"].tolist() == np.repeat(images["path"], 2).tolist()
    assert parts[["x", "y"]].to_numpy()[0].tolist() == [12.0, 7.5]
    assert parts["visible"].tolist() == [True, False] + [True] * 6


def test_cub_cropped_to_its_boxes(cub, tmp_path):
    images, parts = read_cub(cub, crop_to=tmp_path / "cropped")
    sizes = [PIL.Image.open(path).size for path in images["path"]]
    assert sizes == [(30, 20), (60, 40), (40, 25), (3, 4)]
    assert [corner(path) for path in images["path"]] == [(10, 5), (0, 0), (20, 10), (1, 2)]
    assert images[BOX].to_numpy().tolist() == [[0, 0, *size] for size in sizes]
    assert images["path"].iloc[0] == str(
        tmp_path / "cropped" / "001.Black_footed_Albatross" / "Black_0001_796111.jpg"
    )
    assert parts["path"].tolist() == np.repeat(images["path"], 2).tolist()
    assert parts[["x", "y"]].to_numpy()[[0, 4]].tolist() == [[2.0, 2.5], [1.0, 24.0]]
    outside = [False, True, False, False, False, True, False, True]  # not visible, or cut off
    assert parts["visible"].tolist() == [not hidden for hidden in outside]


def test_parts_are_what_metrics_take_and_crops_what_fit_takes(cub, tmp_path):
    images, parts = read_cub(cub, crop_to=tmp_path / "cropped")
    dataset = ImageDataset(Images(images["path"]), Preprocessing(32, "squash"))
    labels = PartLabels(parts, dataset)
    assert labels.names.tolist() == ["back", "left eye"]
    assert labels.visible.tolist() == [[True, False], [True, True], [True, False], [True, False]]
    clf = ProtoPNetClassifier(
        "small_cnn", image_size=32, prototypes_per_class=1, joint_epochs=0, verbose=0
    )
    clf.fit(images["path"], images["class"])
    assert set(clf.predict(images["path"])) <= {"Black footed Albatross", "Laysan Albatross"}


@pytest.mark.parametrize("name", CUB)
def test_a_file_of_cub_that_is_missing_is_named(cub, name):
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"'{name}'"):
        read_cub(cub)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "train_test_split.txt",
            ["1 0", "2 1", "4 1"],
            "train_test_split.txt' says nothing of .*3",
        ),
        ("images.txt", ["1 a.jpg", "two b.jpg"], "images.txt', line 2: expected a number"),
        (
            "image_class_labels.txt",
            ["1 1", "2 1", "3 7", "4 2"],
            "image_class_labels.txt', image 3: expected one of 1, 2, got '7'",
        ),
        (
            "train_test_split.txt",
            ["1 0", "2 1", "3 x", "4 7"],
            "train_test_split.txt', image 3: expected one of 0, 1, got 'x'",
        ),
        ("classes.txt", ["1 Albatross"], "classes.txt', class 1: expected a name after '.'"),
        ("classes.txt", ["1 001.A", "1 002.B"], "classes.txt', line 2: expected a number that is"),
        (
            "bounding_boxes.txt",
            ["1 0 0 9 9", "2 nan 0 9 9", "3 0 0 9 9", "4 0 0 9 9"],
            "bounding_boxes.txt', image 2: expected numbers for x, y, width, height",
        ),
        ("bounding_boxes.txt", ["1 0 0 9", "2 0 0 9 9", "3 0 0 9 9", "4 0 0 9 9"], "bounding_boxe"),
        ("parts/part_locs.txt", ["1 1 2.0 3.0"], "part_locs.txt' is not as it should be"),
        ("parts/part_locs.txt", ["9 1 2.0 3.0 1"], "part_locs.txt' has an unknown image, number 9"),
        (
            "parts/part_locs.txt",
            ["1 16 2.0 3.0 1"],
            "part_locs.txt' has an unknown part, number 16",
        ),
    ],
)
def test_a_file_of_cub_that_is_damaged_is_named(cub, name, lines, message):
    (cub / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_cub(cub)


def test_a_text_of_cub_in_another_encoding_is_named(cub):
    (cub / "classes.txt").write_bytes(b"1 001.Caf\xe9\n2 002.B\n")
    with pytest.raises(ValueError, match=r"classes\.txt', byte 9: expected text in UTF-8"):
        read_cub(cub)


# Photos that EXIF data turns ----------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_crops_and_parts_turn_with_their_photo(cub, tmp_path, orientation):
    """Annotations count stored pixels: what they show is what stands there once it is upright."""
    path = cub / "images" / CUB["images.txt"][0].split()[1]
    stored, exif = PIL.Image.open(path).convert("RGB"), PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=95, subsampling=0)
    locations = cub / "parts" / "part_locs.txt"
    locations.write_text(locations.read_text().replace("1 1 12.0 7.5", "1 1 12.0 7.0"))
    part = stored.crop((10, 5, 40, 25))
    part.getexif()[0x0112] = orientation
    expected = np.asarray(PIL.ImageOps.exif_transpose(part), float)

    (images, parts), (crops, parts_of_crops) = read_cub(cub), read_cub(cub, tmp_path / "cropped")
    upright = Images(images["path"]).open(0).crop(images[BOX].iloc[0].tolist())
    for picture in (upright, PIL.Image.open(crops["path"].iloc[0])):
        np.testing.assert_allclose(np.asarray(picture, float), expected, atol=12)
    for table, whole in ((parts, images), (parts_of_crops, crops)):
        pixels = Images(whole["path"]).open(0)
        red, green, _ = pixels.getpixel(tuple(table[["x", "y"]].iloc[0].astype(int)))
        assert (round(red / 4), round(green / 6)) == (12, 7)
        assert table["visible"].iloc[0]


# Crops --------------------------------------------------------------------------------------------


def test_an_interrupted_crop_goes_on_and_leaves_no_half_a_file(cub, tmp_path, monkeypatch):
    folder = tmp_path / "cropped"
    read_cub(cub, crop_to=folder)
    files = {path: path.read_bytes() for path in folder.rglob("*.jpg")}
    damaged, missing, kept, wrong = files
    damaged.write_bytes(b"half")
    missing.unlink()
    PIL.Image.new("RGB", (5, 5)).save(wrong)
    saved = []
    save = crops._save
    monkeypatch.setattr(crops, "_save", lambda image, path: (saved.append(path), save(image, path)))
    read_cub(cub, crop_to=folder)
    assert sorted(saved) == sorted([damaged, missing, wrong])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert kept not in saved

    monkeypatch.setattr(crops.os, "replace", raises(KeyboardInterrupt))
    kept.unlink()
    with pytest.raises(KeyboardInterrupt):
        read_cub(cub, crop_to=folder)
    assert {path for path in folder.rglob("*") if path.is_file()} == files.keys() - {kept}


def raises(error):
    def function(*args):
        raise error

    return function


def test_a_box_beside_the_photo_and_crops_over_the_originals_are_refused(cub, tmp_path):
    with pytest.raises(ValueError, match="another folder"):
        read_cub(cub, crop_to=cub / "images")
    lines = ["1 60.0 0.0 5.0 5.0", *CUB["bounding_boxes.txt"][1:]]
    (cub / "bounding_boxes.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"\(60, 0, 65, 5\) of .*796111.jpg' shows nothing"):
        read_cub(cub, crop_to=tmp_path / "cropped")


@pytest.mark.parametrize("folder", [None, "cropped"])
def test_a_photo_that_is_missing_is_named(cub, tmp_path, folder):
    (cub / "images" / CUB["images.txt"][2].split()[1]).unlink()
    with pytest.raises(ImageError, match=r"Laysan_0001_545\.jpg.*no such file"):
        read_cub(cub, crop_to=folder and tmp_path / folder)


# Stanford Cars ------------------------------------------------------------------------------------

CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
BOXES = [(5, 3, 30, 20), (1, 1, 60, 40), (10, 10, 12, 12)]  # as Matlab counts pixels
HALF_OPEN = [[4, 2, 30, 20], [0, 0, 60, 40], [9, 9, 12, 12]]
SIDES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def structs(rows):
    """Return a struct array (1, n) as Matlab writes it."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    return array


def cells(texts):
    array = np.empty((1, len(texts)), dtype=object)
    array[0, :] = texts
    return array


def car(box, number, **others):
    return dict(zip(SIDES, map(np.uint16, box), strict=True)) | {"class": np.uint8(number)} | others


def cars_with_devkit(root, test="cars_test_annos_withlabels.mat"):
    for name, cars in {
        "devkit/cars_train_annos.mat": [
            car(BOXES[0], 2, fname="00001.jpg"),
            car(BOXES[1], 1, fname="00002.jpg"),
        ],
        test: [car(BOXES[2], 2, fname="00001.jpg")],
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        savemat(root / name, {"annotations": structs(cars)})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(CARS)})
    for name in ("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"):
        write_photo(root / name)


def cars_with_labels_in_the_devkit(root):
    cars_with_devkit(root, test="devkit/cars_test_annos_withlabels.mat")


def cars_in_one_folder(root):
    names = [f"car_ims/00000{i}.jpg" for i in (1, 2, 3)]
    cars = [
        {"relative_im_path": name} | car(box, number, test=np.uint8(name == names[2]))
        for name, box, number in zip(names, BOXES, (2, 1, 2), strict=True)
    ]
    root.mkdir()
    savemat(root / "cars_annos.mat", {"annotations": structs(cars), "class_names": cells(CARS)})
    for name in names:
        write_photo(root / name)


def cars_in_class_folders(root):
    folders = [name.replace("/", "-") for name in CARS]
    images = [("train", 1, "00001.jpg"), ("train", 0, "00002.jpg"), ("test", 1, "00001.jpg")]
    lines = {"train": [], "test": []}
    for (split, number, name), box in zip(images, BOXES, strict=True):
        write_photo(root / "car_data" / "car_data" / split / folders[number] / name)
        lines[split].append(",".join(map(str, (name, *box, number + 1))))
    for split, rows in lines.items():
        (root / f"anno_{split}.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    "write",
    [
        *(cars_with_devkit, cars_with_labels_in_the_devkit),
        *(cars_in_one_folder, cars_in_class_folders),
    ],
)
def test_cars_in_each_of_their_forms(write, tmp_path):
    root = tmp_path / "stanford_cars"
    write(root)
    images = read_cars(root).sort_values(["split", "class"], ascending=[False, False])
    assert images.columns.tolist() == ["path", "class", "split", *BOX]
    assert [name.replace("-", "/") for name in images["class"]] == [CARS[1], CARS[0], CARS[1]]
    assert images["split"].tolist() == ["train", "train", "test"]
    assert images[BOX].to_numpy().tolist() == HALF_OPEN
    cropped = read_cars(root, crop_to=tmp_path / "cropped").loc[images.index]
    assert [corner(path) for path in cropped["path"]] == [(4, 2), (0, 0), (9, 9)]
    assert [PIL.Image.open(path).size for path in cropped["path"]] == [(26, 18), (60, 40), (3, 3)]
    assert cropped["path"].nunique() == 3  # train and test have files of the same name


def test_matlab_files_are_nested_as_the_published_ones(tmp_path):
    cars_with_devkit(tmp_path)
    read = loadmat(tmp_path / "devkit" / "cars_train_annos.mat")["annotations"]
    assert read.shape == (1, 2)
    assert read.dtype.names == (*SIDES, "class", "fname")
    assert read[0, 0]["fname"].tolist() == ["00001.jpg"]
    assert read[0, 0]["class"].tolist() == [[2]]
    names = loadmat(tmp_path / "devkit" / "cars_meta.mat")["class_names"]
    assert names.shape == (1, 2)
    assert names[0, 1].tolist() == [CARS[1]]


def test_what_cars_lack_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cars_train_annos\.mat"):
        read_cars(tmp_path)
    root = tmp_path / "devkit"
    cars_with_devkit(root)
    (root / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"cars_test_annos_withlabels\.mat"):
        read_cars(root)
    root = tmp_path / "classes"
    cars_in_class_folders(root)
    (root / "anno_test.csv").write_text("00009.jpg,1,1,2,2,1\n")
    with pytest.raises(ValueError, match=r"anno_test\.csv' says nothing of '.*00001\.jpg"):
        read_cars(root)


@pytest.mark.parametrize("number", [0, 3])
def test_a_class_of_cars_that_is_not_there_is_named(tmp_path, number):
    cars_with_devkit(tmp_path)
    file = tmp_path / "cars_test_annos_withlabels.mat"
    savemat(file, {"annotations": structs([car(BOXES[2], number, fname="00001.jpg")])})
    message = rf"{file.name}', image '.*00001\.jpg': expected a class from 1 to 2, got {number}"
    with pytest.raises(ValueError, match=message):
        read_cars(tmp_path)


def test_annotations_of_cars_without_classes_are_named(tmp_path):
    cars_with_devkit(tmp_path)
    unlabelled = {n: v for n, v in car(BOXES[2], 2, fname="00001.jpg").items() if n != "class"}
    file = tmp_path / "cars_test_annos_withlabels.mat"
    savemat(file, {"annotations": structs([unlabelled])})
    with pytest.raises(
        ValueError, match=rf"{file.name}', annotations: expected the fields .*class"
    ):
        read_cars(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["00001.jpg,5,3", "00002.jpg,1,1,60,40,1"], "line 1: expected numbers for bbox_x1"),
        (["00001.jpg,5,3,30,20,2"] * 2, "line 2: expected an image that is new"),
        (["00001.jpg,5,3,30,,2"], "line 1: expected numbers for bbox_x1"),
    ],
)
def test_a_table_of_cars_that_is_damaged_is_named(tmp_path, lines, message):
    cars_in_class_folders(tmp_path)
    (tmp_path / "anno_train.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"anno_train\.csv', {message}"):
        read_cars(tmp_path)


def test_images_of_cars_are_all_there_whatever_the_case_of_their_ending(tmp_path):
    cars_in_class_folders(tmp_path)
    before = read_cars(tmp_path)
    path = Path(before["path"].iloc[0])
    path.rename(path.with_suffix(".JPG"))
    after = read_cars(tmp_path)
    assert after["path"].iloc[0] == str(path.with_suffix(".JPG"))
    assert after.drop(columns="path").equals(before.drop(columns="path"))
    path.with_suffix(".JPG").unlink()
    message = rf"anno_train\.csv' names '{path.name}', .*\(1 of 2 missing\)"
    with pytest.raises(FileNotFoundError, match=message):
        read_cars(tmp_path)


# Stanford Dogs ------------------------------------------------------------------------------------

DOGS = {
    "train": [
        "n02085620-Chihuahua/n02085620_5927.jpg",
        "n02095314-wire-haired_fox_terrier/n0_7.jpg",
    ],
    "test": ["n02085620-Chihuahua/n02085620_4441.jpg"],
}
XML = """<annotation>
<folder>02085620</folder><filename>n02085620_7</filename>
<size><width>60</width><height>40</height><depth>3</depth></size>
{}</annotation>
"""
DOG = """<object><name>dog</name><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>
"""


@pytest.fixture
def dogs(tmp_path):
    root = tmp_path / "dogs"
    dog_boxes = iter([[(5, 3, 30, 20)], [(0, 10, 20, 40), (15, 2, 60, 30)], [(2, 2, 4, 4)]])
    (root / "lists").mkdir(parents=True)
    for split, names in DOGS.items():
        column = cells(names).T
        annotations = cells([name.removesuffix(".jpg") for name in names]).T
        labels = np.arange(1, len(names) + 1, dtype=np.uint8)[:, None]
        savemat(
            root / "lists" / f"{split}_list.mat",
            {"file_list": column, "annotation_list": annotations, "labels": labels},
        )
        for name in names:
            write_photo(root / "Images" / name)
            file = root / "Annotation" / name.removesuffix(".jpg")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(XML.format("".join(DOG.format(*box) for box in next(dog_boxes))))
    return root


def test_dogs(dogs, tmp_path):
    images = read_dogs(dogs)
    assert images.columns.tolist() == ["path", "class", "split", *BOX]
    assert images["class"].tolist() == ["Chihuahua", "wire-haired fox terrier", "Chihuahua"]
    assert images["split"].tolist() == ["train", "train", "test"]
    assert images[BOX].to_numpy().tolist() == [[5, 3, 30, 20], [0, 2, 60, 40], [2, 2, 4, 4]]
    assert all(Path(path).is_file() for path in images["path"])
    cropped = read_dogs(dogs, crop_to=tmp_path / "cropped")
    assert [corner(path) for path in cropped["path"]] == [(5, 3), (0, 2), (2, 2)]
    assert cropped["path"].iloc[2] == str(tmp_path / "cropped" / DOGS["test"][0])


def test_what_dogs_lack_is_named(dogs):
    file = dogs / "Annotation" / "n02085620-Chihuahua" / "n02085620_5927"
    for text in (XML.format(""), "<annotation>", XML.format(DOG.format(1, 2, "wide", 3))):
        file.write_text(text)
        with pytest.raises(ValueError, match="n02085620_5927' is no annotation with boxes"):
            read_dogs(dogs)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="n02085620_5927"):
        read_dogs(dogs)
    savemat(dogs / "lists" / "train_list.mat", {"file_list": cells(["Chihuahua/1.jpg"]).T})
    with pytest.raises(ValueError, match=r"train_list\.mat', image .*: expected a name after '-'"):
        read_dogs(dogs)
    (dogs / "lists" / "train_list.mat").write_bytes(b"no Matlab file")
    with pytest.raises(ValueError, match=r"train_list\.mat' is no Matlab file"):
        read_dogs(dogs)
    (dogs / "lists" / "train_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_list\.mat"):
        read_dogs(dogs)
