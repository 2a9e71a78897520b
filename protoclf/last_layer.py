"""The last layer: a sparse, sign-constrained softmax regression, solved to a certified optimum.

Stage 3 of ProtoPNet (Chen et al., 2019, section 2.2), with bounds: with the activations g of all
prototypes fixed, minimise over W the mean cross-entropy of the logits G W^T plus lambda_l1 *
sum |W| + lambda_l2 / 2 * sum W^2 / C for C classes, where a prototype may only speak for its own
class (W_cj >= 0) and against the others (W_cj <= 0). The paper has no bounds and no squared penalty
(that of the elastic net, Zou and Hastie, 2005), and penalises the weights to other classes alone.

With V = |W| >= 0 the penalties are linear and square, so what is left is smooth, convex, and
bounded below. It is solved by a proximal Newton method (Lee, Sun and Saunders, 2014) on a small
working set of weights:

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
H. Zou, T. Hastie. Regularization and variable selection via the elastic net. Journal of the Royal
Statistical Society B 67(2), 2005.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from protoclf.last_layer_problem import Problem, check_number, projected
from protoclf.quadratic_model import QuadraticModel

_ONE_THREAD = 200_000  # activations up to which a second thread does not pay
_GROWTH = 4  # weights per class that may enter in one iteration, or as many as there are
_PATIENCE = 10  # iterations without progress: rounding allows no more


@dataclass(frozen=True)
class LastLayerResult:
    """A solved last layer and the proof of how well it is solved.

    Attributes
    ----------
    weight : ndarray or Tensor of shape (n_classes, n_prototypes)
        W, of the same kind as the activations and on the same device.
    objective : float
        Mean cross-entropy and both penalties, at ``weight``.
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
    lambda_l1, lambda_l2 : float
        The penalties that it was solved for.
    """

    weight: Any
    objective: float
    residual: float
    n_iter: int
    converged: bool
    n_evaluations: int
    n_products: int
    lambda_l1: float
    lambda_l2: float


def solve_last_layer(
    activations: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    prototype_class: np.ndarray | Tensor,
    lambda_l1: float,
    sample_weight: np.ndarray | Tensor | None = None,
    tol: float = 1e-6,
    *,
    lambda_l2: float = 0.0,
    n_classes: int | None = None,
    warm_start: np.ndarray | Tensor | None = None,
    max_iter: int = 200,
) -> LastLayerResult:
    """Find the last layer that minimises cross-entropy and two penalties under sign bounds.

    Parameters
    ----------
    activations : ndarray or Tensor of shape (n_samples, n_prototypes)
        g, how strongly each prototype is present in each image. A tensor is worked on where it is,
        unless that is one of Apple's GPUs, which have no float64.
    y : array of shape (n_samples,)
        Class index of each image.
    prototype_class : array of shape (n_prototypes,)
        Class index of each prototype: W is >= 0 there and <= 0 in all other classes.
    lambda_l1 : float
        Weight of sum |W|, >= 0. Where both penalties are 0 and the data is separable, no minimum
        exists; the solver then stops where the residual falls below ``tol``.
    sample_weight : array of shape (n_samples,), optional
        Weights >= 0; a weight of 2 is the same as the image twice.
    tol : float, default=1e-6
        Residual at which to stop.
    lambda_l2 : float, default=0
        Weight of half the mean over classes of the sum of squared weights, >= 0. It shares a
        weight among prototypes that are alike, where `lambda_l1` alone picks one of them.
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
    check_number("tol", tol, 0.0)
    if not isinstance(max_iter, Integral) or max_iter < 0:
        raise ValueError(f"max_iter must be an int >= 0, got {max_iter!r}.")
    penalties = {"lambda_l1": lambda_l1, "lambda_l2": lambda_l2}
    problem = Problem.build(activations, y, prototype_class, penalties, sample_weight, n_classes)
    with _threads_for(problem):
        result = _minimise(problem, problem.start(warm_start), float(tol), max_iter)
    if not result.converged:
        stalled = result.n_iter < max_iter
        warnings.warn(
            f"last layer not solved to tol={tol:g}: residual {result.residual:.3g} after "
            f"{result.n_iter} iterations{', which make it no smaller' if stalled else ''}. Raise "
            f"{'tol' if stalled else 'max_iter or tol'}"
            + (", or use a penalty > 0." if lambda_l1 == lambda_l2 == 0 else "."),
            ConvergenceWarning,
            stacklevel=2,
        )
    if isinstance(activations, Tensor):
        return replace(result, weight=result.weight.to(activations.device))
    return replace(result, weight=result.weight.numpy())


