"""What torch is set to around a computation."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from protoclf.torch_settings import random_numbers_from, widest_float, with_algebra


def test_threads_that_draw_from_seeds_wait_for_one_another():
    def draws(seed):
        with random_numbers_from(seed, torch.device("cpu")):
            found = []
            for _ in range(5):
                found.append(torch.rand(1).item())
                time.sleep(0.002)  # others come in between
        return found

    before = torch.get_rng_state()
    expected = [draws(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draws, range(6))) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("device", "in_use", "kept"), [("cpu", False, 0), ("cpu", True, 2), ("cuda:1", False, 2)]
)
def test_other_gpus_go_on_as_if_nothing_had_been_drawn(monkeypatch, device, in_use, kept):
    states, seeded = {0: "a", 1: "b"}, []
    before = states.copy()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda i: states[i])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, i: states.update({i: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with random_numbers_from(3, torch.device(device)):
        assert seeded == [3]
        states.update(dict.fromkeys(range(kept), "seeded"))
    assert states == before


@pytest.mark.parametrize(("device", "place"), [("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_where_algebra_is(device, place):
    with FakeTensorMode():
        x = torch.zeros(3, device=device)
        assert with_algebra(x).device.type == place
        assert widest_float(with_algebra(x).device) == torch.float64
