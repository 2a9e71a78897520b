"""Every stage on a device that is not the CPU, where a tensor left behind is an error.

On machines without a GPU a fake one stands in: its tensors have shapes and a device, no values.
What only values can decide, which patch is nearest or how many rows a sheet has, is stood in for.
The backward pass runs on the "meta" device.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from protoclf import (
    ProtoPNetClassifier,
    activations,
    augmentation,
    explanation,
    features,
    localization,
    nearest_patches,
    patch_search,
    projection,
    selection,
    stages,
)
from protoclf.attribution import gradient_maps
from protoclf.augmentation import AugmentedDataset, augment_mildly
from protoclf.backbones import SmallCNN
from protoclf.concepts import Concepts, ForbiddenPatches
from protoclf.discriminants import discriminants
from protoclf.explanation import explain_batch
from protoclf.features import FeatureDataset, FitData
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.last_layer import LastLayerResult
from protoclf.localization import pair_boxes, upsample
from protoclf.losses import ProtoPNetLoss
from protoclf.network import Discriminants, ProtoPNet, PrototypeSpec
from protoclf.self_matches import rare_classes

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIMILARITIES = ["log", "cosine"]
SIZES = [(1, 1), (2, 3), (4, 4)]  # of a prototype, on a map of 4 x 4
PAIRS = 5  # rows of a sheet


def make(device, size=(1, 1), similarity="log", latent_dim=6):
    """A network and a batch, on a device."""
    spec = PrototypeSpec([0, 0, 1, 2], 3, size, similarity)
    with torch.device(device):
        net = ProtoPNet(SmallCNN(8), 8, spec, latent_dim, IMAGENET)
        images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        y = torch.zeros(5, dtype=torch.int64)
    return net, images, y


@pytest.fixture
def gpu():
    """A fake GPU: whatever meets a tensor of another device, or needs a value, raises."""
    with FakeTensorMode():
        yield "cuda"


@pytest.fixture
def values(monkeypatch):
    """Stand in for values on the fake GPU where shapes depend on them or the host reads them."""

    def nonzero(mask, as_tuple):
        return tuple(mask.new_zeros(PAIRS, dtype=torch.int64) for _ in range(mask.ndim))

    def unique(x, return_inverse):
        return x, torch.arange(len(x), device=x.device)

    monkeypatch.setattr(torch, "nonzero", nonzero)
    monkeypatch.setattr(torch, "unique", unique)
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: x.new_zeros(minlength))
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [PAIRS] + [0] * (len(counts) - 1))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tuple(tensor.shape), int))


def on_gpu(tensors):
    return all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("latent_dim", [6, None])
def test_forward_loss_and_similarity_maps_stay_on_the_device(gpu, size, similarity, latent_dim):
    net, images, y = make(gpu, size, similarity, latent_dim)
    features = net.features(images)
    outputs = net(images)
    losses = ProtoPNetLoss(net.owner, 0.8, 0.08, 0.5)(outputs, y, torch.ones(5, device=gpu))
    maps = net.similarity_maps(net.latents(features), torch.zeros(2, dtype=int, device=gpu))
    assert maps.shape == (5, 2, 5 - size[0], 5 - size[1])
    assert on_gpu([*outputs, *net(features=features), losses, maps])
    net.reset_last_layer()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distinct", [None, "patches", "images"])
@pytest.mark.parametrize("forbids", [False, True])
def test_the_search_of_the_projection_stays_on_the_device(
    gpu, monkeypatch, size, similarity, distinct, forbids
):
    """All that it hands over to the host are the candidates, once."""
    net, images, y = make(gpu, size, similarity)
    taken = []

    def cpu(tensor):
        taken.append(tensor)
        return torch.empty(tensor.shape, device="cpu")

    monkeypatch.setattr(projection, "_slots", lambda owner: owner.new_zeros(3, 2))
    monkeypatch.setattr(projection, "_choose", lambda *args: args)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
    z = net.latents(net.features(images))
    batches = [(z, y.to("cpu")), (z[:2], y[:2].to("cpu"))]
    concepts = ForbiddenPatches.__new__(ForbiddenPatches)
    concepts.patches, concepts.owner = net.scaled_prototypes()[:2], net.owner[:2]
    forbidden = concepts.distance if forbids else None
    distance, cell, barred, target, owner, _ = projection.find_sources(
        batches, net.scaled_prototypes(), net.owner, distinct, forbidden=forbidden
    )
    assert on_gpu(taken)
    assert len(taken) == 5
    assert barred.shape == cell.shape
    assert distance.shape == cell.shape
    assert distance.shape[:2] == (7, 2)
    assert target.shape == (7,)
    assert owner.shape == (4,)


@pytest.mark.parametrize("weighted", [False, True])
def test_discriminants_stay_on_the_device(gpu, weighted):
    weight = torch.ones(5) if weighted else None
    y = torch.zeros(5, dtype=torch.int64)  # weights and labels come from the CPU
    found = discriminants(torch.zeros(5, 8, device=gpu), y, 3, 0.4, weight)
    assert found.device.type == "cuda"
    net = Discriminants(8, 3).to(gpu)
    net.weight.copy_(found[..., None, None])
    assert net(torch.zeros(5, 8, 4, 4, device=gpu)).shape == (5, 11, 4, 4)


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", ["predicted", "top2", "all", [1]])
def test_explanation_stays_on_the_device(gpu, size, similarity, classes):
    net, images, _ = make(gpu, size, similarity)
    rows = explain_batch(net.eval(), net.latents(net.features(images)), classes, 32, 95)
    assert len(rows) == PAIRS


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("size", SIZES)
def test_boxes_and_upsampling_stay_on_the_device(gpu, size):
    net, images, _ = make(gpu, size)
    z = net.latents(net.features(images))
    index = torch.zeros(PAIRS, dtype=torch.int64, device=gpu)
    assert on_gpu([pair_boxes(net, z, index, index, 32, 95)])
    assert on_gpu([upsample(net.similarity_maps(z)[0], 20, 30)])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_similarities_on_the_meta_device(size, similarity):
    net, images, _ = make("meta", size, similarity)
    prototypes = torch.zeros(2, dtype=torch.int64, device="meta")
    maps = gradient_maps(net.eval(), images[0], prototypes)
    assert maps.device.type == "meta"
    assert maps.shape == (2, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("size", SIZES)
def test_what_rates_candidates_and_tells_rare_classes_stays_on_the_device(
    gpu, size, components, dtype
):
    net, images, y = make(gpu, size, "cosine")
    with torch.no_grad():
        z = net.latents(net.features(images))
        candidates = net.scaled_prototypes()
        axes = components and candidates[0].flatten().new_ones(candidates[0].numel(), components)
        found = selection._rough_distances([z], candidates, axes, dtype)
    rare = rare_classes(y, 3)
    for tensor, shape in ((found, (5, 4)), (rare, (3,))):
        assert tensor.device.type == "cuda"
        assert tensor.shape == shape


@pytest.mark.usefixtures("values")
def test_nearest_patches_stay_on_the_device(gpu, monkeypatch):
    net, images, _ = make(gpu)
    z = net.eval().latents(net.features(images))
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [3] * 4 + [0])  # 3 of 4 prototypes
    others = torch.zeros(5, 4, dtype=torch.bool, device=gpu)
    best = nearest_patches._best_of_batch(net, z, others, 0, 3)
    more = nearest_patches._best_of_batch(net, z, others, 5, 3)
    merged = nearest_patches._merged(best, more, 3)
    for parts in (best, merged):
        assert on_gpu(parts)
        assert [tuple(part.shape) for part in parts] == [(4, 3)] * 3 + [(4, 3, 4, 4)]


@pytest.mark.parametrize("forbidden", [True, False])
def test_costs_of_concepts_stay_on_the_device(gpu, monkeypatch, forbidden):
    """They are kept on the CPU, and come to the device batch by batch."""
    net, images, y = make(gpu)
    monkeypatch.setattr(FakeTensor, "tolist", lambda places: [0] * len(places))
    cells = torch.zeros(5, dtype=int)
    kinds = torch.full((5,), forbidden), torch.ones(5)
    box = torch.tensor([[0, 0, 4, 4]]).expand(5, 4)
    concepts = Concepts(images.to("cpu"), box, cells, cells, y.to("cpu"), *kinds)
    assert on_gpu([concepts.cost(net)])


def test_a_tensor_left_behind_on_the_cpu_is_found(gpu, monkeypatch):
    """The tests above can fail: here is what they are there for."""
    net, images, _ = make(gpu)
    net.mean = net.mean.to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        net(images)
    net, images, _ = make(gpu)
    net.owner = net.owner.to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        ProtoPNetLoss(net.owner, 0.8, 0.08, 0.5)(net(images), torch.zeros(5, dtype=int, device=gpu))
    matrix = localization._bicubic
    monkeypatch.setattr(localization, "_bicubic", lambda *args: matrix(*args).to("cpu"))
    with pytest.raises(RuntimeError, match="device"):
        upsample(torch.zeros(2, 4, 4, device=gpu), 20, 30)


@pytest.mark.usefixtures("values")
def test_a_tensor_left_behind_by_the_explanation_is_found(gpu, monkeypatch):
    net, images, _ = make(gpu)
    monkeypatch.setattr(explanation, "chosen_classes", lambda *args: torch.zeros(5, 1, dtype=int))
    with pytest.raises(RuntimeError, match="device"):
        explain_batch(net.eval(), net.latents(net.features(images)), "all", 32, 95)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
def test_stages_of_projection_and_last_layer_stay_on_the_device(
    squares, monkeypatch, size, similarity
):
    """The choice of patches and the solver of the last layer, which need values, are left out."""
    clf = ProtoPNetClassifier("small_cnn", image_size=32, batch_size=7, verbose=0, device="cpu")
    clf.classes_inferred_, y = np.unique(squares[1], return_inverse=True)
    images = Images(squares[0])
    dataset = ImageDataset(images, Preprocessing(32), y, np.ones(len(y))).keep()
    clf.initialize().device = "cuda"

    def sources(latents, prototypes, owner, distinct, gather, forbidden):
        assert on_gpu([z for z, _ in latents] + [prototypes, owner])
        return projection.Sources(np.arange(4), np.zeros(4, int), np.zeros(4))

    def solved(g, y, owner, *args, **kwargs):
        assert on_gpu([g, y, owner])
        return [LastLayerResult(g.new_zeros(3, 4), 0.0, 0.0, 1, True, 1, 1, 0.1, 0.0)]

    monkeypatch.setattr(patch_search, "find_sources", sources)
    monkeypatch.setattr(features, "_check_finite", lambda rows, index: on_gpu([rows]))
    monkeypatch.setattr(activations, "last_layer_path", solved)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tuple(tensor.shape), int))
    monkeypatch.setattr(torch.Tensor, "bincount", lambda x, minlength: x.new_zeros(minlength))
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):  # images come from the host
        module, *_ = make("cuda", size, similarity)
        vars(clf)["module_"] = module
        vars(clf)["criterion_"] = ProtoPNetLoss(module.owner, 0.8, 0.08, 0.5)
        data = FitData(clf, dataset, None)
        stages.Projection(None).run(clf, data)
        stages.LastLayer(0.1, "auto", 0.0).run(clf, data)
        assert on_gpu([data.train_features.features, data.train_distance, module.prototypes])
    assert clf.history[:, "stage"] == ["projection", "last layer"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("now", "given", "moved_to"),
    [("cuda:1", "cuda", "cuda:0"), ("cuda:1", "cuda:1", None), ("cuda:0", "cuda", None)],
)
def test_a_network_comes_to_the_gpu_that_its_inputs_go_to(monkeypatch, now, given, moved_to):
    """That is torch's current one, the first here, where `device` has no number."""
    clf, moved = ProtoPNetClassifier(device=given), []
    module, *_ = make(now)
    vars(clf)["module_"], vars(clf)["criterion_"] = module, ProtoPNetLoss(module.owner, 0.8, 0.08)
    clf.backbone_trained_, clf.channels_last_ = True, False
    monkeypatch.setattr(torch.nn.Module, "to", lambda part, device: moved.append(str(device)))
    clf.prepare_processor()
    assert moved == ([] if moved_to is None else [moved_to] * 2)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_training_step_on_the_meta_device(size, similarity, weighted):
    net, images, y = make("meta", size, similarity)
    loss = ProtoPNetLoss(net.owner, 0.8, 0.08, 0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-3)
    weight = torch.ones(5, device="meta") if weighted else None
    net.train()
    value = loss(net(images), y, weight)
    value.backward()
    optimizer.step()
    assert value.device.type == "meta"
    for parameter in net.parameters():
        assert parameter.grad.device.type == "meta"
        assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_fit_on_a_real_gpu(squares, similarity, train_backbone):
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=48,
        similarity=similarity,
        train_backbone=train_backbone,
        prototypes_per_class=2,
        warmup_epochs=1,
        joint_epochs=1,
        random_state=0,
        verbose=0,
        device="cuda",
    )
    X, y = squares
    clf.fit(X, y, sample_weight=np.ones(len(y)))
    assert on_gpu(clf.module_.state_dict().values())
    sheet = clf.explain(X, "all")
    logits = clf.decision_function(X)
    for (i, label), rows in sheet.groupby(["sample", "class"]):
        c = clf.classes_.tolist().index(label)
        assert rows["contribution"].sum() == pytest.approx(logits[i, c], rel=1e-4, abs=1e-3)
    assert np.isfinite(clf.similarity_maps(X)).all()


