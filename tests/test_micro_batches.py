"""Batches in pieces: the same loss and the same gradients, in less memory."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skorch.callbacks import Callback
from skorch.dataset import ValidSplit
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.concepts import Concepts
from protoclf.datasets import make_birds
from protoclf.editing import forbid
from protoclf.losses import ProtoPNetLoss
from protoclf.micro_batches import images_stay_apart, learns_statistics, pieces_by_class
from protoclf.network import ProtoPNet, PrototypeSpec


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 50))
def test_pieces_hold_each_image_once_and_no_class_in_several(classes, size):
    y = torch.tensor(classes)
    pieces = pieces_by_class(y, size)
    assert torch.cat(pieces).sort().values.tolist() == list(range(len(y)))
    owners = [set(y[piece].tolist()) for piece in pieces]
    assert sum(map(len, owners)) == len(set(classes))
    assert all(len(piece) for piece in pieces)
    largest_class = int(y.bincount().max())
    assert max(map(len, pieces)) < size + largest_class
    assert len(pieces) == min(-(-len(y) // size), len(set(classes)))


@pytest.mark.parametrize("weighted", [False, True])
def test_shares_of_pieces_add_up_to_the_loss_and_its_gradients(weighted):
    torch.manual_seed(0)
    n, m = 24, 18
    owner = torch.arange(6).repeat_interleave(3)
    y = torch.randint(5, (n,))  # no image of the sixth class
    weight = torch.rand(n) * (torch.rand(n) > 0.3) if weighted else None
    criterion = ProtoPNetLoss(owner, 0.8, 0.08, 0.7)
    distance = torch.rand(n, m, dtype=torch.float64, requires_grad=True)

    def outputs(rows):
        d = distance[rows]
        return -d @ torch.ones(m, 6, dtype=torch.float64).tril(), d, d

    expected = criterion(outputs(slice(None)), y, weight)
    (expected_gradient,) = torch.autograd.grad(expected, distance)
    pieces = pieces_by_class(y, 5)
    assert len(pieces) == 5
    total = 0.0
    for piece, share in criterion.shares(pieces, y, weight):
        own_weight = None if weight is None else weight[piece]
        loss = criterion(outputs(piece), y[piece], own_weight, share)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item())
    torch.testing.assert_close(distance.grad, expected_gradient, rtol=1e-5, atol=1e-8)


def test_a_batch_of_weight_0_costs_nothing_in_pieces_either():
    criterion = ProtoPNetLoss(torch.tensor([0, 1]), 0.8, 0.08, 0.7)
    y, weight = torch.tensor([0, 1, 1]), torch.zeros(3)
    for piece, share in criterion.shares(pieces_by_class(y, 1), y, weight):
        logits = torch.ones(len(piece), 2)
        loss = criterion((logits, logits, logits), y[piece], weight[piece], share)
        assert loss == 0


class Mixes(nn.Module):
    """Subtracts the mean of the batch, as no batch-norm layer of torch would."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, x):
        z = self.convolution(x)
        return z - z.mean(0) if self.training else z


class Dropped(nn.Module):
    """Draws other masks for a batch than for its images one by one."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        z = self.norm(self.convolution(x))
        return nn.functional.dropout(z, 0.5, training=self.training).relu()


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("not in training")


@pytest.mark.parametrize(
    ("backbone", "apart"),
    [
        (Mixes(), False),
        (Dropped(), True),
        (nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GroupNorm(2, 4)), True),
        (nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.InstanceNorm2d(4)), True),
        (Raises(), False),
    ],
)
def test_images_that_see_one_another_are_found_out(backbone, apart):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    assert images_stay_apart(backbone, 16) is apart
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], v) for name, v in backbone.state_dict().items())


def test_layers_that_learn_statistics_are_seen():
    net = Dropped().train()
    assert learns_statistics(net)
    net.norm.eval()
    assert not learns_statistics(net)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    paths, labels, _ = make_birds(tmp_path_factory.mktemp("birds"), n_per_class=3, image_size=64)
    return paths, np.asarray(labels)


def backbone():
    """Return a new one, the same each time, without layers that learn statistics."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=4), nn.ReLU()]
    return nn.Sequential(*layers)


