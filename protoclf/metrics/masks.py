"""Masks of the model input, and what covering it by them leaves of an image."""

from __future__ import annotations

import torch
from torch import Tensor


def cover(image: Tensor, masks: Tensor) -> Tensor:
    """Return copies (k, 3, S, S) of an image (3, S, S), each with a mask in its mean colour.

    `masks` (k, S, S) are bool.
    """
    mean = image.float().mean((1, 2)).round().to(image.dtype)  # (3,)
    return torch.where(masks[:, None], mean[:, None, None], image)


def box_masks(boxes: Tensor, side: int) -> Tensor:
    """Return bool masks (k, S, S) of half-open boxes (k, 4), x0, y0, x1, y1 in pixels."""
    at = torch.arange(side, device=boxes.device)
    x0, y0, x1, y1 = boxes.T[..., None]  # (k, 1) each
    columns, rows = (at >= x0) & (at < x1), (at >= y0) & (at < y1)  # (k, S)
    return rows[:, :, None] & columns[:, None, :]
