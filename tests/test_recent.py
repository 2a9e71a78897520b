"""Tensors within a budget of memory."""

import torch

from protoclf import recent
from protoclf.recent import Recent


def test_what_has_room_stays_and_the_budget_holds(monkeypatch):
    monkeypatch.setattr(recent, "RECENT_BUDGET", 400)
    monkeypatch.setattr(recent, "_OVERHEAD", 0)
    kept = Recent()
    for i in range(10):
        kept.put(i, torch.full((10,), float(i)))  # 40 bytes
    assert all(torch.equal(kept.get(i), torch.full((10,), float(i))) for i in range(10))
    kept.put(3, torch.zeros(10))  # as the first time: they are the same
    assert kept.get(3)[0] == 3
    for i in range(10, 40):
        kept.put(i, torch.full((10,), float(i)))
        assert kept.get(i) is not None
    found = [i for i in range(40) if kept.get(i) is not None]
    assert len(found) == 10
    assert any(i < 30 for i in found)  # not the last ones alone
    kept.put("large", torch.zeros(101))
    assert kept.get("large") is None
    monkeypatch.setattr(recent, "_OVERHEAD", 361)  # what an entry takes beside its numbers
    kept.put("small", torch.zeros(10))
    assert kept.get("small") is None
    kept.clear()
    assert not [i for i in range(40) if kept.get(i) is not None]