def classifier(**parameters):
    settings = {"backbone": backbone(), "image_size": 64, "prototypes_per_class": 2}
    settings |= {"joint_epochs": 2, "augmentation": None, "random_state": 0, "verbose": 0}
    settings |= {"augmented_views": 0, "batch_size": 16}
    return ProtoPNetClassifier(**settings | parameters)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_fit_in_pieces_is_the_fit_of_whole_batches(birds, weighted, monkeypatch):
    X, y = birds
    weight = np.linspace(0.1, 2, len(y)) if weighted else None
    whole = classifier(micro_batch_size=None).fit(X, y, sample_weight=weight)
    sizes = []
    forward = type(whole.module_).forward

    def watched(self, images=None, features=None):
        if torch.is_grad_enabled() and images is not None:
            sizes.append(len(images))
        return forward(self, images, features)

    monkeypatch.setattr(type(whole.module_), "forward", watched)
    pieces = classifier(micro_batch_size=4).fit(X, y, sample_weight=weight)
    assert 4 <= max(sizes) < 16
    assert sum(sizes) == 2 * len(y)
    losses = [[row["train_loss"] for row in c.history] for c in (whole, pieces)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for a, b in zip(whole.module_.parameters(), pieces.module_.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert (whole.predict(X) == pieces.predict(X)).all()


class Watch(Callback):
    """Notes for each batch whether its outputs are in its order."""

    def __init__(self):
        self.seen = []

    def on_batch_end(self, net, batch=None, training=False, **step):
        if training and "images" in batch[0]:
            with torch.no_grad():
                net.module_.eval()
                expected = net.module_(batch[0]["images"])
            same = map(torch.allclose, expected, step["y_pred"])
            self.seen.append(all(same) and not any(o.requires_grad for o in step["y_pred"]))


def test_callbacks_see_the_whole_batch_in_its_order(birds):
    X, y = birds
    watch = Watch()
    clf = classifier(lr=0.0, backbone_lr=0.0, micro_batch_size=4, callbacks=[("watch", watch)])
    clf.fit(X, y)
    assert len(watch.seen) == 2 * -(-len(y) // 16)
    assert all(watch.seen)


def test_concepts_cost_once_a_batch(birds, monkeypatch):
    X, y = birds
    calls = []
    cost = Concepts.cost
    monkeypatch.setattr(Concepts, "cost", lambda self, net: calls.append(1) or cost(self, net))
    clf = classifier(micro_batch_size=4).fit(X, y)
    whole = copy.deepcopy(clf).set_params(micro_batch_size=None)
    histories = []
    for net in (clf, whole):
        calls.clear()
        taught = forbid(net, [0], X, y, epochs=1)
        assert len(calls) == -(-len(y) // 16)
        histories.append([row["train_loss"] for row in taught.history])
    np.testing.assert_allclose(*histories, rtol=1e-4)


class OwnLoss(ProtoPNetClassifier):
    """Adds to the loss, as skorch's users do."""

    def get_loss(self, y_pred, y_true, X=None, training=False):
        return super().get_loss(y_pred, y_true, X=X, training=training) + 1


def learning():
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"backbone": learning()}, "learns batch-norm statistics"),
        ({"backbone": Mixes()}, "depends on the others"),
        ({"cls": OwnLoss}, "OwnLoss has a get_loss of its own"),
        ({"compile": True}, "compile=True"),
    ],
)
def test_where_pieces_would_change_the_step_batches_stay_whole(birds, parameters, reason):
    settings = {"backbone": backbone()} | parameters
    make = settings.pop("cls", ProtoPNetClassifier)
    clf = make(**classifier(**settings).get_params(deep=False))
    clf.classes_inferred_ = np.unique(birds[1])
    clf.seed_ = 0
    clf._fitting = True
    clf.initialize()
    assert clf.piece_size() is None
    clf.micro_batch_size = 4
    with pytest.warns(UserWarning, match=f"pieces of 4 images: .*{reason}"):
        assert clf.piece_size() is None


