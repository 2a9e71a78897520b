"""Stanford Dogs.

Khosla et al., "Novel Dataset for Fine-Grained Image Categorization", FGVC 2011.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from protoclf.fine_grained.crops import write_crops
from protoclf.fine_grained.files import COLUMNS, found, name_after, variable
from protoclf.fine_grained.upright import upright


def read_dogs(
    root: str | os.PathLike[str], crop_to: str | os.PathLike[str] | None = None
) -> pd.DataFrame:
    """Return a table of the images of Stanford Dogs, with the box around the dogs.

    Parameters
    ----------
    root : str or path
        Folder that holds ``Images/``, ``Annotation/``, ``train_list.mat`` and ``test_list.mat``;
        the lists may lie in ``lists/``.
    crop_to : str or path, optional
        Write what the boxes show to this folder, and return the crops. Crops that are there
        already are kept, so that an interrupted call goes on.

    Returns
    -------
    DataFrame
        One row an image: path, class, split ("train" or "test"), and the box around all its dogs
        x0, y0, x1, y1, int64, half-open, in pixels of the photo, turned upright.

    Raises
    ------
    FileNotFoundError
        If a file of the data set is missing.
    ValueError
        If a file cannot be read; `ImageError` if it is a photo.
    """
    pictures = found(root, "Images", "images/Images", "images")
    annotations = found(root, "Annotation", "annotations/Annotation", "annotation")
    rows: list[tuple] = []
    for split in ("train", "test"):
        file = found(root, f"{split}_list.mat", f"lists/{split}_list.mat")
        for name in map(Path, variable(file, "file_list")):
            breed = name_after("-", file, f"image '{name}'", name.parent.name)  # WordNet's number
            box = _box(found(annotations, str(name.with_suffix(""))))
            rows.append((str(pictures / name), breed, split, *box))
    images = upright(pd.DataFrame(rows, columns=COLUMNS))
    return images if crop_to is None else write_crops(images, pictures, crop_to)[0]


def _box(file: Path) -> tuple[int, ...]:
    """Return the box around all dogs of an annotation, which is XML."""
    try:
        dogs = [
            [int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(file).iter("bndbox")
        ]
        boxes = np.array(dogs).reshape(-1, 4)
        return (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"'{file}' is no annotation with boxes: {error}.") from error
