"""The prototype layer against plain loops, its gradients, and what it may not allocate."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protoclf import prototype_layer
from protoclf.prototype_layer import (
    distance_maps,
    min_distances,
    own_class_distances,
    similarity,
    unit_length,
)

SIZES = [(1, 1), (2, 2), (1, 3), (3, 2), (4, 5)]  # of a prototype, on a map of 4 x 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(size=(1, 1), N=3, m=7, D=4, H=4, W=5, dtype=torch.float64):
    return torch.rand(N, D, H, W, dtype=dtype), torch.rand(m, D, *size, dtype=dtype)


def loop_distances(z_i, p_j):
    """The distances of one prototype to all patches of one map, in order, as a list."""
    height, width = p_j.shape[1:]
    return [
        float(((z_i[:, y : y + height, x : x + width] - p_j) ** 2).sum())
        for y in range(z_i.shape[1] - height + 1)
        for x in range(z_i.shape[2] - width + 1)
    ]


def textbook(z, p):
    """All distances, then their minimum, by automatic differentiation."""
    patches = z.unfold(2, p.shape[2], 1).unfold(3, p.shape[3], 1)  # (N, D, H', W', H1, W1)
    p = p[:, :, None, None]  # (m, D, 1, 1, H1, W1)
    return (patches[:, None] - p).square().sum(dim=(2, 5, 6)).amin(dim=(2, 3))  # (N, m)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop over them runs more than once."""
    monkeypatch.setattr(prototype_layer, "_BLOCK_CPU", 64)


@pytest.fixture(params=["one block", "many blocks"])
def _blocks(request):
    if request.param == "many blocks":
        request.getfixturevalue("small_blocks")


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("size", SIZES)
def test_min_distances_are_those_of_loops(size):
    z, p = make(size)
    distance, cell = min_distances(z, p)
    for i, z_i in enumerate(z):
        for j, p_j in enumerate(p):
            expected = loop_distances(z_i, p_j)
            assert distance[i, j].item() == pytest.approx(min(expected))
            assert cell[i, j].item() == expected.index(min(expected))
    assert cell.dtype == torch.int64


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 2])
def test_own_class_distances_are_those_of_loops(size, k):
    z, _ = make(size)
    p = torch.rand(3, 2, 4, *size, dtype=torch.float64)
    if size == (4, 5) and k == 2:
        with pytest.raises(ValueError, match="k must be 1 to 1, the patches of a map; got 2"):
            own_class_distances(z, p, k)
        return
    distance, cell = own_class_distances(z, p, k)
    for i in range(3):
        for j in range(2):
            expected = loop_distances(z[i], p[i, j])
            order = sorted(range(len(expected)), key=expected.__getitem__)[:k]
            assert cell[i, j].tolist() == order
            assert distance[i, j].tolist() == pytest.approx([expected[c] for c in order])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("size", SIZES)
def test_distance_maps_are_those_of_loops(size):
    z, p = make(size, dtype=torch.float32)
    maps = distance_maps(z, p)
    assert maps.shape == (3, 7, 4 - size[0] + 1, 5 - size[1] + 1)
    assert maps.dtype == torch.float32
    for i, z_i in enumerate(z):
        for j, p_j in enumerate(p):
            assert maps[i, j].flatten().tolist() == pytest.approx(loop_distances(z_i, p_j))
    torch.testing.assert_close(maps.flatten(2).amin(2), min_distances(z, p)[0])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("size", SIZES)
def test_gradients(size):
    z, p = (t.requires_grad_() for t in make(size, N=2, m=5, D=3))
    assert torch.autograd.gradcheck(lambda z, p: min_distances(z, p)[0], (z, p), fast_mode=True)
    g = torch.randn(2, 5, dtype=torch.float64)
    expected = torch.autograd.grad(textbook(z, p), (z, p), g)
    torch.testing.assert_close(torch.autograd.grad(min_distances(z, p)[0], (z, p), g), expected)


@pytest.mark.parametrize("of_z", [True, False])
def test_gradient_of_one_argument_alone(of_z):
    z, p = make()
    wanted = z if of_z else p
    wanted.requires_grad_()
    distance, cell = min_distances(z, p)
    assert not cell.requires_grad
    (expected,) = torch.autograd.grad(textbook(z, p).sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(distance.sum(), wanted)[0], expected)


