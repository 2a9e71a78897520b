"""The stages of a fit: their schedule, what each changes and sees, and what it leaves behind."""

import copy
import math
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from skorch.callbacks import Callback, EarlyStopping
from skorch.dataset import ValidSplit
from skorch.history import History
from torch import nn

from protoclf import ProtoPNetClassifier, fitting, progress
from protoclf.backbones import SmallCNN
from protoclf.features import FitData
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.network import PARTS
from protoclf.stages import LastLayer, Projection, Start, Training, schedule


class Spy(nn.Module):
    """A small backbone that notes how many images it sees at a time, and may be interrupted."""

    seen: list[int] = []  # noqa: RUF012 (shared, since the estimator copies its backbone)
    interrupt_after = math.inf

    def __init__(self):
        super().__init__()
        self.layers = SmallCNN(8)

    def forward(self, x):
        """Images are seen in batches; the backbone's geometry is measured on single ones."""
        if x.device.type == "cpu" and len(x) > 1:
            if len(Spy.seen) >= Spy.interrupt_after:
                raise KeyboardInterrupt
            Spy.seen.append(len(x))
        return self.layers(x)


@pytest.fixture(autouse=True)
def _reset_spy(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(Spy, "seen", [])
    monkeypatch.setattr(Spy, "interrupt_after", math.inf)


class Recorder(Callback):
    """Keeps the network and the learning rates of each row of the history."""

    def __init__(self):
        self.start, self.rows = None, []

    def on_train_begin(self, net, **kwargs):
        self.start = copy.deepcopy(net.module_.state_dict())

    def on_epoch_end(self, net, **kwargs):
        rates = {group["part"]: group["lr"] for group in net.optimizer_.param_groups}
        self.rows.append((net.history[-1, "stage"], copy.deepcopy(net.module_.state_dict()), rates))

    def states(self, stage):
        return [state for name, state, _ in self.rows if name == stage]

    def rates(self, stage, part):
        return [rates[part] for name, _, rates in self.rows if name == stage]


def make(**parameters):
    settings = {"backbone": "small_cnn", "image_size": 32, "prototypes_per_class": 2}
    settings |= {"latent_dim": 8, "lambda_l1": 0.01, "prototype_init": "kmeans"}
    settings |= {"warmup_epochs": 1, "joint_epochs": 1, "batch_size": 7}
    settings |= {"random_state": 0, "verbose": 0, "augmentation": None, "device": "cpu"}
    return ProtoPNetClassifier(**(settings | parameters))


def part(state, name):
    return {key: value for key, value in state.items() if key.split(".")[0] == name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def dataset_of(clf, squares, sample_weight=None, index=slice(None)):
    X, y = squares[0][index], np.unique(squares[1], return_inverse=True)[1][index]
    return ImageDataset(Images(X), clf.preprocessing_, y, sample_weight).keep()


@torch.no_grad()
def latents_in_batches(clf, X):
    """Latent maps of images, computed in the batches of the fit."""
    dataset, module = ImageDataset(Images(X), clf.preprocessing_), clf.module_.eval()
    batches = [inputs["images"] for inputs, _ in clf.get_iterator(dataset)]
    return torch.cat([module.latents(module.features(images)) for images in batches])


def assert_prototypes_are_patches(clf, X):
    """Each prototype equals, bit for bit, the latent patch of X that the table names."""
    rows, cols = clf.module_.prototype_size
    z = latents_in_batches(clf, X)
    for source in clf.prototypes_.to_dict("records"):
        i, top, left = source["source_index"], source["row"], source["col"]
        patch = z[i, :, top : top + rows, left : left + cols]
        assert torch.equal(clf.module_.prototypes[source["prototype"]], patch)


# The schedule -----------------------------------------------------------------------------------


def test_schedule_by_default():
    net = ProtoPNetClassifier()
    heads = {"add_on": net.lr, "prototypes": net.lr}
    assert schedule(net, first=True) == [
        Start(net.prototype_init),
        Training("warm-up", net.warmup_epochs, heads),
        Training("joint", net.joint_epochs, {"backbone": net.backbone_lr, **heads}, "cosine"),
        Projection(None),
        LastLayer("auto", "auto", "auto"),
    ]


def test_schedule_of_the_paper():
    heads = {"add_on": 3e-3, "prototypes": 3e-3}
    joint = {"backbone": 1e-4, **heads}
    assert schedule(ProtoPNetClassifier.paper(), first=True) == [
        Start("random"),
        Training("warm-up", 5, heads),
        *(Training("joint", 10, joint, "step", 0), Projection(None), LastLayer(1e-4, "keep", 0.0)),
        *(Training("joint", 10, joint, "step", 10), Projection(None), LastLayer(1e-4, "keep", 0.0)),
        *(Training("joint", 10, joint, "step", 20), Projection(None), LastLayer(1e-4, "keep", 0.0)),
    ]


@pytest.mark.parametrize("verbose", [0, 1])
def test_each_epoch_has_a_bar_of_its_batches(squares, monkeypatch, verbose):
    bars = []

    def bar(items, what, total, disable, **_):
        if "epoch" in what:
            bars.append((what, len(items), disable))
        return items

    monkeypatch.setattr(progress, "tqdm", bar)
    make(joint_epochs=2, verbose=verbose).fit(*squares)
    batches = -(-len(squares[1]) // 7)
    assert bars == [
        ("warm-up, epoch 1 of 1", batches, not verbose),
        ("joint, epoch 1 of 2", batches, not verbose),
        ("joint, epoch 2 of 2", batches, not verbose),
    ]


def test_schedule_without_training_the_backbone_has_no_joint_stage():
    stages = schedule(make(train_backbone=False, distinct="images", lambda_l1=0.5), first=True)
    assert [stage.name for stage in stages] == ["start", "warm-up", "projection", "last layer"]
    assert stages[2:] == [Projection("images"), LastLayer(0.5, "auto", "auto")]


@pytest.mark.parametrize("given", [{"train_backbone": False}, {"joint_epochs": 0}])
def test_nothing_is_projected_again_where_nothing_is_trained_between(given):
    stages = schedule(make(cycles=3, **given), first=False)
    assert [s.name for s in stages if s.name != "joint"] == ["projection", "last layer"]


def test_schedule_of_a_continued_fit_begins_with_a_cycle():
    stages = schedule(make(cycles=2), first=False)
    assert [stage.name for stage in stages] == ["joint", "projection", "last layer"] * 2


def test_optimizer_of_the_paper_decays_backbone_and_add_on_layers_only():
    net = ProtoPNetClassifier.paper(backbone="small_cnn", image_size=32, verbose=0, device="cpu")
    net.classes_inferred_ = np.arange(2)
    groups = net.initialize().optimizer_.param_groups
    decay = {group["part"]: group["weight_decay"] for group in groups}
    assert decay == {"backbone": 1e-3, "add_on": 1e-3, "prototypes": 0.0}
    assert net.optimizer is torch.optim.Adam


# The walk through the stages --------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(squares):
    """A fit of two cycles with a record of every row; the log similarity, weights that vary."""
    recorder = Recorder()
    clf = make(
        similarity="log",
        cycles=2,
        warmup_epochs=2,
        joint_epochs=3,
        lr_schedule="step",
        callbacks=[recorder],
    )
    with warnings.catch_warnings():  # two of six prototypes may be projected onto one patch
        warnings.filterwarnings("ignore", ".*distinct patches only")
        return clf.fit(*squares), recorder


def test_history_has_a_row_for_each_epoch_and_each_computed_stage_in_the_papers_order(recorded):
    clf, _ = recorded
    cycle = ["joint"] * 3 + ["projection", "last layer"]
    assert clf.history[:, "stage"] == ["warm-up"] * 2 + 2 * cycle
    assert all(np.isfinite(clf.history[:, "train_loss"]))


def test_history_of_computed_stages_has_their_results(recorded, squares):
    clf, _ = recorded
    for row in clf.history:
        assert ("distinct_patches" in row) == (row["stage"] == "projection")
        assert ("objective" in row) == ("residual" in row) == (row["stage"] == "last layer")
    table = clf.prototypes_
    patches = set(zip(table["source_index"], table["row"], table["col"], strict=True))
    assert clf.history[-2, "distinct_patches"] == len(patches)
    assert clf.history[-2, "distinct_images"] == table["source_index"].nunique()
    codes = np.unique(squares[1], return_inverse=True)[1]
    entropy = -np.log(clf.predict_proba(squares[0])[np.arange(len(codes)), codes]).mean()
    ridge = clf.last_layer_result_.lambda_l2 / 2 * (clf.coef_**2).sum(1).mean()
    objective = entropy + clf.lambda_l1_ * np.abs(clf.coef_).sum() + ridge
    assert clf.history[-1, "objective"] == pytest.approx(objective, rel=1e-4)
    assert clf.history[-1, "residual"] == clf.last_layer_result_.residual


def test_train_loss_of_the_last_row_is_the_joint_loss_of_all_images(recorded, squares):
    clf, _ = recorded
    codes = torch.tensor(np.unique(squares[1], return_inverse=True)[1])
    images = dataset_of(clf, squares).pixels
    with torch.no_grad():
        loss = clf.criterion_(clf.module_.eval()(images), codes)
    assert clf.history[-1, "train_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_train_loss_of_the_last_row_has_the_weights_of_the_images(squares):
    X, y = squares
    weight = np.where(y == "red", 5.0, 0.5)
    options = {"image_size": 48, "prototypes_per_class": 2, "joint_epochs": 0, "verbose": 0}
    options |= {"discriminant_weight": 0, "train_backbone": False, "random_state": 0}
    clf = ProtoPNetClassifier(Spy(), **options).fit(X, y, sample_weight=weight)
    images, codes = clf.get_dataset(X), torch.from_numpy(np.searchsorted(clf.classes_, y))
    with torch.no_grad():
        outputs = clf.module_(images.decoded(np.arange(len(X))))
        loss = clf.criterion_(outputs, codes, torch.from_numpy(weight).float())
        plain = clf.criterion_(outputs, codes, None)
    assert clf.history[-1, "train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert loss.item() != pytest.approx(plain.item(), rel=1e-2)


class Moments(Callback):
    """Notes how many steps Adam has taken, before the first step of each stage."""

    def __init__(self):
        self.steps, self.stages = [], []

    def on_grad_computed(self, net, **kwargs):
        stage = net.history[-1]["stage"], net.history[-1]["epoch"]
        if not self.stages or stage[0] != self.stages[-1]:
            self.stages.append(stage[0])
            self.steps.append([int(s["step"]) for s in net.optimizer_.state.values()])


def test_moments_of_one_stage_are_not_those_of_the_next(squares):
    seen = Moments()
    options = {"image_size": 48, "prototypes_per_class": 2, "batch_size": 12, "verbose": 0}
    ProtoPNetClassifier(
        Spy(), warmup_epochs=1, joint_epochs=1, callbacks=[seen], random_state=0, **options
    ).fit(*squares)
    assert seen.stages == ["warm-up", "joint"]
    assert seen.steps == [[], []]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_no_gradient_outlives_the_stage_that_it_is_of(squares, micro_batch_size):
    held = []

    class Gradients(Callback):
        def on_epoch_end(self, net, **kwargs):
            if net.history[-1]["stage"] == "projection":
                held.append([p for p in net.module_.parameters() if p.grad is not None])

    clf = make(backbone=nn.Conv2d(3, 8, 8, 8), micro_batch_size=micro_batch_size)
    clf.set_params(callbacks=[Gradients()]).fit(*squares)
    assert held == [[]]
    assert all(p.grad is None for p in clf.module_.parameters())


@pytest.mark.parametrize(("distinct", "warns"), [(7, True), (8, False)])
def test_few_distinct_patches_warn(distinct, warns):
    class Net:
        history = History()
        sources_ = {  # noqa: RUF012
            "image": np.minimum(np.arange(10), distinct - 1),
            **{"row": np.zeros(10, int), "col": np.zeros(10, int)},
        }

    Net.history.new_epoch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Projection(None)._record_distinct(Net)
    assert len(caught) == warns
    assert Net.history[-1, "distinct_patches"] == Net.history[-1, "distinct_images"] == distinct


def test_warm_up_changes_add_on_layers_and_prototypes_and_leaves_the_backbone(recorded):
    _, recorder = recorded
    before = recorder.start
    for state in recorder.states("warm-up"):
        assert same(part(state, "backbone"), part(before, "backbone"))  # running statistics too
        assert not same(part(state, "add_on"), part(before, "add_on"))
        assert not same(part(state, "prototypes"), part(before, "prototypes"))
        before = before | part(state, "add_on") | part(state, "prototypes")


def test_joint_changes_all_but_the_last_layer(recorded):
    _, recorder = recorded
    before = recorder.states("warm-up")[-1]
    for state in recorder.states("joint"):
        for name in PARTS[:3]:
            assert not same(part(state, name), part(before, name))
        before = state


def test_last_layer_is_fixed_at_one_and_minus_a_half_until_it_is_solved(recorded):
    clf, recorder = recorded
    own = clf.module_.owner == torch.arange(3)[:, None]
    for stage in ("warm-up", "joint"):
        for state in recorder.states(stage):
            assert torch.equal(state["last_layer.weight"], torch.where(own, 1.0, -0.5))


def test_projection_changes_prototypes_alone_and_the_last_layer_itself_alone(recorded):
    _, recorder = recorded
    for before, state in zip(
        recorder.states("joint")[2::3], recorder.states("projection"), strict=True
    ):
        for name in ("backbone", "add_on", "last_layer"):
            assert same(part(state, name), part(before, name))
        assert not same(part(state, "prototypes"), part(before, "prototypes"))
    for before, state in zip(
        recorder.states("projection"), recorder.states("last layer"), strict=True
    ):
        for name in PARTS[:3]:
            assert same(part(state, name), part(before, name))
        assert not same(part(state, "last_layer"), part(before, "last_layer"))


def test_step_schedule_takes_a_tenth_every_five_joint_epochs_of_all_cycles(recorded):
    clf, recorder = recorded
    factors = [1, 1, 1, 1, 1, 0.1]
    for name, rate in (("backbone", clf.backbone_lr), ("add_on", clf.lr), ("prototypes", clf.lr)):
        assert recorder.rates("joint", name) == pytest.approx([f * rate for f in factors])
        warm_up = [0.0 if name == "backbone" else clf.lr] * 2
        assert recorder.rates("warm-up", name) == warm_up


@pytest.mark.parametrize(("lr_schedule", "factors"), [("cosine", [1, 0.75, 0.25]), (None, [1] * 3)])
def test_learning_rates_fall_along_half_a_cosine_or_not_at_all(squares, lr_schedule, factors):
    recorder = Recorder()
    clf = make(joint_epochs=3, lr_schedule=lr_schedule, cycles=2, callbacks=[recorder])
    clf.fit(*squares)
    for name, rate in (("backbone", clf.backbone_lr), ("prototypes", clf.lr)):
        assert recorder.rates("joint", name) == pytest.approx([f * rate for f in factors] * 2)


def test_a_frozen_backbone_is_left_as_it_was_by_the_whole_fit(squares):
    recorder = Recorder()
    make(train_backbone=False, warmup_epochs=3, callbacks=[recorder]).fit(*squares)
    for _, state, _ in recorder.rows:
        assert same(part(state, "backbone"), part(recorder.start, "backbone"))


def statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k}


@pytest.mark.parametrize(("batch_norm", "kept"), [("keep", True), ("train", False)])
def test_a_backbone_with_statistics_keeps_them_or_learns_them_anew(squares, batch_norm, kept):
    backbone = SmallCNN(8)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
    before = statistics(backbone)
    clf = make(backbone=backbone, batch_norm=batch_norm, cycles=2).fit(*squares)
    assert same(statistics(clf.module_.backbone), before) == kept
    assert not torch.equal(clf.module_.backbone[0][1].weight, backbone[0][1].weight)


def test_a_backbone_from_scratch_learns_its_statistics_in_all_cycles_and_then_keeps_them(squares):
    recorder = Recorder()
    clf = make(cycles=2, callbacks=[recorder]).fit(*squares)
    new, first, second = recorder.start, *recorder.states("joint")
    name = "backbone.0.1.running_mean"
    assert len({tuple(state[name].tolist()) for state in (new, first, second)}) == 3
    learned = statistics(clf.module_)
    clf.partial_fit(*squares)
    assert same(statistics(clf.module_), learned)


# Projection and last layer ----------------------------------------------------------------------

NETWORKS = {
    "small_cnn": {},
    "patches, log": {"prototype_size": (2, 2), "similarity": "log", "distinct": "patches"},
    "full": {"prototype_size": "full", "latent_dim": None},
    "own module": {"backbone": nn.Conv2d(3, 6, 9, 8, 1), "train_backbone": False},
}


@pytest.mark.parametrize("parameters", NETWORKS.values(), ids=NETWORKS)
def test_prototypes_equal_their_sources_patches_bit_for_bit(squares, parameters):
    clf = make(**parameters).fit(*squares)
    assert_prototypes_are_patches(clf, squares[0])
    table = clf.prototypes_
    assert squares[1][table["source_index"]].tolist() == table["class"].tolist()


@pytest.mark.parametrize("parameters", NETWORKS.values(), ids=NETWORKS)
def test_projecting_twice_is_projecting_once(squares, parameters):
    clf = make(**parameters).fit(*squares)
    before, sources = clf.module_.prototypes.clone(), clf.sources_
    Projection(clf.distinct).run(clf, FitData(clf, dataset_of(clf, squares), None))
    assert torch.equal(clf.module_.prototypes, before)
    for name in ("image", "row", "col", "box"):
        assert np.array_equal(clf.sources_[name], sources[name])
    assert clf.sources_["moved"] == pytest.approx(np.zeros(6), abs=1e-10)


def test_prototypes_that_meet_at_few_patches_give_a_warning_and_distinct_helps():
    X = np.full((8, 32, 32, 3), 128, dtype=np.uint8)
    X[::2] = 30
    settings = {"prototypes_per_class": 4, "prototype_size": "full", "prototype_init": "random"}
    settings["batch_size"] = len(X)  # batches of other sizes may round equal images differently
    with pytest.warns(UserWarning, match="8 prototypes were projected onto 2 distinct patches"):
        clf = make(**settings).fit(X, [0, 1] * 4)
    assert clf.history[-2, "distinct_images"] == 2
    clf = make(**settings, distinct="images").fit(X, [0, 1] * 4)
    assert clf.history[-2, "distinct_images"] == clf.history[-2, "distinct_patches"] == 8


@pytest.mark.parametrize("parameters", NETWORKS.values(), ids=NETWORKS)
def test_signs_of_the_last_layer_hold_and_its_residual_is_small(squares, parameters):
    clf = make(**parameters).fit(*squares)
    own = clf.module_.owner.numpy() == np.arange(3)[:, None]
    assert (clf.coef_[own] >= 0).all()
    assert (clf.coef_[~own] <= 0).all()
    assert clf.last_layer_result_.residual <= 1e-6
    np.testing.assert_array_equal(clf.coef_, clf.last_layer_result_.weight.float().numpy())


# What each stage sees ---------------------------------------------------------------------------


class BlackOut:
    """An augmentation that leaves nothing of an image, and counts."""

    calls = 0

    def __call__(self, image):
        BlackOut.calls += 1
        return torch.zeros_like(image)


@pytest.mark.parametrize("train_split", [None, ValidSplit(4, stratified=True)])
def test_only_the_joint_stage_sees_augmented_images_and_only_training_ones(
    squares, monkeypatch, train_split
):
    monkeypatch.setattr(BlackOut, "calls", 0)
    clf = make(augmentation=BlackOut(), augmented_views=0, joint_epochs=2, train_split=train_split)
    clf.fit(*squares)
    n = 24 if train_split is None else 18
    assert BlackOut.calls == 2 * n
    if train_split is None:
        assert_prototypes_are_patches(clf, squares[0])
    assert clf.module_.prototypes.flatten(1).unique(dim=0).shape[0] > 1  # no patches of blackness


@pytest.mark.parametrize("cycles", [1, 2])
def test_a_frozen_backbone_sees_each_image_once_in_a_fit(squares, cycles):
    make(backbone=Spy(), train_backbone=False, warmup_epochs=3, cycles=cycles).fit(*squares)
    assert sum(Spy.seen) == 24


def test_a_trained_backbone_sees_each_image_once_in_each_epoch_and_each_run_of_other_stages(
    squares,
):
    make(backbone=Spy(), warmup_epochs=3, joint_epochs=2, cycles=2).fit(*squares)
    start_and_warm_up = projection_and_last_layer = 24
    assert sum(Spy.seen) == start_and_warm_up + 2 * (2 * 24 + projection_and_last_layer)


def test_validation_images_pass_a_frozen_backbone_once_too(squares):
    split = ValidSplit(4, stratified=True)
    make(backbone=Spy(), train_backbone=False, warmup_epochs=3, train_split=split).fit(*squares)
    assert sum(Spy.seen) == 18 + 6


def test_validation_images_are_scored_in_each_row_and_are_never_sources(squares):
    clf = make(train_split=ValidSplit(3, stratified=True), prototypes_per_class=4)
    clf.fit(*squares)
    dataset = dataset_of(clf, squares)
    train, valid = clf.get_split_datasets(dataset, dataset.y.numpy())
    table = clf.prototypes_
    assert set(table["source_index"]) <= set(train.indices)
    assert squares[1][table["source_index"]].tolist() == table["class"].tolist()
    z = latents_in_batches(clf, squares[0][train.indices])
    for source in table.to_dict("records"):
        i = list(train.indices).index(source["source_index"])
        patch = z[i, :, source["row"], source["col"]]
        assert torch.equal(clf.module_.prototypes[source["prototype"]].flatten(), patch)
    assert np.isfinite(clf.history[:, "valid_loss"]).all()
    accuracy = clf.score(squares[0][valid.indices], squares[1][valid.indices])
    assert clf.history[-1, "valid_acc"] == pytest.approx(accuracy)


# Callbacks, interruption and weights ------------------------------------------------------------


def test_early_stopping_ends_the_stage_and_not_the_fit(squares):
    stop = EarlyStopping("train_loss", patience=2, threshold=1e6, threshold_mode="abs")
    clf = make(warmup_epochs=9, joint_epochs=9, callbacks=[stop]).fit(*squares)
    stages = clf.history[:, "stage"]
    assert stages[-2:] == ["projection", "last layer"]
    assert stages.count("warm-up") == stages.count("joint") == 3  # each counts its own misses
    assert_prototypes_are_patches(clf, squares[0])
    check_is_fitted(clf)


@pytest.mark.parametrize("interrupt_after", [0, 2, 6, 9])
def test_an_interrupted_fit_stops_and_leaves_no_fitted_estimator(
    squares, monkeypatch, interrupt_after
):
    clf = make(backbone=Spy()).fit(*squares)  # the earlier fit cannot be taken for the new one
    monkeypatch.setattr(Spy, "interrupt_after", len(Spy.seen) + interrupt_after)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*squares)
    with pytest.raises(NotFittedError):
        check_is_fitted(clf)
    for use in (clf.predict, clf.transform, clf.explain, clf.similarity_maps):
        with pytest.raises(NotFittedError):
            use(squares[0])


@pytest.mark.parametrize("fits_before", [0, 1])
def test_a_fit_that_is_interrupted_at_its_very_end_leaves_none_either(
    squares, monkeypatch, tmp_path, fits_before
):
    clf = make(checkpoint=tmp_path)
    for _ in range(fits_before):
        clf.fit(*squares)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "changes_since", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"is not fitted\.$"):  # the checkpoint is gone
        clf.fit(*squares)
    with pytest.raises(NotFittedError):
        clf.predict(squares[0])
    monkeypatch.undo()
    check_is_fitted(clf.fit(*squares))


class CtrlC(Callback):
    """Presses Ctrl-C, as the system does, while the callbacks of the second epoch run."""

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_ctrl_c_among_the_callbacks_ends_the_fit_and_no_stage_alone(squares, tmp_path, checkpoint):
    handler = signal.getsignal(signal.SIGINT)
    folder = tmp_path if checkpoint else None
    clf = make(joint_epochs=4, callbacks=[CtrlC()], checkpoint=folder)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*squares)
    with pytest.raises(NotFittedError):
        check_is_fitted(clf)
    assert len(list(tmp_path.iterdir())) == checkpoint  # something to go on from
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_fit_in_another_thread_has_no_ctrl_c_to_notice(squares):
    with ThreadPoolExecutor(1) as pool:
        clf = pool.submit(lambda: make(joint_epochs=1).fit(*squares)).result()
    check_is_fitted(clf)


def test_an_image_of_weight_zero_is_an_image_left_out_of_the_joint_loss(squares):
    """In the first steps of training; the start and the projection still see all images."""
    settings = {"similarity": "log", "prototype_init": "random", "warmup_epochs": 3}
    settings |= {"batch_size": 24, "train_backbone": False}
    weight = np.arange(24) < 12
    X, y = squares
    recorders = Recorder(), Recorder()
    one = make(**settings, callbacks=[recorders[0]]).fit(X, y, sample_weight=weight)
    other = make(**settings, callbacks=[recorders[1]]).fit(X[:12], y[:12])
    assert one.history[:3, "train_loss"] == pytest.approx(other.history[:3, "train_loss"], rel=1e-5)
    states = [recorder.states("warm-up")[-1] for recorder in recorders]
    for name in ("prototypes", "add_on.0.weight"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("doubled", [False, True])
def test_last_layer_takes_weight_zero_as_left_out_and_weight_two_as_twice(squares, fitted, doubled):
    index = np.r_[0:12, 0:12] if doubled else np.arange(12)
    index = np.r_[index, 12:18] if doubled else index
    counts = np.bincount(index, minlength=24)
    solved = []
    for rows, weight in ((slice(None), counts), (index, None)):
        clf = copy.deepcopy(fitted)
        dataset = dataset_of(clf, squares, weight, rows)
        data = FitData(clf, dataset, None)
        with torch.no_grad():
            data.train_distance = clf.module_(dataset.pixels)[1]
        LastLayer(0.01, "keep", 0.0).run(clf, data)
        solved.append(clf)
    np.testing.assert_allclose(solved[0].coef_, solved[1].coef_, atol=1e-3)
    objectives = [clf.last_layer_result_.objective for clf in solved]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-5)


def test_a_callback_that_goes_back_to_earlier_weights_leaves_a_projected_net(squares):
    class ForgetTheEnd(Callback):
        """Restore the weights of the first epoch when training ends, as load_best does."""

        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 1:
                self.first = copy.deepcopy(net.module_.state_dict())

        def on_train_end(self, net, **kwargs):
            net.module_.load_state_dict(self.first)

    clf = make(joint_epochs=2, callbacks=[ForgetTheEnd()]).fit(*squares)
    stages = [row["stage"] for row in clf.history]
    assert stages[-4:] == ["projection", "last layer"] * 2
    np.testing.assert_array_equal(clf.coef_, clf.last_layer_result_.weight.float().numpy())
    assert_prototypes_are_patches(clf, squares[0])


@pytest.mark.parametrize("best", [1, 2])
def test_chosen_numbers_of_prototypes_go_with_going_back_to_the_best_epoch(squares, best):
    """What has no weight goes once no callback goes back any more."""

    class Best(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.history.record("valid_score", -abs(len(net.history) - best))

    stop = EarlyStopping("valid_score", lower_is_better=False, patience=9, load_best=True)
    settings = {"prototypes_per_class": "auto", "lambda_l1": 1e-2, "joint_epochs": 3}
    settings |= {"prototype_init": "selected"}
    clf = make(**settings, callbacks=[Best(), stop]).fit(*squares)
    stages = [row["stage"] for row in clf.history]
    assert stages[-4:] == ["projection", "last layer"] * 2
    used = (clf.coef_ != 0).any(0)
    assert used.sum() >= len(used) - 3  # but for one of each class
    assert len(used) < 60
    assert clf.activations_.g.shape[1] == len(used) == len(clf.prototypes_)
    assert_prototypes_are_patches(clf, squares[0])
