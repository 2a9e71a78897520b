"""A ProtoPNet made by hand, whose prototypes find colours: 8 x 8 cells of 4 x 4 pixels."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from protoclf import ProtoPNetClassifier

SIDE, CELL = 32, 4
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}
GREY = (128, 128, 128)


class Pooled(nn.Module):
    """The mean colour of each cell; `reorder` may move cells elsewhere."""

    def __init__(self, reorder=None):
        super().__init__()
        self.pool, self.reorder = nn.AvgPool2d(CELL), reorder

    def forward(self, x):
        z = self.pool(x)
        return z if self.reorder is None else self.reorder(z)


def picture(spots, background=GREY):
    """Return pixels (32, 32, 3) with cells {(row, col): colour}."""
    pixels = np.full((SIDE, SIDE, 3), background, np.uint8)
    for (row, col), colour in spots.items():
        pixels[CELL * row : CELL * row + CELL, CELL * col : CELL * col + CELL] = colour
    return pixels


def colour_model(backbone=None, colours=None, owner=(0, 1), weight=None, **settings):
    """Return a classifier of "blue" and "red" with these prototypes and this last layer.

    `colours` are those of the prototypes, in 0..255, `owner` their classes; each weighs 1 for its
    class unless `weight` (2, m) says otherwise. Similarity is "log" of squared distances of colours
    in -1..1.
    """
    rng = np.random.default_rng(0)
    places = rng.integers(0, 8, (8, 2)).tolist()
    X = np.stack([picture({(r, c): COLOURS[k]}) for r, c in places for k in COLOURS])
    defaults = {
        "image_size": SIDE,
        "normalization": ([0.5] * 3, [0.5] * 3),
        "train_backbone": False,
        "prototypes_per_class": len(owner) // 2,
        "similarity": "log",
        "discriminant_weight": 0.0,
        "prototype_init": "random",
        "distinct": "patches",
        "batch_size": 3,
        "random_state": 0,
        "verbose": 0,
    }
    clf = ProtoPNetClassifier(backbone or Pooled(), **(defaults | settings))
    clf.fit(X, list(COLOURS) * 8)
    colours = list(COLOURS.values()) if colours is None else colours
    prototypes = torch.tensor(colours).float() / 127.5 - 1
    owner = torch.tensor(owner)
    weight = owner == torch.arange(2)[:, None] if weight is None else torch.tensor(weight)
    clf.replace_prototypes(prototypes[:, :, None, None], owner, weight.float())
    return clf


def parts_at(*places, **columns):
    """Return labels of parts: for image i {part: (row, col)}, in the middle of the cell."""
    rows = [
        {"sample": i, "part": part, "x": CELL * col + 2, "y": CELL * row + 2}
        for i, of_image in enumerate(places)
        for part, (row, col) in of_image.items()
    ]
    return pd.DataFrame(rows).assign(**columns)
