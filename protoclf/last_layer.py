"""The last layer: a sparse, sign-constrained softmax regression, solved to a certified optimum.

Stage 3 of ProtoPNet (Chen et al., 2019, section 2.2), with bounds: with the activations g of all
prototypes fixed, minimise over W the mean cross-entropy of the logits G W^T plus lambda_l1 *
sum |W|, where a prototype may only speak for its own class (W_cj >= 0) and against the others
(W_cj <= 0). The paper has no bounds, and penalises the weights to other classes alone.

With V = |W| >= 0 the penalty is linear, so what is left is smooth, convex, and bounded below. It is
solved by a proximal Newton method (Lee, Sun and Saunders, 2014) on a small working set of weights:

1. the full gradient, in double precision, gives the certificate and names the weights that want
   to leave zero; only they and the weights above zero may move in this step;
2. the quadratic model on those weights is minimised, bounds included, by proximal steps in the
   metric of the Hessian's diagonal blocks, one per class. The blocks absorb the mean that all
   activations share, which ruins first-order methods; since any two classes are coupled by
   -p_c p_c' <= 0, twice the blocks bound the Hessian;
3. in that metric a proximal step is one small non-negative least-squares problem per class, all
   of them solved at once by block principal pivoting (Kim and Park, 2011);
   Between two proximal steps, conjugate gradients finish the weights that stay above zero, which
   is where the coupling of classes is dealt with (as in More and Toraldo, 1991);
4. a line search along the step costs no matrix product, since logits are linear in W.

Without a warm start the penalty comes down in stages, so that few weights are ever in play and
Newton's steps need no cutting. The model may live in single precision: it only ever proposes a
step from an exact gradient.

References
----------
C. Chen, O. Li, C. Tao, A. Barnett, J. Su, C. Rudin. This looks like that: deep learning for
interpretable image recognition. NeurIPS 2019.
J. D. Lee, Y. Sun, M. A. Saunders. Proximal Newton-type methods for minimizing composite
functions. SIAM Journal on Optimization 24(3), 2014.
J. Kim, H. Park. Fast nonnegative matrix factorization: an active-set-like method and
comparisons. SIAM Journal on Scientific Computing 33(6), 2011.
J. J. More, G. Toraldo. On the solution of large quadratic programming problems with bound
constraints. SIAM Journal on Optimization 1(1), 1991.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from protoclf.torch_settings import widest_float

_SMALL = 2_000_000  # activations up to which single precision would save nothing
_ONE_THREAD = 200_000  # activations up to which a second thread does not pay
_GROWTH = 4  # weights per class that may enter in one iteration, or as many as there are
_PATIENCE = 10  # iterations without progress: rounding allows no more
_MODEL_STEPS = 150  # products with the Hessian in one quadratic model
_CG_STEPS = 50  # and between two proximal steps
_BENT_STEPS = 6  # lengths tried when a step crosses bounds
_EXPLICIT = 1500  # weights up to which the Hessian is worth writing out
_RIDGE = 1e-10  # of the mean diagonal, so that the whole Hessian can be factored
_DAMPING = 1e-4  # of a block's mean diagonal, so that collinear prototypes stay solvable
_GATHERED = 8  # copies of the activations that the working set may take, before all is multiplied
_MOST_GATHERED = 2**28  # numbers in these copies
_CHUNK = 2**25  # numbers in a temporary


@dataclass(frozen=True)
class LastLayerResult:
    """A solved last layer and the proof of how well it is solved.

    Attributes
    ----------
    weight : ndarray or Tensor of shape (n_classes, n_prototypes)
        W, of the same kind as the activations and on the same device.
    objective : float
        Mean cross-entropy + lambda_l1 * sum |W|, at ``weight``.
    residual : float
        Largest absolute entry of the projected gradient at ``weight``: the gradient in which the
        components that push against an active bound are set to 0. It is 0 at the optimum alone.
    n_iter : int
        Newton steps.
    converged : bool
        Whether ``residual <= tol``.
    n_evaluations : int
        Evaluations of the objective and its full gradient.
    n_products : int
        Products with the Hessian of the working set, each much cheaper than an evaluation.
    lambda_l1 : float
        The penalty that it was solved for.
    """

    weight: Any
    objective: float
    residual: float
    n_iter: int
    converged: bool
    n_evaluations: int
    n_products: int
    lambda_l1: float


def solve_last_layer(
    activations: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    prototype_class: np.ndarray | Tensor,
    lambda_l1: float,
    sample_weight: np.ndarray | Tensor | None = None,
    tol: float = 1e-6,
    *,
    n_classes: int | None = None,
    warm_start: np.ndarray | Tensor | None = None,
    max_iter: int = 200,
) -> LastLayerResult:
    """Find the last layer that minimises cross-entropy + lambda_l1 * sum |W| under sign bounds.

    Parameters
    ----------
    activations : ndarray or Tensor of shape (n_samples, n_prototypes)
        g, how strongly each prototype is present in each image. A tensor is worked on where it is.
    y : array of shape (n_samples,)
        Class index of each image.
    prototype_class : array of shape (n_prototypes,)
        Class index of each prototype: W is >= 0 there and <= 0 in all other classes.
    lambda_l1 : float
        Weight of the penalty, >= 0. With 0 and separable data no minimum exists; the solver then
        stops where the residual falls below ``tol``.
    sample_weight : array of shape (n_samples,), optional
        Weights >= 0; a weight of 2 is the same as the image twice.
    tol : float, default=1e-6
        Residual at which to stop.
    n_classes : int, optional
        Number of classes; by default the largest index in ``y`` and ``prototype_class`` plus 1.
    warm_start : array of shape (n_classes, n_prototypes), optional
        W to start from, such as a solution for another ``lambda_l1``.
    max_iter : int, default=200
        Newton steps at most.

    Returns
    -------
    LastLayerResult
        Weights, objective, and the residual that certifies them.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If ``tol`` is not reached; the message holds the residual that was.

    Examples
    --------
    >>> import numpy as np
    >>> activations = np.array([[1.0, 0.2], [0.9, 0.3], [0.1, 1.0], [0.2, 0.8]])
    >>> result = solve_last_layer(activations, [0, 0, 1, 1], [0, 1], lambda_l1=0.01)
    >>> round(result.objective, 4), bool(result.residual <= 1e-6)
    (0.1313, True)
    >>> (activations @ result.weight.T).argmax(axis=1)
    array([0, 0, 1, 1])
    """
    _check_number("tol", tol, 0.0)
    if not isinstance(max_iter, Integral) or max_iter < 0:
        raise ValueError(f"max_iter must be an int >= 0, got {max_iter!r}.")
    problem = _Problem.build(activations, y, prototype_class, lambda_l1, sample_weight, n_classes)
    with _threads_for(problem):
        result = _minimise(problem, problem.start(warm_start), float(tol), max_iter)
    if not result.converged:
        stalled = result.n_iter < max_iter
        warnings.warn(
            f"last layer not solved to tol={tol:g}: residual {result.residual:.3g} after "
            f"{result.n_iter} iterations{', which make it no smaller' if stalled else ''}. Raise "
            f"{'tol' if stalled else 'max_iter or tol'}"
            + (", or use lambda_l1 > 0." if lambda_l1 == 0 else "."),
            ConvergenceWarning,
            stacklevel=2,
        )
    if isinstance(activations, Tensor):
        return result
    return LastLayerResult(**{**vars(result), "weight": result.weight.numpy()})


def last_layer_path(
    activations: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    prototype_class: np.ndarray | Tensor,
    lambdas: Iterable[float],
    **options: Any,
) -> list[LastLayerResult]:
    """Solve the last layer for several penalties, each started from the one before.

    Parameters
    ----------
    activations, y, prototype_class
        As in :func:`solve_last_layer`.
    lambdas : iterable of float
        Penalties. They are solved from the largest to the smallest, as solutions grow.
    **options
        Passed on to :func:`solve_last_layer`.

    Returns
    -------
    list of LastLayerResult
        One for each penalty, the largest first.
    """
    results: list[LastLayerResult] = []
    warm_start = options.pop("warm_start", None)
    for lambda_l1 in sorted(lambdas, reverse=True):
        result = solve_last_layer(
            activations, y, prototype_class, lambda_l1, warm_start=warm_start, **options
        )
        warm_start = result.weight
        results.append(result)
    return results


# ------------------------------------------------------------------------------- the problem


@dataclass
class _Problem:
    """Cross-entropy and penalty as a function of V = |W|, with class-major (C, n) logits."""

    g: Tensor  # (n, m), exact dtype
    g_model: Tensor  # (m, n), model dtype, a row per prototype so that gathering is copying
    onehot: Tensor  # (C, n), bool
    sign: Tensor  # (C, m), +1 own class, -1 other
    omega: Tensor  # (n,), sample weights that sum to 1
    lambda_l1: float
    out_dtype: torch.dtype

    @classmethod
    def build(cls, activations, y, prototype_class, lambda_l1, weight, n_classes):
        """Check the input and bring it to one device and to the dtypes of the solver."""
        _check_number("lambda_l1", lambda_l1, 0.0)
        given = _check_activations(activations)
        n, m = given.shape
        device = given.device
        y = _check_indices("y", y, n, "one per row of activations").to(device)
        owner = _check_indices("prototype_class", prototype_class, m, "one per column").to(device)
        n_classes = _check_n_classes(n_classes, y, owner)
        omega = _check_sample_weight(weight, n)
        exact = widest_float(device)
        model = torch.float32 if n * m > _SMALL else exact
        classes = torch.arange(n_classes, device=device)[:, None]  # (C, 1)
        return cls(
            g=given.to(exact),
            g_model=given.to(model).T.contiguous(),
            onehot=classes == y,
            sign=torch.where(classes == owner, 1.0, -1.0).to(exact),
            omega=omega.to(exact).to(device),
            lambda_l1=float(lambda_l1),
            out_dtype=torch.float64 if given.dtype == torch.float64 else torch.float32,
        )

    def start(self, warm_start) -> Tensor:
        """V to begin at: zero, or what of the warm start respects the signs."""
        if warm_start is None:
            return torch.zeros_like(self.sign)
        w = _tensor(warm_start)
        if w.shape != self.sign.shape:
            raise ValueError(
                f"warm_start must have shape (n_classes, n_prototypes) = {tuple(self.sign.shape)},"
                f" got {tuple(w.shape)}."
            )
        if not torch.isfinite(w).all():
            raise ValueError("warm_start holds NaN or infinity.")
        return self.round((self.sign * w.to(self.sign)).clamp_min(0))

    def round(self, v: Tensor) -> Tensor:
        """V as it will be handed out: the certificate must hold for those numbers."""
        return v.to(self.out_dtype).to(v.dtype)

    def logits(self, v: Tensor) -> Tensor:
        """Logits of all images."""
        return (self.sign * v) @ self.g.T  # (C, n)

    def objective(self, logits: Tensor, v_sum: Tensor, penalty: float) -> float:
        """Weighted mean cross-entropy + penalty."""
        entropy = logits.logsumexp(0) - (logits * self.onehot).sum(0)  # (n,)
        return float(entropy @ self.omega + penalty * v_sum)

    def loss_gradient(self, probability: Tensor) -> Tensor:
        """Gradient of the cross-entropy with respect to V."""
        error = (probability - self.onehot.to(probability)) * self.omega  # (C, n)
        return self.sign * (error @ self.g)  # (C, m)


@contextmanager
def _threads_for(problem: _Problem) -> Iterator[None]:
    """Use one thread on a small problem, where threads would mostly wait for one another."""
    before = torch.get_num_threads()
    if problem.g.device.type != "cpu" or problem.g.numel() > _ONE_THREAD or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _projected(v: Tensor, gradient: Tensor) -> Tensor:
    """Gradient without the components that push against the bound V >= 0."""
    return torch.where(v > 0, gradient, gradient.clamp_max(0))


# --------------------------------------------------------------------------------- the solver


def _minimise(problem: _Problem, v: Tensor, tol: float, max_iter: int) -> LastLayerResult:
    """Proximal Newton steps on working sets until the projected gradient is within tol."""
    n_products = 0
    best_residual, best_objective, stalled = math.inf, 1e300, 0  # not inf: inf - inf is NaN
    penalty = problem.lambda_l1 if v.any() else math.inf
    for n_iter in range(max_iter + 1):
        logits = problem.logits(v)
        probability = logits.softmax(0)
        loss_gradient = problem.loss_gradient(probability)
        residual = _residual(v, loss_gradient + problem.lambda_l1)
        objective = problem.objective(logits, v.sum(), problem.lambda_l1)
        better = objective < best_objective - 1e-9 * abs(best_objective)
        stalled = 0 if better or residual < best_residual else stalled + 1
        best_residual, best_objective = min(best_residual, residual), min(best_objective, objective)
        if residual <= tol or n_iter == max_iter or stalled == _PATIENCE:
            break
        if n_iter == 0 and v.any() and not objective < math.log(len(v)):
            v, penalty = torch.zeros_like(v), math.inf  # which is better than that warm start
            best_residual, best_objective = math.inf, 1e300
            continue
        penalty = _next_penalty(problem, v, loss_gradient, penalty, tol)
        gradient = loss_gradient + penalty
        model = _Model(problem, probability, _working_set(problem, v, gradient, tol))
        step, products = model.minimise(v, gradient)
        n_products += products
        size = _line_search(problem, v, gradient, logits, model, step, penalty)
        if size > 0:
            v = problem.round((v + size * model.scatter(step)).clamp_min(0))
        stalled = 0 if penalty > problem.lambda_l1 else stalled
        del model  # before there is another: its copies can be large
    return LastLayerResult(
        weight=(problem.sign * v + 0.0).to(problem.out_dtype),  # + 0.0: no negative zeros
        objective=objective,
        residual=residual,
        n_iter=n_iter,
        converged=residual <= tol,
        n_evaluations=n_iter + 1,
        n_products=n_products,
        lambda_l1=problem.lambda_l1,
    )


def _next_penalty(problem, v, loss_gradient, penalty, tol) -> float:
    """Lower the penalty in stages: far from the optimum Newton steps would be cut to nothing."""
    if penalty == math.inf:
        penalty = float((-loss_gradient).max()) / 3  # at three times that V = 0 is the optimum
    while penalty > problem.lambda_l1 and _residual(v, loss_gradient + penalty) <= 0.7 * penalty:
        penalty = penalty / 4 if penalty > tol else 0.0
    return max(penalty, problem.lambda_l1)


def _residual(v: Tensor, gradient: Tensor) -> float:
    return float(_projected(v, gradient).abs().max())


def _working_set(problem: _Problem, v: Tensor, gradient: Tensor, tol: float) -> Tensor:
    """Weights above zero, and of each class those at zero that pull hardest upwards."""
    pull = torch.where(v > 0, 0.0, -gradient)  # (C, m)
    own = pull.masked_fill(problem.sign < 0, 0.0)
    # own-class weights explain most; the others then have far less left to say
    if not (v > 0).any() and (own > tol).any():
        pull = own
    n_enter = min(max(_GROWTH, int((v > 0).sum()) // len(v)), pull.shape[1])
    least = pull.topk(n_enter, dim=1).values[:, -1:]  # (C, 1)
    return (v > 0) | ((pull > 0.5 * tol) & (pull >= least))


def _line_search(problem, v, gradient, logits, model, step, penalty) -> float:
    """Halve the step until the objective falls enough (Armijo); it is feasible throughout."""
    change = model.forward(step.to(model.g)).to(logits)  # (C, n)
    derivative = float((model.gather(gradient, 0.0) * step).sum())
    v_sum, step_sum = v.sum(), step.sum()
    before = problem.objective(logits, v_sum, penalty)
    size = 1.0
    while size > 1e-10:
        after = problem.objective(logits + size * change, v_sum + size * step_sum, penalty)
        if after <= before + 1e-4 * size * derivative + 1e-15 * abs(before):
            return size
        size /= 2
    return 0.0


# ------------------------------------------------------------------------- the quadratic model


class _Model:
    """Second-order model of the objective on a working set, padded to k weights per class.

    Parameters
    ----------
    problem : _Problem
    probability : Tensor of shape (C, n)
        Of the classes, where the model is made.
    working : Tensor of shape (C, m), bool
        The working set.
    """

    def __init__(self, problem: _Problem, probability: Tensor, working: Tensor) -> None:
        self.problem = problem
        k = max(1, int(working.sum(1).max()))
        order = working.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        self.index = order[:, :k]  # (C, k)
        self.valid = working.gather(1, self.index)  # (C, k)
        self.flat = self.valid.flatten().nonzero()[:, 0]  # (F,)
        self.sign = problem.sign.gather(1, self.index)  # (C, k)
        self.g = problem.g_model  # (m, n)
        self.p = probability.to(self.g)  # (C, n)
        self.omega = problem.omega.to(self.g)  # (n,)
        # a gathered copy saves work while k is small; a large one is worse than all of g
        n_classes, m = working.shape
        few = n_classes * k <= min(_GATHERED * m, _MOST_GATHERED // self.g.shape[1])
        self.gathered = self._gather_rows(slice(None)) if few else None
        blocks = self._blocks()
        self.hessian = self._hessian(blocks)
        self.blocks = self._damped(blocks)  # (C, k, k)

    def _gather_rows(self, classes: slice) -> Tensor:
        index = self.index[classes]
        return self.g.index_select(0, index.flatten()).view(*index.shape, -1)  # (c, k, n)

    def _blocks(self) -> Tensor:
        """Diagonal blocks of the Hessian, G_c^T diag(omega p_c (1 - p_c)) G_c."""
        curvature = self.omega * self.p * (1 - self.p)  # (C, n)
        n_classes, k = self.index.shape
        size = max(1, _CHUNK // (k * self.g.shape[1]))
        parts = []
        for first in range(0, n_classes, size):
            classes = slice(first, first + size)
            g = self._gather_rows(classes) if self.gathered is None else self.gathered[classes]
            parts.append((g * curvature[classes, None, :]) @ g.transpose(1, 2))  # (c, k, k)
        blocks = torch.cat(parts).to(self.problem.g)
        blocks = blocks * (self.sign[:, :, None] * self.sign[:, None, :])
        blocks = blocks * (self.valid[:, :, None] & self.valid[:, None, :])
        return blocks

    def _damped(self, blocks: Tensor) -> Tensor:
        diagonal = blocks.diagonal(dim1=1, dim2=2)  # (C, k)
        mean = diagonal.sum(1, keepdim=True) / self.valid.sum(1, keepdim=True).clamp_min(1)
        floor = torch.finfo(blocks.dtype).tiny ** 0.5
        return blocks + torch.where(self.valid, _DAMPING * mean + floor, 1.0).diag_embed()

    def _hessian(self, blocks: Tensor) -> Tensor | None:
        """All F x F second derivatives, where the F weights of the working set are few."""
        if len(self.flat) > _EXPLICIT:
            return None
        k = self.index.shape[1]
        owner, place = self.flat // k, self.flat % k
        signed = self.sign.flatten()[self.flat].to(self.g)[:, None]  # (F, 1)
        rows = self.g[self.index.flatten()[self.flat]] * self.p[owner] * signed  # (F, n)
        across = -((rows * self.omega) @ rows.T).to(blocks)  # (F, F)
        within = blocks[owner[:, None], place[:, None], place]
        return torch.where(owner[:, None] == owner, within, across)

    def gather(self, full: Tensor, padding: float) -> Tensor:
        """Entries of a (C, m) matrix on the working set."""
        return torch.where(self.valid, full.gather(1, self.index), padding)  # (C, k)

    def scatter(self, part: Tensor) -> Tensor:
        """Put a (C, k) matrix back among zeros."""
        full = torch.zeros_like(self.problem.sign)
        return full.scatter_(1, self.index, torch.where(self.valid, part, 0.0))  # (C, m)

    def forward(self, part: Tensor) -> Tensor:
        """Logits of weights on the working set."""
        part = part * self.sign.to(part)
        if self.gathered is None:
            return self.scatter(part).to(self.g) @ self.g  # (C, n)
        return (part[:, None, :] @ self.gathered)[:, 0]  # (C, n)

    def backward(self, error: Tensor) -> Tensor:
        """Transpose of forward."""
        if self.gathered is None:
            part = (error @ self.g.T).gather(1, self.index)  # (C, k)
        else:
            part = (self.gathered @ error[:, :, None])[:, :, 0]  # (C, k)
        return part * (self.sign * self.valid).to(part)

    def product(self, part: Tensor) -> Tensor:
        """Hessian on the working set times a (C, k) matrix."""
        if self.hessian is not None:
            return self._unflatten(self.hessian @ part.flatten()[self.flat])
        weighted = self.forward(part.to(self.g)) * self.p  # (C, n)
        error = (weighted - self.p * weighted.sum(0)) * self.omega
        return self.backward(error).to(part)  # (C, k)

    def _unflatten(self, values: Tensor) -> Tensor:
        part = torch.zeros_like(self.sign).flatten()
        return part.index_copy_(0, self.flat, values).view_as(self.sign)  # (C, k)

    def minimise(self, v: Tensor, gradient: Tensor) -> tuple[Tensor, int]:
        """Minimise the model within the bounds; returns the step from v, which goes downhill."""
        start, gradient = self.gather(v, 0.0), self.gather(gradient, 1.0)  # (C, k)
        goal = self._residual(start, gradient)
        goal *= min(0.1, math.sqrt(goal))
        products = 0
        if self.hessian is not None:
            x = self._exactly(start, gradient)
            h_step = self.product(x - start)
            solved = self._residual(x, gradient + h_step) <= goal
            if solved and _model_change(x - start, gradient, h_step) < 0:
                return x - start, 1
            products = 1
        x, h_step, used = self._iteratively(start, gradient, goal)
        products += used
        if not _model_change(x - start, gradient, h_step) < 0:  # all but singular, for rounding
            x, _ = self._proximal(start, gradient, self.valid, 2.0)
        return x - start, products

    def _exactly(self, start: Tensor, gradient: Tensor) -> Tensor:
        """Minimise by pivoting on the whole Hessian, the way that proximal steps go by blocks."""
        assert self.hessian is not None
        hessian = self.hessian.clone()[None]  # (1, F, F)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean()
        x, linear = (part.flatten()[None, self.flat] for part in (start, gradient))  # (1, F)
        linear = linear - _times(hessian, x)
        x, _ = _nonnegative_quadratic(hessian, linear, x > 0)
        return self._unflatten(x[0])

    def _iteratively(
        self, start: Tensor, gradient: Tensor, goal: float
    ) -> tuple[Tensor, Tensor, int]:
        """Alternate proximal steps, which find the face, and CG on it.

        Returns x, the Hessian times the step from start to x, and the number of products.
        """
        x, free, at_start = start, self.valid, gradient
        scale, products = 1.0, 0
        while products < _MODEL_STEPS:
            new, free = self._proximal(x, gradient, free, scale)
            h_step = self.product(new - x)
            products += 1
            if not torch.isfinite(h_step).all():  # activations too large to be squared
                break
            length = float(((new - x) * _times(self.blocks, new - x)).sum())
            if scale < 2 and float(((new - x) * h_step).sum()) > scale * length:
                scale = 2.0  # the metric was too short; twice the blocks bound the Hessian
                continue
            x, gradient = new, gradient + h_step
            if self._residual(x, gradient) <= goal:
                break
            x, gradient, used = self._on_face(x, gradient, goal)
            products += used
            if self._residual(x, gradient) <= goal:
                break
        return x, gradient - at_start, products

    def _residual(self, x: Tensor, gradient: Tensor) -> float:
        return float(_projected(x, gradient).where(self.valid, 0.0).abs().max())

    def _proximal(self, x, gradient, free, scale) -> tuple[Tensor, Tensor]:
        """Minimise the model with the blocks for a Hessian, within the bounds."""
        metric = scale * self.blocks
        linear = (gradient - _times(metric, x)).where(self.valid, 1.0)
        return _nonnegative_quadratic(metric, linear, free)

    def _on_face(self, x: Tensor, gradient: Tensor, goal: float) -> tuple[Tensor, Tensor, int]:
        """Minimise the model over the weights above zero, then come back within the bounds."""
        step, h_step, products = self._conjugate_gradients(gradient, x > 0, 0.5 * goal)
        if bool((x + step >= 0).all()):
            return x + step, gradient + h_step, products
        # up to the first bound the model falls; beyond it, bent at the bounds, mostly further
        size = float(torch.where(step < 0, -x / step, math.inf).amin())
        best, h_best = size * step, size * h_step
        lowest = _model_change(best, gradient, h_best)
        size = 1.0
        for _ in range(_BENT_STEPS):
            bent = (x + size * step).clamp_min(0) - x
            h_bent = self.product(bent)
            products += 1
            change = _model_change(bent, gradient, h_bent)
            if change < lowest:
                best, h_best, lowest = bent, h_bent, change
            size *= 0.4
        return (x + best).clamp_min(0), gradient + h_best, products

    def _preconditioner(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Invert the Hessian on a face, or its blocks where it is not written out."""
        if self.hessian is None:
            factor = _factor(self.blocks, mask)
            return lambda part: _solve(factor, part)
        hessian, flat = self.hessian, self.flat
        on = mask.flatten()[flat]
        factor = _factor(hessian[None], on[None])
        return lambda part: self._unflatten(_solve(factor, part.flatten()[None, flat])[0])

    def _conjugate_gradients(self, gradient, face, goal) -> tuple[Tensor, Tensor, int]:
        """Newton step on a face, and the Hessian times it."""
        mask = face.to(gradient)
        precondition = self._preconditioner(mask)
        rest = -gradient * mask
        step, h_step = torch.zeros_like(rest), torch.zeros_like(rest)
        conjugate, energy = torch.zeros_like(rest), 1.0
        for products in range(1, _CG_STEPS + 1):
            scaled = precondition(rest) * mask
            before, energy = energy, float((rest * scaled).sum())
            conjugate = scaled + (energy / before if products > 1 else 0.0) * conjugate
            h_conjugate = self.product(conjugate)
            curvature = float((conjugate * h_conjugate).sum())
            if curvature <= 0:  # flat to rounding: nothing left to gain
                break
            step = step + energy / curvature * conjugate
            h_step = h_step + energy / curvature * h_conjugate
            rest = rest - energy / curvature * h_conjugate * mask
            if float(rest.abs().max()) <= goal:
                break
        return step, h_step, products


