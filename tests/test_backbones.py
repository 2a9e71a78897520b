"""Names, weights and files; what comes out of each family."""

import copy
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from protoclf.backbones import SmallCNN, available_backbones, build_backbone, copied
from protoclf.receptive_field import measure

# name -> channels and cells at 64 pixels; one small member of each family
FAMILIES = {
    "small_cnn": (128, 8),
    "alexnet": (256, 1),
    "convnext_tiny": (768, 2),
    "densenet121": (1024, 2),
    "efficientnet_b0": (1280, 2),
    "mnasnet0_5": (1280, 2),
    "mobilenet_v2": (1280, 2),
    "mobilenet_v3_small": (576, 2),
    "regnet_y_400mf": (440, 2),
    "resnet18": (512, 2),
    "resnext50_32x4d": (2048, 2),
    "shufflenet_v2_x0_5": (1024, 2),
    "squeezenet1_1": (512, 3),
}
BIG = {
    "convnext_large": (1536, 7),
    "densenet201": (1920, 7),
    "efficientnet_b7": (2560, 7),
    "resnet152": (2048, 7),
    "vgg11": (512, 7),
    "vgg16": (512, 7),
    "vgg19_bn": (512, 7),
    "wide_resnet50_2": (2048, 7),
}


# What comes out of each family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_gives_what_measure_says(name):
    net = build_backbone(name, weights=None).eval()
    channels, cells = FAMILIES[name]
    with torch.no_grad():
        assert net(torch.randn(2, 3, 64, 64)).shape == (2, channels, cells, cells)
    geometry = measure(net, 64)
    assert (geometry.channels, geometry.height, geometry.width) == (channels, cells, cells)


@pytest.mark.parametrize("name", BIG)
def test_big_backbones_are_measured_without_memory(name):
    with torch.device("meta"):
        net = build_backbone(name, weights=None)
    geometry = measure(net, 224)
    channels, cells = BIG[name]
    assert (geometry.channels, geometry.height, geometry.width) == (channels, cells, cells)
    assert geometry.stride == (32, 32)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "mnasnet0_5"])
def test_features_are_those_inside_the_torchvision_model(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    seen = {}
    last = {"densenet121": "classifier", "resnet18": "avgpool", "mobilenet_v3_small": "avgpool"}
    layer = getattr(model, last.get(name, "classifier"))
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    net = build_backbone(name, weights=None).eval()
    net.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        z = net(x)
    pooled = z.mean((2, 3)) if seen["x"].ndim == 2 else z  # densenet and mnasnet pool in forward
    torch.testing.assert_close(pooled, seen["x"])


def test_every_family_of_the_list_is_tested():
    def family(name):
        return torchvision.models.get_model_builder(name).__module__

    tested = {family(n) for n in {**FAMILIES, **BIG} if n != "small_cnn"}
    assert {family(n) for n in available_backbones() if n != "small_cnn"} == tested


@pytest.mark.parametrize("size", [32, 33, 64, 97, 128])
def test_small_cnn_takes_any_size_and_learns(size):
    net = SmallCNN(channels=40)
    z = net(torch.randn(2, 3, size, size))
    cells = -(-size // 8)
    assert z.shape == (2, 40, cells, cells)
    z.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# Wrong names, weights and types


@pytest.mark.parametrize(
    ("name", "near"), [("resnet_18", "resnet18"), ("smallcnn", "small_cnn"), ("VGG16", "vgg16")]
)
def test_an_unknown_name_gets_the_nearest_ones(name, near):
    with pytest.raises(ValueError, match=f"unknown.*{near}"):
        build_backbone(name, weights=None)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "EfficientNet-lite2"])
def test_efficientnet_lite_is_told_where_it_is(name):
    with pytest.raises(ValueError, match=r"unknown. EfficientNet-lite is a module: see examples"):
        build_backbone(name)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "inception_v3"])
def test_unsupported_families_say_what_is_supported(name):
    with pytest.raises(ValueError, match=r"not supported.*resnet.*any nn\.Module"):
        build_backbone(name, weights=None)


