"""Digests tell apart whatever computes something else, and nothing that computes the same."""

import copy
import dataclasses
import functools
import importlib
import operator
import os
import pickle
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from protoclf import backbone_facts, fingerprints
from protoclf.backbone_facts import found_once, shape_and_layout
from protoclf.backbones import SmallCNN
from protoclf.fingerprints import code_digest, described, module_digest, state_digest
from protoclf.receptive_field import measure


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


@dataclasses.dataclass
class Slotted:
    __slots__ = ("scale",)
    scale: float


class Scaling(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale


class Ordered(Base):
    def __init__(self, order):
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, x):
        return self.conv(x)[:, self.order]


class Extra(Base):
    def get_extra_state(self):
        return {"extra": self.attribute}

    def set_extra_state(self, state):
        self.attribute = state["extra"]


class Derived(Base):
    pass


def test_what_computes_something_else_has_another_digest():
    one, two = (lambda x: x + 1), (lambda x: x + 2)

    def holding(value):
        return lambda x: x * value

    attributes = [None, 1, 2.0, "1", (1, 2), [1, 3], {"a": 1}, {"a": 2}, torch.ones(2)]
    attributes += [torch.zeros(2), one, two, holding(1), holding(2), [one], [two]]
    attributes += [functools.partial(scaled, factor=f) for f in (1, 2)]
    attributes += [torch.float32, torch.float64, torch.device("cpu"), torch.device("meta")]
    attributes += [slice(0, 2), slice(1, 2), range(2), range(3), bytearray(b"a"), bytearray(b"b")]
    attributes += [operator.itemgetter(1), operator.itemgetter(2), deque([1]), deque([2])]
    attributes += [Slotted(1), Slotted(2), [Slotted(3)], Holder({"a": Slotted(4)})]
    attributes += [[Scaling(1)], [Scaling(2)], {"a": [Scaling(2)]}]
    attributes += [v2.Compose([v2.Lambda(one)]), v2.Compose([v2.Lambda(two)])]
    modules = [Base(attribute) for attribute in attributes]
    modules += [Ordered([0, 1, 2]), Ordered([2, 1, 0]), Extra(1), Extra(2)]
    modules += [Derived(), copy.deepcopy(Base()).double(), nn.Sequential(Base())]
    changed = Base()
    with torch.no_grad():
        changed.conv.weight[0, 0, 0, 0] += 1e-6
    hooked, before = Base(), Base()
    hooked.conv.register_forward_hook(lambda module, x, out: -out)
    before.conv.register_forward_pre_hook(lambda module, x: None)
    modules += [changed, hooked, before]
    assert len({module_digest(module) for module in modules}) == len(modules)


def test_configurations_that_code_names_count():
    def made(config):
        exec("def act(x):\n    return CONFIG.scale * x", space := {"CONFIG": config})
        return Base(space["act"]), space["act"]

    modules, functions = zip(
        *[made(SimpleNamespace(scale=scale)) for scale in (1, 1, 2)], strict=True
    )
    assert module_digest(modules[0]) == module_digest(modules[1])
    assert module_digest(modules[0]) != module_digest(modules[2])
    assert module_digest(made(Slotted(1))[0]) != module_digest(made(Slotted(2))[0])
    assert described(functions[0]) == described(functions[2])  # a loader, say, may count in one


def test_what_no_pickle_can_hold_is_like_no_other():
    one, two = (Base(n for n in [k]) for k in range(2))
    assert module_digest(one) == module_digest(one)
    assert module_digest(one) != module_digest(two)


def test_what_holds_itself_is_described():
    def cyclic():
        module, held = Base(), {"a": []}
        held["a"].append(held)
        module.attribute = [module, held]
        return module

    assert module_digest(cyclic()) == module_digest(cyclic())


def test_what_is_deep_inside_is_left_out():
    def chain(length, end):
        return end if length == 0 else SimpleNamespace(next=chain(length - 1, end))

    shallow, deep = ([described(chain(n, end)) for end in (1, 2)] for n in (2, 400))
    assert shallow[0] != shallow[1]
    assert deep[0] == deep[1]


def test_hooks_of_all_modules_count():
    before = module_digest(Base())
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, out: 2 * out)
    try:
        assert module_digest(Base()) != before
    finally:
        handle.remove()
    assert module_digest(Base()) == before


def test_a_hook_may_keep_what_it_sees():
    seen, module = {}, Base()
    module.conv.register_forward_hook(lambda layer, x, out: seen.update(conv=out.detach()))
    module.to("meta")(torch.zeros(1, 3, 8, 8, device="meta"))
    assert module_digest(module) == module_digest(module)


@pytest.mark.filterwarnings("ignore")  # torch gives them up some day
def test_quantized_layers_are_told_apart():
    def made(scale):
        net = nn.Sequential(nn.Linear(2, 2))
        nn.init.constant_(net[0].weight, scale)
        nn.init.zeros_(net[0].bias)
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})

    assert module_digest(made(1.0)) == module_digest(made(1.0))
    assert module_digest(made(1.0)) != module_digest(made(2.0))


def test_what_computes_the_same_has_the_same_digest():
    module = Base({"a": functools.partial(scaled, factor=2), "b": [1, None]})
    expected = module_digest(module)
    assert module_digest(module) == expected
    assert module_digest(copy.deepcopy(module)) == expected
    assert module_digest(pickle.loads(pickle.dumps(module))) == expected
    assert module_digest(module.train()) == expected  # which features are never computed in
    assert module_digest(module.to(memory_format=torch.channels_last)) == expected


