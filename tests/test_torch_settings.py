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


@pytest.mark.parametrize(("device", "place"), [("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_where_algebra_is(device, place):
    with FakeTensorMode():
        x = torch.zeros(3, device=device)
        assert with_algebra(x).device.type == place
        assert widest_float(with_algebra(x).device) == torch.float64
