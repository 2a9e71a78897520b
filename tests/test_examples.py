"""The examples and benchmarks run, and the quickstart keeps what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.explanation import BOX

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_prints_accuracies_and_a_sheet_and_saves_it(tmp_path):
    arguments = ("--epochs", 1, "--per-class", 6, "--prototypes", 2)
    printed = run("quickstart.py", *arguments, "--output", tmp_path / "결과 폴더")
    assert "test accuracy, ProtoPNet" in printed
    assert "black box on the same backbone" in printed
    sheet = pd.read_csv(tmp_path / "결과 폴더" / "sheet.csv")
    assert sheet["class"].nunique() == 2
    assert (tmp_path / "결과 폴더" / "explanation.png").stat().st_size > 10_000


@pytest.mark.slow
def test_quickstart_takes_a_folder_of_classes(tmp_path):
    make_birds(tmp_path / "birds", 8, 64)
    arguments = ("--images", tmp_path / "birds", "--epochs", 1, "--prototypes", 2)
    assert "48 training images, 16 test" in run("quickstart.py", *arguments, "--output", tmp_path)


@pytest.mark.slow
def test_confounders_are_found_and_forbidden(tmp_path):
    arguments = ("--epochs", 2, "--per-class", 6, "--output", tmp_path)
    printed = run("confounders.py", *arguments)
    assert "where find_confounders has them" in printed
    assert "with marks, trained on" in printed
    assert "without marks" in printed


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Training birds, new ones, and a classifier with the quickstart's settings."""
    root = tmp_path_factory.mktemp("birds")
    train, test = make_birds(root / "train", 40, 128), make_birds(root / "test", 20, 128, start=40)
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=128,
        prototypes_per_class=10,
        joint_epochs=40,
        batch_size=8,
        lr=2e-3,
        backbone_lr=2e-3,
        lambda_l1=1e-3,
        distinct="patches",
        random_state=0,
        verbose=0,
    )
    return train, test, clf.fit(*train[:2])


@pytest.mark.slow
@pytest.mark.timeout(900)  # it trains, for minutes where the machine is busy
def test_quickstart_settings_reach_95_percent_on_new_birds(birds):
    _, (X_test, y_test, _), clf = birds
    assert clf.score(X_test, y_test) >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attribution", ["upsampled", "gradient"])
def test_boxes_of_highest_contributions_overlap_the_part_that_tells_twins_apart(birds, attribution):
    _, (X, _, parts), clf = birds
    parts = parts[parts["distinguishing"]].set_index("path")
    best = clf.explain(X, top=1, attribution=attribution)
    best = best[best["rank"] == 1]
    boxes, part = best[BOX].to_numpy(int), parts.loc[best["path"], BOX].to_numpy(int)
    start, stop = np.maximum(boxes, part)[:, :2], np.minimum(boxes, part)[:, 2:]
    assert (start < stop).all(1).mean() >= 0.8


@pytest.mark.slow
def test_one_image_is_explained(tmp_path):
    printed = run("explain_one.py", "--epochs", 1, "--output", tmp_path / "why.png")
    assert "difference" in printed
    assert (tmp_path / "why.png").stat().st_size > 10_000


@pytest.mark.slow
def test_sheets_are_exported_and_asked(tmp_path):
    printed = run("export_sheets.py", "--epochs", 1, "--output", tmp_path / "sheets.parquet")
    assert "48 test images" in printed
    assert "blame" in printed
    assert pd.read_parquet(tmp_path / "sheets.parquet")["sample"].nunique() == 48


def test_a_folder_for_sheets_that_is_not_there_is_told_before_the_fit(tmp_path):
    output = tmp_path / "gone" / "sheets.parquet"
    command = [sys.executable, EXAMPLES / "export_sheets.py", "--epochs", "0", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--output: there is no folder '{output.parent}'" in done.stderr


DRAWN_BY = """
import os
import pathlib
import protoclf.datasets

draw = protoclf.datasets.make_birds

def make_birds(*args, **kwargs):
    pathlib.Path("drawn by " + os.environ["RANK"]).touch()
    return draw(*args, **kwargs)

protoclf.datasets.make_birds = make_birds
"""


@pytest.mark.slow  # two processes
def test_the_first_of_several_processes_draws_the_birds_of_the_page_about_gpus(tmp_path):
    pytest.importorskip("accelerate")
    page = (EXAMPLES.parent / "docs" / "gpus.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "train.py").write_text(DRAWN_BY + block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("drawn by *")] == ["drawn by 0"]
    assert (tmp_path / "trained").is_dir()


BENCHMARKS = sorted(
    path.name
    for path in (EXAMPLES / "benchmarks").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and "--quick" in path.read_text()
)


@pytest.mark.slow  # a process or several each
@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmark_runs_in_its_quick_form(script):
    assert run(f"benchmarks/{script}", "--quick")


def test_every_benchmark_is_known():
    assert len(BENCHMARKS) >= 11
