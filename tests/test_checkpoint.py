"""A fit that is stopped goes on from its checkpoint and ends in the same model."""

import collections
import errno
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fit_and_die import Stop, classifier, pictures
from skorch.callbacks import Callback, EarlyStopping
from skorch.dataset import ValidSplit

from protoclf import ProtoPNetClassifier
from protoclf.checkpoint import FILE, CheckpointError
from protoclf.files import write_checked

WORKER = Path(__file__).parent / "fit_and_die.py"


def assert_same_model(one, other, X):
    state = other.module_.state_dict()
    for name, value in one.module_.state_dict().items():
        assert torch.equal(value, state[name]), name
    pd.testing.assert_frame_equal(one.prototypes_, other.prototypes_)
    columns = ["stage", "train_loss"]
    histories = [pd.DataFrame(clf.history.to_list())[columns] for clf in (one, other)]
    pd.testing.assert_frame_equal(*histories)
    assert np.array_equal(one.decision_function(X), other.decision_function(X))


@cache
def never_stopped(name):
    return classifier(name).fit(*pictures())


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


ROWS = {"joint": 5, "two cycles": 8, "auto": 4, "frozen": 4}


@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, rows in ROWS.items() for row in range(1, rows + 1)]
)
def test_a_fit_that_is_stopped_anywhere_ends_in_the_same_model(tmp_path, monkeypatch, name, row):
    X, y = pictures()
    expected = never_stopped(name)
    assert len(expected.history) == ROWS[name]
    stopped = classifier(name, checkpoint=tmp_path, callbacks=[Stop(row)])
    with pytest.raises(RuntimeError, match="stopped"):
        stopped.fit(X, y)
    assert not hasattr(stopped, "prototypes_")
    resumed = classifier(name, checkpoint=tmp_path, callbacks=[Stop()])
    trained = []
    train_step = ProtoPNetClassifier.train_step
    monkeypatch.setattr(
        ProtoPNetClassifier, "train_step", lambda *args: trained.append(1) or train_step(*args)
    )
    assert_same_model(expected, resumed.fit(X, y), X)
    assert not (tmp_path / FILE).exists()
    left = [r for r in expected.history[row - 1 :] if r["stage"] in ("warm-up", "joint")]
    assert len(trained) == sum(len(r["batches"]) for r in left)


@pytest.mark.parametrize(
    "moment", [slow("start"), slow("second epoch"), "writing", slow("projection")]
)
def test_a_process_that_is_killed_goes_on(tmp_path, moment):
    X, y = pictures()
    command = [sys.executable, str(WORKER), str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / FILE).exists() == (moment != "start")
    resumed = classifier("joint", checkpoint=tmp_path).fit(X, y)
    assert_same_model(never_stopped("joint"), resumed, X)


def test_a_stream_of_random_numbers_goes_on_too(tmp_path):
    X, y = pictures()
    stream = np.random.RandomState(0)
    clf = classifier("joint", checkpoint=tmp_path, callbacks=[Stop(2)], random_state=stream)
    with pytest.raises(RuntimeError, match="stopped"):
        clf.fit(X, y)
    clf.set_params(callbacks=[Stop()])
    assert_same_model(never_stopped("joint"), clf.fit(X, y), X)
    assert stream.randint(2**31) != np.random.RandomState(0).randint(2**31)  # the next fit's


@pytest.mark.slow
def test_a_compiled_network_goes_on_too(tmp_path):
    X, y = pictures()
    compiled = {"compile": True, "compile__backend": "eager"}
    stopped = classifier("joint", checkpoint=tmp_path, callbacks=[Stop(2)], **compiled)
    with pytest.raises(RuntimeError, match="stopped"):
        stopped.fit(X, y)
    resumed = classifier("joint", checkpoint=tmp_path, callbacks=[Stop()], **compiled)
    assert_same_model(classifier("joint", **compiled).fit(X, y), resumed.fit(X, y), X)


def test_ctrl_c_while_it_is_written_is_no_full_disk(tmp_path, monkeypatch):
    """torch's writer finds its file unfinished when the interrupt passes through."""

    def interrupted(*args):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"is not fitted\.$"):  # there is none yet
        classifier("joint", checkpoint=tmp_path).fit(*pictures())


@pytest.mark.filterwarnings("ignore:.*distinct patches")  # what a seed of its own may come to
def test_early_stopping_and_a_random_seed_go_on_too(tmp_path):
    X, y = pictures()

    def made(*more, **given):
        callbacks = [EarlyStopping("valid_loss", patience=2, load_best=True), *more]
        split = ValidSplit(3, stratified=True)
        parameters = {"train_split": split, "joint_epochs": 6, "lr": 0.05} | given
        return classifier("joint", callbacks=callbacks, **parameters)

    expected = made().fit(X, y)
    stop = Stop(3)
    stopped = made(stop, checkpoint=tmp_path)
    with pytest.raises(RuntimeError):
        stopped.fit(X, y)
    resumed = made(Stop(), checkpoint=tmp_path).fit(X, y)
    assert_same_model(expected, resumed, X)
    stopped = classifier("joint", random_state=None, checkpoint=tmp_path, callbacks=[Stop(2)])
    with pytest.raises(RuntimeError):
        stopped.fit(X, y)
    resumed = classifier("joint", random_state=None, checkpoint=tmp_path, callbacks=[Stop()])
    assert resumed.fit(X, y).seed_ == stopped.seed_


