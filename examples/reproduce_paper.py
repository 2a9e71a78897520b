"""The table of the paper, a row a command: accuracy of ProtoPNets on CUB-200-2011, cropped.

    python examples/reproduce_paper.py --root CUB_200_2011 --backbone resnet34 --seed 0
    python examples/reproduce_paper.py --root CUB_200_2011 --backbone resnet34 --settings default
    python examples/reproduce_paper.py --root CUB_200_2011 --backbone vgg19+resnet34+densenet121
    python examples/reproduce_paper.py --table     # of all rows that are there
    python examples/reproduce_paper.py --quick     # tiny rows on drawn birds, in seconds

Each row is written to the folder results (or --output) as JSON, beside its model, and is skipped
once it is there; so are the members of an ensemble. One that was interrupted goes on from its last
epoch, or with the scoring if its model is there. Table 1 of Chen et al., NeurIPS 2019, has the
figures to compare with.

A tenth of each class's training images is held out. Of the cycles of joint training, projection and
last layer, the one that is best on them is delivered; the test images are scored once.
"""

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skorch.callbacks import Checkpoint
from skorch.dataset import ValidSplit
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

from protoclf import ProtoPNetClassifier, ProtoPNetEnsemble
from protoclf.datasets import make_birds
from protoclf.fine_grained import read_cars, read_cub, read_dogs

BACKBONES = ("vgg16", "vgg19", "resnet34", "resnet152", "densenet121", "densenet161")
ENSEMBLE = "vgg19+resnet34+densenet121"
PAPER = {  # Chen et al., table 1, for "cub": accuracy of ProtoPNet and of its baseline, in percent
    "vgg16": ("76.1 ± 0.2", "74.6 ± 0.2"),
    "vgg19": ("78.0 ± 0.2", "75.1 ± 0.4"),
    "resnet34": ("79.2 ± 0.1", "82.3 ± 0.3"),
    "resnet152": ("78.0 ± 0.3", "81.5 ± 0.4"),
    "densenet121": ("80.2 ± 0.2", "80.5 ± 0.1"),
    "densenet161": ("80.1 ± 0.3", "82.2 ± 0.2"),
    ENSEMBLE: ("84.8", ""),
}
SETTINGS = ("paper", "default")
NOT_RUN = "–"


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        images = read_images(args)
        for backbone in args.backbone.split("+"):
            row(args, backbone, images, fitted)
        if "+" in args.backbone:
            row(args, args.backbone, images, combined)
    print(table(args.output, args.data))


def row(args, backbone, images, make) -> None:
    """Write one row, unless it is there."""
    folder = args.output / f"{args.data}-{args.settings}-{backbone}-seed{args.seed}"
    file = folder.with_suffix(".json")
    if file.exists():
        print(f"{file} is there already")
        return
    start = time.perf_counter()
    model, about = make(args, backbone, images, folder)
    test = images[images["split"] == "test"]
    result = {
        **{name: vars(args)[name] for name in ("data", "settings", "seed")},
        "backbone": backbone,
        "accuracy": float(model.score(test["path"], test["class"])),
        "test_images": len(test),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **about,
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2))
    os.replace(temporary, file)
    print(f"{file}: accuracy {result['accuracy']:.4f}")


# Models -------------------------------------------------------------------------------------------


