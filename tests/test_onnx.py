"""An exported classifier computes what the original does, and its service explains alike."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.editing import remove
from protoclf.explanation import BOX, FIELD, SOURCE_BOX
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from protoclf.onnx_export import METADATA_KEY, OUTPUTS, export_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
SERVICE = Path(__file__).parent.parent / "examples" / "serve_onnx.py"
SMALL = {
    **{"image_size": 48, "prototypes_per_class": 2, "warmup_epochs": 1, "joint_epochs": 1},
    **{"batch_size": 8, "random_state": 0, "verbose": 0},
}
SETTINGS = {
    "cosine": {},
    "log with add-on layers": {"similarity": "log", "latent_dim": 16, "lambda_l1": 0.01},
    "larger patches": {"similarity": "log", "prototype_size": (2, 3), "resize": "squash"},
    "patches of cosines": {"prototype_size": (3, 1), "latent_dim": 8},
    "whole images": {"prototype_size": "full", "image_size": 40},
    "resnet18": {"backbone": "resnet18", "weights": None, "image_size": 64, "lambda_l1": 0.01},
}


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def pixels_of(clf, X):
    return ImageDataset(Images(X), clf.preprocessing_).decoded(np.arange(len(X)))


def assert_equal(clf, session, X):
    """Compare all outputs of the file with those of the classifier, from the same pixels."""
    pixels = pixels_of(clf, X)
    found = dict(zip(OUTPUTS, session.run(None, {"images": pixels.numpy()}), strict=True))
    with torch.no_grad():
        logits, distance, cell = clf.module_(pixels)
        activations = clf.module_.activations(distance)
    maps = clf.similarity_maps(X)
    scale = max(1.0, logits.abs().max().item())
    np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(found["activations"], activations, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["maps"], maps, rtol=1e-5, atol=1e-5)
    row, col = np.divmod(cell.numpy(), maps.shape[3])
    sample, prototype = np.indices(row.shape)
    same = (found["cells"] == np.stack([row, col], axis=2)).all(2)
    there = maps[sample, prototype, found["cells"][..., 0], found["cells"][..., 1]]
    assert same.mean() > 0.95
    np.testing.assert_allclose(there, maps.max((2, 3)), rtol=0, atol=1e-5)  # another, as near


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "cosine" else [pytest.mark.slow]) for n in SETTINGS],
)
def test_all_outputs_equal_those_of_torch(name, squares, tmp_path):
    X, y = squares
    clf = ProtoPNetClassifier(**{"backbone": "small_cnn", **SMALL, **SETTINGS[name]}).fit(X, y)
    path = export_onnx(clf, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(path, full_check=True)
    session = session_of(path)
    for n in (1, 7, 24):
        assert_equal(clf, session, X[:n])


@pytest.mark.slow  # an export each
def test_two_classes_with_labels_that_are_numbers(squares, tmp_path):
    X, y = squares
    clf = ProtoPNetClassifier("small_cnn", **SMALL).fit(X, y == "red")
    session = session_of(export_onnx(clf, tmp_path / "model.onnx"))
    assert_equal(clf, session, X[:5])
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert about["classes"] == [False, True]
    assert about["prototypes"]["class"] == [False, False, True, True]


def test_the_description_holds_the_last_layer_and_where_prototypes_come_from(fitted, tmp_path):
    session = session_of(export_onnx(fitted, tmp_path / "model.onnx"))
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    weight = np.zeros_like(fitted.coef_)
    entries = about["weights"]
    weight[entries["class"], entries["prototype"]] = entries["weight"]
    np.testing.assert_array_equal(weight, fitted.coef_)
    assert about["format"] == 1
    assert about["classes"] == ["blue", "green", "red"]
    assert about["prototypes"]["source"] == fitted.prototypes_["source"].tolist()
    assert (about["image_size"], about["resize"]) == (48, "crop")
    image = session.get_inputs()[0]
    assert (image.name, image.type, image.shape[1:]) == ("images", "tensor(uint8)", [3, 48, 48])


@pytest.mark.slow  # an export each
def test_an_edited_classifier_is_exported_as_it_is_now(squares, tmp_path):
    X, y = squares
    clf = ProtoPNetClassifier("small_cnn", **SMALL).fit(X, y)
    clf = remove(clf, [0], reason="background")
    session = session_of(export_onnx(clf, tmp_path / "model.onnx"))
    assert session.get_outputs()[1].shape[1] == 5
    assert_equal(clf, session, X[:3])


@pytest.mark.slow
def test_export_is_in_float32_and_leaves_the_classifier_as_it_is(squares, tmp_path):
    X, y = squares
    clf = ProtoPNetClassifier("small_cnn", **SMALL, precision="bfloat16").fit(X, y)
    before = clf.decision_function(X)
    session = session_of(export_onnx(clf, tmp_path / "model.onnx"))
    np.testing.assert_array_equal(clf.decision_function(X), before)
    clf.set_params(precision="float32")
    (logits,) = session.run(["logits"], {"images": pixels_of(clf, X).numpy()})
    np.testing.assert_allclose(logits, clf.decision_function(X), rtol=0, atol=1e-4)
    assert np.abs(logits - before).max() > 1e-4


class OtherInExports(nn.Sequential):
    """Computes something else in an exported graph, as an exporter's bug would."""

    def forward(self, x):
        return super().forward(x) * (1.5 if torch.compiler.is_exporting() else 1)


