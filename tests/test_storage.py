"""Where large tensors go, and what happens where there is no room."""

import errno
import os
import tempfile

import pytest
import torch

from protoclf import storage
from protoclf.storage import allocate


def test_beyond_the_budget_a_tensor_is_a_file_that_nobody_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY_BUDGET", 100)
    files, temporary = [], tempfile.TemporaryFile

    def noted(**options):
        files.append(str(options["dir"]))
        return temporary(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    small, large = (allocate((n, 5), torch.float32, folder=tmp_path / "m") for n in (5, 6))
    assert list((tmp_path / "m").iterdir()) == []  # made for the large one, whose file has no name
    assert files == [str(tmp_path / "m")]
    for tensor in (small, large):
        tensor[:] = 2
        assert tensor.sum() == 2 * tensor.numel()
    assert allocate((6, 5), torch.bfloat16).shape == (6, 5)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_an_error_and_not_a_killed_process(tmp_path, monkeypatch, known):
    def full(file, offset, length):
        assert (offset, length) == (0, 120)
        raise OSError(errno.ENOSPC if known else errno.EOPNOTSUPP, "it says")

    monkeypatch.setattr(storage, "MEMORY_BUDGET", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    if not known:  # a file system that cannot reserve anything
        assert allocate((6, 5), torch.float32, folder=tmp_path).shape == (6, 5)
        return
    with pytest.raises(OSError, match=f"no room in '{tmp_path}'.* set memory=") as caught:
        allocate((6, 5), torch.float32, folder=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_gpu_holds_what_it_has_room_for(monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "MEMORY_BUDGET", 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (500, 0))
    # the rest of what is free an earlier fit has taken and given back, to torch
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 400)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    made = []
    monkeypatch.setattr(
        torch, "empty", lambda shape, dtype, device: made.append((shape, str(device)))
    )
    allocate((50,), torch.float32, "cuda")
    assert made == [((50,), "cuda")]
    assert allocate((51,), torch.float32, "cuda").shape == (51,)  # a file
    assert storage._budget(torch.device("cuda:1")) == 200
    assert asked == [3, 3, 1]  # numbers: torch 2.4 takes no device without one
