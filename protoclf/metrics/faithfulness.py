"""Whether the boxes of scoring sheets are where the evidence is: covering them, against chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from protoclf.explanation import BOX
from protoclf.localization import box_masks
from protoclf.metrics.masks import cover
from protoclf.metrics.streams import opened, sheet_of
from protoclf.progress import with_bar
from protoclf.rules import COUNT

DELETION_COLUMNS = [
    *("area", "similarity_drop", "control_similarity_drop", "logit_drop", "control_logit_drop")
]

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


def deletion_score(
    clf: ProtoPNetClassifier,
    X: Any,
    *,
    attribution: str = "upsampled",
    percentile: float = 95,
    top: int = 3,
    n_controls: int = 4,
    random_state: int = 0,
) -> pd.DataFrame:
    """Return how far similarity and logit fall when the boxes of the scoring sheets are covered.

    A box is faithful if covering it lowers the similarity of its prototype, and the logit, more
    than covering a region of the same size at a random place does.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in its `fit`.
    attribution, percentile
        How boxes are found: as in `ProtoPNetClassifier.explain`.
    top : int, default=3
        Number of boxes to cover for each image: those of the highest contributions to the predicted
        class. Of these, prototypes that do not have a weight above 0 are left out.
    n_controls : int, default=4
        Number of random places for each box.
    random_state : int, default=0

    Returns
    -------
    DataFrame
        One row for each covered box:

        - sample, path, class, prototype, similarity, weight, contribution : from the sheet
        - area : share of the model's input that the box covers
        - similarity_drop, control_similarity_drop : how far the prototype's similarity to the
          image falls when the box is covered, and on average over the random places
        - logit_drop, control_logit_drop : the same for the predicted class's logit

        The means of ``similarity_drop - control_similarity_drop`` and of ``logit_drop -
        control_logit_drop`` are the scores: above 0 is better than chance, in units of the
        similarity and of the logit.

    Notes
    -----
    Boxes are covered in the model's input, with the mean colour of the image. Random places can
    overlap the box, a large one more than a small one: that pulls its scores towards 0, which
    they are for a box that fills the input. Compare ways to find boxes at like areas.
    """
    COUNT.check(top=top, n_controls=n_controls)
    dataset = opened(clf, X)
    table = sheet_of(clf, X, top=top, attribution=attribution, percentile=percentile)
    table = table[table["prototype"].notna() & (table["weight"] > 0)].reset_index(drop=True)
    classes = {label: i for i, label in enumerate(clf.classes_.tolist())}
    drops = np.zeros((len(table), len(DELETION_COLUMNS)))
    for i, rows in with_bar(table.groupby("sample"), "covering", clf.verbose):
        image = dataset.__getitems__([i])[0]["images"][0]  # (3, S, S)
        boxes = clf.preprocessing_.to_input(rows[BOX].to_numpy(float), dataset.sizes([i]))
        boxes = boxes.round().astype(int).clip(0, clf.preprocessing_.image_size)
        c, prototypes = classes[rows["class"].iloc[0]], rows["prototype"].to_numpy(int)
        rng = np.random.default_rng((random_state, i))  # an image's, whatever the others are
        drops[rows.index] = _drops(clf, image, boxes, c, prototypes, n_controls, rng)
    about = ["sample", "path", "class", "prototype", "similarity", "weight", "contribution"]
    return table[about].assign(**dict(zip(DELETION_COLUMNS, drops.T, strict=True)))


def _drops(
    clf: ProtoPNetClassifier,
    image: Tensor,
    boxes: np.ndarray,
    c: int,
    prototypes: np.ndarray,
    n_controls: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the values of `DELETION_COLUMNS` (k, 5) for k boxes of one image and class c."""
    side, k = image.shape[1], len(boxes)
    all_boxes = np.concatenate([boxes[:, None], _elsewhere(boxes, side, n_controls, rng)], 1)
    masks = box_masks(torch.from_numpy(all_boxes.reshape(-1, 4)), side)
    logit, g = _scores(clf, torch.cat([image[None], cover(image, masks)]), c)
    logit_drop = logit[0] - logit[1:].reshape(k, -1)  # (k, 1 + n)
    g_drop = (g[0] - g[1:]).reshape(k, -1, g.shape[1])[np.arange(k), :, prototypes]  # (k, 1 + n)
    values = [(boxes[:, 2:] - boxes[:, :2]).prod(1) / side**2]
    for drop in (g_drop, logit_drop):
        values += [drop[:, 0], drop[:, 1:].mean(1)]
    return np.stack(values, axis=1)


def _elsewhere(boxes: np.ndarray, side: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return boxes (k, n, 4) of the same sizes as (k, 4), at random places inside the image."""
    size = (boxes[:, 2:] - boxes[:, :2])[:, None]  # (k, 1, 2)
    start = rng.integers(0, side - size + 1, (len(boxes), n, 2))
    return np.concatenate([start, start + size], axis=2)


@torch.no_grad()
def _scores(clf: ProtoPNetClassifier, images: Tensor, c: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of class c (k,) and the similarities (k, m) of images (k, 3, S, S)."""
    logits, similarities = [], []
    for batch in images.split(int(clf.batch_size)):
        out, distance, _ = clf.module_(batch.to(clf.device))
        logits.append(out[:, c].cpu())
        similarities.append(clf.module_.activations(distance).cpu())
    return torch.cat(logits).numpy(), torch.cat(similarities).numpy()
