"""Make a set to train and to test on from folders of pictures, such as packages of clip art.

    apt install openclipart-png tuxpaint-stamps-default
    python examples/benchmarks/picture_set.py --pictures /usr/share/openclipart/png --output clipart
    python examples/benchmarks/accuracy.py --train clipart/train --test clipart/test

A class is a folder, with what lies deeper than --depth. Of pictures that look alike all but one are
left out, and so are files that cannot be read, and classes of fewer than --least. A third of each
class is to test on.
"""

import argparse
import atexit
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from photos import photos

from protoclf.image_errors import ImageError
from protoclf.images import Images

SIDE = 256  # pixels, at most
ALIKE = 20  # bits of 256 that differ, at most


def main():
    args = arguments()
    classes = pictures_by_class(args)
    for name, pictures in classes.items():
        for i, picture in enumerate(pictures):
            folder = args.output / ("test" if i % 3 == 2 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i:03}.png")
    print(f"{len(classes)} classes, {sum(map(len, classes.values()))} pictures in {args.output}")


def pictures_by_class(args):
    """Return lists of pictures by name of class, drawn at random."""
    files = sorted(path for path in args.pictures.rglob("*") if path.is_file())
    found, hashes = defaultdict(list), np.zeros((0, 256), dtype=bool)
    for path in np.random.default_rng(0).permutation(np.array(files, dtype=object)):
        try:
            picture = Images([str(path)]).open(0)
        except ImageError:
            continue
        picture.thumbnail((SIDE, SIDE))
        bits = difference_hash(picture)
        if (hashes != bits).sum(1).min(initial=256) > ALIKE:
            hashes = np.vstack([hashes, bits])
            folders = path.relative_to(args.pictures).parts[:-1]
            found["-".join(folders[: args.depth])].append(picture)
    return {
        name: pictures[: args.most]
        for name, pictures in sorted(found.items())
        if name and len(pictures) >= args.least
    }


def difference_hash(picture):
    """Return 256 bits that pictures which look alike have in common: where it gets brighter."""
    grey = np.asarray(picture.convert("L").resize((17, 16))).astype(int)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="folder of folders of pictures")
    parser.add_argument("--output", type=Path, help="where to write the folders train and test")
    parser.add_argument("--depth", type=int, default=3, help="folders, one in another, of a class")
    parser.add_argument("--least", type=int, default=13, help="pictures of a class")
    parser.add_argument("--most", type=int, default=36, help="pictures of a class")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.pictures = Path(photos(None, quick=True)[0][0]).parents[1]
        args.output, args.least = Path(tempfile.mkdtemp(prefix="picture-set-")), 4
        atexit.register(shutil.rmtree, args.output, ignore_errors=True)
    elif args.pictures is None or args.output is None:
        parser.error("--pictures and --output are needed")
    elif args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: pictures of another set would stay in it")
    return args


if __name__ == "__main__":
    main()