def test_channels_last_and_expanded_inputs():
    z, p = make((2, 2))
    expected = min_distances(z, p)[0]
    z = z.to(memory_format=torch.channels_last).requires_grad_()
    distance = min_distances(z, p)[0]
    torch.testing.assert_close(distance, expected)
    gradient = torch.autograd.grad(distance.sum(), z)[0]
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(min_distances(z[:1].expand(3, -1, -1, -1), p)[0][2], expected[0])


@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_properties(seed, size, scale):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 3, 4, 5, generator=generator) * scale
    p = torch.randn(5, 3, *size, generator=generator) * scale
    distance, cell = min_distances(z, p)
    assert (distance >= 0).all()

    order = torch.randperm(5, generator=generator)
    permuted = min_distances(z, p[order])
    close = {"rtol": 1e-5, "atol": 1e-5 * scale**2}
    torch.testing.assert_close(permuted[0], distance[:, order], **close)
    assert (permuted[1] == cell[:, order]).all()

    shift = torch.randn(3, 1, 1, generator=generator)
    shifted = min_distances(z + shift, p + shift)[0]
    torch.testing.assert_close(shifted, distance, rtol=1e-4, atol=1e-5 * scale**2)

    nearest = own_class_distances(z, p.expand(2, *p.shape), 1)
    torch.testing.assert_close(nearest[0][..., 0], distance, **close)
    assert (nearest[1][..., 0] == cell).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_match_is_exactly_zero_however_long_the_vectors(size):
    z = 30 * torch.rand(4, 128, 4, 5)  # squared length about 40 000 a cell
    p = z[:, :, : size[0], -size[1] :].clone()
    cell = 5 - size[1]
    distance, where = min_distances(z, p)
    assert (distance.diagonal() == 0).all()
    assert (where.diagonal() == cell).all()
    distance, where = own_class_distances(z, p[:, None], 1)
    assert (distance == 0).all()
    assert (where == cell).all()
    assert distance_maps(z, p).flatten(2).amin(2).diagonal().max() < 1e-8


@pytest.mark.parametrize("offset", [1e-3, 1e-2])
def test_a_near_match_keeps_its_digits(offset):
    """The expanded form in float32 is off by some 1e-5 here, more than these distances."""
    z = 1 + torch.rand(2, 128, 7, 7)
    p = z[:, :, 3:4, 4:5] + offset * torch.randn(2, 128, 1, 1) / 128**0.5
    expected = (z[:, :, 3:4, 4:5].double() - p.double()).square().sum(dim=(1, 2, 3))
    for distance in (min_distances(z, p)[0], distance_maps(z, p)[:, :, 3, 4]):
        torch.testing.assert_close(distance.diagonal().double(), expected, rtol=1e-5, atol=0)


def test_the_value_does_not_depend_on_grad_mode():
    z, p = make(dtype=torch.float32)
    with torch.no_grad():
        expected = min_distances(z, p)
    with torch.inference_mode():
        assert all(map(torch.equal, min_distances(z, p), expected))
    assert all(map(torch.equal, min_distances(z.requires_grad_(), p.requires_grad_()), expected))


@pytest.mark.parametrize("side", [1, 2, 7, 13, 28])
def test_ties_go_to_the_lowest_cell(side):
    z = torch.rand(3, 17, 1, 1).expand(3, 17, side, side)
    p = torch.rand(40, 17, 1, 1)
    assert (min_distances(z, p)[1] == 0).all()
    k = min(side**2, 12)
    cell = own_class_distances(z, p.expand(3, *p.shape), k)[1]
    assert (cell == torch.arange(k)).all()


def test_a_tie_between_far_cells():
    z = 5 + torch.rand(2, 16, 9, 9)
    z[:, :, 2, 7] = z[:, :, 6, 1] = z[:, :, 8, 8] = 0
    p = torch.zeros(3, 16, 1, 1)
    assert (min_distances(z, p)[1] == 2 * 9 + 7).all()
    cell = own_class_distances(z, p.expand(2, *p.shape), 3)[1]
    assert (cell == torch.tensor([2 * 9 + 7, 6 * 9 + 1, 8 * 9 + 8])).all()


