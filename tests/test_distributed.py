"""Two processes that fit one classifier together, by gloo on this machine, against one process."""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fit_and_die import Stop
from fit_together import FITS, backbone, parameters, photos
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch.callbacks import Callback
from test_sklearn import EXCUSED
from test_sklearn import OnTables as OfOneProcess
from test_sklearn import on_tables as as_for_one_process

from protoclf import ProtoPNetClassifier
from protoclf.checkpoint import CheckpointError
from protoclf.distributed import DistributedProtoPNetClassifier, PartOfBatch, SeveralProcesses
from protoclf.processes import OneProcess


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and what two of them got: (name, processes, rank) -> its file."""
    folder = tmp_path_factory.mktemp("together")
    worker = Path(__file__).parent / "fit_together.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(count), str(worker), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
    return folder


def read(results, name, count, rank):
    return torch.load(results / f"{name}.{count}.{rank}", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_both_processes_end_with_the_same_model_and_history(results, name):
    state, table, result, history = read(results, name, 2, 0)
    other_state, other_table, other_result, other_history = read(results, name, 2, 1)
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    pd.testing.assert_frame_equal(table, other_table)
    assert result.objective == other_result.objective
    assert history == other_history


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, p in FITS.items() if p["random_state"] == 0])
def test_two_processes_find_what_one_finds(results, name):
    one, table_of_one, result_of_one, _ = read(results, name, 1, 0)
    two, table_of_two, result_of_two, _ = read(results, name, 2, 0)
    source = ["class", "source_index", "row", "col"]
    pd.testing.assert_frame_equal(table_of_one[source], table_of_two[source])
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    assert result_of_two.objective == pytest.approx(result_of_one.objective, rel=1e-4)
    assert result_of_two.residual <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "distinct", "auto", "few batches"])
def test_one_process_finds_what_an_ordinary_fit_finds(results, name):
    X, y, weight = photos()
    clf = ProtoPNetClassifier(**parameters(name)).fit(X, y, sample_weight=weight)
    for count in (1, 2):
        state, table, _, _ = read(results, name, count, 0)
        pd.testing.assert_frame_equal(table, clf.prototypes_, rtol=1e-4, atol=1e-5)
        assert torch.equal(state["prototypes"], clf.module_.prototypes)
        weight = clf.module_.last_layer.weight  # of activations that round by the size of a batch
        torch.testing.assert_close(state["last_layer.weight"], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_what_the_first_process_saved_is_an_ordinary_classifier(results, name):
    X, y, _ = photos()
    clf = ProtoPNetClassifier.load(
        results / f"{name} 2", backbone=None if "backbone" in FITS[name] else backbone()
    )
    state = read(results, name, 2, 0)[0]
    assert all(torch.equal(state[key], value) for key, value in clf.module_.state_dict().items())
    assert clf.predict(X).shape == y.shape


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_of_a_batch_are_the_batch(n, count):
    (whole,) = [list(PartOfBatch(n, 4, 0, 1, lambda: 7))]
    samplers = [PartOfBatch(n, 4, rank, count, lambda: 7) for rank in range(count)]
    assert sorted(i for batch in whole for i in batch) == list(range(n))
    assert all(len(sampler) == len(whole) for sampler in samplers)
    for batch, *own in zip(whole, *samplers, strict=True):
        if len(batch) < count:
            assert own == [batch] * count
        else:
            assert [i for part in own for i in part] == batch
            assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize(("n", "batches"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_a_last_batch_that_is_smaller_can_be_left_out(n, batches):
    parts = PartOfBatch(n, 4, 0, 2, lambda: 7, drop_last=True)
    assert len(list(parts)) == len(parts) == batches


def test_a_saved_model_is_loaded_by_the_class_for_one_process(tmp_path):
    with pytest.raises(TypeError, match=r"ProtoPNetClassifier\.load"):
        DistributedProtoPNetClassifier.load(tmp_path)


class _Rank:
    is_main_process = False

    def __init__(self, rank, count):
        self.process_index, self.num_processes = rank, count


@pytest.mark.parametrize(("n", "size"), [(1, 4), (8, 4), (9, 4), (33, 8), (100, 7)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_of_processes_are_whole_batches_in_order(n, size, count):
    rows = [SeveralProcesses(_Rank(rank, count)).own_rows(n, size) for rank in range(count)]
    if -(-n // size) < count:
        assert rows == [range(n)] * count
        return
    assert np.concatenate(rows).tolist() == list(range(n))
    assert all(part[0] % size == 0 for part in rows)


def classifier(accelerator=None, **given):
    settings = parameters("frozen") | given
    return DistributedProtoPNetClassifier(
        accelerator=accelerator or Accelerator(cpu=True), **settings
    )


def test_it_is_an_estimator_of_one_process_too():
    X, y, _ = photos()
    clf = clone(classifier(backbone="small_cnn"))
    assert "accelerator" in repr(clf)
    assert "lambda_clst" not in repr(clf)
    clf.fit(X, y).partial_fit(X, y)
    assert clf.get_params()["device"] == "auto"
    assert clone(clf).fit(X, y).score(X, y) >= 0.5


def test_an_accelerator_keeps_no_network_of_earlier_fits():
    X, y, _ = photos()
    clf = classifier(backbone="small_cnn", warmup_epochs=1).fit(X, y)
    former = weakref.ref(clf.module_.backbone[0][0].weight)
    clf.fit(X, y)
    gc.collect()
    assert former() is None


class OnTables(OfOneProcess, DistributedProtoPNetClassifier):
    """Takes rows of a table for images, as scikit-learn's checks need."""


