"""Small changes of images that a person hardly sees: noise, and what JPEG leaves."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from protoclf.parameters import normalization

UNIT = 255 * torch.tensor(normalization("imagenet")[1]).view(3, 1, 1)
"""Grey levels of a unit of change, by channel: ImageNet's standard deviations, as published.

The same for every classifier, whatever the normalisation of its input.
"""


def with_noise(images: Tensor, first: int, noise: float, clip: float, seed: int) -> Tensor:
    """Add normal noise to images (n, 3, S, S) in 0..255, the same to an image in every batch.

    Parameters
    ----------
    images : Tensor of shape (n, 3, S, S)
    first : int
        Position of the first of them among all images.
    noise, clip : float
        Standard deviation and largest absolute value of the noise, in `UNIT`.
    seed : int

    Returns
    -------
    Tensor of shape (n, 3, S, S), float32
        It may go beyond 0..255.
    """
    rngs = [np.random.default_rng((seed, first + i)) for i in range(len(images))]
    shape = tuple(images.shape[1:])
    draws = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
    change = torch.from_numpy(draws).mul_(noise).clamp_(-clip, clip).to(images.device)
    return images + change * UNIT.to(images.device)


def as_jpeg(images: Tensor, quality: int) -> Tensor:
    """Return images (n, 3, S, S), uint8, as they come out of JPEG files of that quality."""
    return torch.stack([_compressed(image, quality) for image in images.cpu()]).to(images.device)


def _compressed(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (S, S, 3)
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
    with PIL.Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)  # (3, S, S)