def test_nan_is_not_hidden():
    z, p = make()
    z[1, 2, 3, 4] = math.nan
    distance = min_distances(z, p)[0]
    assert distance[1].isnan().all()
    assert distance[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_autocast_computes_in_float32(dtype, size):
    z, p = (t.requires_grad_() for t in make(size, dtype=torch.float32))
    p_many = p.expand(3, *p.shape)
    expected = min_distances(z, p)[0]
    expected_gradients = torch.autograd.grad(expected.sum(), (z, p))
    with torch.autocast("cpu", dtype=dtype):
        distance = min_distances(z, p)[0]
        gradients = torch.autograd.grad(distance.sum(), (z, p))
        torch.testing.assert_close(distance_maps(z, p).flatten(2).amin(2), expected)
        own = own_class_distances(z, p_many, 1)[0]
    torch.testing.assert_close(own[..., 0], expected.detach())
    assert torch.equal(distance, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents(dtype):
    z, p = make(dtype=torch.float32)
    z = (100 * z).to(dtype).requires_grad_()
    distance = min_distances(z, p)[0]
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, textbook(z.float(), p))
    gradient = torch.autograd.grad(distance.sum(), z)[0]
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    z, p = (t.requires_grad_() for t in make((2, 2), dtype=torch.float32))

    def loss(z, p):
        return similarity(min_distances(2 * z, p)[0], "log").sum()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(z, p), loss(z, p))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(z, p), (z, p)), torch.autograd.grad(loss(z, p), (z, p))
    )


def test_operators_are_registered_soundly():
    z, p = make((2, 2))
    for requires_grad in (False, True):
        inputs = tuple(t.requires_grad_(requires_grad) for t in (z, p))
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.protoclf.min_distances, inputs, test_utils=tests)


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_no_tensor_is_left_behind_on_another_device(size):
    """On a fake GPU: a tensor made on the CPU, or a value taken to the host, raises here."""
    with FakeTensorMode():
        z = torch.empty(3, 4, 7, 7, device="cuda")
        p = torch.empty(6, 4, *size, device="cuda")
        p_many = torch.empty(3, 6, 4, *size, device="cuda")
        outputs = [
            *min_distances(z, p),
            *own_class_distances(z, p_many, 2),
            distance_maps(z, p),
            similarity(min_distances(z, p)[0], "log"),
            unit_length(z),
        ]
        # What the operators do on a real device, which the fake one only stands in for.
        distance, cell = prototype_layer._min_distances(z, p)
        outputs += [
            prototype_layer._grad_z(distance, z, p, cell),
            prototype_layer._grad_prototypes(distance, z, p, cell),
        ]
    assert all(output.device.type == "cuda" for output in outputs)


def test_meta_device_forward_and_backward():
    z = torch.empty(3, 4, 7, 7, device="meta", requires_grad=True)
    p = torch.empty(6, 4, 2, 2, device="meta", requires_grad=True)
    distance = min_distances(unit_length(z, area=4), unit_length(p, area=4))[0]
    similarity(distance, "cosine").sum().backward()
    assert z.grad.shape == z.shape
    assert p.grad.shape == p.shape
    assert distance_maps(z, p).shape == (3, 6, 6, 6)
    assert own_class_distances(z, p.expand(3, *p.shape), 2)[1].shape == (3, 6, 2)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // 4 for t in tree_leaves(result) if is_float(t)]
        self.numel = max([self.numel, *sizes])
        return result


