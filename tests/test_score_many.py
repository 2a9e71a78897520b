"""Scoring any number of images in partitions: the same sheets, restarts, failures, bounded work."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from protoclf import ProtoPNetClassifier

pytest.importorskip("pyarrow")
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "score_many.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a function of its arguments, in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import score_many
    import score_partition

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        score_partition.model_of.cache_clear()  # a process of its own
        score_many.main()

    return run


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("models") / "모델")


@pytest.fixture(scope="module")
def photos(squares, tmp_path_factory):
    """A folder of 40 pictures in two folders, and its paths in their order."""
    folder = tmp_path_factory.mktemp("photos") / "사진"
    paths = [folder / f"{i % 2} 번째" / f"새 {i:02}.png" for i in range(40)]
    for path, pixels in zip(paths, itertools.cycle(squares[0]), strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    return folder, sorted(map(str, paths))


def assert_same(got, expected):
    pd.testing.assert_frame_equal(got, expected, check_dtype=False, rtol=1e-4, atol=1e-5)


def files_of(output):
    return sorted((output / "sheets").iterdir())


# ---- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("classes", ["predicted", "all"])
def test_sheets_are_those_of_one_call(script, saved, photos, fitted, tmp_path, top, classes):
    folder, paths = photos
    options = ["--classes", classes] + ([] if top is None else ["--top", top])
    script(saved, folder, tmp_path / "out", "--partition", 16, *options)
    assert len(files_of(tmp_path / "out")) == 3
    got = pd.read_parquet(tmp_path / "out" / "sheets")
    assert_same(got, fitted.explain(paths, classes=classes, top=top))
    assert not (tmp_path / "out" / "failures").exists()


def test_predictions_are_those_of_one_call(script, saved, photos, fitted, tmp_path):
    folder, paths = photos
    script(saved, folder, tmp_path / "out", "--partition", 16, "--what", "predictions")
    got = pd.read_parquet(tmp_path / "out" / "predictions")
    assert got["path"].tolist() == paths
    assert got["class"].tolist() == fitted.predict(paths).tolist()
    np.testing.assert_allclose(got["probability"], fitted.predict_proba(paths).max(1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["text", "csv", "windows"])
def test_a_list_of_paths_is_as_good_as_a_folder(script, saved, photos, tmp_path, kind):
    _, paths = photos
    chosen = paths[7:3:-1]  # in an order of its own
    if kind == "csv":
        file, options = tmp_path / "목록.csv", ["--column", "photo"]
        pd.DataFrame({"id": range(4), "photo": chosen}).to_csv(file, index=False)
    else:
        file, options = tmp_path / "list.txt", []
        encoding, end = ("utf-8-sig", "\r\n") if kind == "windows" else ("utf-8", "\n")
        file.write_bytes((end.join(chosen) + 2 * end).encode(encoding))
    script(saved, file, tmp_path / "out", *options)
    sheets = pd.read_parquet(tmp_path / "out" / "sheets")
    assert sheets.drop_duplicates("sample")["path"].tolist() == chosen


def test_the_summary_counts_and_estimates(script, saved, photos, tmp_path, capsys):
    script(saved, photos[0], tmp_path / "out")
    printed = capsys.readouterr().out
    assert "40 images in" in printed
    assert "a million at this rate" in printed
    script(saved, photos[0], tmp_path / "out")
    assert "0 images in" in (again := capsys.readouterr().out)
    assert "40 were there already" in again
    assert "a million" not in again  # nothing was measured


def test_what_has_no_images_is_refused(script, saved, photos, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit, match="holds no images"):
        script(saved, tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "table.csv").write_text("file\na.jpg\n")
    with pytest.raises(SystemExit, match=r"no column 'path' but \['file'\]"):
        script(saved, tmp_path / "table.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--partition", "--workers", "--threads", "--top"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_numbers_start_at_one(script, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        script("model", "images", tmp_path / "out", option, value)
    message = f"argument {option}: expected a whole number from 1 on, got {value!r}"
    assert message in capsys.readouterr().err


# ---- what cannot be read ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sheets", "predictions"])
def test_bad_images_are_listed_and_the_others_scored(
    script, saved, photos, fitted, tmp_path, what, capsys
):
    paths = list(photos[1])
    whole = Path(paths[0]).read_bytes()
    bad = {3: whole[: len(whole) // 2], 17: b"", 18: b"text", 19: None}
    for position, content in bad.items():
        paths[position] = str(tmp_path / f"나쁜 {position}.png")
        if content is not None:
            Path(paths[position]).write_bytes(content)
    (tmp_path / "list.txt").write_text("\n".join(paths), encoding="utf-8")
    given = saved, tmp_path / "list.txt", tmp_path / "out", "--partition", 9, "--what", what
    script(*given)
    assert "4 cannot be read" in capsys.readouterr().out
    failures = pd.read_parquet(tmp_path / "out" / "failures")
    assert failures["sample"].tolist() == list(bad)
    assert failures["path"].tolist() == [paths[i] for i in bad]
    reasons = failures["reason"].tolist()
    assert "truncated" in reasons[0]
    assert "empty" in reasons[1]
    assert "not an image" in reasons[2]
    got = pd.read_parquet(tmp_path / "out" / what)
    good = [i for i in range(40) if i not in bad]
    assert got["sample"].drop_duplicates().tolist() == good
    expected = fitted.explain([paths[i] for i in good])
    if what == "sheets":
        assert_same(got, expected.assign(sample=np.array(good)[expected["sample"]]))

    for position in bad:  # mended
        shutil.copy(photos[1][0], paths[position])
    script(*given)
    assert len(pd.read_parquet(tmp_path / "out" / "failures")) == 4  # not asked to look again
    script(*given, "--retry")
    assert not list((tmp_path / "out" / "failures").iterdir())
    assert pd.read_parquet(tmp_path / "out" / what)["sample"].nunique() == 40


def test_a_partition_of_failures_alone_reads_like_the_others(script, saved, photos, tmp_path):
    lines = [*photos[1][:4], *(f"gone {i}.png" for i in range(4)), *photos[1][4:6]]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    script(saved, tmp_path / "list.txt", tmp_path / "out", "--partition", 4, "--top", 1)
    sheets = pd.read_parquet(tmp_path / "out" / "sheets")
    assert sheets["sample"].unique().tolist() == [0, 1, 2, 3, 8, 9]
    dtypes = {tuple(pd.read_parquet(file).dtypes) for file in files_of(tmp_path / "out")}
    assert len(dtypes) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_parquet_cannot_hold_are_listed(script, saved, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    name = os.fsencode(folder) + b"/\xbb\xf5.png"  # in an older Korean encoding
    shutil.copy(photos[1][0], os.fsdecode(name))
    shutil.copy(photos[1][0], folder / "새.png")
    script(saved, folder, tmp_path / "out")
    (path,) = pd.read_parquet(tmp_path / "out" / "sheets")["path"].unique()
    assert path == str(folder / "새.png")
    (failure,) = pd.read_parquet(tmp_path / "out" / "failures").itertuples()
    assert failure.path == str(folder / "\\xbb\\xf5.png")
    assert "not UTF-8" in failure.reason


# ---- restarts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_job_goes_on_and_computes_nothing_twice(saved, photos, fitted, tmp_path):
    _, paths = photos
    paths = paths * 5
    (tmp_path / "list.txt").write_text("\n".join(paths), encoding="utf-8")
    output = tmp_path / "out"
    command = [sys.executable, SCRIPT, saved, tmp_path / "list.txt", output, "--partition", "2"]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (output / "sheets").exists() or len(list(output.glob("sheets/part*"))) < 5:
        assert job.poll() is None
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    (output / "sheets" / ".part-0000099.parquet.0").write_bytes(b"half")  # as a kill may leave
    before = {file: file.stat().st_mtime_ns for file in output.glob("sheets/part*")}
    assert 5 <= len(before) < 100
    subprocess.run(command, check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(files_of(output)) == 100  # and nothing hidden
    assert_same(pd.read_parquet(output / "sheets"), fitted.explain(paths))


@pytest.mark.parametrize("change", ["model", "images", "partition", "classes", "top", "what"])
def test_a_job_with_other_settings_is_refused(script, saved, photos, fitted, tmp_path, change):
    folder = tmp_path / "photos"
    shutil.copytree(photos[0], folder)
    given, options = [saved, folder, tmp_path / "out"], []
    script(*given)
    before = files_of(tmp_path / "out")[0].stat().st_mtime_ns
    if change == "model":
        other = ProtoPNetClassifier.load(saved)
        other.module_.last_layer.weight.data *= 2
        given[0] = other.save(tmp_path / "other")
    elif change == "images":
        shutil.copy(photos[1][0], folder / "new.png")
    else:
        values = {"partition": 7, "classes": "all", "top": 3, "what": "predictions"}
        options = [f"--{change}", values[change]]
    with pytest.raises(SystemExit, match=f"begun with other {change}: give another OUTPUT"):
        script(*given, *options)
    assert files_of(tmp_path / "out")[0].stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "job.json").read_text())["partition"] == 10_000


def test_relative_paths_go_on_in_their_folder_alone(script, saved, photos, tmp_path, monkeypatch):
    names = [os.path.relpath(path, photos[0]) for path in photos[1]]
    (tmp_path / "list.txt").write_text("\n".join(names), encoding="utf-8")
    given = saved, tmp_path / "list.txt", tmp_path / "out", "--partition", 16
    monkeypatch.chdir(photos[0])
    script(*given)
    last = files_of(tmp_path / "out")[-1]
    last.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="begun with other working folder: give another OUTPUT"):
        script(*given)
    assert not last.exists()
    monkeypatch.chdir(photos[0])
    script(*given)
    assert last.exists()
    assert not (tmp_path / "out" / "failures").exists()


def test_a_worker_with_another_model_in_the_same_place_stops(script, saved, photos, tmp_path):
    import score_partition
    from score_partition import Job, Part

    folders = [str(saved), "0" * 64, None, str(tmp_path), str(tmp_path / "out")]
    job = Job(*folders, "sheets", "all", None, None)
    with pytest.raises(ValueError, match="another model here"):
        score_partition.score(job, Part(0, 0, photos[1]))


# ---- bounds -----------------------------------------------------------------------------------


def test_rows_of_few_images_are_in_memory_at_a_time(script, saved, photos, tmp_path, monkeypatch):
    import score_partition

    seen = []
    table_of = score_partition.table_of

    def counted(clf, job, X):
        seen.append(len(X))
        return table_of(clf, job, X)

    monkeypatch.setattr(score_partition, "table_of", counted)
    monkeypatch.setattr(score_partition, "CHUNK", 6)
    script(saved, photos[0], tmp_path / "out")
    assert seen == [1, *[6] * 6, 4]  # the first tells what the columns are
    assert len(files_of(tmp_path / "out")) == 1


def identity(job, part):
    return part, 0.0, 0.0


def test_few_partitions_are_on_their_way_to_a_cluster(script, monkeypatch):
    distributed = pytest.importorskip("dask.distributed")
    import score_many

    drawn = []
    monkeypatch.setattr(score_many, "score", identity)
    todo = (drawn.append(k) or score_many.Part(k, k, []) for k in range(50))
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None
    ) as client:
        done = []
        for part, *_ in score_many.results(client, None, todo):
            done.append(part.number)
            assert len(drawn) - len(done) < 4
    assert sorted(done) == list(range(50))


@pytest.mark.slow  # two processes that import torch
def test_two_workers_write_the_same(saved, photos, fitted, tmp_path):
    folder, paths = photos
    command = [sys.executable, SCRIPT, saved, folder, tmp_path / "out"]
    options = ["--partition", "4", "--workers", "2"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    assert "for each of 2 worker(s)" in done.stdout
    assert_same(pd.read_parquet(tmp_path / "out" / "sheets"), fitted.explain(paths))