@pytest.mark.parametrize("backbone", [None, 18, nn.Conv2d, ["resnet18"]])
def test_other_types_are_refused(backbone):
    with pytest.raises(TypeError, match="backbone must be a name or any"):
        build_backbone(backbone)


@pytest.mark.parametrize("backbone", ["resnet18", "small_cnn", nn.Conv2d(3, 4, 3)])
def test_weights_of_no_such_name_or_file(backbone):
    with pytest.raises(ValueError, match="weights='IMAGENET9'"):
        build_backbone(backbone, weights="IMAGENET9")
    with pytest.raises(TypeError, match="weights must be"):
        build_backbone(backbone, weights=True)


def test_names_of_weights_are_listed():
    with pytest.raises(ValueError, match="IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        build_backbone("resnet50", weights="IMAGENET1K_V3")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("late"), RuntimeError("invalid hash")]
)
def test_a_failed_download_names_the_ways_out(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(RuntimeError, match=r"could not be downloaded.*weights=None.*path.*Module"):
        build_backbone("resnet18")


def test_published_weights_are_loaded(monkeypatch):
    """As published: with the classifier, without num_batches_tracked, densenet's old names."""
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {
        k.replace("norm1", "norm.1").replace("conv2", "conv.2"): v
        for k, v in state.items()
        if "num_batches" not in k
    }
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: old
    )
    net = build_backbone("densenet121", weights="IMAGENET1K_V1")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


# State-dict files


@pytest.fixture(scope="module")
def resnet_state():
    return torchvision.models.resnet18(weights=None, num_classes=7).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if not k.startswith("fc.")},
    ],
    ids=["plain", "state_dict", "model", "module.", "both", "features only"],
)
def test_a_state_dict_of_the_whole_model_is_loaded(tmp_path, resnet_state, wrap):
    torch.save(wrap(resnet_state), tmp_path / "my weights.pth")
    net = build_backbone("resnet18", weights=tmp_path / "my weights.pth")
    assert all(torch.equal(v, resnet_state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "resnet18" else [pytest.mark.slow])
        for name in sorted({*FAMILIES, "vgg11"} - {"small_cnn"})
    ],
)
def test_no_weights_are_drawn_that_others_replace(tmp_path, name):
    state = torchvision.models.get_model(name, weights=None).state_dict()
    torch.save(state, tmp_path / "w.pt")
    before = torch.random.get_rng_state()
    net = build_backbone(name, weights=tmp_path / "w.pt")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"cpu"}
    assert all(p.requires_grad for p in net.parameters())


def test_weights_that_other_programs_wrote_become_the_model_s_own_kind(tmp_path, resnet_state):
    whole = torch.stack([resnet_state["bn1.weight"], resnet_state["bn1.bias"]])
    other = {
        k: v.half() if v.is_floating_point() else v
        for k, v in resnet_state.items()
        if not k.endswith("num_batches_tracked")  # torch 0.3 had none
    } | {"bn1.weight": whole[0], "bn1.bias": whole[1]}
    other["conv1.weight"] = other["conv1.weight"].to(memory_format=torch.channels_last)
    torch.save(other, tmp_path / "w.pt")
    net = build_backbone("resnet18", weights=tmp_path / "w.pt")
    for name, value in net.state_dict().items():
        assert value.dtype == resnet_state[name].dtype
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
        torch.testing.assert_close(value, resnet_state[name], atol=1e-3, rtol=1e-3)


def test_safetensors_are_loaded(tmp_path, resnet_state):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(resnet_state, tmp_path / "w.safetensors")
    net = build_backbone("resnet18", weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(net.conv1.weight, resnet_state["conv1.weight"])
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a file of tensors"):
        build_backbone("resnet18", weights=str(tmp_path / "bad.safetensors"))


def test_small_cnn_and_own_modules_are_loaded(tmp_path):
    for module in (SmallCNN(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))):
        torch.save(module.state_dict(), tmp_path / "w.pt")
        fresh = copy.deepcopy(module)
        nn.init.zeros_(next(fresh.parameters()))
        backbone = "small_cnn" if isinstance(module, SmallCNN) else fresh
        net = build_backbone(backbone, weights=tmp_path / "w.pt")
        assert torch.equal(next(net.parameters()), next(module.parameters()))
        assert not next(fresh.parameters()).any()