def _model_change(step: Tensor, gradient: Tensor, h_step: Tensor) -> float:
    """Return what the model says that a step changes; `h_step` is the Hessian times it."""
    return float((step * (gradient + 0.5 * h_step)).sum())


def _times(blocks: Tensor, part: Tensor) -> Tensor:
    return (blocks @ part[:, :, None])[:, :, 0]  # (C, k)


def _nonnegative_quadratic(
    blocks: Tensor, linear: Tensor, free: Tensor, max_iter: int = 50
) -> tuple[Tensor, Tensor]:
    """Minimise linear . x + x . blocks x / 2 over x >= 0, per class, by block principal pivoting.

    Every variable on the wrong side changes sides at once; a class in which that stops helping
    changes only its last one, which cannot cycle.
    """
    n_classes, k = linear.shape
    fewest = torch.full((n_classes,), k + 1, device=linear.device)
    patience = torch.full_like(fewest, 3)
    place = torch.arange(k, device=linear.device)
    for _ in range(max_iter):
        mask = free.to(blocks)
        x = _solve(_factor(blocks, mask), -linear * mask) * mask
        gradient = linear + _times(blocks, x)
        wrong = torch.where(free, x < 0, gradient < -1e-12 * linear.abs())
        count = wrong.sum(1)
        if not count.any():
            break
        better = count < fewest
        fewest = torch.where(better, count, fewest)
        patience = torch.where(better, 3, patience - 1)
        last = torch.where(wrong, place, -1).amax(1, keepdim=True)  # (C, 1)
        free = free ^ (wrong & ((patience >= 0)[:, None] | (place == last)))
    return x.clamp_min(0), free


