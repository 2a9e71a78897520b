"""What the last layer is solved for: activations of images, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from protoclf.last_layer import LastLayerResult, last_layer_path

_FEW_CLASSES = 10  # that penalties were chosen for


def share_of_many(n_classes: int) -> float:
    """Return 1 for up to ten classes, and ten over their number for more.

    The images of a class are about so much less of all. The gradient of the mean cross-entropy by
    a weight is a mean over all images too, so that the same penalty on sum |W| weighs more.
    """
    return min(1.0, _FEW_CLASSES / n_classes)


def tolerance(penalties: Sequence[float], n_classes: int) -> float:
    """Return the residual that a last layer is solved to: 1e-6 for up to ten classes.

    For more it is lower where penalties are weak, as far as their gradients are: beside a residual
    that nears the penalty, weights that are due stay 0.
    """
    return float(np.clip(0.01 * min(penalties), 1e-6 * share_of_many(n_classes), 1e-6))


class Activations:
    """What the last layer is solved for.

    Parameters
    ----------
    g : Tensor of shape (N, m)
    y : Tensor of shape (N,), int64
        Class indices.
    owner : Tensor of shape (m,), int64
        The class of each prototype.
    n_classes : int
    weight : Tensor of shape (N,) or None
        Sample weights.
    views : Tensor of shape (V, N, m) or None
        Of random transforms of the same images.
    """

    def __init__(
        self,
        g: Tensor,
        y: Tensor,
        owner: Tensor,
        n_classes: int,
        weight: Tensor | None = None,
        views: Tensor | None = None,
    ) -> None:
        self.g, self.y, self.owner, self.n_classes, self.weight = g, y, owner, n_classes, weight
        self.views = g.new_empty(0, *g.shape) if views is None else views

    def changed(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """Return the same with changed activations (N, m), of the images and of each view."""
        views = [change(view) for view in self.views]
        return self._with(g=change(self.g), views=torch.stack(views) if views else None)

    def of_prototypes(self, index: Tensor) -> Activations:
        """Return the activations of some prototypes."""
        columns = index.to(self.g.device)
        owner = self.owner[index.to(self.owner.device)]
        return self._with(g=self.g[:, columns], owner=owner, views=self.views[..., columns])

    def cpu(self) -> Activations:
        """Return the activations in main memory."""
        return self._with(**{k: v.cpu() for k, v in vars(self).items() if isinstance(v, Tensor)})

    def take(self, index: np.ndarray) -> Activations:
        """Return the activations of some images."""
        rows = torch.from_numpy(index).to(self.g.device)
        weight = None if self.weight is None else self.weight[rows.to(self.weight.device)]
        return self._with(g=self.g[rows], y=self.y[rows], weight=weight, views=self.views[:, rows])

    def _with(self, **others: Tensor | None) -> Activations:
        return Activations(**{**vars(self), **others})

    def solve(
        self, penalties: Sequence[float], tol: float | None = None, lambda_l2: float = 0.0
    ) -> list[LastLayerResult]:
        """Solve for each lambda_l1, the largest first, on images and views alike.

        To a residual of `tol`, by default that of `tolerance`.
        """
        times = 1 + len(self.views)
        return last_layer_path(
            torch.cat([self.g, *self.views]),
            self.y.repeat(times),
            *(self.owner, penalties),
            sample_weight=None if self.weight is None else self.weight.repeat(times),
            n_classes=self.n_classes,
            lambda_l2=lambda_l2,
            tol=tolerance(penalties, self.n_classes) if tol is None else tol,
        )

    def scores(self, weight: Tensor) -> tuple[float, float]:
        """Return accuracy and mean cross-entropy of a last layer on the images, weighted."""
        logits = self.g @ weight.to(self.g).T  # (N, C)
        entropy = torch.nn.functional.cross_entropy(logits, self.y, reduction="none")
        right = (logits.argmax(1) == self.y).to(entropy)
        share = torch.ones_like(entropy) if self.weight is None else self.weight.to(entropy)
        share = share / share.sum()
        return float(right @ share), float(entropy @ share)
