"""The last layer's optimum, against independent solvers and formulas written as loops."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning

from protoclf import last_layer_problem, quadratic_model
from protoclf.last_layer import last_layer_path, solve_last_layer


def similarities(n=60, m=9, n_classes=3, seed=0, noise=1.0, mean=3.0):
    """Activations with a large shared mean, as ProtoPNet's are; higher for the own class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n)
    owner = np.arange(m) % n_classes
    g = mean + (y[:, None] == owner) + noise * rng.normal(size=(n, m))
    return np.abs(g), y, owner


def objective_by_loops(w, g, y, lambda_l1, sample_weight, lambda_l2=0.0):
    total = 0.0
    for i in range(len(g)):
        logits = [sum(w[c, j] * g[i, j] for j in range(w.shape[1])) for c in range(w.shape[0])]
        top = max(logits)
        entropy = top + np.log(sum(np.exp(value - top) for value in logits)) - logits[y[i]]
        total += sample_weight[i] * entropy
    ridge = lambda_l2 / len(w) * sum(value**2 for value in w.ravel()) / 2
    return total / sum(sample_weight) + lambda_l1 * sum(abs(v) for v in w.ravel()) + ridge


def residual_by_loops(w, g, y, owner, lambda_l1, sample_weight=None, lambda_l2=0.0):
    n_classes, m = w.shape
    weight = np.ones(len(g)) if sample_weight is None else np.asarray(sample_weight, float)
    logits = g @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    worst = 0.0
    for c in range(n_classes):
        error = weight * (p[:, c] - (y == c)) / weight.sum()
        for j in range(m):
            slope = error @ g[:, j] + lambda_l2 / n_classes * w[c, j]
            if owner[j] == c:  # W_cj >= 0
                entry = slope + lambda_l1
                worst = max(worst, abs(entry) if w[c, j] > 0 else max(0.0, -entry))
            else:  # W_cj <= 0
                entry = slope - lambda_l1
                worst = max(worst, abs(entry) if w[c, j] < 0 else max(0.0, entry))
    return worst


def scipy_optimum(g, y, owner, lambda_l1, n_classes, sample_weight=None, start=None, lambda_l2=0.0):
    """L-BFGS-B on W itself, in double precision."""
    n, m = g.shape
    weight = np.full(n, 1 / n) if sample_weight is None else sample_weight / sample_weight.sum()
    sign = np.where(owner == np.arange(n_classes)[:, None], 1.0, -1.0)
    onehot = y[:, None] == np.arange(n_classes)

    def value_and_gradient(flat):
        w = flat.reshape(n_classes, m)
        logits = g @ w.T
        logits = logits - logits.max(1, keepdims=True)
        normaliser = np.exp(logits).sum(1, keepdims=True)
        entropy = np.log(normaliser[:, 0]) - logits[onehot]
        error = (np.exp(logits) / normaliser - onehot) * weight[:, None]
        ridge = lambda_l2 / n_classes
        value = weight @ entropy + lambda_l1 * (sign * w).sum() + ridge / 2 * (w**2).sum()
        return value, (error.T @ g + lambda_l1 * sign + ridge * w).ravel()

    bounds = [(0, None) if s > 0 else (None, 0) for s in sign.ravel()]
    options = {"maxiter": 20000, "maxfun": 50000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    found = minimize(
        value_and_gradient,
        np.zeros(sign.size) if start is None else start.ravel(),
        jac=True,
        bounds=bounds,
        options=options,
    )
    return found.fun


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 8),
    n_classes=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    noise=st.floats(0.05, 2.0),
    lambda_l1=st.sampled_from([1e-3, 1e-2, 0.1]),
    lambda_l2=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_optimum_is_the_one_that_scipy_finds(n, m, n_classes, seed, noise, lambda_l1, lambda_l2):
    g, y, owner = similarities(n, m, n_classes, seed, noise)
    sample_weight = np.random.default_rng(seed).uniform(0.1, 3, size=n)
    given = g, y, owner, lambda_l1
    ridge = {"lambda_l2": lambda_l2}
    result = solve_last_layer(*given, sample_weight, tol=1e-8, n_classes=n_classes, **ridge)
    assert result.converged
    assert result.objective <= scipy_optimum(*given, n_classes, sample_weight, **ridge) + 1e-7
    # scipy stops early where the problem is ill-conditioned; let it try to better ours as well
    bettered = scipy_optimum(*given, n_classes, sample_weight, start=result.weight, **ridge)
    assert result.objective <= bettered + 1e-8
    by_loops = objective_by_loops(result.weight, g, y, lambda_l1, sample_weight, **ridge)
    np.testing.assert_allclose(result.objective, by_loops, atol=1e-10)
    by_loops = residual_by_loops(result.weight, *given[:3], lambda_l1, sample_weight, **ridge)
    np.testing.assert_allclose(result.residual, by_loops, atol=1e-10)


