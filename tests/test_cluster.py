"""Searches in other processes: the scores of a serial search, one cache for all, lost workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from skorch.callbacks import Callback

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.scorers import n_prototypes_scorer

EXAMPLES = Path(__file__).parent.parent / "examples"
GRID = {"lambda_clst": [0.0, 0.8], "lambda_sep": [0.0, 0.3]}
SCORES = {"accuracy": "accuracy", "loss": "neg_log_loss", "prototypes": n_prototypes_scorer}


@pytest.fixture(scope="module")
def photos(squares, tmp_path_factory):
    """Paths of 24 pictures, each twelve times, and labels: enough that joblib scatters them."""
    folder = tmp_path_factory.mktemp("사진")
    X, y = squares
    paths = [str(folder / f"{i}.png") for i in range(len(X))]
    for path, pixels in zip(paths, X, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths * 12, y.tolist() * 12


def search(photos, memory, **parameters):
    """Return a search that was fitted, as the page on clusters has it: lists, not arrays."""
    X, y = photos
    clf = ProtoPNetClassifier(
        "small_cnn",
        weights=None,
        train_backbone=False,
        warmup_epochs=1,
        image_size=48,
        prototypes_per_class=2,
        memory=memory,
        random_state=0,
        verbose=0,
        **parameters,
    )
    splits = StratifiedKFold(2, shuffle=True, random_state=0).split(X, y)
    folds = [(train.tolist(), test.tolist()) for train, test in splits]
    return GridSearchCV(
        clf, GRID, scoring=SCORES, refit=False, cv=folds, error_score="raise", n_jobs=2
    ).fit(X, y)


@pytest.fixture(scope="module")
def serial(photos, tmp_path_factory):
    """The search in this process, and the folder of its cache."""
    memory = tmp_path_factory.mktemp("serial")
    with joblib.parallel_config("sequential"):
        return search(photos, memory), memory


def assert_same_scores(found, serial):
    for name in SCORES:
        column = f"mean_test_{name}"
        np.testing.assert_allclose(
            found.cv_results_[column], serial.cv_results_[column], rtol=1e-5, err_msg=name
        )


def features(memory):
    return {file.relative_to(memory): np.load(file) for file in memory.rglob("*.npy")}


def assert_same_features(memory, expected):
    found, expected = features(memory), features(expected)
    assert len(found) == 24
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def client():
    """Two worker processes on this machine, which restart when they die."""
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky"])  # forks hang where torch has threads
def test_a_search_in_processes_of_joblib_scores_as_a_serial_one(photos, serial, tmp_path, backend):
    with joblib.parallel_config(backend):
        found = search(photos, tmp_path)
    assert_same_scores(found, serial[0])
    assert_same_features(tmp_path, serial[1])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_search_on_dask_scores_as_a_serial_one(photos, serial, tmp_path, client):
    with joblib.parallel_config("dask"):
        found = search(photos, tmp_path)
    assert_same_scores(found, serial[0])
    assert_same_features(tmp_path, serial[1])


class Killer(Callback):
    """Kills its process at the start of a fit, if that is one of some processes."""

    def __init__(self, victims):
        self.victims = victims

    def on_train_begin(self, net, **kwargs):
        if os.getpid() in self.victims:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("n_victims", [1, 2])
def test_a_search_outlives_its_workers(photos, serial, tmp_path, client, n_victims):
    before = client.run(os.getpid).values()
    victims = sorted(before)[:n_victims]
    with joblib.parallel_config("dask"):
        found = search(photos, tmp_path, callbacks=[Killer(victims)])
    assert not set(victims) & set(client.run(os.getpid).values())
    assert_same_scores(found, serial[0])
    assert_same_features(tmp_path, serial[1])


# ---- the examples -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_scoring_on_a_cluster_outlives_a_worker(fitted, photos, tmp_path, client):
    folder = Path(photos[0][0]).parent
    X = [Path(path).name for path in photos[0][:160]]  # relative: workers are in another folder
    model = fitted.save(tmp_path / "model")
    (tmp_path / "list.txt").write_text("\n".join(X), encoding="utf-8")
    pids = client.run(os.getpid)
    command = [sys.executable, EXAMPLES / "score_many.py", model, tmp_path / "list.txt"]
    command += [tmp_path / "out", "--partition", "2", "--scheduler", client.scheduler.address]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as job:
        while len(list(tmp_path.glob("out/sheets/part*"))) < 5:
            assert job.poll() is None
            time.sleep(0.01)
        os.kill(min(pids.values()), signal.SIGKILL)
    assert job.returncode == 0
    got = pd.read_parquet(tmp_path / "out" / "sheets")
    assert got["path"].drop_duplicates().tolist() == X[:24]
    expected = fitted.explain(photos[0][:160]).assign(path=got["path"])
    pd.testing.assert_frame_equal(got, expected, check_dtype=False, rtol=1e-4, atol=1e-5)


def run_example(*arguments):
    command = [sys.executable, EXAMPLES / "search_prototypes.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_accuracy_is_drawn_against_the_number_of_prototypes(tmp_path):
    done = run_example("--quick", "--output", tmp_path / "찾기")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "찾기.csv")
    assert len(table.drop_duplicates(["lambda_clst", "lambda_sep"])) == 4
    assert table["n_prototypes"].between(1, 40).all()
    best = table[table["best"]]
    assert best["accuracy"].max() == table["accuracy"].max()
    assert best["n_prototypes"].min() == table["n_prototypes"].min()
    assert (tmp_path / "찾기.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_search_takes_groups_of_photos(tmp_path):
    X, _, _ = make_birds(tmp_path / "새", 6, 48)
    names = [Path(path).relative_to(tmp_path / "새").as_posix() for path in X]
    specimens = [f"{name[:-7]}{i // 2}" for i, name in enumerate(names)]  # two photos of each
    table = pd.DataFrame({"path": names, "group": specimens})
    table[:-3].to_csv(tmp_path / "some.csv", index=False)
    table.to_csv(tmp_path / "all.csv", index=False)
    options = ["--quick", "--images", tmp_path / "새", "--backbone", "small_cnn"]
    options += ["--prototypes", "2", "--output", tmp_path / "search", "--groups"]
    incomplete = run_example(*options, tmp_path / "some.csv")
    assert f"no group for 3 images: ['{names[-3]}'" in incomplete.stderr
    done = run_example(*options, tmp_path / "all.csv")  # StratifiedGroupKFold asks for groups
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "search.csv")) == 4
