"""The paper's table: rows are run once, hold what was run, and stand beside the paper's figures."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from skorch.history import History
from torch.utils.data import TensorDataset

from protoclf import ProtoPNetClassifier

SCRIPT = Path(__file__).parent.parent / "examples" / "reproduce_paper.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_paper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return call


def rows_in(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("settings", ["paper", "default"])
def test_rows_hold_what_the_saved_models_score_and_are_not_run_again(run, settings, tmp_path):
    printed = run("--quick", "--settings", settings, "--output", tmp_path, "--seed", 3)
    rows = rows_in(tmp_path)
    names = ["small_cnn", "squeezenet1_1", "small_cnn+squeezenet1_1"]
    assert sorted(rows) == sorted(f"birds-{settings}-{name}-seed3" for name in names)
    test = sorted((tmp_path / "birds" / "test").rglob("*.jpg"))
    labels = np.array([path.parent.name for path in test])
    logits = 0
    for name in names[:2]:
        clf = ProtoPNetClassifier.load(tmp_path / f"birds-{settings}-{name}-seed3")
        assert clf.resize == "squash"
        assert clf.similarity == ("log" if settings == "paper" else "cosine")
        row = rows[f"birds-{settings}-{name}-seed3"]
        assert row["accuracy"] == clf.score(test, labels)
        assert (row["train_images"], row["test_images"], row["passes"]) == (80, 40, 2)
        logits = logits + clf.decision_function(test)
    summed = (clf.classes_[logits.argmax(1)] == labels).mean()
    assert rows[f"birds-{settings}-small_cnn+squeezenet1_1-seed3"]["accuracy"] == summed
    assert f"{100 * summed:.1f} (1)" in printed

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    again = run("--quick", "--settings", settings, "--output", tmp_path, "--seed", 3)
    assert again.count("is there already") == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == written


@pytest.fixture
def birds(script, monkeypatch, tmp_path):
    """Arguments of a quick row, and its images."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--output", str(tmp_path)])
    args = script.arguments()
    return args, script.read_images(args)


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
def test_the_cycle_that_is_best_on_images_held_out_is_delivered(
    script, birds, tmp_path, monkeypatch
):
    args, images = birds
    train = images[images["split"] == "train"]

    def is_first_cycle(net):  # whatever the accuracies are, the first is called the best
        ended = net.history[-1, "stage"] == "last layer"
        return ended and len(script.accuracies_of_cycles(net)) == 1

    monkeypatch.setattr(script, "is_best_cycle", is_first_cycle)
    two = script.classifier(args, "small_cnn", tmp_path / "two")
    one = clone(two).set_params(cycles=1, callbacks="disable")
    first, delivered = (clf.fit(train["path"], train["class"]) for clf in (one, two))
    X = images["path"]
    np.testing.assert_allclose(
        delivered.decision_function(X), first.decision_function(X), atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.slow
def test_a_row_that_was_interrupted_goes_on_to_the_same_end(script, birds, tmp_path, monkeypatch):
    args, images = birds
    script.row(args, "small_cnn", images, script.fitted)
    args.output, whole = tmp_path / "other", rows_in(tmp_path)
    args.output.mkdir()
    loader, loaders = script.Passes.__call__, SimpleNamespace(made=0)

    def failing(self, dataset, **parameters):
        loaders.made += 1
        if loaders.made == 3:
            raise OSError("the power went")
        return loader(self, dataset, **parameters)

    monkeypatch.setattr(script.Passes, "__call__", failing)
    with pytest.raises(OSError, match="power"):
        script.row(args, "small_cnn", images, script.fitted)
    assert rows_in(args.output) == {}
    script.row(args, "small_cnn", images, script.fitted)
    assert loaders.made == 4  # warm-up and the first cycle were not trained again
    for rows in (whole, rows_in(args.output)):
        (row,) = rows.values()
        row.pop("seconds")
    assert rows_in(args.output).keys() == whole.keys()
    assert row == next(iter(whole.values()))
    assert sorted(path.name for path in args.output.iterdir()) == [
        "birds-paper-small_cnn-seed0",
        "birds-paper-small_cnn-seed0.json",
    ]


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
def test_a_row_that_was_interrupted_while_it_was_scored_is_not_fitted_again(
    script, birds, tmp_path, monkeypatch
):
    args, images = birds
    with monkeypatch.context() as patched:
        patched.setattr(ProtoPNetClassifier, "score", killed)
        patched.setattr(script.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            script.row(args, "small_cnn", images, script.fitted)
    monkeypatch.setattr(ProtoPNetClassifier, "fit", killed)
    script.row(args, "small_cnn", images, script.fitted)
    ((name, row),) = rows_in(tmp_path).items()
    cycles = script.accuracies_of_cycles(ProtoPNetClassifier.load(tmp_path / name))[:2]
    assert row["validation_accuracy"] == max(cycles)
    assert row["cycle"] == np.argmax(cycles) + 1
    assert not (tmp_path / f"{name}-unfinished").exists()


def killed(*args, **kwargs):
    raise KeyboardInterrupt


def test_only_a_cycle_better_than_all_before_is_the_best(script):
    net = SimpleNamespace(history=History())
    found = []
    for stage, accuracy in [
        *(("joint", 0.9), ("projection", 0.9), ("last layer", 0.5)),
        *(("joint", 0.9), ("last layer", 0.5), ("last layer", 0.6), ("last layer", 0.55)),
    ]:
        net.history.new_epoch()
        net.history.record("stage", stage)
        net.history.record("valid_acc", accuracy)
        found.append(script.is_best_cycle(net))
    assert found == [False, False, True, False, False, True, False]


def test_an_epoch_passes_each_image_so_many_times(script):
    data = TensorDataset(torch.arange(7))
    shuffled = script.Passes(3)(data, shuffle=True, batch_size=5)
    assert len(shuffled) == 5
    seen = torch.cat([batch for (batch,) in shuffled])
    assert seen.bincount().tolist() == [3] * 7
    (in_order,) = next(iter(script.Passes(3)(data, shuffle=False, batch_size=7)))
    assert in_order.tolist() == list(range(7))


def test_the_table_holds_what_was_run_beside_the_papers_figures(run, script, tmp_path):
    for settings, backbone, seed, accuracy in [
        *(("paper", "vgg19", 0, 0.70), ("paper", "vgg19", 1, 0.72), ("paper", "vgg19", 2, 0.74)),
        *(("default", script.ENSEMBLE, 0, 0.8125), ("default", "resnet18", 0, 0.5)),
    ]:
        row = {"settings": settings, "backbone": backbone, "accuracy": accuracy}
        (tmp_path / f"cub-{settings}-{backbone}-seed{seed}.json").write_text(json.dumps(row))
    printed = run("--table", "--output", tmp_path)
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = {line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert cells["vgg19"] == ["72.0 ± 2.0 (3)", "–", "78.0 ± 0.2", "75.1 ± 0.4"]
    assert cells["vgg19 + resnet34 + densenet121"][:3] == ["–", "81.2 (1)", "84.8"]
    assert cells["resnet34"] == ["–", "–", "79.2 ± 0.1", "82.3 ± 0.3"]
    assert cells["resnet18"][:2] == ["–", "50.0 (1)"]
    assert "vgg19" not in run("--table", "--data", "cars", "--output", tmp_path)


def test_data_and_weights_are_found_by_name(script, tmp_path, monkeypatch):
    images = pd.DataFrame({"path": ["a.jpg"], "class": ["a"], "split": ["train"]})
    asked = []
    monkeypatch.setattr(
        script, "read_cub", lambda root, crop_to: (asked.append((root, crop_to)), (images, None))[1]
    )
    args = SimpleNamespace(data="cub", root="CUB", output=tmp_path)
    assert script.read_images(args) is images
    assert asked == [("CUB", tmp_path / "cub-cropped")]
    args.root = None
    with pytest.raises(SystemExit, match="--root"):
        script.read_images(args)
    assert script.weights_of("IMAGENET1K_V1", "vgg16") == "IMAGENET1K_V1"
    assert script.weights_of(None, "vgg16") is None
    assert script.weights_of(tmp_path, "vgg16") == tmp_path / "vgg16.pth"