def _factor(blocks: Tensor, mask: Tensor) -> Tensor:
    """Cholesky factors of the blocks, with rows and columns outside the mask the identity's."""
    system = blocks * (mask[:, :, None] * mask[:, None, :])  # (C, k, k)
    peak = system.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)  # (C, 1)
    system += torch.diag_embed(1 - mask)
    factor, failed = torch.linalg.cholesky_ex(system)
    jitter = torch.finfo(system.dtype).eps
    for _ in range(8):
        if not failed.any():
            break
        jitter *= 100  # rounding made a singular block indefinite
        system += torch.diag_embed((failed > 0)[:, None] * jitter * peak * mask)
        factor, failed = torch.linalg.cholesky_ex(system)
    return factor


def _solve(factor: Tensor, target: Tensor) -> Tensor:
    return torch.cholesky_solve(target[:, :, None], factor)[:, :, 0]  # (C, k)


# ----------------------------------------------------------------------------------- checks


def _check_number(name: str, value: Any, least: float) -> None:
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number >= {least:g}, got {value!r}.")


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    # torch warns about arrays that it could not write to, such as joblib's memory maps
    array = np.require(values, requirements=["C", "W"])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _check_activations(activations: Any) -> Tensor:
    given = _tensor(activations)
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(
            "activations must have shape (n_samples, n_prototypes), both at least 1, got "
            f"{tuple(given.shape)}."
        )
    if not given.is_floating_point():
        given = given.to(torch.float64)
    bad = ~torch.isfinite(given)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"activations must be finite, got {float(given[row, column])} in row {row}, column "
            f"{column} ({int(bad.sum())} such entries)."
        )
    return given


