"""The problem of the last layer: what its solver minimises, and the check of what it is given.

n images, m prototypes, C classes; V = |W| is what is solved for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclf.torch_settings import with_algebra

_SMALL = 2_000_000  # activations up to which single precision would save nothing
_COPIED = 2**24  # activations that are copied to another dtype at once


@dataclass
class Problem:
    """Cross-entropy and penalties as a function of V = |W|, with class-major (C, n) logits."""

    g: Tensor  # (n, m), as given
    g_model: Tensor  # (m, n), model dtype, a row per prototype so that gathering is copying
    onehot: Tensor  # (C, n), bool
    sign: Tensor  # (C, m), +1 own class, -1 other
    omega: Tensor  # (n,), sample weights that sum to 1
    lambda_l1: float
    lambda_l2: float
    out_dtype: torch.dtype

    @classmethod
    def build(cls, activations, y, prototype_class, penalties, weight, n_classes):
        """Check the input and bring it to one device and to the dtypes of the solver."""
        for name, value in penalties.items():
            check_number(name, value, 0.0)
        given = with_algebra(_check_activations(activations))
        n, m = given.shape
        device = given.device
        y = _check_indices("y", y, n, "one per row of activations").to(device)
        owner = _check_indices("prototype_class", prototype_class, m, "one per column").to(device)
        n_classes = _check_n_classes(n_classes, y, owner)
        omega = _check_sample_weight(weight, n)
        model = torch.float32 if n * m > _SMALL else torch.float64
        classes = torch.arange(n_classes, device=device)[:, None]  # (C, 1)
        return cls(
            g=given,
            g_model=given.to(model).T.contiguous(),
            onehot=classes == y,
            sign=torch.where(classes == owner, 1.0, -1.0).double(),
            omega=omega.to(device),
            **{name: float(value) for name, value in penalties.items()},
            out_dtype=torch.float64 if given.dtype == torch.float64 else torch.float32,
        )

    def start(self, warm_start) -> Tensor:
        """V to begin at: zero, or what of the warm start respects the signs."""
        if warm_start is None:
            return torch.zeros_like(self.sign)
        w = _as_tensor(warm_start)
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
        w, g = self.sign * v, self.g
        used = v.any(0).nonzero()[:, 0]
        if 2 * len(used) < len(v.T):
            w, g = w[:, used], g[:, used]
        logits = w.new_zeros(len(w), len(g))  # (C, n)
        for weights, activations in zip(self._parts(w), self._parts(g), strict=True):
            logits.addmm_(weights, activations.double().T)
        return logits

    def _parts(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Columns of some prototypes each, few enough to be copied to another dtype."""
        return columns.split(max(1, _COPIED // len(self.g)), dim=1)

    @property
    def ridge(self) -> float:
        """Weight of half the sum of squares."""
        return self.lambda_l2 / len(self.sign)

    def objective(self, logits: Tensor, v: Tensor, penalty: float) -> float:
        """Weighted mean cross-entropy + penalties, for V or the part of it that is not 0."""
        entropy = logits.logsumexp(0) - (logits * self.onehot).sum(0)  # (n,)
        value = entropy @ self.omega + penalty * v.sum()
        if self.ridge:  # 0 times squares that overflow would be NaN
            value = value + self.ridge / 2 * v.square().sum()
        return float(value)

    def smooth_gradient(self, probability: Tensor, v: Tensor, exact: bool) -> Tensor:
        """Gradient of all but the linear penalty with respect to V, or the model dtype's of it."""
        error = (probability - self.onehot.to(probability)) * self.omega  # (C, n)
        if exact:
            pull = torch.cat([error @ part.double() for part in self._parts(self.g)], 1)
        else:
            pull = (error.to(self.g_model) @ self.g_model.T).double()
        return (self.sign * pull).add_(v, alpha=self.ridge)  # (C, m)


def projected(v: Tensor, gradient: Tensor) -> Tensor:
    """Gradient without the components that push against the bound V >= 0."""
    return torch.where(v > 0, gradient, gradient.clamp_max(0))


def check_number(name: str, value: Any, least: float) -> None:
    """Raise ValueError for what is no finite number from `least` on."""
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number >= {least:g}, got {value!r}.")


def _as_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    # torch warns about arrays that it could not write to, such as joblib's memory maps
    array = np.require(values, requirements=["C", "W"])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _check_activations(activations: Any) -> Tensor:
    given = _as_tensor(activations)
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
    indices = _as_tensor(indices)
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
    weight = _as_tensor(weight).to("cpu", torch.float64)
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
