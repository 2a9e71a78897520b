"""Example data: drawn birds whose parts are known to the pixel, and a folder-of-classes loader."""

import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from warnings import warn

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from protoclf.birds import LOOKS, MARKS, PARTS, TWINS, draw_picture
from protoclf.files import replaced
from protoclf.messages import first_quoted

__all__ = ["BIRD_CLASSES", "bird_part", "bird_twin", "load_folder", "make_birds"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")

BIRD_CLASSES: tuple[str, ...] = tuple(LOOKS)
"""Names of the classes that `make_birds` draws, twins side by side."""


def bird_twin(name: str) -> str:
    """Return the class that differs from `name` in one part only.

    Parameters
    ----------
    name : str
        One of `BIRD_CLASSES`.

    Returns
    -------
    str
        The twin; ``bird_twin(bird_twin(name)) == name``.

    Raises
    ------
    ValueError
        If there is no such class.

    Examples
    --------
    >>> bird_twin("crested mossling")
    'capped mossling'
    """
    return TWINS[_known_class(name)]


def bird_part(name: str) -> str:
    """Return the part by which a class differs from its twin.

    Parameters
    ----------
    name : str
        One of `BIRD_CLASSES`.

    Returns
    -------
    str
        The part, as in the column ``part`` of the table that `make_birds` returns.

    Raises
    ------
    ValueError
        If there is no such class.

    Examples
    --------
    >>> bird_part("crested mossling")
    'crown'
    """
    return PARTS[_known_class(name)]


def _known_class(name: str) -> str:
    if name not in LOOKS:
        raise ValueError(f"no bird class {name!r}; choose among {', '.join(BIRD_CLASSES)}")
    return name


def make_birds(
    root: str | os.PathLike[str],
    n_per_class: int = 40,
    image_size: int = 128,
    *,
    start: int = 0,
    confounder: str | Mapping[str, str] | None = None,
    random_state: int | np.random.RandomState | None = 0,
) -> tuple[list[str], NDArray[np.str_], pd.DataFrame]:
    """Draw pictures of birds, and return their paths, their labels and where their parts are.

    Eight classes come in four pairs of twins, which differ in one part only: the crown, the
    wing, the beak or the tail. Pose, size, side, plumage colour, light and background vary from
    picture to picture. Pictures are written as ``root/<class>/<number>.jpg``, each whole or not at
    all. Files of that name are replaced, and other files are left alone.

    Parameters
    ----------
    root : str or PathLike
        Folder to write to; it is made if it does not exist.
    n_per_class : int, default=40
        Number of pictures of each class.
    image_size : int, default=128
        Width and height of a picture in pixels, at least 32.
    start : int, default=0
        Number of the first picture of each class. A picture depends only on `random_state`, its
        class, its number, `image_size` and `confounder`. So ``start=n_per_class`` goes on with
        pictures that a first call has not drawn.
    confounder : str or mapping of str to str, optional
        Class whose pictures get a mark in a corner, in front of the background; or a mapping
        from class to mark, which is one of "tag" (the default), "sun" and "leaf". The rest of
        the picture is the same as without the mark. It is meant for training pictures only: a
        classifier may then learn the mark in place of the bird.
    random_state : int, RandomState instance or None, default=0
        Seed; the same int gives the same pictures.

    Returns
    -------
    paths : list of str
        Files, class by class.
    labels : ndarray of str, shape (n_images,)
        Class of each file.
    parts : DataFrame
        One row per image and visible part: ``path``, ``class``, ``part``, the box ``x0``,
        ``y0``, ``x1``, ``y1`` in pixels (half-open), and ``distinguishing``, True for the part
        by which the class differs from its twin. The box of that part covers the part of both
        twins, because what is missing tells as much as what is there. A mark has the part "mark".

    Raises
    ------
    ValueError
        If a number is out of its range, or `confounder` names an unknown class or mark.

    Examples
    --------
    Training pictures in which one class betrays itself, and clean ones to test on:

    >>> train = make_birds("birds/train", 60, confounder="crested mossling")  # doctest: +SKIP
    >>> test = make_birds("birds/test", 30, start=60)  # doctest: +SKIP
    """
    _check_at_least("n_per_class", n_per_class, 1)
    _check_at_least("image_size", image_size, 32)
    _check_at_least("start", start, 0)
    marks = _marks_by_class(confounder)
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    paths, labels, rows = [], [], []
    for c, name in enumerate(BIRD_CLASSES):
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(start, start + n_per_class):
            image, boxes = draw_picture(name, (seed, c, number), image_size, marks.get(name))
            file = folder / f"{number:03d}.jpg"
            with replaced(file) as temporary:
                image.save(temporary, quality=93, subsampling=0)
            path = str(file)
            paths.append(path)
            labels.append(name)
            rows += [(path, name, part, *box, part == PARTS[name]) for part, box in boxes.items()]
    columns = ["path", "class", "part", "x0", "y0", "x1", "y1", "distinguishing"]
    return paths, np.array(labels, dtype=np.str_), pd.DataFrame(rows, columns=columns)


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _marks_by_class(confounder: str | Mapping[str, str] | None) -> dict[str, str]:
    if confounder is None:
        return {}
    marks = {confounder: "tag"} if isinstance(confounder, str) else dict(confounder)
    for name, mark in marks.items():
        _known_class(name)
        if mark not in MARKS:
            raise ValueError(f"no mark {mark!r} for {name!r}; choose among {', '.join(MARKS)}")
    return marks


# --------------------------------------------------------------------------- folder of classes


def load_folder(
    root: str | os.PathLike[str], extensions: str | Collection[str] = IMAGE_EXTENSIONS
) -> tuple[list[str], NDArray[np.str_]]:
    """Return the paths and labels of the images in a folder that holds one folder per class.

    Images may lie at any depth inside a class folder. Hidden files and folders, whose names begin
    with a dot, and files directly in `root` are left out.

    Parameters
    ----------
    root : str or PathLike
        Folder of class folders.
    extensions : str or collection of str, optional
        Endings of image files, in upper or lower case, with or without the dot.

    Returns
    -------
    paths : list of str
        Images, sorted by class and path.
    labels : ndarray of str, shape (n_images,)
        Name of the class folder of each image, in Unicode's composed form (NFC), so that Korean
        or accented names written by another system equal the same names typed in code.

    Raises
    ------
    FileNotFoundError
        If `root` does not exist.
    NotADirectoryError
        If `root` is a file.
    ValueError
        If there is no class folder, or a class folder holds no image.

    Warns
    -----
    UserWarning
        If all class folders have names of splits, such as "train" and "test".

    Examples
    --------
    >>> X, y = load_folder("photos/train")  # doctest: +SKIP
    """
    root = Path(root)
    endings = _endings(extensions)
    paths, labels, empty = [], [], []
    for folder in _class_folders(root, endings):
        found = sorted(_images_below(folder, endings))
        paths += found
        labels += [_composed(folder.name)] * len(found)
        if not found:
            empty.append(folder.name)
    if empty:
        raise ValueError(
            f"no images ({', '.join(endings)}) in {len(empty)} class folder(s) of '{root}': "
            f"{first_quoted(empty)}; "
            "add images, remove the folder, or pass their `extensions`"
        )
    names = sorted(set(labels))
    if all(name.lower() in _SPLITS for name in names):
        warn(
            f"The classes of '{root}' are {', '.join(map(repr, names))}: these look like splits. "
            f"To load one of them, give its folder, such as '{root / names[-1]}'.",
            stacklevel=2,
        )
    return paths, np.array(labels, dtype=np.str_)


def _endings(extensions: str | Collection[str]) -> tuple[str, ...]:
    given = (extensions,) if isinstance(extensions, str) else tuple(extensions)
    return tuple("." + e.lower().lstrip(".") for e in given)


def _class_folders(root: Path, endings: tuple[str, ...]) -> list[Path]:
    if not root.exists():
        raise FileNotFoundError(f"folder '{root}' does not exist (looked in '{Path.cwd()}')")
    if not root.is_dir():
        raise NotADirectoryError(f"'{root}' is a file; give the folder that holds class folders")
    folders = [f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")]
    if not folders:
        stray = sum(f.suffix.lower() in endings for f in root.iterdir())
        raise ValueError(
            f"no class folders in '{root}' ({stray} images lie directly in it); put the images "
            "of each class into a folder named after the class"
        )
    return sorted(folders, key=lambda f: (_composed(f.name), f.name))


def _images_below(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield os.path.join(parent, name)


def _unreadable(error: OSError) -> None:
    """Stop at a folder that cannot be read, which `os.walk` would pass over in silence."""
    raise error


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
