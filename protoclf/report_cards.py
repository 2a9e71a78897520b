"""The cards of a report: what the scoring sheets of one image say, ready for the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from protoclf.explanation import BOX, SOURCE_BOX
from protoclf.images import Images
from protoclf.logits import probabilities, ranking
from protoclf.progress import with_bar
from protoclf.thumbnails import Thumbnail, thumbnail_of

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

_TAG = 0.075  # side of a box's number, as a share of the picture's longer side


class Row(NamedTuple):
    """One line of a sheet; `mark` names its box, `tag` is where that is written, in percent."""

    mark: str
    tag: tuple[float, float]
    box: tuple[int, ...]
    prototype: int
    prototype_class: str
    source_index: int
    source_box: tuple[int, ...]
    similarity: float
    weight: float
    contribution: float

    @property
    def likeness(self) -> str:
        """Return what the similarity says in words."""
        return "is unlike" if self.similarity < 0 else "looks like"


@dataclass
class Sheet:
    """What speaks for one class; `rest` is what the `n_rest` prototypes left out contribute."""

    label: str
    logit: float
    probability: float
    rows: list[Row]
    rest: float | None
    n_used: int

    @property
    def n_rest(self) -> int:
        """Return the number of prototypes in the rest."""
        return self.n_used - len(self.rows)


@dataclass
class Card:
    """One image of X; `region` is the part that the model sees, None for all of it."""

    sample: int
    path: str | None
    picture: Thumbnail
    region: tuple[float, ...] | None
    predicted: Sheet
    rival: Sheet
    truth: Truth | None

    @property
    def name(self) -> str:
        """Return the file's name, or the position in X."""
        return f"Image {self.sample}" if self.path is None else os.path.basename(self.path)

    @property
    def wrong(self) -> bool:
        """Return whether the prediction is known to be wrong."""
        return self.truth is not None and not self.truth.right

    @property
    def labels(self) -> list[str]:
        """Return the classes under which the card is found."""
        truth = [] if self.truth is None else [self.truth.label]
        return list(dict.fromkeys([self.predicted.label, *truth]))

    @property
    def first(self) -> Row | None:
        """Return the line that is lit to begin with."""
        return next(iter(self.predicted.rows + self.rival.rows), None)

    @property
    def largest(self) -> float:
        """Return the largest absolute contribution, whose bar is full."""
        sheets = (self.predicted, self.rival)
        values = [row.contribution for sheet in sheets for row in sheet.rows]
        values += [sheet.rest for sheet in sheets if sheet.rest is not None]
        return max(map(abs, values), default=0.0) or 1.0


class Truth(NamedTuple):
    """The true label, and whether the classifier knows it and predicted it."""

    label: str
    known: bool
    right: bool


def explained_cards(
    clf: ProtoPNetClassifier, images: Images, y: np.ndarray | None, side: int, **how: Any
) -> list[Card]:
    """Return the cards, wrong predictions first, then the least certain.

    `side` is that of the thumbnails in pixels, and `how` goes to `explain`.
    """
    cards: list[Card] = []
    size = max(1, clf.batch_size)
    starts = range(0, len(images), size)
    for start in with_bar(starts, "batches of images", clf.verbose):
        batch = range(start, min(start + size, len(images)))
        for card in _explained(clf, images.take(batch), side, how):
            if y is not None:
                card.truth = _truth(clf, y[[card.sample]].tolist()[0], card)
            cards.append(card)
    return sorted(cards, key=lambda card: (not card.wrong, card.predicted.probability))


def _explained(
    clf: ProtoPNetClassifier, images: Images, side: int, how: dict[str, Any]
) -> Iterator[Card]:
    """Yield the cards of one batch."""
    opened, pictures = [], []
    for i in range(len(images)):
        image = images.open(i)
        pictures.append(thumbnail_of(image, side))
        if images.paths is None:
            opened.append(image)
    X = opened if images.paths is None else images.paths
    sheet = clf.explain(X, classes="top2", **how)
    rows_of = dict(list(sheet.groupby("sample")))
    for i, picture in enumerate(pictures):
        rows = rows_of.get(i, sheet[:0])
        predicted, rival = _two_sheets(clf, X[i : i + 1], rows, picture)
        yield Card(
            sample=int(images.positions[i]),
            path=None if images.paths is None else images.paths[i],
            picture=picture,
            region=_region(clf, picture),
            predicted=predicted,
            rival=rival,
            truth=None,
        )


