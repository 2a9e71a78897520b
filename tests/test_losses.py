"""The costs and the joint loss, against loops over the papers' formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclf.losses import ProtoPNetLoss, cluster_cost, patch_cost, separation_cost

OWNER = torch.tensor([0, 0, 1, 2, 2, 2])


def batch(n=5, owner=OWNER, scale=1.0, seed=0):
    """Outputs of a network in double precision, classes and weights."""
    generator = torch.Generator().manual_seed(seed)
    n_classes = int(owner.max()) + 1

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    distance = scale * rand(n, len(owner))
    outputs = 4 * rand(n, n_classes) - 2, distance, torch.zeros(distance.shape, dtype=torch.int64)
    return outputs, torch.arange(n) % n_classes, 0.1 + rand(n)


def loop_mean(values, weight):
    return sum(w * v for v, w in zip(values, weight, strict=True)) / sum(weight)


def loop_clst(distance, y, owner, weight):
    """Mean over images of min over c(j) = y_i of d_j(x_i)."""
    values = []
    for i, y_i in enumerate(y):
        values.append(min(float(distance[i][j]) for j, c in enumerate(owner) if c == y_i))
    return loop_mean(values, weight)


def loop_sep(distance, y, owner, weight):
    """Minus the mean over images of min over c(j) != y_i of d_j(x_i)."""
    values = []
    for i, y_i in enumerate(y):
        values.append(min(float(distance[i][j]) for j, c in enumerate(owner) if c != y_i))
    return -loop_mean(values, weight)


def loop_patch(distance, y, owner, weight):
    """Mean over prototypes of min over y_i = c(j), weight_i > 0 of d_j(x_i), where there is one."""
    values = []
    for j, c in enumerate(owner):
        own = [float(distance[i][j]) for i, y_i in enumerate(y) if y_i == c and weight[i] > 0]
        values += [min(own)] if own else []
    return sum(values) / len(values) if values else 0.0


def loop_cross_entropy(logits, y, weight):
    values = []
    for i, y_i in enumerate(y):
        total = sum(math.exp(float(logit)) for logit in logits[i])
        values.append(math.log(total) - float(logits[i][y_i]))
    return loop_mean(values, weight)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 6),
    others=st.lists(st.integers(0, 2), max_size=6),
    lambdas=st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)),
    weighted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_joint_loss_is_that_of_loops(n, others, lambdas, weighted, seed):
    owner = torch.tensor([0, 1, 2, *others])
    outputs, y, weight = batch(n, owner, scale=10.0, seed=seed)
    given_weight = weight if weighted else None
    weight = weight.tolist() if weighted else [1.0] * n
    logits, distance, _ = outputs
    args = distance, y.tolist(), owner.tolist(), weight
    clst, sep = loop_clst(*args), loop_sep(*args)
    patch = loop_patch(*args)
    costs = lambdas[0] * clst + lambdas[1] * sep + lambdas[2] * patch
    expected = loop_cross_entropy(logits, y.tolist(), weight) + costs
    assert cluster_cost(distance, y, owner, given_weight).item() == pytest.approx(clst)
    assert separation_cost(distance, y, owner, given_weight).item() == pytest.approx(sep)
    assert patch_cost(distance, y, owner, given_weight).item() == pytest.approx(patch)
    loss = ProtoPNetLoss(owner, *lambdas)(outputs, y, given_weight)
    assert loss.item() == pytest.approx(expected)


def test_separation_enters_with_the_papers_sign():
    """Images further from the prototypes of other classes cost less."""
    (logits, distance, cell), y, _ = batch()
    loss = ProtoPNetLoss(OWNER, lambda_clst=0.0, lambda_sep=0.08)
    further = torch.where(y[:, None] == OWNER, distance, distance + 1)
    gain = loss((logits, distance, cell), y) - loss((logits, further, cell), y)
    assert gain.item() == pytest.approx(0.08)


def test_weight_two_is_a_row_twice():
    outputs, y, _ = batch()
    loss = ProtoPNetLoss(OWNER, 0.8, 0.08, 0.5)
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    twice = torch.tensor([0, 1, 1, 2, 3, 4])
    repeated = tuple(values[twice] for values in outputs)
    assert loss(outputs, y, weight).item() == pytest.approx(loss(repeated, y[twice]).item())


def test_weight_zero_is_a_row_left_out():
    outputs, y, _ = batch()
    loss = ProtoPNetLoss(OWNER, 0.8, 0.08, 0.5)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    kept = torch.tensor([0, 2, 3])
    fewer = tuple(values[kept] for values in outputs)
    assert loss(outputs, y, weight).item() == pytest.approx(loss(fewer, y[kept]).item())


def test_a_batch_of_weight_zero_costs_nothing_and_has_zero_gradients():
    (logits, distance, cell), y, _ = batch()
    logits.requires_grad_(), distance.requires_grad_()
    loss = ProtoPNetLoss(OWNER, 0.8, 0.08, 0.5)((logits, distance, cell), y, torch.zeros(5))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert (distance.grad == 0).all()


def masked_by_product(distance, among):
    """The older codes' minimum: a 0/1 mask on (bound - d), where `bound` bounds the distances."""
    bound = 128.0  # the channels, for latents in [0, 1]
    return bound - ((bound - distance) * among).amax(1)


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (1e4, False)])
def test_minimum_of_unbounded_distances_where_a_mask_of_zeros_and_ones_fails(scale, holds):
    (_, distance, _), y, _ = batch(scale=scale)
    distance = distance + scale / 2
    own = y[:, None] == OWNER
    clst = cluster_cost(distance, y, OWNER).item()
    sep = separation_cost(distance, y, OWNER).item()
    args = distance, y.tolist(), OWNER.tolist(), [1] * len(y)
    assert clst == pytest.approx(loop_clst(*args))
    assert sep == pytest.approx(loop_sep(*args))
    product = masked_by_product(distance, own).mean(), -masked_by_product(distance, ~own).mean()
    assert ((clst, sep) == pytest.approx([value.item() for value in product])) == holds


