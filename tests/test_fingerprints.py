"""Digests tell apart whatever computes something else, and nothing that computes the same."""

import copy
import functools
import pickle

import torch
from torch import nn

from protoclf import backbone_facts, fingerprints
from protoclf.backbone_facts import facts_of
from protoclf.backbones import SmallCNN
from protoclf.fingerprints import code_digest, module_digest, state_digest


def scaled(x, factor):
    return factor * x


class Base(nn.Module):
    def __init__(self, attribute=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.attribute = attribute

    def forward(self, x):
        return self.conv(x)


class Derived(Base):
    pass


def test_what_computes_something_else_has_another_digest():
    one, two = (lambda x: x + 1), (lambda x: x + 2)

    def holding(value):
        return lambda x: x * value

    attributes = [None, 1, 2.0, "1", (1, 2), [1, 3], {"a": 1}, {"a": 2}, torch.ones(2)]
    attributes += [torch.zeros(2), one, two, holding(1), holding(2), [one], [two]]
    attributes += [functools.partial(scaled, factor=f) for f in (1, 2)]
    modules = [Base(attribute) for attribute in attributes]
    modules += [Derived(), copy.deepcopy(Base()).double(), nn.Sequential(Base())]
    changed = Base()
    with torch.no_grad():
        changed.conv.weight[0, 0, 0, 0] += 1e-6
    hooked, before = Base(), Base()
    hooked.conv.register_forward_hook(lambda module, x, out: -out)
    before.conv.register_forward_pre_hook(lambda module, x: None)
    modules += [changed, hooked, before]
    assert len({module_digest(module) for module in modules}) == len(modules)


def test_what_computes_the_same_has_the_same_digest():
    module = Base({"a": functools.partial(scaled, factor=2), "b": [1, None]})
    expected = module_digest(module)
    assert module_digest(module) == expected
    assert module_digest(copy.deepcopy(module)) == expected
    assert module_digest(pickle.loads(pickle.dumps(module))) == expected
    assert module_digest(module.train()) == expected  # which features are never computed in
    assert module_digest(module.to(memory_format=torch.channels_last)) == expected


def test_a_base_class_counts():
    def made(factor):
        space = {"nn": nn}
        code = f"class A(nn.Module):\n    def forward(self, x):\n        return {factor} * x"
        exec(code + "\nclass B(A):\n    pass", space)
        return module_digest(space["B"]())

    assert made(2) == made(2)
    assert made(2) != made(3)


def test_names_types_and_shapes_of_tensors_count():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)]
    digests = {state_digest({name: t}) for t in tensors for name in ("a", "b")}
    assert len(digests) == 6


def test_the_digest_of_the_code_covers_every_file(monkeypatch, tmp_path):
    assert code_digest() == code_digest.__wrapped__()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "one.py").write_text(text)
        monkeypatch.setattr(fingerprints.importlib.resources, "files", lambda name: tmp_path)
        if text == "a = 1":
            first = code_digest.__wrapped__()
    assert code_digest.__wrapped__() != first


def test_facts_are_found_out_once_for_each_backbone(monkeypatch):
    asked, measure = [], backbone_facts.measure

    def noting(backbone, image_size):
        asked.append(image_size)
        return measure(backbone, image_size)

    monkeypatch.setattr(backbone_facts, "measure", noting)
    monkeypatch.setattr(backbone_facts, "_known", type(backbone_facts._known)())
    backbone = SmallCNN(16)
    facts = facts_of(backbone, 48)
    assert facts_of(copy.deepcopy(backbone), 48) is facts
    assert facts.channels_last
    assert (facts.geometry.channels, facts.geometry.height) == (16, 6)
    assert facts_of(backbone, 64).geometry.height == 8
    assert facts_of(SmallCNN(8), 48).geometry.channels == 8
    assert asked == [48, 64, 48]
    monkeypatch.setattr(backbone_facts, "_KEPT", 1)
    facts_of(SmallCNN(4), 48)
    assert len(backbone_facts._known) == 1
    assert facts_of(backbone, 48) is not facts
