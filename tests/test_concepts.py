"""What is forbidden or encouraged: its cost against plain loops, the projection, whole edits."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from colour_model import CELL, SIDE, Pooled, picture
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch.callbacks import Callback

from protoclf import ProtoPNetClassifier
from protoclf.concepts import Concepts, ForbiddenPatches
from protoclf.editing import encourage, forbid
from protoclf.projection import find_sources

YELLOW = (255, 230, 0)
MARK = (0, 0)  # the cell in which one class has a mark
HEAD = {"blue": (0, 0, 255), "red": (255, 0, 0)}
BODY = {"blue": (0, 120, 200), "red": (200, 120, 0)}


def marked(mark=True):
    """Twelve pictures, each with a head and a body; those of "blue" are marked in a corner."""
    rng = np.random.default_rng(0)
    y = np.array(["blue", "red"] * 6)
    images = []
    for label in y:
        row, col = rng.integers(2, 6, 2).tolist()
        spots = {(row, col): HEAD[label], (row + 1, col): BODY[label]}
        images.append(picture(spots | ({MARK: YELLOW} if mark and label == "blue" else {})))
    return np.stack(images), y


def classifier(**settings):
    defaults = {
        "image_size": SIDE,
        "normalization": ([0.5] * 3, [0.5] * 3),
        "prototypes_per_class": 3,
        "joint_epochs": 0,
        "augmentation": None,
        "batch_size": 4,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier(Pooled(), **(defaults | settings))


@pytest.fixture(scope="module")
def clf():
    clf = classifier().fit(*marked())
    assert on_mark(clf), "a patch of the mark is one of the three that tell blue from red"
    return clf


def on_mark(clf):
    table = clf.prototypes_
    at = (table["row"] == MARK[0]) & (table["col"] == MARK[1]) & (table["class"] == "blue")
    return np.flatnonzero(at).tolist()


@pytest.fixture
def network():
    """A network of four prototypes, two of each class, and concepts in its images."""
    X, y = marked()
    clf = classifier(prototypes_per_class=2).fit(X, y)
    images = torch.from_numpy(X[[0, 2, 1]]).permute(0, 3, 1, 2)  # blue, blue, red
    box = torch.tensor([[0, 0, CELL, CELL], [0, 0, 2 * CELL, CELL], [8, 8, 12, 16]])
    cells = torch.tensor([0, 0, 3]), torch.tensor([0, 1, 4])
    kinds = torch.tensor([0, 0, 1]), torch.tensor([True, False, True]), torch.tensor([1.0, 2, 0.5])
    return clf.module_, Concepts(images, box, *cells, *kinds)


def test_the_cost_is_that_of_plain_loops(network):
    module, concepts = network
    torch.manual_seed(0)
    order = torch.randint(3, (3,)).tolist()
    torch.manual_seed(0)
    got = concepts.cost(module)
    expected = []
    for f in order:
        image = concepts.images[f].float()
        x0, y0, x1, y1 = concepts.box[f].tolist()
        alone = image.mean((1, 2), keepdim=True).to(torch.uint8).float().expand_as(image).clone()
        alone[:, y0:y1, x0:x1] = image[:, y0:y1, x0:x1]
        whole = module.latents(module.features(alone[None]))[0]  # (D, H, W)
        place = module.latents(module.features(image[None]))[0][:, concepts.row[f], concepts.col[f]]
        cost = 0.0
        for cells in (whole.flatten(1).T, place[None]):  # the patch alone, and in its place
            similarities, distances = [], []
            for p, owner in zip(module.scaled_prototypes(), module.owner, strict=True):
                if owner == concepts.owner[f]:
                    nearest = min(((p.flatten() - cell) ** 2).sum() for cell in cells)
                    distances.append(nearest)
                    similarities.append(max(1 - nearest / 2, 0))
            if concepts.forbidden[f]:
                cost += sum(similarities) / len(similarities)
            else:
                cost += min(distances)
        expected.append(concepts.weight[f] * cost)
    torch.testing.assert_close(got, sum(expected) / 3)


def test_gradients_flow_and_batch_norm_stays(network):
    module, concepts = network
    module.train_only(["prototypes"])
    module.train()
    concepts.cost(module).backward()
    assert module.prototypes.grad.abs().sum() > 0
    assert module.training


def test_what_lies_outside_of_a_patch_is_its_images_mean(network):
    _, concepts = network
    alone = concepts.alone()
    for f in range(3):
        x0, y0, x1, y1 = concepts.box[f].tolist()
        outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert alone[f][:, ~outside].equal(concepts.images[f][:, ~outside])
        colours = alone[f][:, outside].unique(dim=1)
        mean = concepts.images[f].float().mean((1, 2)).to(torch.uint8)
        assert colours.equal(mean[:, None])


def test_distances_to_what_is_forbidden_are_those_of_plain_loops(network):
    module, concepts = network
    forbidden = ForbiddenPatches(concepts, module, batch_size=2)
    z = module.latents(module.features(concepts.images))
    got = forbidden.distance(z, torch.tensor([0, 1, 1]))
    for n, c in enumerate([0, 1, 1]):
        for cell, vector in enumerate(z[n].flatten(1).T):
            f = {0: 0, 1: 2}[c]  # the one forbidden patch of the class
            patch = z[f][:, concepts.row[f], concepts.col[f]]
            assert got[n, cell] == pytest.approx(float(((vector - patch) ** 2).sum()), abs=1e-5)


@pytest.mark.parametrize("distinct", [None, "patches", "images"])
def test_the_projection_passes_over_what_is_more_like_what_is_forbidden(distinct):
    torch.manual_seed(0)
    z, y = torch.randn(8, 3, 2, 3), torch.tensor([0, 1] * 4)
    owner, p = torch.tensor([0, 0, 1, 1]), torch.randn(4, 3, 1, 1)
    bar = torch.rand(8, 6) * 6  # for each patch, how near to what is forbidden
    batches = zip(z.split(3), y.split(3), strict=True)
    rows = iter(bar.split(3))
    sources = find_sources(batches, p, owner, distinct, forbidden=lambda z, y: next(rows))
    distance = (z.flatten(2)[:, None] - p[..., 0]).square().sum(2)  # (8, 4, 6)
    for j in range(4):
        allowed = distance[:, j].clone()
        allowed[(bar <= allowed) | (y != owner[j])[:, None]] = torch.inf
        image, cell = sources.image[j], sources.cell[j]
        assert allowed[image, cell].isfinite()
        assert sources.distance[j] == pytest.approx(float(allowed[image, cell]), abs=1e-5)
        if distinct is None:
            assert allowed[image, cell] == allowed.min()


@pytest.mark.parametrize("distinct", [None, "patches", "images"])
def test_where_everything_is_forbidden_the_nearest_patches_are_taken_with_a_warning(distinct):
    z, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1] * 2)
    owner, p = torch.tensor([0, 1]), torch.rand(2, 3, 1, 1)
    with pytest.warns(UserWarning, match="Too few patches of class number [01]"):
        barred = find_sources(
            [(z, y)], p, owner, distinct, forbidden=lambda z, y: torch.zeros(len(z), 4)
        )
    plain = find_sources([(z, y)], p, owner, distinct)
    np.testing.assert_array_equal(barred.image, plain.image)
    np.testing.assert_array_equal(barred.cell, plain.cell)


@pytest.mark.parametrize(
    ("distinct", "image", "cell"),
    [(None, [1, 1], [0, 1]), ("patches", [1, 1], [0, 1]), ("images", [1, 0], [0, 1])],
)
def test_a_prototype_without_other_patches_leads_no_other_to_what_is_forbidden(
    distinct, image, cell
):
    z, y = torch.tensor([[1.0, 2.0], [3.0, 11.0]]).view(2, 1, 1, 2), torch.tensor([0, 0])
    owner, p = torch.tensor([0, 0]), torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    near = torch.tensor([[0.5, 0.5], [10.0, 0.5]])  # the third is free for the first prototype
    with pytest.warns(UserWarning, match="class number 0 .*: 1 of its 2 prototypes"):
        sources = find_sources([(z, y)], p, owner, distinct, forbidden=lambda z, y: near)
    assert sources.image.tolist() == image
    assert sources.cell.tolist() == cell


def test_what_is_forbidden_does_not_come_back(clf):
    X, y = marked()
    before = clf.decision_function(X)
    ids = on_mark(clf)
    taught = forbid(clf, ids, X, y, reason={ids[0]: "the mark"})
    assert not on_mark(taught)
    assert taught.n_prototypes_ == clf.n_prototypes_
    np.testing.assert_array_equal(clf.decision_function(X), before)
    assert clf.concepts_ is None
    assert not hasattr(clf, "edits_")
    record = taught.edits_
    assert record["action"].unique().tolist() == ["forbid"]
    assert set(ids) <= set(record["prototype"])
    assert record.set_index("prototype")["reason"][ids[0]] == "the mark"
    assert taught.concepts_.forbidden.all()
    assert (taught.concepts_.box[:, :2] == 0).all()  # all of them in the marked corner
    # and it stays forbidden where training goes on, also in a copy from a pickle
    again = pickle.loads(pickle.dumps(taught)).partial_fit(X, y)
    assert not on_mark(again)
    fresh = clone(taught).fit(X, y)
    assert fresh.concepts_ is None


@pytest.mark.parametrize("edit", [forbid, encourage])
def test_weights_and_groups_are_checked_before_the_network_runs(clf, edit, backbone_images):
    X, y = marked()
    for wrong in ({"sample_weight": [1, 2]}, {"groups": [0] * (len(X) - 1)}):
        with pytest.raises(ValueError, match=r"sample_weight|groups"):
            edit(clf, [0], X, y, **wrong)
    assert not backbone_images


@pytest.mark.parametrize("edit", [forbid, encourage])
def test_nothing_is_found_in_images_of_weight_zero(clf, edit):
    X, y = marked()
    counting = np.arange(len(X)) >= 4
    weight = counting.astype(float)
    taught = edit(clf, on_mark(clf), X, y, k=3, sample_weight=weight)
    alone = edit(clf, on_mark(clf), X[counting], y[counting], k=3)
    assert torch.equal(taught.concepts_.images, alone.concepts_.images)
    assert len(taught.concepts_) == 3


def test_a_classifier_that_may_not_use_the_mark_does_not_miss_it(clf):
    taught = forbid(clf, on_mark(clf), *marked())
    X, y = marked(mark=False)
    assert taught.score(X, y) == 1


def test_sheets_add_up_and_prototypes_are_patches(clf):
    X, y = marked()
    taught = forbid(clf, on_mark(clf), X, y)
    sheet, logits = taught.explain(X), taught.decision_function(X)
    sign = np.where(taught.predict(X) == taught.classes_[1], 1, -1)
    totals = taught.explain(X, "all").groupby(["sample", "class"])["contribution"].sum().unstack()
    np.testing.assert_allclose(totals["red"] - totals["blue"], logits, atol=1e-4)
    assert len(sheet)
    assert set(sign) == {-1, 1}
    g = taught.transform(X)
    own = g[taught.prototypes_["source_index"], np.arange(taught.n_prototypes_)]
    np.testing.assert_allclose(own, 1, atol=1e-5)


class DistanceToConcepts(Callback):
    """Keeps how far the prototypes of "red" are from what they are to show, after each epoch."""

    def on_epoch_end(self, net, **_):
        """Measure, before the projection makes a patch of each prototype."""
        if net.history[-1, "stage"] != "joint" or net.concepts_ is None:
            return
        module = net.module_
        with torch.no_grad():
            patches = net.concepts_.embedded(module, 4).flatten(1)
            own = module.scaled_prototypes()[module.owner == 1].flatten(1)
            self.last = float(torch.cdist(patches, own).amin(1).mean())


def test_what_is_encouraged_is_drawn_nearer():
    X, y = marked()
    distance = DistanceToConcepts()
    costs = {"lambda_clst": 0.0, "lambda_sep": 0.0, "lambda_patch": 0.0}
    settings = {"prototypes_per_class": 2, "joint_epochs": 1, "lr": 0.05, "distinct": "patches"}
    clf = classifier(**costs, **settings, callbacks=[distance]).fit(X, y)
    ids = np.flatnonzero(clf.prototypes_["class"] == "red")
    with torch.no_grad():  # somewhere else, so that training has something to mend
        clf.module_.prototypes[ids] *= -1
    before = clf.module_.prototypes.clone()

    def trained(weight):
        taught = encourage(clf, ids[:1], X, y, k=3, weight=weight, epochs=10)
        assert not taught.concepts_.forbidden.any()
        assert taught.edits_["action"].tolist() == ["encourage"]
        assert taught.n_prototypes_ == clf.n_prototypes_
        (kept,) = (c for c in taught.callbacks if isinstance(c, DistanceToConcepts))
        return kept.last

    far, near = trained(0.0), trained(50.0)
    assert near < 0.5 * far
    assert clf.module_.prototypes.equal(before)


def test_both_are_heeded_together(clf):
    X, y = marked()
    red = np.flatnonzero(clf.prototypes_["class"] == "red")[:1]
    both = encourage(forbid(clf, on_mark(clf), X, y), red, X, y)
    assert both.concepts_.forbidden.any()
    assert not both.concepts_.forbidden.all()
    assert not on_mark(both)
    assert both.edits_["step"].max() == 2


def test_a_backbone_learns_under_a_prohibition(fitted, squares):
    X, y = squares
    taught = forbid(fitted, [0], X, y, k=3, epochs=1)
    assert np.isfinite(taught.decision_function(X)).all()
    assert taught.joint_epochs == fitted.joint_epochs
    assert len(taught.concepts_) == 3
    near = ForbiddenPatches(taught.concepts_, taught.module_, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert near.among(taught.module_) == []


@pytest.mark.parametrize("edit", [forbid, encourage])
def test_wrong_arguments_are_refused(clf, edit):
    X, y = marked()
    for wrong, message in [
        ({"k": 0}, "k must be an int >= 1"),
        ({"weight": -1}, "weight must be a finite number >= 0"),
        ({"epochs": 1.5}, "epochs must be an int >= 0, or None"),
    ]:
        with pytest.raises(ValueError, match=message):
            edit(clf, [0], X, y, **wrong)
    with pytest.raises(ValueError, match=r"ids must name .* got none"):
        edit(clf, [], X, y)
    with pytest.raises(ValueError, match="ids must name prototypes"):
        edit(clf, [99], X, y)
    with pytest.raises(ValueError, match="X has no image of class 'blue'"):
        edit(clf, on_mark(clf), X[y == "red"], y[y == "red"])
    with pytest.raises(NotFittedError):
        edit(clone(clf), [0], X, y)


def test_a_failure_half_way_leaves_the_classifier_as_it_was(clf, monkeypatch):
    X, y = marked()
    before = pickle.dumps(clf.prototypes_)

    def fail(*args, **kwargs):
        raise RuntimeError("half-way")

    monkeypatch.setattr(ProtoPNetClassifier, "partial_fit", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        forbid(clf, on_mark(clf), X, y)
    assert pickle.dumps(clf.prototypes_) == before
    assert clf.concepts_ is None


def test_saving_says_that_pixels_of_concepts_are_left_out(clf, tmp_path):
    taught = forbid(clf, on_mark(clf), *marked())
    with pytest.warns(UserWarning, match="what is forbidden and encouraged.* `forbid` or"):
        taught.save(tmp_path / "model")
    loaded = ProtoPNetClassifier.load(tmp_path / "model", backbone=Pooled())
    assert loaded.concepts_ is None
    np.testing.assert_array_equal(
        loaded.decision_function(marked()[0]), taught.decision_function(marked()[0])
    )
    assert loaded.edits_["action"].tolist() == taught.edits_["action"].tolist()


def test_memory_does_not_mistake_a_projection_without_prohibition_for_one_with(tmp_path):
    X, y = marked()
    plain = classifier(train_backbone=False).fit(X, y)
    cached = classifier(train_backbone=False, memory=tmp_path).fit(X, y)
    for clf in (plain, cached):
        clf.partial_fit(X, y)  # keeps a projection of these prototypes, where it can be kept
    ids = on_mark(plain)
    expected, taught = forbid(plain, ids, X, y), forbid(cached, ids, X, y)
    assert not on_mark(taught)
    assert taught.module_.prototypes.equal(expected.module_.prototypes)
    np.testing.assert_array_equal(taught.coef_, expected.coef_)
