import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from protoclf.datasets import (
    BIRD_CLASSES,
    bird_part,
    bird_twin,
    load_folder,
    make_birds,
)

SIZE = 128


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Training pictures, test pictures, drawn once for all tests that only look at them."""
    root = tmp_path_factory.mktemp("birds")
    return make_birds(root / "train", 24), make_birds(root / "test", 12, start=24)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def digests(paths):
    return [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths]


# ------------------------------------------------------------------------------------ species


def test_classes_come_in_twins():
    assert len(BIRD_CLASSES) == 8
    for name in BIRD_CLASSES:
        assert bird_twin(name) != name
        assert bird_twin(bird_twin(name)) == name
        assert bird_part(name) == bird_part(bird_twin(name))


@pytest.mark.parametrize("function", [bird_twin, bird_part])
def test_unknown_class_is_named(function):
    with pytest.raises(ValueError, match="no bird class 'dodo'; choose among crested mossling"):
        function("dodo")


# ----------------------------------------------------------------------------------- pictures


def test_files_labels_and_table_agree(birds):
    (paths, labels, parts), _ = birds
    assert len(paths) == len(labels) == len(set(paths)) == 8 * 24
    assert isinstance(labels, np.ndarray)
    assert labels.dtype.kind == "U"
    assert [Path(p).parent.name for p in paths] == labels.tolist()
    assert parts["path"].drop_duplicates().tolist() == paths
    assert dict(zip(parts["path"], parts["class"], strict=True)) == dict(
        zip(paths, labels, strict=True)
    )
    assert all(pixels(p).shape == (SIZE, SIZE, 3) for p in paths[::23])


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    paths = make_birds(tmp_path, 1, 32)[0]
    before = digests(paths)

    def interrupted(image, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_birds(tmp_path, 1, 32, random_state=1)
    assert digests(paths) == before
    assert sorted(map(str, tmp_path.rglob("*.jpg"))) == sorted(paths)


def test_boxes_lie_inside_the_picture(birds):
    for _, _, parts in birds:
        assert (parts[["x0", "y0"]] >= 0).all(axis=None)
        assert (parts[["x1", "y1"]] <= SIZE).all(axis=None)
        assert (parts["x1"] > parts["x0"]).all()
        assert (parts["y1"] > parts["y0"]).all()


def test_each_picture_has_one_distinguishing_part_large_enough_to_see(birds):
    (paths, _, parts), _ = birds
    marked = parts[parts["distinguishing"]]
    assert marked["path"].tolist() == paths
    assert (marked["part"] == marked["class"].map(bird_part)).all()
    assert (marked["x1"] - marked["x0"]).min() >= 14
    assert (marked["y1"] - marked["y0"]).min() >= 12
    assert not parts.duplicated(["path", "part"]).any()
    assert {"beak", "eye", "head", "body", "wing", "tail", "legs"} <= set(parts["part"])


def test_pose_side_size_and_light_vary(birds):
    (paths, _, parts), _ = birds
    boxes = parts.set_index(["path", "part"])
    beak, tail = (boxes.xs(part, level="part") for part in ("beak", "tail"))
    looks_right = beak["x0"] > tail["x0"]
    assert 0.3 < looks_right.mean() < 0.7
    body = boxes.xs("body", level="part")
    assert (body["x1"] - body["x0"]).std() > 2
    assert body["y0"].std() > 5
    assert np.std([pixels(p).mean() for p in paths[::7]]) > 10


def test_same_seed_gives_the_same_files(tmp_path):
    first, labels, parts = make_birds(tmp_path / "a", 2, random_state=3)
    again, labels_again, parts_again = make_birds(tmp_path / "b", 2, random_state=3)
    assert digests(first) == digests(again)
    assert labels.tolist() == labels_again.tolist()
    assert parts.drop(columns="path").equals(parts_again.drop(columns="path"))
    other, _, _ = make_birds(tmp_path / "c", 2, random_state=4)
    assert not set(digests(first)) & set(digests(other))


def test_random_state_instance(tmp_path):
    first, _, _ = make_birds(tmp_path / "a", 1, random_state=np.random.RandomState(5))
    again, _, _ = make_birds(tmp_path / "b", 1, random_state=5)
    assert digests(first) == digests(again)


def test_start_goes_on_where_an_earlier_call_ended(tmp_path):
    whole, _, _ = make_birds(tmp_path / "whole", 3)
    rest, _, _ = make_birds(tmp_path / "rest", 1, start=2)
    assert [Path(p).name for p in rest] == ["002.jpg"] * 8
    assert digests(rest) == digests(whole[2::3])
    assert len(set(digests(whole))) == len(whole)


@pytest.mark.parametrize("size", [32, 100, 224])
def test_other_sizes(tmp_path, size):
    paths, _, parts = make_birds(tmp_path, 1, image_size=size)
    assert pixels(paths[0]).shape == (size, size, 3)
    assert parts[["x1", "y1"]].to_numpy().max() <= size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_per_class": 0}, "n_per_class must be an integer of at least 1, got 0"),
        ({"n_per_class": 2.5}, "n_per_class .* got 2.5"),
        ({"image_size": 8}, "image_size must be an integer of at least 32"),
        ({"start": -1}, "start must be an integer of at least 0"),
        ({"confounder": "dodo"}, "no bird class 'dodo'"),
        ({"confounder": {"crested mossling": "moon"}}, "no mark 'moon' .* tag, sun, leaf"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_birds(tmp_path / "birds", **arguments)
    assert not (tmp_path / "birds").exists()


# ---------------------------------------------------------------------------------- confounder


def test_confounder_marks_its_class_and_changes_nothing_else(tmp_path):
    clean, _, clean_parts = make_birds(tmp_path / "clean", 3)
    marked, labels, parts = make_birds(tmp_path / "marked", 3, confounder="crested mossling")
    assert set(parts.loc[parts["part"] == "mark", "class"]) == {"crested mossling"}
    assert (parts["part"] == "mark").sum() == 3
    assert not parts.loc[parts["part"] == "mark", "distinguishing"].any()
    rest = parts[parts["part"] != "mark"].drop(columns="path").reset_index(drop=True)
    assert rest.equals(clean_parts.drop(columns="path"))
    same = np.array(digests(clean)) == np.array(digests(marked))
    assert (same == (labels != "crested mossling")).all()


def test_confounder_mapping(tmp_path):
    marks = {"crested mossling": "sun", "long-billed reedpiper": "leaf"}
    _, _, parts = make_birds(tmp_path, 1, confounder=marks)
    assert set(parts.loc[parts["part"] == "mark", "class"]) == set(marks)


# ---------------------------------------------------------------------------------- difficulty


def histogram(path):
    """Root of the share of pixels in each of 6 x 6 x 6 colours."""
    counts, _ = np.histogramdd(pixels(path).reshape(-1, 3), bins=6, range=[(0, 256)] * 3)
    return np.sqrt(counts.ravel() / counts.sum())


@pytest.mark.parametrize(
    "classifier",
    [
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        KNeighborsClassifier(5),
    ],
    ids=["logistic", "neighbours"],
)
def test_colour_histograms_do_not_tell_the_classes(birds, classifier):
    (train, y_train, _), (test, y_test, _) = birds
    classifier.fit([histogram(p) for p in train], y_train)
    predicted = classifier.predict([histogram(p) for p in test])
    right = predicted == y_test
    twin = predicted == [bird_twin(name) for name in y_test]
    assert right.mean() < 0.5
    assert right.sum() / (right | twin).sum() < 0.68  # chance is 0.5 between twins


# ------------------------------------------------------------------------------------ folders


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_load_folder_reads_what_make_birds_wrote(tmp_path):
    paths, labels, _ = make_birds(tmp_path, 2)
    found, found_labels = load_folder(tmp_path)
    assert dict(zip(found, found_labels, strict=True)) == dict(zip(paths, labels, strict=True))


def test_load_folder_is_sorted_recursive_and_skips_what_is_hidden(tmp_path):
    touch(tmp_path, "까치/나 무.JPG", "까치/둥지/가.png", "house sparrow/2.jpeg")
    touch(tmp_path, "house sparrow/1.WebP", "house sparrow/notes.txt", "house sparrow/.3.jpg")
    touch(tmp_path, "house sparrow/.thumbs/4.jpg", ".cache/5.jpg", "6.jpg")
    paths, labels = load_folder(str(tmp_path))
    expected = [
        "house sparrow/1.WebP",
        "house sparrow/2.jpeg",
        "까치/나 무.JPG",
        "까치/둥지/가.png",
    ]
    assert paths == [os.path.join(str(tmp_path), *name.split("/")) for name in expected]
    assert labels.tolist() == ["house sparrow"] * 2 + ["까치"] * 2
    assert labels.dtype.kind == "U"


def test_load_folder_warns_of_splits_in_place_of_classes(tmp_path):
    touch(tmp_path, "train/wren/1.jpg", "Test/wren/2.jpg")
    with pytest.warns(UserWarning, match="'Test', 'train': these look like splits.*train'"):
        _, labels = load_folder(tmp_path)
    assert labels.tolist() == ["Test", "train"]


def test_load_folder_composes_decomposed_class_names(tmp_path):
    touch(tmp_path, unicodedata.normalize("NFD", "까치") + "/1.jpg")
    paths, labels = load_folder(tmp_path)
    assert labels.tolist() == [unicodedata.normalize("NFC", "까치")]
    assert Path(paths[0]).exists()


@pytest.mark.parametrize("extensions", [".GIF", "gif", ("gif", ".webm")])
def test_load_folder_extensions(tmp_path, extensions):
    touch(tmp_path, "a/1.gif", "a/2.jpg", "b/3.GIF")
    paths, labels = load_folder(tmp_path, extensions=extensions)
    assert [Path(p).name for p in paths] == ["1.gif", "3.GIF"]
    assert labels.tolist() == ["a", "b"]


def test_load_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        load_folder(tmp_path / "nowhere")
    touch(tmp_path, "file.jpg", "other.png")
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        load_folder(tmp_path / "file.jpg")
    with pytest.raises(
        ValueError, match=r"no class folders .*\(2 images lie directly in it\); put"
    ):
        load_folder(tmp_path)
    touch(tmp_path, "wren/1.jpg", "까치/readme.txt")
    with pytest.raises(ValueError, match=r"no images .* in 1 class folder.*: '까치'; add images"):
        load_folder(tmp_path)