@pytest.mark.parametrize("place", ["body", "constant"])
def test_a_base_class_counts(place):
    def made(factor):
        space = {"nn": nn}
        code = f"class A(nn.Module):\n    def forward(self, x):\n        return {factor} * x"
        if place == "constant":
            code = f"class A(nn.Module):\n    f = {factor}\n    forward = lambda s, x: s.f * x"
        exec(code + "\nclass B(A):\n    pass", space)
        return module_digest(space["B"]())

    assert made(2) == made(2)
    assert made(2) != made(3)


HELPED = """
import functools
import torch
from torch import nn

SLOPE = {slope}

@functools.cache
def bent(x):
    return {function}(x, SLOPE)

class Helped(nn.Module):
    def forward(self, x):
        return twice(x)

    @staticmethod
    def of(x):
        return SHIFTS[{shift}] + x

def twice(x):
    return bent(bent(x)) if SLOPE else twice(x)

SHIFTS = [1.0, {last}]
"""


@pytest.mark.parametrize(
    "changed", [{"slope": 0.2}, {"function": "max"}, {"shift": 1}, {"last": 3.0}]
)
def test_what_a_backbone_calls_by_name_counts(changed):
    def made(slope=0.1, function="nn.functional.leaky_relu", shift=0, last=2.0):
        text = HELPED.format(slope=slope, function=function, shift=shift, last=last)
        exec(text, space := {"__name__": "helped"})
        return module_digest(space["Helped"]())

    assert made() == made()
    assert made() != made(**changed)


def test_what_another_module_holds_counts_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helpers_of_backbone.py").write_text("def act(x):\n    return x + 1")
    helpers = importlib.import_module("helpers_of_backbone")

    space = {"helpers": helpers, "nn": nn, "__name__": "calling"}
    exec("class A(nn.Module):\n    def forward(self, x):\n        return helpers.act(x)", space)
    before = module_digest(space["A"]())
    assert module_digest(space["A"]()) == before
    helpers.act = lambda x: x + 2
    assert module_digest(space["A"]()) != before


class Holder:
    def __init__(self, secret):
        self._secret = secret


def test_hidden_attributes_of_objects_count_in_modules_and_not_in_parameters():
    assert module_digest(Base(Holder(1))) != module_digest(Base(Holder(2)))
    assert described(Holder(1)) == described(Holder(2))


def test_functions_are_described_by_their_code():
    made = [lambda x: x, lambda x: 255 - x, scaled, functools.partial(scaled, factor=2)]
    made += [functools.cache(made[0]), functools.cache(made[1])]
    made += [functools.partial(scaled, factor=3), torch.relu, torch.sigmoid, str.join, len]
    assert len({described(function) for function in made}) == len(made)
    assert described(torch.optim.Adam) == "torch.optim.adam.Adam"


@pytest.mark.slow  # two processes
def test_a_description_is_the_same_in_another_process():
    code = (
        "from protoclf.fingerprints import described, module_digest\n"
        "from protoclf.backbones import SmallCNN\nimport torch\n"
        "names = {str(i) for i in range(20)}\n"
        "def chosen(x):\n    return x in {'a', 'b', 'c', 'd'} or x in names\n"
        "torch.manual_seed(0)\n"
        "print(described([chosen, names]), module_digest(SmallCNN(8)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_names_types_and_shapes_of_tensors_count():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)]
    digests = {state_digest({name: t}) for t in tensors for name in ("a", "b")}
    assert len(digests) == 6
    assert state_digest({"a": torch.arange(3)[::3]}) == state_digest({"a": torch.zeros(1).long()})
    assert state_digest({"a": torch.tensor(1)}) != state_digest({"a": torch.tensor([1])})


def test_the_digest_of_the_code_covers_every_file(monkeypatch, tmp_path):
    assert code_digest() == code_digest.__wrapped__()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "one.py").write_text(text)
        monkeypatch.setattr(fingerprints.importlib.resources, "files", lambda name: tmp_path)
        if text == "a = 1":
            first = code_digest.__wrapped__()
    assert code_digest.__wrapped__() != first


def test_facts_are_found_out_once_for_each_backbone(monkeypatch):
    asked = []

    def noting(backbone, image_size):
        asked.append(image_size)
        return measure(backbone, image_size)

    monkeypatch.setattr(backbone_facts, "_known", type(backbone_facts._known)())
    backbone = SmallCNN(16)
    geometry = found_once(noting, backbone, 48)
    assert found_once(noting, copy.deepcopy(backbone), 48) is geometry
    assert (geometry.channels, geometry.height) == (16, 6)
    assert shape_and_layout(backbone, 48) == (geometry, True)
    assert found_once(noting, backbone, 64).height == 8
    assert found_once(noting, SmallCNN(8), 48).channels == 8
    assert asked == [48, 64, 48]
    assert [found_once(noting, Ordered(order), 48).channels for order in ([0], [0, 1])] == [1, 2]
    assert asked == [48, 64, 48, 48, 48]
    monkeypatch.setattr(backbone_facts, "_KEPT", 1)
    found_once(noting, SmallCNN(4), 48)
    assert len(backbone_facts._known) == 1
    assert found_once(noting, backbone, 48) is not geometry


def test_facts_that_another_thread_looks_up_too_are_found(monkeypatch):
    class Shared(type(backbone_facts._known)):
        """What another thread takes out, to put it last, once it is known to be there."""

        def __contains__(self, key):
            return super().__contains__(key) and bool(self.pop(key) or True)

    monkeypatch.setattr(backbone_facts, "_known", Shared())
    backbone = SmallCNN(4)
    assert found_once(measure, backbone, 48) == found_once(measure, backbone, 48)
