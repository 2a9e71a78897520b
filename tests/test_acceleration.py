"""What makes backbones fast, and what it must not change."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from protoclf import ProtoPNetClassifier, net
from protoclf import acceleration as fast
from protoclf.prototype_layer import min_distances
from protoclf.torch_settings import float32_matmul_precision

RESIDENT = """
import sys, torch
from protoclf.acceleration import keep_freed_memory, return_freed_memory
def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024  # MB
if sys.argv[1] == "tuned":
    assert keep_freed_memory()
before = resident()
torch.ones(150_000_000)  # 600 MB, freed at once
print(resident() - before)
return_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.slow  # a process each
@pytest.mark.parametrize(("how", "kept"), [("plain", False), ("tuned", True)])
def test_the_allocator_keeps_memory_until_told_to_return_it(how, kept):
    command = [sys.executable, "-c", RESIDENT, how]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    freed, returned = map(int, output.split())
    assert (freed > 500) is kept
    assert returned < 50


def test_older_versions_of_glibc_keep_smaller_blocks(monkeypatch):
    asked = []

    def mallopt(what, size):
        asked.append((what, size))
        return int(what == -1 or size <= 2**25)

    monkeypatch.setattr(fast.sys, "platform", "linux")
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert fast.keep_freed_memory.__wrapped__()
    assert asked == [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one precision"
)
def test_a_precision_of_products_for_each_kind_of_device_is_the_least(squares):
    layer = torch.backends.cuda.matmul
    before = layer.fp32_precision
    z, p = torch.rand(2, 4, 3, 3), torch.rand(3, 4, 1, 1)
    expected = min_distances(z, p)[0]
    layer.fp32_precision = "tf32"
    try:
        assert float32_matmul_precision() == "medium"
        torch.testing.assert_close(min_distances(z, p)[0], expected)
    finally:
        layer.fp32_precision = before
    assert float32_matmul_precision() == "highest"


def test_channels_last_where_the_backbone_can():
    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)[:, :12].view(len(x), 3, 2, 2)

    assert fast.takes_channels_last(nn.Conv2d(3, 4, 3), 8)
    assert not fast.takes_channels_last(Viewing(), 8)


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(fast, "_cpu_flags", lambda: frozenset({"avx2", "avx512_bf16"}))
    assert fast.has_fast_bfloat16("cpu")
    monkeypatch.setattr(fast, "_cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert not fast.has_fast_bfloat16("cpu")
    assert not fast.has_fast_bfloat16("meta")


def in_precision(clf, precision):
    return copy.deepcopy(clf).set_params(precision=precision)


def test_bfloat16_keeps_predictions_and_sheets(fitted, squares):
    """The stated tolerance: similarities within 0.05, and every clear prediction the same."""
    X, _ = squares
    in_float32, in_bfloat16 = (in_precision(fitted, p) for p in ("float32", "bfloat16"))
    exact, sheet = in_float32.decision_function(X), in_float32.explain(X)
    rough, rough_sheet = in_bfloat16.decision_function(X), in_bfloat16.explain(X)
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(fitted.coef_).sum(1).max()
    best = np.sort(exact, axis=1)
    clear = best[:, -1] - best[:, -2] > 0.1
    assert clear.any()
    assert (exact.argmax(1) == rough.argmax(1))[clear].all()
    both = sheet.merge(rough_sheet, on=["sample", "class", "prototype"])
    assert len(both) > 0.9 * len(sheet)
    assert (both["similarity_x"] - both["similarity_y"]).abs().max() < 0.05
    totals = rough_sheet.groupby("sample")[["contribution"]].sum()["contribution"]
    assert (totals - rough_sheet.groupby("sample")["logit"].first()).abs().max() < 1e-4


def test_a_fit_in_bfloat16_keeps_its_invariants(fitted, squares):
    X, y = squares
    clf = clone(fitted).set_params(precision="bfloat16", batch_size=len(X)).fit(X, y)
    assert clf.module_.half_precision
    own = clf.transform(X)[clf.prototypes_["source_index"], np.arange(clf.n_prototypes_)]
    np.testing.assert_allclose(own, 1, atol=1e-6)
    assert clf.module_.prototypes.dtype == torch.float32


@pytest.mark.parametrize("around", [nullcontext(), torch.autocast("cpu", torch.bfloat16)])
def test_training_in_bfloat16_computes_with_the_weights_of_each_step(squares, around):
    X, y = squares
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=32,
        prototypes_per_class=2,
        joint_epochs=5,
        backbone_lr=1e-2,
        batch_size=8,
        augmentation=None,
        precision="bfloat16",
        random_state=0,
        verbose=0,
    )
    with around:
        losses = clf.fit(X, y).history[:5, "train_loss"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("settings", "half"),
    [
        ({"train_backbone": False}, True),
        ({"joint_epochs": 0}, True),
        ({}, False),
        ({"precision": "bfloat16"}, True),
        ({"train_backbone": False, "precision": "float32"}, False),
    ],
)
def test_auto_is_bfloat16_for_a_frozen_backbone_on_a_fast_processor(
    fitted, squares, monkeypatch, settings, half
):
    monkeypatch.setattr(net, "has_fast_bfloat16", lambda device: True)
    clf = clone(fitted).set_params(**settings).fit(*squares)
    assert clf.module_.half_precision is half
    clf.set_params(train_backbone=False).predict(squares[0])  # what is trained stays so
    assert clf.module_.half_precision is half


@pytest.mark.parametrize("wrong", ["half", 16, None])
def test_a_wrong_precision_is_refused(wrong):
    with pytest.raises(ValueError, match="precision must be one of 'auto'"):
        ProtoPNetClassifier("small_cnn", precision=wrong, verbose=0).fit(["a", "b"], [0, 1])