def is_float(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


@pytest.mark.parametrize("size", [(1, 1), (3, 3)])
def test_no_tensor_of_all_distances(monkeypatch, size):
    monkeypatch.setattr(prototype_layer, "_BLOCK_CPU", 2**14)
    z, p = torch.rand(16, 8, 14, 14), torch.rand(300, 8, *size)
    with LargestTensor() as largest:
        distance, cell = prototype_layer._min_distances(z, p)
        prototype_layer._grad_z(distance, z, p, cell)
        prototype_layer._grad_prototypes(distance, z, p, cell)
    assert largest.numel <= max(2**14, z.numel(), p.numel())  # 900 000 distances in all


def test_saves_only_inputs_and_cells_for_backward():
    z, p = (t.requires_grad_() for t in make())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        min_distances(z, p)
    assert sorted(t.numel() for t in saved) == sorted([z.numel(), p.numel(), 3 * 7])


def test_similarity():
    distance = torch.tensor([0.0, 1e-4, 0.5, 2.0, 4.0], dtype=torch.float64)
    expected = [math.log((d + 1) / (d + 1e-4)) for d in distance.tolist()]
    assert similarity(distance, "log").tolist() == pytest.approx(expected)
    expected = [math.log((d + 1) / (d + 0.1)) for d in distance.tolist()]
    assert similarity(distance, "log", eps=0.1).tolist() == pytest.approx(expected)
    assert similarity(distance, "cosine").tolist() == pytest.approx([1, 0.99995, 0.75, 0, -1])
    with pytest.raises(ValueError, match='must be "log" or "cosine"; got \'l2\''):
        similarity(distance, "l2")


def test_unit_length_patches_make_the_distance_a_mean_cosine():
    z, p = make((2, 3))
    distance = min_distances(unit_length(z, area=6), unit_length(p, area=6))[0]
    patches = z.unfold(2, 2, 1).unfold(3, 3, 1)[:, None]  # (N, 1, D, H', W', 2, 3)
    cosine = torch.cosine_similarity(patches, p[None, :, :, None, None], dim=2)
    torch.testing.assert_close(
        similarity(distance, "cosine"), cosine.mean(dim=(4, 5)).amax(dim=(2, 3))
    )


def test_unit_length_of_zero():
    x = torch.zeros(1, 3, 2, 2)
    x[0, :, 0, 0] = torch.tensor([3.0, 0.0, 4.0])
    x.requires_grad_()
    unit = unit_length(x)
    assert unit[0, :, 0, 0].tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert (unit[:, :, 1] == 0).all()
    assert torch.autograd.grad(unit.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(("length", "scale"), [(2e-6, 1 / 2e-6), (1e-6, 1), (5e-7, 1)])
def test_vectors_shorter_than_a_millionth_stay_as_they_are(length, scale):
    x = torch.tensor([0.6, 0.8]).view(1, 2, 1, 1) * length
    x.requires_grad_()
    unit = unit_length(x)
    torch.testing.assert_close(unit, x * scale)
    assert torch.autograd.grad(unit.sum(), x)[0].abs().max() <= 1e6


@pytest.mark.parametrize(
    ("z_shape", "p_shape", "message"),
    [
        ((2, 3, 4, 4), (5, 2, 1, 1), r"got shapes \(2, 3, 4, 4\) and \(5, 2, 1, 1\)"),
        ((3, 4, 4), (5, 3, 1, 1), r"must be \(N, D, H, W\)"),
        ((2, 3, 4, 4), (5, 3, 1, 5), "H1 <= H and W1 <= W"),
    ],
)
def test_wrong_shapes(z_shape, p_shape, message):
    for function in (min_distances, distance_maps):
        with pytest.raises(ValueError, match=message):
            function(torch.rand(z_shape), torch.rand(p_shape))


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (2, 300), (300, 1)])
def test_the_largest_score_is_found_where_it_comes_first(shape):
    score = torch.randint(0, 5, (3, *shape, 6)).float()
    score[0, :, :, 1] = 2.0  # all equal
    expected = score.flatten(1, 2).numpy()
    index, best = prototype_layer._argmax(score)
    assert torch.equal(index, torch.from_numpy(expected.argmax(1)))
    assert torch.equal(best, torch.from_numpy(expected.max(1)))


def test_a_latent_that_is_no_number_is_overlooked_by_no_prototype():
    z, p = make(dtype=torch.float32)
    z[1, 2, 3, 4] = torch.nan
    distance, cell = min_distances(z, p)
    assert distance.isnan().all(1).tolist() == [False, True, False]
    assert not distance[[0, 2]].isnan().any()
    assert ((cell >= 0) & (cell < 20)).all()


