"""The quadratic model of the last layer's objective, and its minimum within bounds.

Each step of the proximal Newton method in `last_layer` minimises one. C classes, n images, m
prototypes; the working set holds up to k weights of a class, and F in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from protoclf.last_layer_problem import Problem, projected

_MODEL_STEPS = 150  # products with the Hessian in one quadratic model
_CG_STEPS = 50  # and between two proximal steps
_PIVOTS = 50  # exchanges of variables in one non-negative problem
_BENT_STEPS = 6  # lengths tried when a step crosses bounds
_EXPLICIT = 700  # weights up to which the Hessian is worth writing out
_LIFT = 1e-10  # of the mean diagonal, so that the whole Hessian can be factored
_DAMPING = 1e-4  # of a block's mean diagonal, so that collinear prototypes stay solvable
_GATHERED = 8  # copies of the activations that the working set may take, before all is multiplied
_MOST_GATHERED = 2**28  # numbers in these copies
_CHUNK = 2**25  # numbers in a temporary


class QuadraticModel:
    """Second-order model of the objective on a working set, padded to k weights per class.

    Parameters
    ----------
    problem : Problem
    probability : Tensor of shape (C, n)
        Of the classes, where the model is made.
    working : Tensor of shape (C, m), bool
        The working set.
    """

    def __init__(self, problem: Problem, probability: Tensor, working: Tensor) -> None:
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
        blocks = torch.cat(parts).double()
        blocks = blocks * (self.sign[:, :, None] * self.sign[:, None, :])
        blocks = blocks * (self.valid[:, :, None] & self.valid[:, None, :])
        blocks.diagonal(dim1=1, dim2=2).add_(self.problem.ridge * self.valid)
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
        full = torch.zeros_like(self.problem.sign, dtype=part.dtype)
        return full.scatter_(1, self.index, torch.where(self.valid, part, 0.0))  # (C, m)

    def forward(self, part: Tensor) -> Tensor:
        """Logits of weights on the working set."""
        part = part * self.sign.to(part)
        if self.gathered is None:
            return self.scatter(part) @ self.g  # (C, n)
        return (part[:, None, :] @ self.gathered)[:, 0]  # (C, n)

    def backward(self, error: Tensor) -> Tensor:
        """Transpose of forward."""
        if self.gathered is None:
            part = (error @ self.g.T).gather(1, self.index)  # (C, k)
        else:
            part = _times(self.gathered, error)  # (C, k)
        return part * (self.sign * self.valid).to(part)

    def product(self, part: Tensor) -> Tensor:
        """Hessian on the working set times a (C, k) matrix."""
        if self.hessian is not None:
            return self._unflatten(self.hessian @ part.flatten()[self.flat])
        weighted = self.forward(part.to(self.g)) * self.p  # (C, n)
        error = (weighted - self.p * weighted.sum(0)) * self.omega
        return self.backward(error).to(part) + self.problem.ridge * part  # (C, k)

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
        diagonal += _LIFT * diagonal.mean()
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
        return float(projected(x, gradient).where(self.valid, 0.0).abs().max())

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
    """Return each of C matrices (k, n) times its vector (n,), the way that CPUs are faster at."""
    return (part[:, None, :] @ blocks.transpose(1, 2))[:, 0]  # (C, k)


def _nonnegative_quadratic(blocks: Tensor, linear: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise linear . x + x . blocks x / 2 over x >= 0, per class, by block principal pivoting.

    Every variable on the wrong side changes sides at once; a class in which that stops helping
    changes only its last one, which cannot cycle.
    """
    n_classes, k = linear.shape
    fewest = torch.full((n_classes,), k + 1, device=linear.device)
    patience = torch.full_like(fewest, 3)
    place = torch.arange(k, device=linear.device)
    for _ in range(_PIVOTS):
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
