"""A fit over a frozen backbone against one pass of it, for few classes and for many.

A class is one picture, and its images are crops of it, mirrored or not, with noise: as many classes
as there are pictures, and no more to learn than which picture it is. Each fit is in a process of
its own, whose peak memory stands beside its time.

    python examples/benchmarks/many_classes.py --images photos/train --backbone efficientnet_lite0
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import resident_memory
from photos import photos, protopnet_on
from PIL import Image

from protoclf.datasets import load_folder


def main():
    args = arguments()
    if args.crops:
        print(json.dumps(fit_and_pass(args)))
        return
    rows = []
    for classes in args.classes:
        with tempfile.TemporaryDirectory() as folder:
            write_crops(args, classes, folder)
            command = [sys.executable, __file__, "--crops", folder]
            command += ["--backbone", args.backbone, "--image-size", str(args.image_size)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        rows.append(json.loads(output))
        print(rows[-1], flush=True)
    print(f"{args.backbone} at {args.image_size}, seconds and MB")
    print(pd.DataFrame(rows).round(2).to_string(index=False))


def write_crops(args, classes, folder):
    """Write images of `--image-size` pixels into one folder for each class."""
    paths, _ = photos(args.images, args.quick, n_per_class=25)
    rng = np.random.default_rng(0)
    size, larger = args.image_size, args.image_size * 4 // 3
    pictures = rng.permutation(paths)[:classes]
    if len(pictures) < classes:
        raise SystemExit(f"{classes} classes take as many pictures; there are {len(paths)}")
    for c, path in enumerate(pictures):
        (Path(folder) / f"{c:04}").mkdir()
        picture = np.asarray(Image.open(path).convert("RGB").resize((larger, larger)))
        for i in range(args.per_class):
            top, left = rng.integers(larger - size + 1, size=2)
            crop = picture[top : top + size, left : left + size][:, :: rng.choice([-1, 1])]
            noisy = (crop + rng.normal(0, 20, crop.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(Path(folder) / f"{c:04}" / f"{i}.jpg")


def fit_and_pass(args):
    paths, y = map(np.asarray, load_folder(args.crops))
    n_classes, per_class = len(np.unique(y)), np.unique(y, return_counts=True)[1].min()
    clf = protopnet_on(args.backbone, args.image_size, prototypes_per_class=min(10, per_class))
    few = slice(10 * per_class)
    clf.fit(paths[few], y[few])  # wakes the libraries
    fit, _ = timed(clf.fit, paths, y)
    memory = resident_memory("VmHWM")
    one_pass, _ = timed(clf.predict, paths)
    stages = {row["stage"]: row["dur"] for row in clf.history}
    return {
        **{"classes": n_classes, "images": len(y), "prototypes": clf.n_prototypes_},
        **{"pass": one_pass, "fit": fit, "fit / pass": fit / one_pass},
        "start": fit - one_pass - stages["projection"] - stages["last layer"],
        **{name: stages[name] for name in ("projection", "last layer")},
        "memory": memory,
    }


def timed(work, *arguments):
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="resnet34")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--per-class", type=int, default=30, help="images of each class")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    parser.add_argument("--crops", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.classes, args.per_class = "small_cnn", 32, [2, 3], 4
    return args


if __name__ == "__main__":
    main()