class Noting(Callback):
    """Remembers numbers of all kinds, in whatever holds them, and what no checkpoint can hold."""

    def initialize(self):
        self.seen, self.best, self.kinds = [], {"loss": [np.float32(9)]}, ()
        self.unknown = {"a": object(), "b": [collections.Counter()]}

    def on_epoch_end(self, net, **kwargs):
        self.seen.append(np.float64(net.history[-1, "train_loss"]))
        self.kinds = (np.int64(1), np.bool_(True), np.str_("a"), True, None, "b", 2, 0.5)
        self.best["loss"].append(min(self.seen))


def test_what_callbacks_remember_is_kept_where_it_is_plain(tmp_path):
    X, y = pictures()
    expected = classifier("joint", callbacks=[Noting()]).fit(X, y)
    with pytest.raises(RuntimeError, match="stopped"):
        classifier("joint", callbacks=[Noting(), Stop(2)], checkpoint=tmp_path).fit(X, y)
    resumed = classifier("joint", callbacks=[Noting(), Stop()], checkpoint=tmp_path).fit(X, y)
    (noted,) = (callback for _, callback in resumed.callbacks_ if isinstance(callback, Noting))
    (wanted,) = (callback for _, callback in expected.callbacks_ if isinstance(callback, Noting))
    assert len(noted.seen) > 2
    assert noted.seen == wanted.seen
    assert noted.best == wanted.best
    assert noted.kinds == wanted.kinds


def test_another_function_is_another_fit(tmp_path):
    X, y = pictures()

    def made(augmentation, stop=None):
        callbacks = [Stop(stop) if stop else Stop()]
        return classifier(
            "joint", augmentation=augmentation, callbacks=callbacks, checkpoint=tmp_path
        )

    with pytest.raises(RuntimeError, match="stopped"):
        made(lambda x: x, 2).fit(X, y)
    with pytest.raises(CheckpointError, match=r"augmentation was <lambda> \w+\.\.\., is <lambda> "):
        made(lambda x: 255 - x).fit(X, y)
    made(lambda x: x).fit(X, y)


@pytest.fixture
def begun(tmp_path):
    """A folder with the checkpoint of a fit that was stopped."""
    X, y = pictures()
    with pytest.raises(RuntimeError):
        classifier("joint", checkpoint=tmp_path, callbacks=[Stop(2)]).fit(X, y)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lambda_clst": 0.5}, "lambda_clst was 0.8, is 0.5"),
        ({"optimizer__weight_decay": 0.1}, "optimizer__weight_decay was not there, is 0.1"),
        ({"random_state": 1}, "random_state was 0, is 1"),
        ({"train_split": ValidSplit(3)}, "train_split was None, is skorch.dataset.ValidSplit"),
    ],
)
def test_other_parameters_are_refused(begun, given, said):
    X, y = pictures()
    before = (begun / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=said):
        classifier("joint", checkpoint=begun, callbacks=[Stop()], **given).fit(X, y)
    assert (begun / FILE).read_bytes() == before


@pytest.mark.parametrize("what", ["the images", "y", "sample_weight", "groups"])
def test_other_data_is_refused(begun, what):
    X, y = pictures()
    weight = groups = None
    if what == "the images":
        X[5, 3, 2] = 255 - X[5, 3, 2]
    elif what == "y":
        y[[0, -1]] = y[[-1, 0]]
    elif what == "sample_weight":
        weight = np.ones(len(y))
    else:
        groups = np.arange(len(y))
    clf = classifier("joint", checkpoint=begun, callbacks=[Stop()])
    with pytest.raises(CheckpointError, match=f"another fit: {what} was"):
        clf.fit(X, y, sample_weight=weight, groups=groups)


def test_what_does_not_matter_may_change(begun):
    X, y = pictures()
    clf = classifier(
        "joint", checkpoint=begun, callbacks=[Stop()], memory=begun / "memory", verbose=1
    )
    assert_same_model(never_stopped("joint"), clf.fit(X, y), X)