@pytest.mark.usefixtures("_blocks")
@example(1.0, 0.0, 0)
@given(st.floats(0.01, 10), st.floats(0, 1), st.integers(0, 2**31))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_single_precision_keeps_its_digits_near_and_far(scale, apart, seed):
    """`apart` goes from prototypes that are patches to such as have nothing to do with them."""
    torch.manual_seed(seed)
    z = scale * torch.randn(3, 64, 4, 5)
    p = torch.lerp(
        z.transpose(0, 1).flatten(1).T[:, :, None, None], torch.randn(60, 64, 1, 1), apart
    )
    distance, _ = min_distances(z, p)
    exact, _ = min_distances(z.double(), p.double())
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=0)
    if apart == 0:
        assert (distance.amin(0) == 0).all()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_nearest_patches_are_found_behind_a_common_mean(precision, mean):
    """Whatever digits of matrix products a user gives up, prototypes match their own patches."""
    before = torch.get_float32_matmul_precision()
    z = mean + torch.randn(4, 64, 4, 5)
    p = z[:2].transpose(0, 1).flatten(1).T[:, :, None, None].contiguous()  # (40, 64, 1, 1)
    torch.set_float32_matmul_precision(precision)
    try:
        distance, cell = min_distances(z, p)
        own_distance, own_cell = own_class_distances(z, p[None].expand(4, -1, -1, -1, -1), 1)
    finally:
        torch.set_float32_matmul_precision(before)
    exact, exact_cell = min_distances(z.double(), p.double())
    image, j = torch.arange(40) // 20, torch.arange(40)
    for found, where in ((distance, cell), (own_distance[..., 0], own_cell[..., 0])):
        assert (found[image, j] == 0).all()
        assert torch.equal(where[image, j], j % 20)
        if (
            precision != "medium"
        ):  # where the cell itself may be another, of nearly the same distance
            assert torch.equal(where, exact_cell)
        torch.testing.assert_close(
            found.double(), exact, rtol=1e-2 if precision == "medium" else 1e-5, atol=0
        )


def test_own_class_distances_overlook_no_latent_that_is_no_number():
    z, _ = make(dtype=torch.float32)
    p = torch.rand(3, 2, 4, 1, 1)
    z[1, 2, 3, 4] = torch.nan
    p[2, 1] = torch.nan
    distance, _ = own_class_distances(z, p, 1)
    assert not distance.isinf().any()
    assert distance[0].isfinite().all()
    assert distance[2, 1].isnan().all()
    assert distance[2, 0].isfinite().all()


def test_what_overflows_is_infinitely_far():
    z, p = make(dtype=torch.float32)
    distance, _ = min_distances(1e20 * z, p)
    assert distance.isinf().all()


def test_log_similarity_keeps_its_digits_and_falls_with_the_distance():
    distance = torch.logspace(-8, 7, 2000)
    g = similarity(distance, "log")
    d = distance.double()
    torch.testing.assert_close(g.double(), torch.log((d + 1) / (d + 1e-4)), rtol=5e-7, atol=0)
    assert (g.diff() <= 0).all()


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("by", [0, 1])
def test_second_derivatives_are_refused(of, by):
    inputs = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(5, 3, 1, 1, requires_grad=True)
    gradients = torch.autograd.grad(min_distances(*inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        gradients[of].square().sum().backward(inputs=[inputs[by]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_map_that_is_not_finite_has_no_arbitrary_nearest_patch(value):
    z, p = torch.randn(4, 8, 5, 5), torch.randn(6, 8, 1, 1)
    expected = min_distances(z[1:], p)
    z[0, 2, 0, 0] = value
    distance, _ = min_distances(z, p)
    torch.testing.assert_close(distance[1:], expected[0])
    rest = torch.cat([min_distances(z[:1, :, 1:], p)[0], min_distances(z[:1, :, :1, 1:], p)[0]])
    known = ~distance[0].isnan()
    torch.testing.assert_close(distance[0][known], rest.amin(0)[known])
    assert value == math.inf or not known.any()


@pytest.mark.parametrize("scale", [1e3, 1e8, math.inf])
def test_a_prototype_far_away_takes_no_digits_from_the_others(scale):
    z, p = torch.rand(4, 128, 7, 7), torch.rand(10, 128, 1, 1)
    p[3] *= scale
    distance, cell = min_distances(z, p)
    others = torch.arange(10) != 3
    expected = distance_maps(z, p[others]).flatten(2).min(2)
    torch.testing.assert_close(distance[:, others], expected.values)
    torch.testing.assert_close(cell[:, others], expected.indices)