def test_weights_are_those_of_slsqp():
    g, y, owner = similarities(n=50, m=4, n_classes=2, noise=1.5)
    sign = np.where(owner == np.arange(2)[:, None], 1.0, -1.0)

    def objective(v):
        logits = g @ (sign * v.reshape(2, 4)).T
        entropy = np.logaddexp(logits[:, 0], logits[:, 1]) - logits[np.arange(len(y)), y]
        return entropy.mean() + 0.02 * v.sum()

    found = minimize(
        objective, np.full(8, 0.1), method="SLSQP", bounds=[(0, None)] * 8, options={"ftol": 1e-14}
    )
    result = solve_last_layer(g, y, owner, 0.02, tol=1e-9)
    assert abs(result.objective - found.fun) < 1e-8
    # of two classes only the difference of the logits is determined
    ours, theirs = (g @ (w[0] - w[1]) for w in (result.weight, sign * found.x.reshape(2, 4)))
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_signs_hold_and_the_certificate_is_honest_at_a_middle_size():
    g, y, owner = similarities(n=800, m=120, n_classes=12, noise=0.7)
    g = g.astype(np.float32)
    result = solve_last_layer(g, y, owner, 1e-3)
    own = owner == np.arange(12)[:, None]
    assert (result.weight[own] >= 0).all()
    assert (result.weight[~own] <= 0).all()
    assert result.weight.dtype == np.float32
    exact = residual_by_loops(result.weight.astype(float), g.astype(float), y, owner, 1e-3)
    assert exact <= 1e-6
    np.testing.assert_allclose(result.residual, exact, atol=1e-9)