class OnCPU(Accelerator):
    """One whose name is the same in every process, as names of tests have to be."""

    def __init__(self):
        super().__init__(cpu=True)

    def __repr__(self):
        return "OnCPU()"


on_tables = OnTables(accelerator=OnCPU(), **as_for_one_process.get_params(deep=False))


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checks repeat rows: prototypes collapse
@pytest.mark.slow  # as in test_sklearn.py, by a subclass
@parametrize_with_checks([on_tables], expected_failed_checks=lambda estimator: EXCUSED)
def test_contract(estimator, check):
    check(estimator)


def test_options_that_would_not_be_heeded_are_refused():
    X, y, _ = photos()
    accumulating = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="accumulate gradients"):
        classifier(accumulating).fit(X, y)
    with pytest.raises(ValueError, match="device"):
        classifier(device="cpu").fit(X, y)
    with pytest.raises(TypeError, match="joint_epochs"):
        classifier(joint_epoch=3)


JOINT = {"backbone": "small_cnn", "train_backbone": True, "augmentation": None, "batch_size": 8}


@pytest.fixture
def mixed():
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_mixed_precision_computes_with_the_weights_of_each_step(mixed):
    X, y, _ = photos()
    settings = {"joint_epochs": 5, "backbone_lr": 1e-2}
    losses = classifier(mixed, **JOINT, **settings).fit(X, y).history[:5, "train_loss"]
    assert losses[-1] < 0.5 * losses[0]


class Norms(Callback):
    """Notes how long the gradients are that callbacks see."""

    def on_train_begin(self, net, **_):
        self.seen = []

    def on_grad_computed(self, net, named_parameters, **_):
        grads = [p.grad.norm() for _, p in named_parameters if p.grad is not None]
        self.seen.append(float(torch.stack(grads).norm()))


def test_callbacks_see_gradients_without_the_scale_of_float16(mixed, monkeypatch):
    """As on a GPU: an accelerator refuses float16 on a CPU."""
    X, y, _ = photos()
    monkeypatch.setattr(mixed, "autocast", nullcontext)
    mixed.state._mixed_precision = "no"
    norms = [classifier(mixed, callbacks=[("norms", Norms())], **JOINT).fit(X, y)]
    mixed.state._mixed_precision, mixed.scaler = "fp16", torch.amp.GradScaler("cpu")
    norms.append(classifier(mixed, callbacks=[("norms", Norms())], **JOINT).fit(X, y))
    plain, scaled = (dict(clf.callbacks_)["norms"].seen for clf in norms)
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)


def test_processes_with_different_data_are_refused(monkeypatch):
    class First(OneProcess):
        count = 2

        def agreed(self, value):
            return value | {"y": "other labels"} if isinstance(value, dict) else value

    monkeypatch.setattr(ProtoPNetClassifier, "processes", First())
    X, y, _ = photos()
    with pytest.raises(
        ValueError, match="compared with the first, in process 0 y was other labels, is"
    ):
        ProtoPNetClassifier(**parameters("frozen")).fit(X, y)


def test_processes_wait_until_the_checkpoint_of_a_fit_is_gone(monkeypatch, tmp_path):
    waited = []

    class Waits(OneProcess):
        def agreed(self, value):
            if value is None:
                waited.append((tmp_path / "checkpoint.pt").exists())
            return value

    monkeypatch.setattr(ProtoPNetClassifier, "processes", Waits())
    X, y, _ = photos()
    clf = ProtoPNetClassifier(**parameters("joint"), checkpoint=tmp_path, callbacks=[Stop()])
    clf.fit(X, y)
    assert waited == [False]
    clf.callbacks = [Stop(2)]
    with pytest.raises(RuntimeError, match="stopped"):
        clf.fit(X, y)
    monkeypatch.setattr(Waits, "count", 2)
    with pytest.raises(CheckpointError, match="the number of processes was 1, is 2"):
        clf.fit(X, y)
