"""CUB-200-2011: birds with boxes and part locations.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", technical report CNS-TR-2011-001, 2011.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from protoclf.explanation import BOX
from protoclf.fine_grained.crops import write_crops
from protoclf.fine_grained.files import COLUMNS, found, looked_up, name_after, numbered, numbers
from protoclf.fine_grained.upright import Turns

_FILES = {
    "path": "images.txt",
    "class": "image_class_labels.txt",
    "split": "train_test_split.txt",
    "box": "bounding_boxes.txt",
}
_POINT = ["x", "y"]
_SPLITS = {"0": "test", "1": "train"}


def read_cub(
    root: str | os.PathLike[str], crop_to: str | os.PathLike[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return tables of CUB-200-2011: the images with the box of each bird, and its parts.

    Parameters
    ----------
    root : str or path
        The folder ``CUB_200_2011`` of the archive, or the one around it.
    crop_to : str or path, optional
        Write what the boxes show to this folder, and return the crops: the version of Chen et al.
        (2019). Crops that are there already are kept, so that an interrupted call goes on.

    Returns
    -------
    images : DataFrame
        One row an image:

        - path
        - class : name of the class, without its number and with spaces
        - split : "train" or "test"
        - x0, y0, x1, y1 : box of the bird, int64, half-open, in pixels of the photo, turned
          upright

    parts : DataFrame
        One row for each image and each of the 15 parts: path, class, part, the point x, y in
        the same pixels, and visible, False where the part is not to be seen. It is what
        `protoclf.metrics` takes.

    Raises
    ------
    FileNotFoundError
        If a file of the data set is missing.
    ValueError
        If a file cannot be read, or says nothing of an image; `ImageError` if a photo cannot.

    Examples
    --------
    >>> images, parts = read_cub("CUB_200_2011", crop_to="cub_cropped")  # doctest: +SKIP
    >>> train = images[images["split"] == "train"]  # doctest: +SKIP
    >>> clf.fit(train["path"], train["class"])  # doctest: +SKIP
    """
    folder = found(root, "images.txt", "CUB_200_2011/images.txt").parent
    table = _images(folder)
    parts = _parts(folder, table)
    row = table.index.get_indexer(parts.index)
    turns = Turns(table["path"].tolist())
    images = turns.table(table[COLUMNS].reset_index(drop=True))
    parts[_POINT] = turns.points(parts[_POINT].to_numpy(), row)
    if crop_to is not None:
        images, start = write_crops(images, folder / "images", crop_to)
        parts = _moved(parts, images, start, row)
    return images, parts.reset_index(drop=True)


def _images(root: Path) -> pd.DataFrame:
    """Return the table of images, by their numbers."""
    table = pd.DataFrame({name: numbered(found(root, file)) for name, file in _FILES.items()})
    for name, file in _FILES.items():
        bare = table.index[table[name].isna()]
        if len(bare):
            raise ValueError(f"'{root / file}' says nothing of image {bare[0]}.")
    classes = _class_names(found(root, "classes.txt"))
    table["path"] = [str(root / "images" / path) for path in table["path"]]
    table["class"] = looked_up(root / _FILES["class"], table["class"], classes)
    table["split"] = looked_up(root / _FILES["split"], table["split"], _SPLITS)
    table[BOX] = _boxes(root / _FILES["box"], table["box"])
    return table


def _class_names(file: Path) -> dict[str, str]:
    """Return the names of classes by their numbers, both as texts."""
    texts = numbered(file)
    return {str(i): name_after(".", file, f"class {i}", text) for i, text in texts.items()}


def _boxes(file: Path, texts: pd.Series) -> np.ndarray:
    """Return boxes (n, 4) of texts "x y width height"."""
    names = ("x", "y", "width", "height")
    rows = [numbers(file, f"image {i}", text.split(), names) for i, text in texts.items()]
    boxes = np.array(rows).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.round().astype(np.int64)


def _parts(root: Path, images: pd.DataFrame) -> pd.DataFrame:
    """Return the table of parts, by the numbers of their images."""
    names = pd.Series(numbered(found(root, "parts/parts.txt")))
    file = found(root, "parts/part_locs.txt")
    try:
        image, part, x, y, visible = np.loadtxt(file, ndmin=2).T
    except ValueError as error:
        raise ValueError(f"'{file}' is not as it should be: {error}.") from error
    for kind, number, known in (("image", image, images), ("part", part, names)):
        unknown = number[~np.isin(number, known.index)]
        if len(unknown):
            raise ValueError(f"'{file}' has an unknown {kind}, number {unknown[0]:g}.")
    return pd.DataFrame(
        {
            "path": images["path"].loc[image].to_numpy(),
            "class": images["class"].loc[image].to_numpy(),
            "part": names.loc[part].to_numpy(),
            "x": x,
            "y": y,
            "visible": visible == 1,
        },
        index=image.astype(int),
    )


def _moved(
    parts: pd.DataFrame, crops: pd.DataFrame, start: np.ndarray, row: np.ndarray
) -> pd.DataFrame:
    """Return parts in pixels of the crops; `row` is the crop of each."""
    xy = parts[_POINT].to_numpy() - start[row]
    inside = ((xy >= 0) & (xy < crops[["x1", "y1"]].to_numpy()[row])).all(1)
    path = crops["path"].to_numpy()[row]
    visible = parts["visible"] & inside
    return parts.assign(path=path, x=xy[:, 0], y=xy[:, 1], visible=visible)