def fitted(args, backbone, images, folder):
    """Return a classifier, which a folder holds then or already, and what is to be said of it."""
    train = images[images["split"] == "train"]
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    if folder.exists():
        print(f"{folder} is there, and is not fitted again", flush=True)
        clf = ProtoPNetClassifier.load(folder)
    else:
        clf = classifier(args, backbone, unfinished).fit(train["path"], train["class"])
        with warnings.catch_warnings():  # files hold no callbacks, transforms and loaders
            warnings.filterwarnings("ignore", "Not saved")
            clf.save(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    cycles = accuracies_of_cycles(clf)[: clf.cycles]
    about = {
        "train_images": len(train),
        "validation_accuracy": float(max(cycles)),
        "cycle": int(np.argmax(cycles)) + 1,
        "passes": args.passes,
    }
    return clf, about


def classifier(args, backbone, folder):
    """Return an unfitted classifier, with a folder for its state and its best cycle's weights."""
    best = Checkpoint(
        monitor=is_best_cycle,
        load_best=True,
        dirname=folder,
        f_optimizer=None,
        f_criterion=None,
        f_history=None,
    )
    parameters = {
        "weights": weights_of(args.weights, backbone),
        "resize": "squash",
        "random_state": args.seed,
        "checkpoint": folder,
        "train_split": ValidSplit(args.validation, stratified=True, random_state=args.seed),
        "callbacks": [("best", best)],
        "iterator_train": Passes(args.passes),
        "iterator_train__num_workers": args.workers,
        **args.parameters,
    }
    if args.settings == "default":
        return ProtoPNetClassifier(backbone, **parameters)
    return ProtoPNetClassifier.paper(
        backbone=backbone, augmentation=paper_augmentation, **parameters
    )


def is_best_cycle(net) -> bool:
    """Tell whether a cycle has just ended, and better than all before."""
    *before, now = [-1.0, *accuracies_of_cycles(net)]
    return net.history[-1, "stage"] == "last layer" and now > max(before)


def accuracies_of_cycles(net) -> list[float]:
    """Return the accuracy on the images held out at the end of each cycle."""
    return [step["valid_acc"] for step in net.history if step["stage"] == "last layer"]


def paper_augmentation(image):
    """Rotate, skew or shear an image at random, and flip it or not: as the authors' code does.

    There 30 such pictures replace each training image before the training, and an epoch passes
    them all; here each of 30 passes draws anew.
    """
    return _AUGMENTATION(image)


_AUGMENTATION = v2.Compose(
    [
        v2.RandomChoice(
            [v2.RandomRotation(15), v2.RandomPerspective(0.2, p=1), v2.RandomAffine(0, shear=10)]
        ),
        v2.RandomHorizontalFlip(),
    ]
)


def weights_of(weights, backbone):
    """Return what `weights=` is for a backbone: of a folder, the file of its name."""
    if weights is None or not Path(weights).is_dir():
        return weights
    return Path(weights) / f"{backbone}.pth"


class Passes:
    """Makes loaders whose epoch passes the images several times, each time in another order."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __call__(self, dataset, shuffle, **parameters) -> DataLoader:
        """Return the loader of a data set."""
        sampler = RandomSampler(dataset, num_samples=self.passes * len(dataset))
        return DataLoader(dataset, sampler=sampler if shuffle else None, **parameters)


def combined(args, names, images, folder):
    """Return the ensemble of classifiers that were saved, and what is to be said of it."""
    members = {
        name: ProtoPNetClassifier.load(folder.with_name(folder.name.replace(names, name)))
        for name in names.split("+")
    }
    ensemble = ProtoPNetEnsemble.of_fitted(list(members.items()), verbose=0)
    return ensemble, {"members": list(members)}


# Data ---------------------------------------------------------------------------------------------


def read_images(args) -> pd.DataFrame:
    """Return a table of path, class and split; photos are cropped to their boxes."""
    crops = args.output / f"{args.data}-cropped"
    if args.data == "birds":
        tables = []
        for split, n, start in (("train", 10, 0), ("test", 5, 10)):
            paths, y, _ = make_birds(args.output / "birds" / split, n, image_size=64, start=start)
            tables.append(pd.DataFrame({"path": paths, "class": y, "split": split}))
        return pd.concat(tables, ignore_index=True)
    if args.root is None:
        raise SystemExit("Say where the data set is: --root FOLDER")
    if args.data == "cub":
        return read_cub(args.root, crop_to=crops)[0]
    return {"cars": read_cars, "dogs": read_dogs}[args.data](args.root, crop_to=crops)


# The table ----------------------------------------------------------------------------------------


def table(folder: Path, data: str) -> str:
    """Return the rows that were run on a data set as a Markdown table, beside the paper's."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{data}-*.json"))]
    names = dict.fromkeys([*BACKBONES, ENSEMBLE] if data == "cub" else [])
    names |= dict.fromkeys(row["backbone"] for row in rows)
    lines = [
        f"Accuracy on the test images of {data} in percent: mean ± standard deviation (seeds).",
        "",
        "| backbone | paper() | defaults | ProtoPNet in the paper | baseline in the paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        ours = [
            summary([r["accuracy"] for r in rows if (r["backbone"], r["settings"]) == (name, s)])
            for s in SETTINGS
        ]
        theirs = PAPER.get(name, ("", "")) if data == "cub" else ("", "")
        lines.append(f"| {' | '.join([name.replace('+', ' + '), *ours, *theirs])} |")
    return "\n".join(lines)


def summary(accuracies) -> str:
    """Return mean ± standard deviation (number of seeds) of what was run."""
    if not accuracies:
        return NOT_RUN
    values = 100 * np.array(accuracies)
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f} ({len(values)})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["cub", "cars", "dogs", "birds"], default="cub")
    parser.add_argument("--root", help="folder of the data set: see protoclf.fine_grained")
    parser.add_argument("--backbone", default="resnet34", help="one, or several with + for a sum")
    parser.add_argument("--settings", choices=SETTINGS, default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--weights", default="IMAGENET1K_V1", help="torchvision's, or a folder")
    parser.add_argument("--passes", type=int, help="over the images an epoch; paper 30, default 1")
    parser.add_argument("--validation", type=float, default=0.1, help="share that is held out")
    parser.add_argument("--workers", type=int, default=4, help="processes that augment")
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    args.parameters = {}
    if args.passes is None:
        args.passes = 30 if args.settings == "paper" else 1
    if args.quick:
        args.data, args.weights, args.workers, args.validation = "birds", None, 0, 0.2
        args.backbone, args.passes = "small_cnn+squeezenet1_1", 2
        tiny = {"image_size": 32, "prototypes_per_class": 2, "joint_epochs": 1, "cycles": 2}
        args.parameters = tiny | {"batch_size": 16, "verbose": 0}
    return args


if __name__ == "__main__":
    main()