def last_layer_path(
    activations: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    prototype_class: np.ndarray | Tensor,
    lambdas: Iterable[float],
    **options: Any,
) -> list[LastLayerResult]:
    """Solve the last layer for several values of lambda_l1, each started from the one before.

    Parameters
    ----------
    activations, y, prototype_class
        As in :func:`solve_last_layer`.
    lambdas : iterable of float
        Values of lambda_l1. They are solved from the largest to the smallest, as solutions grow.
    **options
        Passed on to :func:`solve_last_layer`; `lambda_l2` is the same for all of them.

    Returns
    -------
    list of LastLayerResult
        One for each value, the largest first.
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


@contextmanager
def _threads_for(problem: Problem) -> Iterator[None]:
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


def _minimise(problem: Problem, v: Tensor, tol: float, max_iter: int) -> LastLayerResult:
    """Proximal Newton steps on working sets until the projected gradient is within tol."""
    n_products = 0
    best_residual, best_objective, stalled = math.inf, 1e300, 0  # not inf: inf - inf is NaN
    penalty = problem.lambda_l1 if v.any() else math.inf
    exact = problem.g_model.dtype == torch.float64
    for n_iter in range(max_iter + 1):
        logits = problem.logits(v)
        probability = logits.softmax(0)
        smooth_gradient = problem.smooth_gradient(probability, v, exact)
        residual = _residual(v, smooth_gradient + problem.lambda_l1)
        if not exact and (not tol < residual < math.inf or stalled == _PATIENCE - 1):
            exact = True  # for what is certified, or where a rough gradient leads no further
            smooth_gradient = problem.smooth_gradient(probability, v, exact)
            residual = _residual(v, smooth_gradient + problem.lambda_l1)
        objective = problem.objective(logits, v, problem.lambda_l1)
        better = objective < best_objective - 1e-9 * abs(best_objective)
        stalled = 0 if better or residual < best_residual else stalled + 1
        best_residual, best_objective = min(best_residual, residual), min(best_objective, objective)
        if residual <= tol or n_iter == max_iter or stalled == _PATIENCE:
            break
        if n_iter == 0 and v.any() and not objective < math.log(len(v)):
            v, penalty = torch.zeros_like(v), math.inf  # which is better than that warm start
            best_residual, best_objective = math.inf, 1e300
            continue
        penalty = _next_penalty(problem, v, smooth_gradient, penalty, tol)
        gradient = smooth_gradient + penalty
        model = QuadraticModel(problem, probability, _working_set(problem, v, gradient, tol))
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
        lambda_l2=problem.lambda_l2,
    )


def _next_penalty(problem, v, smooth_gradient, penalty, tol) -> float:
    """Lower the penalty in stages: far from the optimum Newton steps would be cut to nothing."""
    if penalty == math.inf:
        penalty = float((-smooth_gradient).max()) / 3  # at three times that V = 0 is the optimum
    while penalty > problem.lambda_l1:
        # what is within tol is solved: weights that pull less may never enter the working set
        if _residual(v, smooth_gradient + penalty) > max(0.7 * penalty, tol):
            break
        penalty = penalty / 4 if penalty > tol else 0.0
    return max(penalty, problem.lambda_l1)


def _residual(v: Tensor, gradient: Tensor) -> float:
    return float(projected(v, gradient).abs().max())


def _working_set(problem: Problem, v: Tensor, gradient: Tensor, tol: float) -> Tensor:
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
    start = model.gather(v, 0.0)  # all of V that is not 0
    before = problem.objective(logits, start, penalty)
    size = 1.0
    while size > 1e-10:
        after = problem.objective(logits + size * change, start + size * step, penalty)
        if after <= before + 1e-4 * size * derivative + 1e-15 * abs(before):
            return size
        size /= 2
    return 0.0