def test_gradients_reach_the_nearest_own_and_the_nearest_other_prototype_alone():
    (logits, distance, cell), y, _ = batch()
    distance.requires_grad_()
    ProtoPNetLoss(OWNER, 0.8, 0.08)((logits, distance, cell), y).backward()
    for i, y_i in enumerate(y.tolist()):
        expected = [0.0] * len(OWNER)
        own = [j for j, c in enumerate(OWNER.tolist()) if c == y_i]
        other = [j for j, c in enumerate(OWNER.tolist()) if c != y_i]
        expected[min(own, key=distance[i].tolist().__getitem__)] = 0.8 / len(y)
        expected[min(other, key=distance[i].tolist().__getitem__)] = -0.08 / len(y)
        assert distance.grad[i].tolist() == pytest.approx(expected)


def test_far_distances_leave_gradients_finite():
    (logits, distance, cell), y, _ = batch(scale=1e30)
    logits.requires_grad_(), distance.requires_grad_()
    ProtoPNetLoss(OWNER, 0.8, 0.08)((logits, distance, cell), y).backward()
    assert logits.grad.isfinite().all()
    assert distance.grad.isfinite().all()


def test_patch_cost_reaches_each_prototype_through_its_nearest_own_image_alone():
    (_, distance, _), y, weight = batch()
    weight[0] = 0.0  # the nearest, did it count
    distance[0] /= 100
    distance.requires_grad_()
    patch_cost(distance, y, OWNER, weight).backward()
    for j, c in enumerate(OWNER.tolist()):
        own = [i for i, y_i in enumerate(y.tolist()) if y_i == c and i > 0]
        nearest = min(own, key=lambda i: distance[i, j].item())
        expected = [1 / len(OWNER) if i == nearest else 0.0 for i in range(len(y))]
        assert distance.grad[:, j].tolist() == pytest.approx(expected)


def test_patch_cost_leaves_out_prototypes_whose_class_is_not_in_the_batch():
    (_, distance, _), _, _ = batch()
    distance.requires_grad_()
    patch_cost(distance, torch.ones(5, dtype=torch.int64), OWNER).backward()
    assert distance.grad.isfinite().all()
    assert distance.grad.sum(0).tolist() == [0, 0, 1, 0, 0, 0]
