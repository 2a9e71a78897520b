"""The scoring sheets of many images as one HTML page (``pip install "protoclf[report]"``).

The page stands alone: pictures, styles and script are inside, and a content security policy keeps
it from loading anything else. Numbers and boxes are those of `ProtoPNetClassifier.explain`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from warnings import warn

import numpy as np
import pandas as pd
import PIL.Image
from numpy.typing import ArrayLike

from protoclf.decoding import check_files
from protoclf.explanation import BOX
from protoclf.files import file_to_write, replaced
from protoclf.fitted import check_classifier
from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.labels import read_labels
from protoclf.messages import installed_version
from protoclf.progress import with_bar
from protoclf.report_cards import Card, Truth, explained_cards
from protoclf.rules import ATTRIBUTION, COUNT, integer
from protoclf.thumbnails import Thumbnail, thumbnail_of
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from jinja2 import Environment

    from protoclf.classifier import ProtoPNetClassifier

_SOURCES = 200  # training images at the full thumbnail size; more of them share its pixels
_UNFOLDED = 40  # prototypes up to which the gallery starts unfolded


def write_report(
    clf: ProtoPNetClassifier,
    X: Any,
    y: ArrayLike | None = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    title: str = "This looks like that",
    top: int = 5,
    thumbnail: int = 320,
    attribution: str = "upsampled",
    metrics: pd.DataFrame | None = None,
) -> Path:
    """Write one HTML file with the scoring sheets of many images, for readers in a browser.

    The page begins with facts about the classifier. Then come its prototypes by class, and a card
    for each image: its sheets for the predicted class and for the rival, boxes over the picture,
    and the training images that the parts look like. Wrong predictions come first, then the least
    certain.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X : images
        As in `ProtoPNetClassifier.explain`.
    y : array-like of shape (n,), optional
        The true labels; by default those of a torch Dataset, if X is one. An image with a label
        that the classifier does not know counts as wrong.
    path : str or path, default="report.html"
        Where to write. An existing file is replaced only once the new page is complete.
    title : str, default="This looks like that"
        Heading of the page.
    top : int, default=5
        Rows of a sheet; the others are summed up in "(rest)".
    thumbnail : int, default=320
        Longer side of the pictures, in pixels. If there are more than 200 training images, their
        pictures are made smaller, so that together they take no more room than 200.
    attribution : {"upsampled", "gradient"}, default="upsampled"
        How boxes are found in the images: as in `ProtoPNetClassifier.explain`.
    metrics : DataFrame, optional
        The table of `protoclf.metrics.interpretability_report`, to show with the classifier.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ImageError
        If an image of X cannot be read. Training images may be missing: their patches are marked
        as not found, with one warning.
    ValueError
        If y has another length than X, or a parameter cannot be used.
    ImportError
        If Jinja2 is not installed.

    Examples
    --------
    >>> from protoclf import ProtoPNetClassifier
    >>> from protoclf.datasets import make_birds
    >>> from protoclf.report import write_report
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> paths, labels, _ = make_birds(folder, n_per_class=4, image_size=64)
    >>> clf = ProtoPNetClassifier("small_cnn", image_size=64, prototypes_per_class=2,
    ...                           joint_epochs=1, random_state=0, verbose=0).fit(paths, labels)
    >>> write_report(clf, paths[:3], labels[:3], folder + "/report.html").name
    'report.html'
    """
    environment = _environment()
    check_classifier(clf)
    COUNT.check(top=top)
    integer(16).check(thumbnail=thumbnail)
    ATTRIBUTION.check(attribution=attribution)
    target = file_to_write(path)
    measured = [] if metrics is None else _measured(metrics)
    X, y = unpacked(X, y)
    images = Images(X)
    y = None if y is None else read_labels(y, len(images))
    _warn_of_other_labels(clf, y)
    check_files(images, show=bool(clf.verbose))
    cards = explained_cards(clf, images, y, thumbnail, top=top, attribution=attribution)
    tiles = _tiles(clf)
    content = {
        "title": title,
        "facts": _facts(clf, cards),
        "settings": clf._settings,
        "metrics": measured,
        "sources": _sources(clf, thumbnail),
        "tiles": tiles,
        "gallery": _by_label(tiles),
        "groups": _groups(clf, cards),
        "cards": cards,
        "judged": y is not None,
        "unfolded": clf.n_prototypes_ <= _UNFOLDED,
    }
    page = _rendered(environment, content)
    with replaced(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def _warn_of_other_labels(clf: ProtoPNetClassifier, y: np.ndarray | None) -> None:
    if y is not None and not set(y.tolist()) & set(clf.classes_.tolist()):
        warn(
            f"No label of y is one of the classes, such as {clf.classes_.tolist()[0]!r}; the first "
            f"label is {y.tolist()[0]!r}. All predictions count as wrong.",
            stacklevel=3,
        )


def _sources(clf: ProtoPNetClassifier, thumbnail: int) -> dict[int, Thumbnail]:
    """Return the training images that prototypes are parts of, by index, where they are found."""
    firsts = clf.prototypes_.drop_duplicates("source_index")
    side = round(thumbnail * min(1.0, math.sqrt(_SOURCES / len(firsts))))
    pictures, missing = {}, []
    rows = zip(firsts["prototype"], firsts["source_index"], firsts["source"], strict=True)
    for prototype, index, name in with_bar(list(rows), "source images", clf.verbose):
        try:
            image = PIL.Image.fromarray(clf.source_image(prototype))
        except ImageError:
            missing.append(name)
            continue
        pictures[index] = thumbnail_of(image, side)
    if missing:
        warn(
            f"{len(missing)} training image(s) that prototypes are parts of cannot be read, such "
            f"as {missing[0]!r}; the report marks them as not found.",
            stacklevel=3,
        )
    return pictures


def _groups(clf: ProtoPNetClassifier, cards: list[Card]) -> dict[str, tuple[int, int]]:
    """Return the classes that images can be chosen by, each with its number and its images."""
    counts = Counter(label for card in cards for label in card.labels)
    known = [label for label in map(str, clf.classes_.tolist()) if label in counts]
    unknown = sorted(counts.keys() - set(known))
    return {label: (i, counts[label]) for i, label in enumerate(known + unknown)}


class Tile(NamedTuple):
    """One prototype of the gallery; `used` by any class."""

    prototype: int
    label: str
    source: str
    source_index: int
    box: tuple[int, ...]
    weight: float
    used: bool


def _tiles(clf: ProtoPNetClassifier) -> list[Tile]:
    used = (clf.coef_ != 0).any(0)
    tiles = []
    for row in clf.prototypes_.to_dict("records"):
        pixels = row["source"] == str(row["source_index"])
        tile = Tile(
            prototype=int(row["prototype"]),
            label=str(row["class"]),
            source=f"training image {row['source']}" if pixels else row["source"],
            source_index=int(row["source_index"]),
            box=tuple(int(row[name]) for name in BOX),
            weight=float(row["weight"]),
            used=bool(used[row["prototype"]]),
        )
        tiles.append(tile)
    return tiles


def _by_label(tiles: list[Tile]) -> dict[str, list[Tile]]:
    """Return the prototypes of each class, those of largest weight first."""
    gallery: dict[str, list[Tile]] = {tile.label: [] for tile in tiles}
    for tile in sorted(tiles, key=lambda tile: (not tile.used, -tile.weight)):
        gallery[tile.label].append(tile)
    return gallery


def _facts(clf: ProtoPNetClassifier, cards: list[Card]) -> dict[str, str]:
    """Return what the classifier is and how it did here, in words."""
    coef, table = clf.coef_, clf.prototypes_
    used = int((coef != 0).any(0).sum())
    rows = np.mean([card.predicted.n_used for card in cards])
    return {
        "Images in this report": str(len(cards)),
        **_judgement([card.truth for card in cards if card.truth is not None]),
        "Classes that it knows": str(len(clf.classes_)),
        "Prototypes": f"{len(table)}, parts of {table['source_index'].nunique()} training images; "
        f"{used} in use",
        "Weights other than 0": f"{np.count_nonzero(coef)} of {coef.size}",
        "Prototypes in a sheet": f"{rows:.1f} on average, for the predicted class",
        "Made": f"{datetime.date.today().isoformat()}, with protoclf {installed_version()}",
    }


def _judgement(truths: list[Truth]) -> dict[str, str]:
    if not truths:
        return {}
    right, unknown = sum(t.right for t in truths), sum(not t.known for t in truths)
    text = f"{right} of {len(truths)} ({_percent(right / len(truths))})"
    if unknown:
        text += f"; {unknown} of classes that it does not know, which count as wrong"
    return {"Right predictions": text}


class Measured(NamedTuple):
    """One line of the table of metrics, as text."""

    name: str
    value: str
    interval: str
    baseline: str
    better: str


def _measured(metrics: pd.DataFrame) -> list[Measured]:
    if not isinstance(metrics, pd.DataFrame):
        given = f"got {type(metrics).__name__}"
    else:
        missing = {"value", "low", "high", "baseline", "better"} - set(metrics)
        given = f"it lacks {sorted(missing)}" if missing else ""
    if given:
        raise ValueError(
            f"metrics must be the table of protoclf.metrics.interpretability_report; {given}."
        )
    lines = []
    for name, row in metrics.iterrows():
        value, low, high, baseline = (
            "" if pd.isna(row[column]) else _number(row[column])
            for column in ("value", "low", "high", "baseline")
        )
        interval = f"{low} to {high}" if low else ""
        lines.append(Measured(str(name), value, interval, baseline, row["better"]))
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 or value == int(value) else f"{value:.3g}"


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            'write_report needs Jinja2; install it: pip install "protoclf[report]"'
        ) from error
    environment = Environment(
        loader=PackageLoader("protoclf"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = _percent
    return environment


def _percent(probability: float) -> str:
    """Write a probability; only what is certain to float precision reads 0 or 100 %."""
    if 0.9995 <= probability < 1:
        return "over 99.9 %"
    if 0 < probability < 0.0005:
        return "under 0.1 %"
    return f"{100 * probability:.1f} %"


def _rendered(environment: Environment, content: dict[str, Any]) -> str:
    """Render the page; its policy lets the one script run that is named by its digest."""
    from markupsafe import Markup

    script = _text(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html").render(
        style=Markup(_text(environment, "report.css")),
        script=Markup(script),
        script_digest=digest,
        **content,
    )


def _text(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