def test_auto_is_for_cpus():
    assert classifier(device="cuda").piece_size() is None
    assert classifier(batch_size=8).piece_size() is None
    assert classifier(micro_batch_size=None).piece_size() is None


def test_features_are_the_same_however_many_images_are_taken_at_once():
    spec = PrototypeSpec([0, 1], 2, (1, 1), "cosine")
    module = ProtoPNet(backbone(), 12, spec, None, ((0.5,) * 3, (0.2,) * 3)).eval()
    images = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8)
    expected = module.features(images).detach()
    for k in (1, 3, 7, 8):
        with module.taking(k), torch.no_grad():
            found = module.features(images)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(KeyError), module.taking(3):
        raise KeyError
    assert module.images_at_once is None


@pytest.mark.parametrize(
    ("parameters", "largest"),
    [
        ({"micro_batch_size": 2}, 4),
        ({}, 16),  # "auto": twice 8
        ({"micro_batch_size": None}, 16),
        ({"micro_batch_size": 2, "train_backbone": False}, 16),
        ({"micro_batch_size": 2, "joint_epochs": 0}, 16),
    ],
)
def test_passes_without_gradients_are_small_where_the_backbone_is_trained(
    birds, parameters, largest, monkeypatch
):
    sizes = []
    features = ProtoPNet._features

    def watched(self, images):
        if not torch.is_grad_enabled():
            sizes.append(len(images))
        return features(self, images)

    monkeypatch.setattr(ProtoPNet, "_features", watched)
    split = ValidSplit(3, stratified=True)
    clf = classifier(train_split=split, augmented_views=1, **parameters).fit(*birds)
    assert max(sizes) == largest
    sizes.clear()
    clf.predict(birds[0])
    assert max(sizes) == 16  # the batch, after the fit


def test_auto_takes_16_images_at_once_on_cpus_but_where_networks_are_compiled():
    assert classifier(compile=True, micro_batch_size=2).images_at_once() is None
    assert classifier(device="cuda").images_at_once() is None
    assert classifier(batch_size=8).images_at_once() is None
    assert classifier(batch_size=32).images_at_once() == 16


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_in_pieces_on_the_meta_device(weighted):
    clf = classifier(device="meta")
    with torch.device("meta"):
        spec = PrototypeSpec([0, 0, 1, 2], 3, (1, 1), "cosine")
        imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        module = ProtoPNet(copy.deepcopy(clf.backbone).to("meta"), 12, spec, None, imagenet)
    clf.__dict__ |= {"module_": module, "criterion_": ProtoPNetLoss(module.owner, 0.8, 0.1, 0.8)}
    clf._modules, clf.concepts_ = ["module"], None
    inputs = {"images": torch.zeros(6, 3, 64, 64, dtype=torch.uint8)}
    if weighted:
        inputs["sample_weight"] = torch.ones(6)
    clf._piece_size = 2
    step = clf.train_step_single((inputs, torch.tensor([2, 1, 0, 0, 1, 2])))
    assert step["loss"].device.type == "meta"
    assert [tuple(o.shape) for o in step["y_pred"]] == [(6, 3), (6, 4), (6, 4)]
    gradients = [p.grad for p in module.parameters() if p is not module.last_layer.weight]
    assert all(g is not None and g.device.type == "meta" for g in gradients)


class OutOfMemory(nn.Module):
    """Fails as a GPU does that is too small for the batch."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        if self.training and len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.convolution(x)


def test_out_of_memory_says_what_helps_and_it_does(birds):
    X, y = birds
    with pytest.raises(torch.cuda.OutOfMemoryError, match="A smaller micro_batch_size"):
        classifier(backbone=OutOfMemory(), micro_batch_size=None).fit(X, y)
    classifier(backbone=OutOfMemory(), micro_batch_size=1).fit(X, y)
