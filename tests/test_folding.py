"""Batch norm folded into convolutions: the same numbers, or no fold at all."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet121, mobilenet_v2, resnet18

from protoclf import ProtoPNetClassifier
from protoclf.backbone_facts import found_once
from protoclf.backbones import SmallCNN
from protoclf.folding import find_evaluation_folds, find_folds, folded, folded_copy
from protoclf.network import ProtoPNet, PrototypeSpec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def with_statistics(module):
    """Give batch-norm layers what only data would give them."""
    torch.manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight, layer.bias):
                if tensor is not None:
                    tensor.data.normal_()
            layer.running_var.uniform_(0.5, 2)
    return module


def output_and_gradients(module, images):
    """By autograd, in the module's own way."""
    output = module(images)
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return output.detach(), gradients


@pytest.mark.parametrize(
    ("build", "pairs"), [(resnet18, 20), (mobilenet_v2, 52), (densenet121, 59), (SmallCNN, 6)]
)
def test_folded_is_the_same_function_with_the_same_gradients(build, pairs):
    net = with_statistics(build()).double().eval()
    if not isinstance(net, SmallCNN):
        net = nn.Sequential(*list(net.children())[:-1])
    folds = find_folds(net, 64)
    assert len(folds) == pairs
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, expected_gradients = output_and_gradients(net, images)
    with folded(net, folds, [norm for _, norm in folds]):
        found, gradients = output_and_gradients(net, images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert len(gradients) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("build", "pairs"), [(resnet18, 20), (mobilenet_v2, 52), (densenet121, 59), (SmallCNN, 6)]
)
def test_a_copy_for_evaluation_is_the_same_function(build, pairs):
    net = with_statistics(build())
    if not isinstance(net, SmallCNN):
        net = nn.Sequential(*list(net.children())[:-1])
    net.to(memory_format=torch.channels_last).train()
    folds = find_evaluation_folds(net, 64)
    assert len(folds) == pairs
    copied = folded_copy(net, folds)
    kept = [layer for layer in copied.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(kept) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) - pairs
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = net.eval()(images), copied(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_several_passes_share_a_fold():
    net = with_statistics(nn.Sequential(*list(resnet18().children())[:-2])).double().eval()
    folds = find_folds(net, 64)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected, expected_gradients = output_and_gradients(net, images)
    first = net.get_submodule("0").weight
    first.requires_grad_(False)
    with folded(net, folds, [norm for _, norm in folds], shared=True):
        outputs = [net(piece) for piece in images.split(2)]
        for output in outputs:
            output.square().sum().backward()
        assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(torch.cat(outputs).detach(), expected)
    assert first.grad is None
    gradients = [p.grad for p in net.parameters() if p is not first]
    torch.testing.assert_close(gradients, expected_gradients[1:])


def passes_of_which_the_second_fails(net):
    with folded(net, (("convolution", "norm"),), ["norm"], shared=True):
        for channels in (3, 5):
            net(torch.randn(2, channels, 8, 8)).sum().backward()


def test_a_shared_fold_that_fails_leaves_nothing_behind():
    net = with_statistics(Pair()).eval()
    with pytest.raises(RuntimeError, match="channels"):
        passes_of_which_the_second_fails(net)
    assert "weight" not in vars(net.convolution)
    assert "forward" not in vars(net.norm)
    assert net.convolution.weight.grad is None


class Pair(nn.Module):
    """A convolution and a batch-norm layer behind it."""

    def __init__(self, bias=True, affine=True):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, bias=bias)
        self.norm = nn.BatchNorm2d(4, affine=affine)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_with_and_without_bias_and_scale(bias, affine):
    net = with_statistics(Pair(bias, affine)).double().eval()
    folds = find_folds(net, 8)
    assert folds == (("convolution", "norm"),)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = output_and_gradients(net, images)
    with folded(net, folds, ["norm"]):
        torch.testing.assert_close(output_and_gradients(net, images), expected)


class UsesItTwice(Pair):
    def forward(self, x):
        z = self.convolution(x)
        return self.norm(z) + z


class Twice(Pair):
    def forward(self, x):
        return self.norm(self.convolution(x)) + self.norm(self.convolution(x.flip(3)))


class DropsInBetween(Pair):
    def forward(self, x):
        return self.norm(nn.functional.dropout(self.convolution(x), training=self.training))


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Activated(Pair):
    def __init__(self):
        super().__init__()
        self.norm = WithActivation(4)


class WeightNormed(Pair):
    def __init__(self):
        super().__init__()
        self.convolution = weight_norm(self.convolution)


class ComputedWeight(Pair):
    """A weight that a hook computes before each call, as older forms of weight norm do."""

    def __init__(self):
        super().__init__()
        weight = self.convolution.weight
        del self.convolution.weight
        self.convolution.register_parameter("weight_v", nn.Parameter(weight.detach()))
        self.convolution.weight = weight.detach()
        self.convolution.register_forward_pre_hook(
            lambda layer, _: setattr(layer, "weight", layer.weight_v * 2)
        )


class Checkpointed(Pair):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class OnlySingle(Pair):
    def forward(self, x):
        return super().forward(x.float())


class OwnForward(Pair):
    def __init__(self):
        super().__init__()
        self.norm.forward = torch.relu


class Watched(Pair):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.convolution.register_forward_hook(lambda layer, x, z: self.seen.append(z.shape))


class ReadsTheLayer(Pair):
    def forward(self, x):
        return super().forward(x) * self.norm.weight.sum() + self.convolution.weight.sum()