@pytest.mark.parametrize("explicit", [0, 700], ids=["products", "written out"])
@pytest.mark.parametrize("small", [0, 10**9], ids=["single", "double"])
@pytest.mark.parametrize("lambda_l2", [0.0, 0.05])
def test_every_form_of_the_model_reaches_the_same_optimum(monkeypatch, explicit, small, lambda_l2):
    monkeypatch.setattr(quadratic_model, "_EXPLICIT", explicit)
    monkeypatch.setattr(last_layer_problem, "_SMALL", small)
    g, y, owner = similarities(n=200, m=30, n_classes=5)
    result = solve_last_layer(g, y, owner, 1e-3, tol=1e-7, lambda_l2=lambda_l2)
    assert result.converged
    expected = scipy_optimum(g, y, owner, 1e-3, 5, lambda_l2=lambda_l2)
    np.testing.assert_allclose(result.objective, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tol", [1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("copied", [0, 500, 10**9])
def test_gradients_in_single_precision_certify_nothing(monkeypatch, tol, copied):
    monkeypatch.setattr(last_layer_problem, "_SMALL", 0)
    monkeypatch.setattr(last_layer_problem, "_COPIED", copied)
    g, y, owner = similarities(n=200, m=30, n_classes=5)
    given = g.astype(np.float32)
    result = solve_last_layer(given, y, owner, 1e-3, tol=tol)
    assert result.converged
    weight, g = result.weight.astype(float), given.astype(float)
    exact = residual_by_loops(weight, g, y, owner, 1e-3, None)
    np.testing.assert_allclose(result.residual, exact, atol=1e-12)
    np.testing.assert_allclose(
        result.objective, objective_by_loops(weight, g, y, 1e-3, np.ones(200)), atol=1e-12
    )


@pytest.mark.parametrize(("name", "most"), [("_GATHERED", 0), ("_MOST_GATHERED", 5 * 200)])
@pytest.mark.parametrize("small", [0, 10**9], ids=["single", "double"])
def test_large_working_sets_are_not_gathered(monkeypatch, name, most, small):
    monkeypatch.setattr(last_layer_problem, "_SMALL", small)
    monkeypatch.setattr(quadratic_model, "_EXPLICIT", 0)
    monkeypatch.setattr(quadratic_model, name, most)
    monkeypatch.setattr(quadratic_model, "_CHUNK", 500)
    gather = quadratic_model.QuadraticModel._gather_rows

    def noted(model, classes):
        assert classes != slice(None) or (name != "_GATHERED" and model.index.numel() <= 5)
        return gather(model, classes)

    monkeypatch.setattr(quadratic_model.QuadraticModel, "_gather_rows", noted)
    g, y, owner = similarities(n=200, m=30, n_classes=5)
    result = solve_last_layer(g, y, owner, 1e-3)
    monkeypatch.undo()
    np.testing.assert_allclose(
        result.objective, solve_last_layer(g, y, owner, 1e-3).objective, atol=1e-6
    )


def test_the_stages_end_where_lambda_l1_is_0():
    rng = np.random.default_rng(0)
    n_classes, each = int(rng.integers(3, 20)), int(rng.integers(2, 6))
    y = np.repeat(np.arange(n_classes), rng.integers(7, 20, n_classes))
    latents = np.abs(rng.normal(size=(len(y), 16))) + 1
    latents += 0.3 * np.abs(rng.normal(size=(n_classes, 16)))[y]
    latents /= np.linalg.norm(latents, axis=1)[:, None]
    sources = rng.integers(0, len(y), n_classes * each)
    owner = np.repeat(np.arange(n_classes), each)
    # one weight pulls too hard for the stage of 5e-7 to end, and too little to enter
    result = solve_last_layer(latents @ latents[sources].T, y, owner, 0.0, lambda_l2=0.1)
    assert result.converged
    assert result.n_iter < 50


def test_a_weight_of_two_is_the_row_twice_and_of_zero_is_no_row():
    g, y, owner = similarities()
    sample_weight = np.ones(len(y))
    sample_weight[:20], sample_weight[50:] = 2, 0
    rows = np.r_[np.arange(50), np.arange(20)]
    weighted = solve_last_layer(g, y, owner, 0.01, sample_weight, tol=1e-9)
    repeated = solve_last_layer(g[rows], y[rows], owner, 0.01, tol=1e-9)
    np.testing.assert_allclose(weighted.weight, repeated.weight, atol=1e-6)
    np.testing.assert_allclose(weighted.objective, repeated.objective, atol=1e-10)


def test_permuting_the_prototypes_permutes_the_weights():
    g, y, owner = similarities()
    order = np.random.default_rng(1).permutation(len(owner))
    plain = solve_last_layer(g, y, owner, 0.01, tol=1e-9)
    permuted = solve_last_layer(g[:, order], y, owner[order], 0.01, tol=1e-9)
    np.testing.assert_allclose(permuted.weight, plain.weight[:, order], atol=1e-6)


def test_same_input_same_bits():
    g, y, owner = similarities()
    first, second = (solve_last_layer(g, y, owner, 0.003).weight for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_activations_beyond_what_can_be_squared_end_with_a_warning():
    g, y, owner = similarities()
    with pytest.warns(ConvergenceWarning):
        result = solve_last_layer(1e200 * g, y, owner, 0.01)
    assert np.isfinite(result.weight).all()


def test_huge_penalty_leaves_nothing():
    result = solve_last_layer(*similarities(), 100.0)
    assert not result.weight.any()
    assert not np.signbit(result.weight).any()
    assert (result.residual, result.converged) == (0.0, True)
    np.testing.assert_allclose(result.objective, np.log(3))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_activations_of_any_scale(spread):
    g, y, owner = similarities(noise=0.8)
    result = solve_last_layer(spread * g, y, owner, 1e-3 * spread, tol=1e-6 * spread)
    assert result.converged
    reference = solve_last_layer(g, y, owner, 1e-3)
    np.testing.assert_allclose(result.objective, reference.objective, atol=1e-5)


def test_lambda_l2_shares_a_weight_among_prototypes_that_are_alike():
    g, y, owner = similarities(n=60, m=3, n_classes=3)
    g, owner = np.column_stack([g, g[:, 0]]), np.append(owner, owner[0])  # one of them twice
    shared = solve_last_layer(g, y, owner, 1e-3, tol=1e-9, lambda_l2=1e-2).weight
    np.testing.assert_allclose(shared[:, 3], shared[:, 0], atol=1e-5)
    assert shared[0, 0] > 0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_torch_in_torch_out(dtype):
    g, y, owner = similarities()
    g = torch.from_numpy(g).to(dtype).requires_grad_()
    result = solve_last_layer(g, torch.from_numpy(y), torch.from_numpy(owner), 0.01)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert isinstance(result.weight, torch.Tensor)
    assert (result.weight.dtype, result.weight.requires_grad) == (expected, False)
    exact = residual_by_loops(
        result.weight.double().numpy(), g.detach().double().numpy(), y, owner, 0.01
    )
    assert exact <= 1e-6


def test_numpy_in_numpy_out_and_the_same_numbers():
    g, y, owner = similarities()
    as_tensor = solve_last_layer(torch.from_numpy(g), y, owner, 0.01).weight
    as_array = solve_last_layer(g, y.astype(np.int32), owner.tolist(), 0.01).weight
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_array_equal(as_array, as_tensor.numpy())
    whole = solve_last_layer(np.round(g).astype(int), y, owner, 0.01)
    np.testing.assert_array_equal(
        whole.weight, solve_last_layer(np.round(g), y, owner, 0.01).weight
    )


def test_read_only_input_stays_as_it_is():
    g, y, owner = similarities()
    before = g.copy()
    g.flags.writeable = False
    solve_last_layer(g, y, owner, 0.01)
    np.testing.assert_array_equal(g, before)


def test_one_image_one_prototype():
    result = solve_last_layer(np.ones((1, 1)), [0], [0], 0.01)
    assert result.weight.shape == (1, 1)
    assert result.weight[0, 0] == 0  # a single class is certain without it
    result = solve_last_layer(np.ones((1, 1)), [0], [0], 0.01, n_classes=2)
    # cross-entropy log(1 + exp(-a)) + 0.01 a has its minimum where 1 / (1 + exp(a)) = 0.01
    np.testing.assert_allclose(result.weight[0] - result.weight[1], np.log(99), atol=1e-3)


def test_class_without_prototypes_and_prototype_of_a_class_without_images():
    g, y, _ = similarities()
    owner = np.array([0, 1, 4] * 3)  # class 2 owns none; classes 3 and 4 have no image
    result = solve_last_layer(g, y, owner, 0.01, n_classes=6)
    assert result.converged
    assert result.weight.shape == (6, 9)
    assert residual_by_loops(result.weight, g, y, owner, 0.01) <= 1e-6


def test_column_of_zeros_and_equal_columns():
    g, y, owner = similarities()
    g[:, 0] = 0
    g[:, 4] = g[:, 1]  # both belong to class 1
    for lambda_l1 in (0.01, 1e-4):
        result = solve_last_layer(g, y, owner, lambda_l1)
        assert result.converged
        assert not result.weight[:, 0].any()


def test_separable_data_without_a_penalty_ends():
    g, y, owner = similarities(noise=0.05)
    result = solve_last_layer(g, y, owner, 0.0)
    assert result.converged
    assert np.isfinite(result.weight).all()
    assert ((g @ result.weight.T).argmax(1) == y).all()


def test_no_penalty_and_overlapping_classes():
    g, y, owner = similarities(n=300, noise=2.0)
    result = solve_last_layer(g, y, owner, 0.0)
    assert result.converged
    assert result.objective <= scipy_optimum(g, y, owner, 0.0, 3) + 1e-7


def test_warm_start_saves_iterations():
    g, y, owner = similarities(n=300, m=30, n_classes=5)
    cold = solve_last_layer(g, y, owner, 0.003)
    near = solve_last_layer(g, y, owner, 0.0033).weight
    warm = solve_last_layer(g, y, owner, 0.003, warm_start=near)
    assert warm.n_iter < cold.n_iter
    np.testing.assert_allclose(warm.objective, cold.objective, atol=1e-6)
    assert solve_last_layer(g, y, owner, 0.003, warm_start=cold.weight).n_iter == 0
    wrong_signs = solve_last_layer(g, y, owner, 0.003, warm_start=-cold.weight)
    np.testing.assert_allclose(wrong_signs.objective, cold.objective, atol=1e-6)


def test_path_runs_from_sparse_to_dense():
    g, y, owner = similarities(n=200, m=20, n_classes=4)
    path = last_layer_path(g, y, owner, [1e-3, 0.1, 1e-2])
    assert [result.lambda_l1 for result in path] == [0.1, 1e-2, 1e-3]
    for result in path:
        alone = solve_last_layer(g, y, owner, result.lambda_l1)
        np.testing.assert_allclose(result.objective, alone.objective, atol=1e-6)
    absolute = [np.abs(result.weight).sum() for result in path]
    assert absolute == sorted(absolute)


def test_unreached_tolerance_is_said():
    with pytest.warns(ConvergenceWarning, match=r"residual .* after 1 iterations"):
        result = solve_last_layer(*similarities(), 0.001, max_iter=1)
    assert not result.converged
    assert result.residual > 1e-6
    with pytest.warns(ConvergenceWarning, match="use a penalty > 0"):
        solve_last_layer(*similarities(), 0.0, max_iter=1)
    with pytest.warns(ConvergenceWarning):  # below rounding: it gives up before max_iter
        result = solve_last_layer(*similarities(), 0.01, tol=0.0)
    assert result.n_iter < 200
    assert result.residual < 1e-9


def set_entry(array, entry, value):
    array = array.astype(float)
    array[entry] = value
    return array


G, Y, OWNER = similarities()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": set_entry(G, (3, 2), np.nan)}, "finite, got nan in row 3, column 2"),
        ({"activations": set_entry(G, (3, 2), -np.inf)}, r"got -inf in row 3, column 2 \(1 such"),
        ({"activations": G[0]}, r"activations must have shape .* got \(9,\)"),
        ({"activations": G[:0]}, r"both at least 1, got \(0, 9\)"),
        ({"activations": G[:, :0]}, r"both at least 1, got \(60, 0\)"),
        ({"y": Y[:-1]}, r"y must have shape \(60,\), one per row of activations, got \(59,\)"),
        ({"prototype_class": OWNER[:-1]}, r"prototype_class must have shape \(9,\)"),
        ({"y": Y.astype(float)}, "y must hold integer class indices, got dtype torch.float64"),
        ({"y": Y - 1}, "y must hold class indices >= 0, got -1"),
        ({"prototype_class": OWNER - 1}, "prototype_class must hold class indices >= 0, got -1"),
        ({"n_classes": 2}, "y must be below n_classes=2, got class index 2"),
        ({"y": 0 * Y, "n_classes": 1}, "prototype_class must be below n_classes=1, got class ind"),
        ({"lambda_l1": -1e-4}, "lambda_l1 must be a finite number >= 0, got -0.0001"),
        ({"lambda_l1": float("nan")}, "lambda_l1 must be a finite number"),
        ({"lambda_l2": -1e-4}, "lambda_l2 must be a finite number >= 0, got -0.0001"),
        ({"tol": -1.0}, "tol must be a finite number >= 0, got -1.0"),
        ({"max_iter": -1}, "max_iter must be an int >= 0, got -1"),
        ({"max_iter": 2.0}, "max_iter must be an int >= 0, got 2.0"),
        ({"sample_weight": np.ones(5)}, r"sample_weight must have shape \(60,\)"),
        ({"sample_weight": set_entry(Y, 0, -1)}, "sample_weight must be finite and >= 0"),
        ({"sample_weight": set_entry(Y, 0, np.nan)}, "sample_weight must be finite and >= 0"),
        ({"sample_weight": np.zeros(60)}, "at least one weight above 0"),
        ({"warm_start": np.zeros((9, 3))}, r"warm_start must have shape .* \(3, 9\), got \(9, 3\)"),
        ({"warm_start": np.full((3, 9), np.nan)}, "warm_start holds NaN or infinity"),
    ],
)
def test_wrong_input_is_named(change, message):
    given = {"activations": G, "y": Y, "prototype_class": OWNER, "lambda_l1": 0.01, **change}
    with pytest.raises(ValueError, match=message):
        solve_last_layer(**given)


