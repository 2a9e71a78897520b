"""Stanford Cars, in the three forms that it goes about in.

Krause et al., "3D Object Representations for Fine-Grained Categorization", 3dRR 2013.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from protoclf.fine_grained.crops import write_crops
from protoclf.fine_grained.files import COLUMNS, found, lines, numbers, unexpected, variable
from protoclf.fine_grained.upright import upright

_DEVKIT = ("devkit", "car_devkit/devkit")
_TEST = "cars_test_annos_withlabels.mat"  # the devkit's own cars_test_annos.mat has no classes
_NUMBERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")


def read_cars(
    root: str | os.PathLike[str], crop_to: str | os.PathLike[str] | None = None
) -> pd.DataFrame:
    """Return a table of the images of Stanford Cars, with the box of each car.

    Parameters
    ----------
    root : str or path
        A folder that holds either of

        - ``cars_train/``, ``cars_test/``, ``devkit/`` and ``cars_test_annos_withlabels.mat``, the
          last in ``devkit/`` or beside it
        - ``car_ims/`` and ``cars_annos.mat``
        - ``car_data/train/<class>/``, ``car_data/test/<class>/``, ``anno_train.csv`` and
          ``anno_test.csv``

    crop_to : str or path, optional
        Write what the boxes show to this folder, and return the crops. Crops that are there
        already are kept, so that an interrupted call goes on.

    Returns
    -------
    DataFrame
        One row an image: path, class, split ("train" or "test"), and the box of the car x0, y0,
        x1, y1, int64, half-open, in pixels of the photo, turned upright.

    Raises
    ------
    FileNotFoundError
        If a file of the data set is missing.
    ValueError
        If a file cannot be read, or says nothing of an image; `ImageError` if a photo cannot.
    """
    root = Path(root)
    if (root / "cars_annos.mat").exists():
        images = _in_one_folder(root)
    elif (root / "anno_train.csv").exists():
        images = _in_class_folders(root)
    else:
        images = _with_devkit(root)
    images = upright(images)
    return images if crop_to is None else write_crops(images, root, crop_to)[0]


def _with_devkit(root: Path) -> pd.DataFrame:
    files = {
        "train": found(root, *(f"{folder}/cars_train_annos.mat" for folder in _DEVKIT)),
        "test": found(root, _TEST, *(f"{folder}/{_TEST}" for folder in _DEVKIT)),
    }
    names = variable(found(root, *(f"{d}/cars_meta.mat" for d in _DEVKIT)), "class_names")
    rows: list[tuple] = []
    for split, file in files.items():
        folder = found(root, f"cars_{split}/cars_{split}", f"cars_{split}")
        for car in variable(file, "annotations", "fname", *_NUMBERS):
            rows.append(_row(file, car, folder / car["fname"], split, names))
    return pd.DataFrame(rows, columns=COLUMNS)


def _in_one_folder(root: Path) -> pd.DataFrame:
    file = root / "cars_annos.mat"
    names = variable(file, "class_names")
    rows: list[tuple] = []
    for car in variable(file, "annotations", "relative_im_path", "test", *_NUMBERS):
        split = "test" if car["test"] else "train"
        rows.append(_row(file, car, root / car["relative_im_path"], split, names))
    return pd.DataFrame(rows, columns=COLUMNS)


def _in_class_folders(root: Path) -> pd.DataFrame:
    """Split and file name tell an image; the folder is its class."""
    rows: list[tuple] = []
    for split in ("train", "test"):
        folder = found(root, f"car_data/car_data/{split}", f"car_data/{split}", split)
        file = found(root, f"anno_{split}.csv")
        boxes = _boxes_by_name(file)
        paths = [path for path in sorted(folder.glob("*/*")) if path.suffix.lower() == ".jpg"]
        for path in paths:
            if path.name.lower() not in boxes:
                raise ValueError(f"'{file}' says nothing of '{path}'.")
            rows.append((str(path), path.parent.name, split, *boxes[path.name.lower()]))
        missing = boxes.keys() - {path.name.lower() for path in paths}
        if missing:
            raise FileNotFoundError(
                f"'{file}' names '{min(missing)}', which is in no class folder of '{folder}' "
                f"({len(missing)} of {len(boxes)} missing). Unpack the images again."
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _boxes_by_name(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the boxes of a table of images, by their names in lower case."""
    boxes: dict[str, tuple[int, ...]] = {}
    table = csv.reader(lines(file))
    for name, *values in filter(None, table):
        where = f"line {table.line_num}"
        if name.lower() in boxes:
            raise unexpected(file, where, "an image that is new", name)
        boxes[name.lower()] = _box(numbers(file, where, values, _NUMBERS))
    return boxes


def _row(file: Path, car: Any, path: Path, split: str, names: np.ndarray) -> tuple:
    where = f"image '{path}'"
    values = numbers(file, where, [car[name] for name in _NUMBERS], _NUMBERS)
    number = int(values[-1])
    if not 1 <= number <= len(names):
        raise unexpected(file, where, f"a class from 1 to {len(names)}", number)
    return str(path), str(names[number - 1]), split, *_box(values)


def _box(values: Sequence[float]) -> tuple[int, ...]:
    """Return a half-open box: Matlab counts pixels from 1, and the last one belongs to the car."""
    x1, y1, x2, y2 = map(int, values[:4])
    return x1 - 1, y1 - 1, x2, y2
