"""What the boxes of annotated photos show, written as pictures of their own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image

from protoclf.decoding import in_threads
from protoclf.explanation import BOX
from protoclf.files import replaced
from protoclf.images import Images


def write_crops(
    images: pd.DataFrame, root: Path, folder: str | os.PathLike[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Write the part of each image that its box shows to a folder, as JPEG.

    Return the table with the paths of the crops and boxes that cover them, and the pixel x, y of
    each original, upright, at which its crop begins, (n, 2). What follows `root` in the path of an
    image names its crop.

    A crop that is there already, in the right size, is kept: what was interrupted goes on. Each
    file is written whole or not at all.
    """
    target = Path(folder)
    if target.resolve() == root.resolve():
        raise ValueError(f"crop_to must be another folder than that of the images, '{root}'.")
    paths = [target / Path(path).relative_to(root) for path in images["path"]]
    for parent in sorted({path.parent for path in paths}):
        parent.mkdir(parents=True, exist_ok=True)
    read = Images(images["path"].tolist())
    wanted = images[BOX].to_numpy(np.int64)
    boxes = np.zeros_like(wanted)

    def work(i: int) -> None:
        width, height = read.size(i)
        boxes[i] = wanted[i].clip(0, [width, height, width, height])
        x0, y0, x1, y1 = boxes[i].tolist()
        if x0 >= x1 or y0 >= y1:
            raise ValueError(
                f"The box {tuple(wanted[i].tolist())} of '{images['path'].iloc[i]}' shows nothing "
                f"of its {width} x {height} pixels."
            )
        if not _is_picture(paths[i], (x1 - x0, y1 - y0)):
            _save(read.open(i).crop((x0, y0, x1, y1)), paths[i])

    in_threads(work, len(paths), "cropping", show=True)
    size = boxes[:, 2:] - boxes[:, :2]
    whole = dict(zip(BOX, np.hstack([np.zeros_like(size), size]).T, strict=True))
    return images.assign(path=[str(path) for path in paths], **whole), boxes[:, :2]


def _is_picture(path: Path, size: tuple[int, int]) -> bool:
    try:
        with PIL.Image.open(path) as image:
            return image.size == size
    except OSError:
        return False


def _save(image: PIL.Image.Image, path: Path) -> None:
    with replaced(path) as temporary:
        image.save(temporary, format="JPEG", quality=95, subsampling=0)