def _region(clf: ProtoPNetClassifier, picture: Thumbnail) -> tuple[float, ...] | None:
    region = tuple(clf.shown_region([(picture.width, picture.height)])[0].tolist())
    return None if region == (0, 0, picture.width, picture.height) else region


def _truth(clf: ProtoPNetClassifier, label: Any, card: Card) -> Truth:
    classes = clf.classes_.tolist()
    if label not in classes:
        return Truth(str(label), known=False, right=False)
    known = str(classes[classes.index(label)])  # 1, where y says 1.0
    return Truth(known, known=True, right=known == card.predicted.label)


def _two_sheets(
    clf: ProtoPNetClassifier, X: list, rows: pd.DataFrame, picture: Thumbnail
) -> list[Sheet]:
    """Return the sheets of the predicted class and of its rival."""
    groups = dict(list(rows.groupby("class", sort=False)))
    if len(groups) == 2 and rows["is_predicted"].iloc[0]:
        probability = {label: group["probability"].iloc[0] for label, group in groups.items()}
    else:  # a class without weights has no rows
        logits = clf._logits(X)  # (1, C); probabilities may all be 0 but one
        best = ranking(logits[0], np.isin(clf.classes_, rows["class"].unique()))[:2]
        found = probabilities(logits)[0, best]
        probability = dict(zip(clf.classes_[best].tolist(), found, strict=True))
    return [
        _sheet(clf, label, float(p), groups.get(label, rows[:0]), picture, prefix)
        for (label, p), prefix in zip(probability.items(), ("", "R"), strict=True)
    ]


def _sheet(
    clf: ProtoPNetClassifier,
    label: Any,
    probability: float,
    rows: pd.DataFrame,
    picture: Thumbnail,
    prefix: str,
) -> Sheet:
    is_rest = rows["prototype"].isna()
    rest = rows.loc[is_rest, "contribution"]
    code = clf.classes_.tolist().index(label)
    return Sheet(
        label=str(label),
        logit=float(rows["logit"].iloc[0]) if len(rows) else 0.0,
        probability=probability,
        rows=_rows(rows[~is_rest], picture, prefix),
        rest=float(rest.iloc[0]) if len(rest) else None,
        n_used=int(np.count_nonzero(clf.coef_[code])),
    )


def _rows(rows: pd.DataFrame, picture: Thumbnail, prefix: str) -> list[Row]:
    boxes = [tuple(map(int, box)) for box in rows[BOX].to_numpy()]
    tags = _tags(boxes, picture)
    return [
        Row(
            mark=f"{prefix}{k}",
            tag=tag,
            box=box,
            prototype=int(row["prototype"]),
            prototype_class=str(row["prototype_class"]),
            source_index=int(row["source_index"]),
            source_box=tuple(int(row[side]) for side in SOURCE_BOX),
            similarity=float(row["similarity"]),
            weight=float(row["weight"]),
            contribution=float(row["contribution"]),
        )
        for k, (row, box, tag) in enumerate(
            zip(rows.to_dict("records"), boxes, tags, strict=True), 1
        )
    ]


def _tags(boxes: list[tuple[int, ...]], picture: Thumbnail) -> list[tuple[float, float]]:
    """Return where to write the number of each box: a corner that no other number has taken."""
    width, height = picture.width, picture.height
    side = _TAG * max(width, height)
    taken: list[tuple[float, float]] = []
    for x0, y0, x1, y1 in boxes:
        corners = [(x0, y0), (x1 - side, y0), (x0, y1 - side), (x1 - side, y1 - side)]
        beside = [(x0 + k * side, y0) for k in range(1, len(boxes) + 1)]
        places = [
            (min(max(x, 0), max(width - side, 0)), min(max(y, 0), max(height - side, 0)))
            for x, y in corners + beside
        ]
        free = [place for place in places if not any(_overlap(place, t, side) for t in taken)]
        taken.append((free or places)[0])
    return [(100 * x / width, 100 * y / height) for x, y in taken]


def _overlap(a: tuple[float, float], b: tuple[float, float], side: float) -> bool:
    return abs(a[0] - b[0]) < side and abs(a[1] - b[1]) < side
