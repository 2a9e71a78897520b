"""Which pixels made a match: the gradient of a similarity, followed back through the network.

SmoothGrad (Smilkov et al., 2017): gradients at several noisy copies of an image, averaged; here
without their signs, which the paper keeps. For prototypes, Xu-Darme et al., "Sanity checks for
patch visualisation in prototype-based image classification" (CVPR workshops, 2023), found such maps
more faithful than upsampled ones.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from protoclf.explanation import BOX
from protoclf.image_dataset import ImageDataset
from protoclf.net import SkorchProtoPNet
from protoclf.network import ProtoPNet
from protoclf.progress import with_bar
from protoclf.torch_settings import without_autocast

_COPIES = 8
_NOISE = 0.1  # standard deviation, of the range of pixels
_BLUR = 0.5  # standard deviation, in cells


def gradient_maps(module: ProtoPNet, image: Tensor, prototypes: Tensor) -> Tensor:
    """Return how much each pixel of an image moves its similarity to prototypes.

    Parameters
    ----------
    module : ProtoPNet
        In evaluation mode.
    image : Tensor of shape (3, S, S), uint8
    prototypes : Tensor of shape (k,), int64

    Returns
    -------
    Tensor of shape (k, S, S), float32
        The absolute gradient of the similarity of the winning patch, summed over channels and
        averaged over noisy copies of the image, the same copies in every call.
    """
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(_COPIES, *image.shape, generator=draws, device="cpu").to(image.device)
    pixels = (image + 255 * _NOISE * noise).requires_grad_()
    with torch.no_grad():
        clean = module.similarity_maps(module.latents(module.features(image[None])), prototypes)
        cell = clean[0].flatten(1).argmax(1)  # (k,)
    with without_autocast(image.device), torch.enable_grad():
        z = module.latents(module.features(pixels))
        maps = module.similarity_maps(z, prototypes).flatten(2)  # (copies, k, cells)
        scores = maps.sum(0).gather(1, cell[:, None])[:, 0]  # (k,)
        gradients = (torch.autograd.grad(s, pixels, retain_graph=True)[0] for s in scores)
        return torch.stack([g.abs().sum(1).mean(0) for g in gradients]).float()


def gradient_boxes(
    net: SkorchProtoPNet, dataset: ImageDataset, sheet: pd.DataFrame, percentile: float
) -> pd.DataFrame:
    """Return the boxes of a sheet's rows by `gradient_maps`, in pixels of the originals."""
    boxes = sheet[BOX].copy()
    rows_of_samples = sheet[sheet["prototype"].notna()].groupby("sample")
    for i, rows in with_bar(rows_of_samples, "gradients", net.verbose):
        found, which = np.unique(rows["prototype"].to_numpy(np.int64), return_inverse=True)
        pixels = image_boxes(net, dataset, i, found, percentile)
        boxes.loc[rows.index] = pixels[which].astype(boxes.to_numpy().dtype)
    return boxes


def image_boxes(
    net: SkorchProtoPNet, dataset: ImageDataset, i: int, prototypes: np.ndarray, percentile: float
) -> np.ndarray:
    """Return the boxes (k, 4) of prototypes in image i, in its pixels."""
    on_input = input_boxes(net, dataset, i, prototypes, percentile)
    return dataset.preprocessing.to_original_pixels(on_input, dataset.sizes([i] * len(on_input)))


def input_boxes(
    net: SkorchProtoPNet, dataset: ImageDataset, i: int, prototypes: np.ndarray, percentile: float
) -> np.ndarray:
    """Return the boxes (k, 4) of prototypes in image i, in pixels of the model input.

    The maps are blurred by half a cell; a box encloses the pixels of at least this percentile
    that hang together with the highest one.
    """
    image = dataset.__getitems__([i])[0]["images"][0].to(net.device)
    index = torch.from_numpy(prototypes).to(net.device)
    maps = gradient_maps(net.module_.eval(), image, index).cpu().numpy()
    blur = _BLUR * np.array(net.geometry_.stride)
    return np.array([salient_box(m, blur, percentile) for m in maps])


def salient_box(attribution: np.ndarray, blur: float | np.ndarray, percentile: float) -> list[int]:
    """Return the half-open box (x0, y0, x1, y1) around the highest region of a map (S, S).

    The map is blurred first, by a Gaussian of this standard deviation in pixels, or of those down
    and right. The region is what hangs together with the highest pixel and is at least this
    percentile.
    """
    smooth = ndimage.gaussian_filter(attribution, blur)
    high = smooth >= np.percentile(smooth, percentile)
    if high.all():  # most of the map is at its lowest
        high = smooth > smooth.min()
    regions, _ = ndimage.label(high)
    region = regions == regions[np.unravel_index(smooth.argmax(), smooth.shape)]
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
