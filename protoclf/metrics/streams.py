"""Images of a metric, batch by batch: as the classifier sees them, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.explanation import UNREADABLE
from protoclf.fitted import check_classifier
from protoclf.image_dataset import ImageDataset
from protoclf.image_errors import ImageError
from protoclf.images import Images, names_column
from protoclf.labels import encode, read_labels
from protoclf.messages import first_few
from protoclf.progress import with_bar
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def opened(clf: ProtoPNetClassifier, X: Any) -> ImageDataset:
    """Return the images of X as a fitted classifier reads them, and set it up to run."""
    check_classifier(clf)
    clf.prepare_processor()
    clf.module_.eval()
    return ImageDataset(Images(X), clf.preprocessing_)


def opened_with_labels(clf: ProtoPNetClassifier, X: Any, y: Any) -> tuple[ImageDataset, np.ndarray]:
    """Return the images of X, and their labels (n,) as indices into `classes_`."""
    X, y = unpacked(X, y)
    dataset = opened(clf, X)
    return dataset, codes_of(clf, y, len(dataset))


def sheet_of(clf: ProtoPNetClassifier, X: Any, **options: Any) -> pd.DataFrame:
    """Return the scoring sheet of images, all of which must be readable.

    Raises
    ------
    ImageError
        If one is not, whatever `on_bad_image` says: a mean over the others is no answer.
    """
    sheet = clf.explain(X, **options)
    unreadable = sheet.loc[sheet["source"] == UNREADABLE, "sample"].tolist()
    if unreadable:
        raise ImageError(
            f"{len(unreadable)} image(s) of X cannot be read, at the positions "
            f"{first_few(list(map(str, unreadable)))}. Leave them out of X, y and masks."
        )
    return sheet


def codes_of(clf: ProtoPNetClassifier, y: Any, n: int) -> np.ndarray:
    """Return the labels of n images as indices into `classes_`."""
    return encode(read_labels(y, n), clf.classes_)[1]


def image_batches(
    clf: ProtoPNetClassifier, dataset: ImageDataset, title: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield which images a batch holds, and the images (n, 3, S, S), uint8, on the device."""
    first, (batches, total) = 0, clf.batches_to_evaluate(dataset)
    for inputs, y in with_bar(batches, title, clf.verbose, total):
        yield slice(first, first + len(y)), inputs["images"].to(clf.device)
        first += len(y)


@torch.no_grad()
def latents_of(clf: ProtoPNetClassifier, images: Tensor) -> Tensor:
    """Return the latent maps z (n, D, H, W) of images (n, 3, S, S) in 0..255."""
    return clf.module_.latents(clf.module_.features(images.to(clf.device)))


def paths_of(dataset: ImageDataset) -> pd.Series:
    """Return the path of each image, or None for each where X holds pixels."""
    paths = dataset.images.paths
    return names_column([None] * len(dataset) if paths is None else paths)