def _check_indices(name: str, indices: Any, length: int, what: str) -> Tensor:
    indices = _tensor(indices)
    if indices.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), {what}, got {tuple(indices.shape)}.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer class indices, got dtype {indices.dtype}.")
    indices = indices.long()
    if int(indices.min()) < 0:
        raise ValueError(f"{name} must hold class indices >= 0, got {int(indices.min())}.")
    return indices


def _check_n_classes(n_classes: int | None, y: Tensor, owner: Tensor) -> int:
    least = 1 + max(int(y.max()), int(owner.max()))
    if n_classes is None:
        return least
    if n_classes < least:
        name, index = (
            ("y", int(y.max()))
            if int(y.max()) >= n_classes
            else ("prototype_class", int(owner.max()))
        )
        raise ValueError(f"{name} must be below n_classes={n_classes}, got class index {index}.")
    return int(n_classes)


def _check_sample_weight(weight: Any, length: int) -> Tensor:
    if weight is None:
        return torch.full((length,), 1.0 / length, dtype=torch.float64)
    weight = _tensor(weight).to("cpu", torch.float64)
    if weight.shape != (length,):
        raise ValueError(
            f"sample_weight must have shape ({length},), one per row of activations, got "
            f"{tuple(weight.shape)}."
        )
    if not torch.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("sample_weight must be finite and >= 0.")
    if not weight.any():
        raise ValueError("sample_weight must hold at least one weight above 0.")
    weight = weight / weight.max()  # their sum may overflow
    return weight / weight.sum()