def test_a_module_with_a_child_named_module_keeps_its_names(tmp_path):
    wrapped = nn.DataParallel(nn.Conv2d(3, 4, 3))
    torch.save(wrapped.state_dict(), tmp_path / "w.pt")
    net = build_backbone(wrapped, weights=tmp_path / "w.pt")
    assert torch.equal(net.module.weight, wrapped.module.weight)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet34", r"does not fit.*missing layer1\.2\.conv1\.weight"),
        ("resnet50", r"does not fit.*size mismatch|does not fit.*shape"),
        ("squeezenet1_1", r"does not fit.*missing features\.0.*unexpected conv1"),
    ],
)
def test_a_state_dict_of_another_architecture(tmp_path, resnet_state, backbone, message):
    torch.save(resnet_state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        build_backbone(backbone, weights=tmp_path / "w.pth")


def test_files_that_are_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        build_backbone("small_cnn", weights=tmp_path / "list.pt")
    torch.save(SmallCNN(), tmp_path / "pickled_module.pt")  # would run code
    with pytest.raises(ValueError, match="not a file of tensors only"):
        build_backbone("small_cnn", weights=tmp_path / "pickled_module.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match="not a file of tensors only"):
        build_backbone("small_cnn", weights=tmp_path / "empty.pt")


# A user's module


def test_a_module_with_more_than_tensors_in_its_state_is_loaded(tmp_path):
    class Counting(nn.Conv2d):
        def get_extra_state(self):
            return {"count": 3}

        def set_extra_state(self, state):
            self.count = state["count"]

    net = nn.Sequential(Counting(3, 4, 3))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert build_backbone(net, weights=tmp_path / "w.pt")[0].count == 3


def test_modules_that_cannot_be_copied_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="TorchScript"):
        build_backbone(torch.jit.trace(net, torch.zeros(1, 3, 8, 8)))
    net.last = net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"cannot be copied.*clear that"):
        build_backbone(net)


def test_a_users_module_is_copied_and_never_changed():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    module[0].weight.requires_grad_(False)
    module.train()
    before = copy.deepcopy(module.state_dict())
    net = build_backbone(module)
    measure(module, 16).cell_box(0, 0)
    nn.init.zeros_(net[0].weight)
    net.eval()
    assert module.training
    assert all(m.training for m in module.modules())
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert all(p.grad is None and p.device.type == "cpu" for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not {p.data_ptr() for p in net.parameters()} & {
        p.data_ptr() for p in module.parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_parameters_of_another_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=f"this module are {dtype}; they must be torch.float32"):
        build_backbone(SmallCNN(8).to(dtype))


def test_a_copy_shares_nothing_with_the_module():
    net = SmallCNN()
    net.settings, net.names = {}, {"a": [1]}
    net[0].settings = net.settings  # the same object, in the copy too
    net[1].register_forward_hook(len)
    again = copied(net)
    assert {**again.state_dict()}.keys() == {**net.state_dict()}.keys()
    for ours, theirs in zip(again.modules(), net.modules(), strict=True):
        assert ours is not theirs
        for name, value in vars(theirs).items():
            if isinstance(value, dict):
                assert vars(ours)[name] is not value, name
                assert type(vars(ours)[name]) is type(value)
    assert again[0].settings is again.settings
    assert again.names == {"a": [1]}
    assert again.names["a"] is not net.names["a"]
    assert list(again[1]._forward_hooks.values()) == [len]
    with torch.no_grad():
        again[0][0].weight.zero_()
    assert net[0][0].weight.any()