@pytest.mark.parametrize(
    "build",
    [
        *(UsesItTwice, Twice, DropsInBetween, Activated, WeightNormed, ComputedWeight),
        *(Checkpointed, OnlySingle, OwnForward, Watched, ReadsTheLayer),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        lambda: nn.Conv2d(3, 4, 3),
    ],
)
def test_no_fold_where_it_would_change_anything(build):
    torch.manual_seed(0)
    net = build()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    modes = [layer.training for layer in net.modules()]
    random = torch.get_rng_state()
    assert find_folds(net, 8) == ()
    assert build in (DropsInBetween, Checkpointed) or find_evaluation_folds(net, 8) == ()
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [layer.training for layer in net.modules()]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


class Dropping(Pair):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), training=self.training)


def test_what_is_random_in_training_alone_is_folded_in_evaluation():
    assert find_evaluation_folds(Dropping(), 8) == (("convolution", "norm"),)
    assert find_evaluation_folds(DropsInBetween(), 8) == (("convolution", "norm"),)


def test_the_layers_are_as_before_after_an_error():
    net = Pair().eval()
    with pytest.raises(RuntimeError), folded(net, (("convolution", "norm"),), ["norm"]):
        net(torch.zeros(1, 5, 8, 8))
    assert not {"weight", "bias", "forward"} & (vars(net.convolution).keys() | vars(net.norm))
    assert isinstance(net.convolution.weight, nn.Parameter)
    pickle.loads(pickle.dumps(net))


def network(statistics):
    torch.manual_seed(0)
    backbone = SmallCNN(8)
    net = ProtoPNet(
        with_statistics(backbone) if statistics else backbone,
        8,
        PrototypeSpec([0, 1], 2, (1, 1), "cosine"),
        None,
        IMAGENET,
    )
    net.keep_statistics(True)
    net.folds = find_folds(net.backbone, 32)
    return net


@pytest.fixture
def norms_called(monkeypatch):
    """Return how many layers of batch norm compute anything for the features of images."""
    original, called = nn.BatchNorm2d.forward, set()

    def forward(layer, x):
        called.add(layer)
        return original(layer, x)

    def of(work):
        called.clear()
        work()
        return len(called)

    def count(net, images):
        return of(lambda: net.features(images))

    count.of = of
    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)
    return count


def test_a_network_folds_in_training_alone(norms_called):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    net = network(statistics=True)
    expected = net.eval().features(images)
    torch.testing.assert_close(net.train().features(images), expected, rtol=1e-4, atol=1e-4)
    assert norms_called(network(True).train(), images) == 0
    assert norms_called(network(True).eval(), images) == 6
    assert norms_called(network(False).train(), images) == 6  # new layers learn their statistics
    with torch.no_grad():
        assert norms_called(network(True).train(), images) == 6


def test_a_fold_is_where_the_network_is():
    net = network(statistics=True).to("meta").train()
    assert len(net.folds) == 6
    net.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")).sum().backward()
    assert all(p.grad.device.type == "meta" for p in net.backbone.parameters())
    assert find_folds(net.backbone, 32) == ()  # there are no numbers to try it out


@pytest.fixture
def large_passes(monkeypatch):
    """Let passes over more than three images be worth a fold."""
    monkeypatch.setattr("protoclf.net._WORTH_FOLDING", 4)


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        *(({}, 0), ({"precision": "bfloat16"}, 6), ({"compile": True}, 6)),
        ({"memory": True}, 0),
        ({"image_size": 40}, 0),  # for the next fit: no trial at another size than the images'
    ],
)
def test_passes_over_many_images_fold(
    eight_images, large_passes, norms_called, tmp_path, given, layers
):
    X, y = eight_images
    backbone = with_statistics(SmallCNN(8))
    frozen = {"train_backbone": False, "precision": "float32"}
    plain = _fitted(backbone, (X[:2], y[:2]), **frozen)
    if "memory" in given:
        given = given | {"memory": tmp_path}
    clf = copy.deepcopy(plain).set_params(**given)
    expected = [plain.decision_function(X[i : i + 2]) for i in range(0, 8, 2)]
    found_once(find_evaluation_folds, clf.module_.backbone, 32)  # a trial, in which they are called
    assert norms_called.of(lambda: clf.predict(X[:3])) == 6
    assert norms_called.of(lambda: clf.predict(X)) == layers
    if "precision" not in given:
        np.testing.assert_allclose(clf.decision_function(X), np.concatenate(expected), atol=1e-3)
    kept = [m for m in clf.module_.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(kept) == 6


def test_somebody_who_watches_sees_the_layers_themselves(eight_images, large_passes):
    X, _ = eight_images
    clf = _fitted(with_statistics(SmallCNN(8)), eight_images, train_backbone=False)
    seen = []
    clf.module_.backbone[2][0].register_forward_hook(lambda layer, x, z: seen.append(len(z)))
    clf.predict(X)
    assert sum(seen) == len(X)


def test_threads_that_fold_do_not_meet(eight_images, large_passes):
    X, _ = eight_images
    clf = _fitted(with_statistics(SmallCNN(8)), eight_images, train_backbone=False)
    expected = clf.decision_function(X)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: clf.decision_function(X), range(12)):
            assert np.array_equal(found, expected)


def test_fit_folds_what_keeps_its_statistics(eight_images):
    backbone = with_statistics(SmallCNN(8))
    assert _fitted(backbone, eight_images).module_.folds
    assert not _fitted(backbone, eight_images, batch_norm="train").module_.folds
    assert not _fitted(SmallCNN(8), eight_images).module_.folds


def _fitted(backbone, data, **parameters):
    clf = ProtoPNetClassifier(
        backbone,
        image_size=32,
        joint_epochs=1,
        prototypes_per_class=1,
        random_state=0,
        **parameters,
    )
    return clf.set_params(verbose=0).fit(*data)


@pytest.fixture
def eight_images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), np.arange(8) % 2
