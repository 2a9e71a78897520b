"""The report holds what `explain` says, whatever the names in it, and stands alone."""

import base64
import copy
import io
import os
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from protoclf import ImageError, ProtoPNetClassifier, report, report_cards, thumbnails
from protoclf.metrics import interpretability_report
from protoclf.report import write_report
from protoclf.thumbnails import Thumbnail

pytest.importorskip("jinja2", reason="the report is a Jinja2 template")

VOID = {"meta", "link", "img", "br", "input"}
HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """An HTML page as a tree; attribute names come in lower case."""

    def __init__(self, path):
        super().__init__()
        self.builder = ElementTree.TreeBuilder()
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.root = self.builder.close()

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self.builder.end(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.builder.end(tag)

    def handle_endtag(self, tag):
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    def find(self, tag, name=None, within=None):
        within = self.root if within is None else within
        found = within.iter(tag)
        return [e for e in found if name is None or name in e.get("class", "").split()]

    @property
    def cards(self):
        return {int(e.get("id").removeprefix("image-")): e for e in self.find("article", "card")}


def text(element):
    return " ".join("".join(element.itertext()).split())


def numbers(string):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", string)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, squares):
    """The squares as files, in a folder with a space and Korean letters."""
    folder = tmp_path_factory.mktemp("squares") / "새 사진"
    folder.mkdir()
    paths = [str(folder / f"{i} {label}.png") for i, label in enumerate(squares[1])]
    for path, pixels in zip(paths, squares[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.parametrize("attribution", ["upsampled", "gradient"])
def test_a_sheet_has_the_numbers_and_the_boxes_of_explain(fitted, squares, tmp_path, attribution):
    X, how = squares[0][:10], {"top": 2, "attribution": attribution}
    page = Page(write_report(fitted, X, path=tmp_path / "report.html", **how))
    explained = fitted.explain(X, classes="top2", **how)
    assert set(page.cards) == set(range(10))
    for (sample, label), rows in explained.groupby(["sample", "class"]):
        predicted = bool(rows["is_predicted"].iloc[0])
        card = page.cards[sample]
        sheet = page.find("section", "predicted" if predicted else "rival", card)[0]
        assert text(page.find("span", "label", sheet)[0]) == label
        assert_sheet(page, card, sheet, rows)


def assert_sheet(page, card, sheet, rows):
    lines = [line for line in page.find("tr", within=sheet) if line.get("data-mark")]
    parts = rows[rows["prototype"].notna()]
    for line, (_, row) in zip(lines, parts.iterrows(), strict=True):
        shown = [numbers(text(cell)) for cell in page.find("td", within=line)[2:]]
        prototype, similarity, weight = shown[0]
        assert prototype == row["prototype"]
        expected = row[["similarity", "weight", "contribution"]].to_numpy(float)
        np.testing.assert_allclose([similarity, weight, *shown[1]], expected, atol=0.00501)
        assert box_of(page, card, line.get("data-mark")) == row[["x0", "y0", "x1", "y1"]].tolist()
        source_box = row[["source_x0", "source_y0", "source_x1", "source_y1"]].tolist()
        assert numbers(line.get("data-source-box")) == source_box
        x0, y0, x1, y1 = source_box
        crop = page.find("svg", "crop", page.find("td", within=line)[1])[0]
        assert numbers(crop.get("viewbox")) == [x0, y0, x1 - x0, y1 - y0]
    rest = rows.loc[rows["prototype"].isna(), "contribution"].tolist()
    shown = [numbers(text(page.find("td", within=e)[0]))[0] for e in page.find("tr", "rest", sheet)]
    np.testing.assert_allclose(shown, rest, atol=0.00501)
    total = numbers(text(page.find("tr", "total", sheet)[0]))[0]
    assert total == pytest.approx(rows["contribution"].sum(), abs=0.00501)
    probability = numbers(text(page.find("span", "probability", sheet)[0]))[0]
    assert probability == pytest.approx(100 * rows["probability"].iloc[0], abs=0.101)


def test_a_part_that_is_unlike_the_other_is_not_said_to_look_like_it(fitted, squares, tmp_path):
    opposed = copy.deepcopy(fitted)
    opposed.module_.prototypes.data.neg_()
    page = Page(write_report(opposed, squares[0][:5], path=tmp_path / "report.html", top=9))
    sheet = opposed.explain(squares[0][:5], "top2", top=9)
    lines = [line for line in page.find("tr") if line.get("data-likeness")]
    words = [line.get("data-likeness") for line in lines]
    assert words.count("is unlike") == (sheet["similarity"] < 0).sum() > 0
    assert ["unlike:" in text(line) for line in lines] == [word == "is unlike" for word in words]
    for card in page.cards.values():
        lit = page.find("tr", "lit", card)[0]
        assert text(page.find("span", "likeness", card)[0]) == lit.get("data-likeness")


def box_of(page, card, mark):
    (outline,) = [e for e in page.find("g", within=card) if e.get("data-mark") == mark]
    x, y, width, height = (
        int(page.find("rect", "line", outline)[0].get(name))
        for name in ("x", "y", "width", "height")
    )
    return [x, y, x + width, y + height]


def test_the_gallery_holds_every_prototype_with_its_box(fitted, squares, tmp_path):
    page = Page(write_report(fitted, squares[0][:2], path=tmp_path / "report.html"))
    for row in fitted.prototypes_.itertuples():
        (tile,) = [e for e in page.find("li") if e.get("id") == f"prototype-{row.prototype}"]
        assert tile.get("data-name") == f"prototype {row.prototype}, {row[2]}"
        assert text(page.find("span", "file", tile)[0]) == f"training image {row.source}"
        assert numbers(text(page.find("span", "where", tile)[0])) == [
            row.x0,
            row.y0,
            row.x1,
            row.y1,
        ]


def test_wrong_predictions_come_first_then_the_least_certain(fitted, squares, tmp_path):
    X, y = squares
    probability = fitted.predict_proba(X)
    y = y.copy()
    y[[3, 7]] = np.where(fitted.predict(X)[[3, 7]] == "red", "blue", "red")
    wrong = fitted.predict(X) != y
    page = Page(write_report(fitted, X, y, tmp_path / "report.html"))
    order = list(page.cards)
    assert order == sorted(order, key=lambda i: (not wrong[i], probability[i].max()))
    assert {i for i in order if "wrong" in page.cards[i].get("class").split()} == set(
        np.flatnonzero(wrong)
    )
    assert f"{(~wrong).sum()} of {len(y)} " in text(page.find("dl", "facts")[0])
    page = Page(write_report(fitted, X, path=tmp_path / "report.html"))
    assert list(page.cards) == np.argsort(probability.max(1), kind="stable").tolist()


def test_the_page_loads_nothing_and_embeds_each_picture_once(fitted, squares, tmp_path):
    path = write_report(fitted, squares[0][:9], squares[1][:9], tmp_path / "report.html")
    page = Page(path)
    links = [e.get(name) for e in page.root.iter() for name in ("href", "src") if e.get(name)]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    whole = path.read_text(encoding="utf-8")
    assert "http://" not in whole
    assert "https://" not in whole
    assert "url(" not in whole
    assert "@import" not in whole
    n_sources = fitted.prototypes_["source_index"].nunique()
    assert len([link for link in links if link.startswith("data:image")]) == 9 + n_sources
    names = {e.get("id") for e in page.root.iter()}
    assert {link[1:] for link in links if link.startswith("#")} <= names


def test_every_picture_has_an_alternative_text(fitted, squares, tmp_path):
    page = Page(write_report(fitted, squares[0][:4], path=tmp_path / "report.html"))
    pictures = page.find("svg")
    assert all(e.get("aria-label") or e.get("aria-hidden") == "true" for e in pictures)
    assert page.root.get("lang") == "en"


def relabelled(clf, labels):
    """Return a copy whose classes have other labels, in that order."""
    clf, labels = copy.deepcopy(clf), np.array(labels)
    owner = np.searchsorted(clf.classes_, clf.prototypes_["class"].to_numpy())
    clf.prototypes_ = clf.prototypes_.assign(**{"class": labels[owner]})
    clf.classes_inferred_ = labels
    return clf


def test_names_are_text_whatever_they_hold(fitted, squares, tmp_path):
    clf = relabelled(fitted, [HOSTILE, "초록 새", "red"])
    names = [str(tmp_path / f"{i} <b onclick='x'>&amp;\"한글.png") for i in range(3)]
    for name, pixels in zip(names, squares[0], strict=False):
        PIL.Image.fromarray(pixels).save(name)
    y = [HOSTILE, "</style>", "초록 새"]
    page = Page(write_report(clf, names, y, tmp_path / "report.html", title=HOSTILE))
    assert len(page.find("script")) == 1
    assert not [name for e in page.root.iter() for name in e.attrib if name.startswith("on")]
    assert text(page.find("h1")[0]) == HOSTILE
    assert {HOSTILE, "초록 새", "red"} <= {text(e) for e in page.find("h3")}
    assert {os.path.basename(name) for name in names} <= {text(e) for e in page.find("h3")}
    assert "</style>" in " ".join(text(card) for card in page.cards.values())


def test_the_policy_allows_the_script_of_the_page_alone(fitted, squares, tmp_path):
    import hashlib

    page = Page(write_report(fitted, squares[0][:1], path=tmp_path / "report.html"))
    script = "".join(page.find("script")[0].itertext())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [e.get("content") for e in page.find("meta") if e.get("http-equiv")]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("labels", [(1, 2, 10), (1.0, 2.0, 10.0)], ids=["ints", "floats"])
def test_labels_need_not_be_strings(labels, fitted, squares, tmp_path):
    clf = relabelled(fitted, labels)
    predicted = clf.predict(squares[0][:3])
    y = [predicted[0], float(predicted[1]), 7]  # 2 and 2.0 are one label
    page = Page(write_report(clf, squares[0][:3], y, tmp_path / "report.html"))
    assert "2 of 3 " in text(page.find("dl", "facts")[0])
    shown = {text(page.find("span", "label", card)[0]) for card in page.cards.values()}
    assert shown == set(map(str, predicted))


def test_a_label_that_the_classifier_does_not_know_counts_as_wrong(fitted, squares, tmp_path):
    y = squares[1].astype(object)
    y[5] = "violet"
    page = Page(write_report(fitted, squares[0], y, tmp_path / "report.html"))
    assert "1 of classes that it does not know" in text(page.find("dl", "facts")[0])
    assert "violet, which the classifier does not know" in text(page.cards[5])
    assert any(text(option).startswith("violet") for option in page.find("option"))


def test_labels_of_which_none_is_known_are_noticed(fitted, squares, tmp_path):
    numbers = np.unique(squares[1], return_inverse=True)[1]
    with pytest.warns(UserWarning, match=r"No label of y is one of the classes, such as 'blue'"):
        page = Page(write_report(fitted, squares[0], numbers, tmp_path / "report.html"))
    assert "0 of 24 " in text(page.find("dl", "facts")[0])


def test_paths_arrays_and_pictures_give_the_same_sheets(fitted, squares, files, tmp_path):
    forms = [squares[0][:9], files[:9], [PIL.Image.open(path) for path in files[:9]]]
    pages = [Page(write_report(fitted, X, path=tmp_path / "report.html")) for X in forms]
    tables = [[text(e) for e in page.find("table")] for page in pages]
    assert tables[0] == tables[1] == tables[2]
    assert text(pages[0].find("h3", within=pages[0].cards[4])[0]) == "Image 4"
    assert text(pages[1].find("h3", within=pages[1].cards[4])[0]) == os.path.basename(files[4])
    assert files[4] in text(pages[1].cards[4])


def test_the_labels_of_a_torch_dataset_are_judged(fitted, squares, tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return PIL.Image.fromarray(squares[0][i]), i % 3

    clf = clone(fitted).fit(squares[0], np.arange(len(squares[0])) % 3)
    page = Page(write_report(clf, Pairs(), path=tmp_path / "page.html"))
    right = round(4 * clf.score(Pairs()))
    assert [text(e) for e in page.find("dd")][1].startswith(f"{right} of 4 ")


def test_a_turned_photo_is_shown_upright(fitted, tmp_path):
    picture = PIL.Image.new("RGB", (600, 300), "blue")
    picture.paste("red", (0, 0, 300, 300))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    picture.save(tmp_path / "turned.jpg", exif=exif)
    path = write_report(fitted, [tmp_path / "turned.jpg"], path=tmp_path / "r.html", thumbnail=160)
    page = Page(path)
    (image,) = [e for e in page.find("image") if e.get("id") == "picture-0"]
    assert (image.get("width"), image.get("height")) == ("300", "600")
    shown = decoded(image)
    assert shown.size == (80, 160)
    assert shown.getpixel((40, 20))[0] > 200
    assert shown.getpixel((40, 140))[2] > 200


def decoded(image):
    data = image.get("href").partition(",")[2]
    return PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_each_image_passes_the_backbone_once(fitted, squares, tmp_path, backbone_images):
    write_report(fitted, *squares, tmp_path / "report.html")
    assert sum(backbone_images) == len(squares[0])


def test_a_training_image_that_moved_is_marked(fitted, squares, tmp_path):
    paths = [str(tmp_path / f"image <i>{i}.png") for i in range(len(squares[0]))]
    for path, pixels in zip(paths, squares[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    clf = clone(fitted).set_params(joint_epochs=0).fit(paths, squares[1])
    sources = clf.prototypes_["source"].tolist()
    moved = sources[0]
    os.rename(moved, tmp_path / "moved.png")
    with pytest.warns(UserWarning, match=r"^1 training image.* cannot be read") as caught:
        page = Page(write_report(clf, squares[0][:4], path=tmp_path / "report.html"))
    assert len(caught) == 1
    found = [e for e in page.find("image") if e.get("id").startswith("source-")]
    assert len(found) == len(set(sources)) - 1
    (tile,) = [e for e in page.find("li") if e.get("id") == "prototype-0"]
    assert "not found" in text(tile)
    assert moved in text(tile)


def test_a_class_without_weights_has_an_empty_sheet(fitted, squares, tmp_path):
    clf = copy.deepcopy(fitted)
    clf.module_.last_layer.weight.data[1:] = 0
    X = squares[0][:6]
    page = Page(write_report(clf, X, path=tmp_path / "report.html"))
    predicted = clf.predict(X)
    for i, card in page.cards.items():
        assert text(page.find("span", "label", card)[0]) == predicted[i]
        assert "No prototype speaks" in text(card)
    clf.module_.last_layer.weight.data[:] = 0
    page = Page(write_report(clf, X, path=tmp_path / "report.html"))
    assert len(page.find("section", "sheet")) == 12


def test_the_settings_are_those_that_were_changed(fitted, squares, tmp_path):
    page = Page(write_report(fitted, squares[0][:1], path=tmp_path / "report.html"))
    settings = {text(e) for e in page.find("code")}
    assert {"backbone='small_cnn'", "image_size=48", "prototypes_per_class=2"} <= settings
    assert not any(setting.startswith(("latent_dim", "verbose")) for setting in settings)


def test_the_settings_are_those_of_the_fit(fitted, squares, tmp_path):
    later = copy.deepcopy(fitted).set_params(prototypes_per_class=7, lambda_clst=0.5)
    loaded = ProtoPNetClassifier.load(fitted.save(tmp_path / "model"), device="cpu")
    loaded.set_params(prototypes_per_class=7, lambda_clst=0.5)
    for clf in (later, loaded):
        page = Page(write_report(clf, squares[0][:1], path=tmp_path / "report.html"))
        settings = {text(e) for e in page.find("code")}
        assert "prototypes_per_class=2" in settings
        assert not any(setting.startswith("lambda_clst") for setting in settings)


@pytest.mark.parametrize(("top", "left_out"), [(1, True), (100, False)])
def test_what_the_rest_holds_is_said_where_there_is_one(fitted, squares, tmp_path, top, left_out):
    X = squares[0][:3]
    page = Page(write_report(fitted, X, path=tmp_path / "report.html", top=top))
    said = "those that speak most against the class, are summed up in “(rest)”" in text(page.root)
    assert said == left_out == ("(rest): " in text(page.root))


def test_numbers_of_boxes_do_not_hide_one_another():
    picture = Thumbnail(200, 100, "")
    boxes = [(10, 10, 60, 60)] * 4 + [(0, 0, 3, 3), (195, 95, 200, 100)] + [(10, 10, 60, 60)] * 2
    places = np.array(report_cards._tags(boxes, picture)) * [2, 1]  # pixels
    apart = np.abs(places[:, None] - places).max(-1) + 200 * np.eye(len(boxes))
    assert apart.min() >= report_cards._TAG * 200 - 1e-6
    assert places.min() >= 0
    assert (places[:, 0] <= 200 - report_cards._TAG * 200).all()


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(1.0, "100.0 %"), (0.99999, "over 99.9 %"), (0.00001, "under 0.1 %"), (0.625, "62.5 %")],
)
def test_what_is_not_quite_certain_does_not_read_so(probability, shown):
    assert report._percent(probability) == shown


def test_y_of_another_length_is_refused(fitted, squares, tmp_path):
    with pytest.raises(ValueError, match="X has 24 images and y 3 labels"):
        write_report(fitted, squares[0], squares[1][:3], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"top": 0}, {"top": 2.5}, {"thumbnail": 0}, {"thumbnail": True}])
def test_a_wrong_parameter_is_refused(fitted, squares, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an int"):
        write_report(fitted, squares[0], path=tmp_path / "report.html", **wrong)


def test_a_place_that_cannot_be_written_to_is_refused_at_once(
    fitted, squares, tmp_path, backbone_images
):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_report(fitted, squares[0], path=tmp_path / "none" / "report.html")
    with pytest.raises(IsADirectoryError, match="must be a file"):
        write_report(fitted, squares[0], path=tmp_path)
    assert backbone_images == []


def test_an_unreadable_image_is_named_by_its_position_in_X(fitted, files, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(files[0]).read_bytes()[:1500])
    for bad in (tmp_path / "cut.png", tmp_path / "missing.png"):
        with pytest.raises(ImageError, match="position 10"):
            write_report(fitted, [*files[:10], bad], path=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_it_must_be_fitted(squares, tmp_path):
    with pytest.raises(NotFittedError):
        write_report(ProtoPNetClassifier("small_cnn"), squares[0], path=tmp_path / "report.html")


def test_without_jinja2_it_says_what_to_install(fitted, squares, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "protoclf\[report\]"'):
        write_report(fitted, squares[0], path=tmp_path / "report.html")


@pytest.mark.parametrize("failing", ["os.replace", "protoclf.report.Path.write_text"])
def test_a_failure_leaves_the_older_page_whole(failing, fitted, squares, tmp_path, monkeypatch):
    path = write_report(fitted, squares[0][:1], path=tmp_path / "report.html")
    older = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fails)
    with pytest.raises(OSError, match="disk full"):
        write_report(fitted, squares[0][:2], path=path)
    assert path.read_bytes() == older
    assert list(tmp_path.iterdir()) == [path]


def test_it_prints_nothing_unless_verbose(fitted, squares, tmp_path, capfd):
    write_report(fitted, squares[0][:2], path=str(tmp_path / "report.html"))
    assert capfd.readouterr() == ("", "")


def test_a_picture_keeps_to_its_limit():
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    picture = thumbnails.thumbnail_of(PIL.Image.fromarray(noise), 320)
    assert len(picture.uri) < 320**2 * thumbnails._BYTES_PER_PIXEL * 4 / 3 + 40
    assert (picture.width, picture.height) == (800, 800)


@pytest.mark.parametrize("side", [96, 320])
def test_a_picture_holds_no_metadata_of_its_file(side, tmp_path):
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).bytes(50_000)
    PIL.Image.new("RGB", (400, 300)).save(path, comment=b"Jane Doe" * 4000, icc_profile=noise)
    uri = thumbnails.thumbnail_of(PIL.Image.open(path), side).uri
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert not picture.info.keys() & {"comment", "icc_profile"}
    assert len(uri) < 5000


@pytest.mark.slow
def test_two_hundred_images_of_noise_take_less_than_20_megabytes(tmp_path):
    """No photo is harder to compress than noise, and each prototype has a source of its own."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (250, 360, 360, 3), dtype=np.uint8)
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=48,
        prototypes_per_class=10,
        distinct="images",
        joint_epochs=0,
        random_state=0,
        verbose=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        clf.fit(X, np.arange(250) % 25)
    assert clf.prototypes_["source_index"].nunique() == 250
    path = write_report(clf, X[:200], np.arange(200) % 25, tmp_path / "report.html")
    assert 10e6 < path.stat().st_size < 20e6


def test_metrics_stand_beside_the_classifier(fitted, squares, tmp_path):
    table = interpretability_report(
        fitted, *squares, metrics=["accuracy", "sparsity", "global size"]
    )
    page = Page(write_report(fitted, squares[0][:2], path=tmp_path / "page.html", metrics=table))
    (shown,) = page.find("table", "metrics")
    lines = [[text(cell) for cell in row] for row in page.find("tr", within=shown)[1:]]
    assert [line[0] for line in lines] == table.index.tolist()
    assert [float(line[1]) for line in lines] == pytest.approx(table["value"].tolist(), rel=1e-2)
    for line, (_, row) in zip(lines, table.iterrows(), strict=True):
        assert numbers(line[2]) == pytest.approx(row[["low", "high"]].dropna().tolist(), rel=1e-2)
        assert line[4] == row["better"]
    with pytest.raises(ValueError, match="interpretability_report; it lacks"):
        write_report(fitted, squares[0][:2], path=tmp_path / "p.html", metrics=table[["value"]])
    for wrong in (dict.fromkeys(("value", "low", "high", "baseline", "better")), 0.9):
        with pytest.raises(ValueError, match=r"must be the table of .*; got (dict|float)"):
            write_report(fitted, ["no file"], path=tmp_path / "p.html", metrics=wrong)


def test_many_prototypes_are_written_as_a_whole_number():
    columns = {"value": [1968.0, 0.12345], "low": np.nan, "high": np.nan, "baseline": [999.7, -1]}
    table = pd.DataFrame(columns, index=["global size", "gain"]).assign(better="lower")
    lines = [(line.value, line.baseline) for line in report._measured(table)]
    assert lines == [("1968", "1000"), ("0.123", "-1")]