def refused(folder):
    """Whether a fit names the checkpoint in its error, and runs nothing of it."""
    with pytest.raises(CheckpointError, match="delete it to begin anew") as caught:
        classifier("joint", checkpoint=folder, callbacks=[Stop()]).fit(*pictures())
    return str(folder / FILE) in str(caught.value) and Unpickled.ran == []


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-9000] + bytes([data[-9000] ^ 1]) + data[-8999:],
    "zeros": lambda data: data[:-9000] + bytes(4096) + data[-4904:],
    "no checksum": lambda data: data[:-4],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(begun, damage):
    damaged = DAMAGE[damage]((begun / FILE).read_bytes())
    (begun / FILE).write_bytes(damaged)
    assert refused(begun)


def put(file, content):
    write_checked(file, lambda stream: torch.save(content, stream))


def state_in(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("content", [{"model": torch.ones(3)}, [], torch.ones(3)], ids=type)
def test_a_file_of_something_else_is_refused(begun, content):
    put(begun / FILE, content)
    assert refused(begun)


FIELDS = [
    *(("stage", value) for value in (99, -1, "a", 1.5)),
    *(("epochs", value) for value in (99, -1, None)),
    *(("seed", value) for value in (10**60, -1, "a")),
    *(("history", value) for value in (5, "{", "5", "[[1, 2]]")),
    *(("key", value) for value in (5, {"y": 5})),
    *(("callbacks", {"epoch_timer": value}) for value in (5, {5: 1}, {"on_epoch_begin": 1})),
    *(("network", value) for value in ({}, {"prototypes": torch.ones(2, 2)})),
    *(("optimizer", {}), ("backbone_trained", "yes"), ("split", None), ("format", "x")),
]


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_fields_that_no_fit_writes_are_refused(begun, name, value):
    put(begun / FILE, state_in(begun / FILE) | {name: value})
    assert refused(begun)


def test_code_in_a_checkpoint_does_not_run(begun):
    put(begun / FILE, state_in(begun / FILE) | {"seed": Unpickled()})
    assert refused(begun)


class Unpickled:
    ran: list = []  # noqa: RUF012

    def __reduce__(self):
        return Unpickled.ran.append, (1,)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    X, y = pictures()
    fsync, writes = os.fsync, []

    def full(file):
        writes.append(file)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        classifier("joint", checkpoint=tmp_path).fit(X, y)
    assert os.listdir(tmp_path) == [FILE]
    monkeypatch.undo()
    resumed = classifier("joint", checkpoint=tmp_path).fit(X, y)
    assert_same_model(never_stopped("joint"), resumed, X)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_says_how_to_go_on(tmp_path, error):
    X, y = pictures()
    clf = classifier("joint", checkpoint=tmp_path, callbacks=[Stop(2, error)])
    said = "is not fitted. The same call goes on" if error is KeyboardInterrupt else "stopped"
    with pytest.raises(error, match=said):
        clf.fit(X, y)
    clf.callbacks[0].plan_.row = None
    assert_same_model(never_stopped("joint"), clf.fit(X, y), X)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_partial_fit_that_fails_leaves_the_classifier_as_it_was(error):
    X, y = pictures()
    stop = Stop(None, error)
    clf = classifier("joint", callbacks=[stop]).fit(X, y)
    logits, table, rows = clf.decision_function(X), clf.prototypes_.copy(), len(clf.history)
    for row in range(rows + 1, rows + 4):
        stop.plan_.row = row
        message = "is as it was before" if error is KeyboardInterrupt else "stopped"
        with pytest.raises(error, match=message):
            clf.partial_fit(X, y)
        assert np.array_equal(clf.decision_function(X), logits)
        pd.testing.assert_frame_equal(clf.prototypes_, table)
        assert len(clf.history) == rows
    stop.plan_.row = None
    again = classifier("joint", callbacks=[Stop()]).fit(X, y).partial_fit(X, y)
    assert_same_model(clf.partial_fit(X, y), again, X)


def test_a_partial_fit_goes_on_too(tmp_path):
    X, y = pictures()
    expected = classifier("joint").fit(X, y).partial_fit(X, y)
    rows = len(expected.history) // 2
    stop = Stop()
    clf = classifier("joint", callbacks=[stop]).fit(X, y).set_params(checkpoint=tmp_path)
    stop.plan_.row = rows + 2
    with pytest.raises(RuntimeError):
        clf.partial_fit(X, y)
    assert (tmp_path / FILE).exists()
    stop.plan_.row = None
    assert_same_model(expected, clf.partial_fit(X, y), X)


def test_a_file_of_a_model_names_no_checkpoint(tmp_path):
    X, y = pictures()
    clf = classifier("joint", checkpoint=tmp_path / "checkpoint").fit(X, y)
    saved = clf.save(tmp_path / "model")
    assert ProtoPNetClassifier.load(saved).checkpoint is None


def test_a_file_is_no_folder_for_checkpoints(tmp_path):
    X, y = pictures()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint must be a folder; '.*file' is a file"):
        classifier("joint", checkpoint=tmp_path / "file").fit(X, y)