def test_images_are_augmented_on_the_device(monkeypatch):
    crops = [[0, 1, 6, 7], [1, 0, 7, 6]]  # drawn on the host: values
    monkeypatch.setattr(augmentation, "_crops", lambda n, side: crops)
    monkeypatch.setattr(augmentation, "_flips", lambda n: [True, False])
    dataset = ImageDataset(Images(np.zeros((4, 8, 8, 3), np.uint8)), Preprocessing(8)).keep()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs, _ = AugmentedDataset(dataset, augment_mildly, "cuda").__getitems__([2, 0])
        assert on_gpu([inputs["images"]])
        assert inputs["images"].shape == (2, 3, 8, 8)


class Recorded:
    """A loader that only says what it was asked for."""

    def __init__(self, dataset, **asked):
        self.asked = asked


WORKERS = {"num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bad", ["raise", "skip"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("pinned", [None, True])
def test_loaders_pin_what_a_gpu_takes_and_have_workers_where_they_help(device, bad, kept, pinned):
    given = {f"iterator_train__{name}": value for name, value in WORKERS.items()}
    if pinned is not None:
        given["iterator_train__pin_memory"] = pinned
    clf = ProtoPNetClassifier(device=device, on_bad_image=bad, iterator_train=Recorded, **given)
    images = ImageDataset(Images(np.zeros((4, 8, 8, 3), np.uint8)), Preprocessing(8))
    kinds = torch.zeros(4, dtype=torch.int64)
    dataset = FeatureDataset(torch.zeros(4, 2, 1, 1), kinds, None, kinds) if kept else images
    asked = clf.get_iterator(dataset, training=True).asked
    assert asked.get("pin_memory", False) is (not kept and (pinned or device == "cuda"))
    workers = WORKERS if bad == "raise" and not kept else {}
    assert {k: v for k, v in asked.items() if k in WORKERS} == workers
    assert asked.keys() <= {*WORKERS, "pin_memory", "batch_size", "shuffle", "collate_fn"}