@pytest.mark.parametrize("seed", range(40))
def test_small_and_nearly_separable_problems_are_solved(seed):
    """Where few images are told apart almost perfectly the curvature is close to singular."""
    rng = np.random.default_rng(seed)
    n_classes, n = int(rng.integers(2, 6)), int(rng.integers(10, 40))
    y = np.arange(n) % n_classes
    owner = np.arange(n_classes * int(rng.integers(1, 4))) % n_classes
    g = rng.random((n, len(owner))) + rng.choice([0, 0.3, 0.6]) * (y[:, None] == owner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = solve_last_layer(g, y, owner, 10 ** rng.uniform(-5, -2))
    assert result.residual <= 1e-6
    assert result.n_iter < 60


def test_a_warm_start_worse_than_none_is_left_out():
    g, y, owner = similarities(n=200, m=24, n_classes=6)
    cold = solve_last_layer(g, y, owner, 1e-3)
    sign = np.where(owner == np.arange(6)[:, None], 1, -1)
    for scale in (10, 100, 1e308):
        far = sign * scale * np.random.default_rng(0).random((6, 24))
        result = solve_last_layer(g, y, owner, 1e-3, warm_start=far)
        assert result.converged
        assert result.objective == pytest.approx(cold.objective, abs=1e-6)


def test_weights_whose_sum_overflows():
    g, y, owner = similarities()
    huge = solve_last_layer(g, y, owner, 1e-2, sample_weight=np.full(len(y), 1e308))
    np.testing.assert_allclose(huge.weight, solve_last_layer(g, y, owner, 1e-2).weight, atol=1e-9)


@pytest.mark.parametrize("kind", ["uint8", "uint64", ">i4", "<i2"])
def test_class_indices_of_any_integers(kind):
    g, y, owner = similarities()
    found = solve_last_layer(g.astype(">f8"), y.astype(kind), owner.astype(kind), 1e-2)
    np.testing.assert_array_equal(found.weight, solve_last_layer(g, y, owner, 1e-2).weight)


def test_what_is_stuck_is_not_told_to_go_on():
    with pytest.warns(ConvergenceWarning, match=r"which make it no smaller. Raise tol\."):
        solve_last_layer(*similarities(), 0.01, tol=0.0)
    with pytest.warns(ConvergenceWarning, match=r"after 1 iterations. Raise max_iter or tol\."):
        solve_last_layer(*similarities(), 0.01, max_iter=1)