class BranchesOnPixels(nn.Sequential):
    """Does what no graph expresses."""

    def forward(self, x):
        return super().forward(x) * (2 if x.mean() > 0 else 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(OtherInExports, "computes other logits"), (BranchesOnPixels, "cannot be exported")],
)
def test_a_backbone_that_onnx_gets_wrong_is_refused_and_the_older_file_stays(
    kind, message, squares, tmp_path
):
    backbone = kind(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
    settings = SMALL | {"warmup_epochs": 0, "joint_epochs": 0}
    clf = ProtoPNetClassifier(backbone, **settings).fit(*squares)
    older = tmp_path / "model.onnx"
    older.write_bytes(b"older")
    with pytest.raises(RuntimeError, match=message):
        export_onnx(clf, older)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package, fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"protoclf\[onnx\]"):
        export_onnx(fitted, tmp_path / "model.onnx")


def test_what_cannot_be_exported_or_written_is_refused(fitted, tmp_path):
    with pytest.raises(NotFittedError):
        export_onnx(ProtoPNetClassifier(), tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="gone"):
        export_onnx(fitted, tmp_path / "gone" / "model.onnx")
    with pytest.raises(IsADirectoryError, match=re.escape(f"'{tmp_path}' is a folder")):
        export_onnx(fitted, tmp_path)


# The service --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service_module():
    spec = importlib.util.spec_from_file_location("serve_onnx", SERVICE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Birds to learn from, and photos that differ in size, orientation, format and colour mode."""
    root = tmp_path_factory.mktemp("photos")
    X, y, _ = make_birds(root / "birds", n_per_class=3, image_size=96)
    made = []
    for i, orientation in enumerate((1, 3, 5, 6, 8)):
        path = root / f"{orientation}.jpg"
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        picture = PIL.Image.open(X[3 * i]).resize((700 + 31 * i, 520 - 7 * i))
        picture.save(path, exif=exif, quality=95)  # so large that it is decoded at a half or less
        made.append(str(path))
    for extension, mode in (("png", "L"), ("png", "RGB"), ("gif", "P")):
        path = root / f"{mode}.{extension}"
        PIL.Image.open(X[-1]).convert(mode).resize((75, 130)).save(path)
        made.append(str(path))
    return X, y, made


@pytest.mark.parametrize(
    "settings",
    [
        {"resize": "crop"},
        pytest.param(
            {"resize": "squash", "similarity": "log", "prototype_size": (2, 3), "lambda_l1": 0.01},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["crop", "squash"],
)
def test_the_service_writes_the_sheets_that_explain_gives(
    settings, service_module, photos, tmp_path
):
    X, y, new = photos
    clf = ProtoPNetClassifier("small_cnn", **SMALL, **settings).fit(X, y)
    service = service_module.Service(export_onnx(clf, tmp_path / "model.onnx"))
    sheet = clf.explain([*new, *X[:8]])
    for i, path in enumerate([*new, *X[:8]]):
        (label, logit, probability), rows = service.explain(path)
        expected = sheet[sheet["sample"] == i].sort_values("prototype")
        rows = sorted(rows, key=lambda row: row["prototype"])
        assert label == expected["class"].iloc[0]
        assert logit == pytest.approx(expected["logit"].iloc[0], abs=1e-4)
        assert probability == pytest.approx(expected["probability"].iloc[0], abs=1e-5)
        assert [row["prototype"] for row in rows] == expected["prototype"].tolist()
        for name in ("prototype_class", "row", "col", *FIELD, "source", *SOURCE_BOX):
            assert [row[name] for row in rows] == expected[name].tolist(), name
        for name in ("similarity", "weight", "contribution"):
            values = [row[name] for row in rows]
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-4)
        boxes = np.array([[row[side] for side in BOX] for row in rows])
        pixel = np.ceil(max(clf.shown_region([700, 520])[2:]) / 48)  # one of the input
        assert np.abs(boxes - expected[BOX].to_numpy()).max() <= pixel


def test_the_service_goes_on_after_a_bad_photo(
    service_module, fitted, photos, tmp_path, monkeypatch, capsys
):
    path, bad = export_onnx(fitted, tmp_path / "model.onnx"), tmp_path / "bad.jpg"
    bad.write_bytes(b"text")
    given = [photos[2][0], bad, tmp_path / "gone.jpg", photos[2][1]]
    monkeypatch.setattr(sys, "argv", ["serve_onnx.py", *map(str, (path, *given))])
    with pytest.raises(SystemExit, match=r"bad\.jpg: UnidentifiedImageError(?s:.*)gone\.jpg: File"):
        service_module.main()
    printed = capsys.readouterr().out
    assert all(f"{photo}: " in printed for photo in photos[2][:2])


@pytest.mark.slow  # a process of its own
def test_the_service_runs_without_torch(fitted, photos, tmp_path):
    path = export_onnx(fitted, tmp_path / "model.onnx")
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "loaded = {'torch', 'protoclf', 'pandas', 'sklearn'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    command = [sys.executable, "-c", program, SERVICE, path, photos[2][0], "--top", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert fitted.predict([photos[2][0]])[0] in done.stdout.splitlines()[0]
    assert len(done.stdout.splitlines()) == 4
