"""Accuracy beside every metric of interpretability, for several settings of the classifier.

Prints one table, in Markdown: for each setting the value with its 95 % interval, and in brackets
that of the same classifier with prototypes at random patches. On the drawn birds, whose parts are
known, or on photos with a frozen backbone, without the metrics that need labels of parts; the
paper's settings, which train the backbone, are left out there unless asked for by --paper.

    python examples/benchmarks/interpretability.py
    python examples/benchmarks/interpretability.py --images photos/train --test photos/test
"""

import argparse
import tempfile
import time

import pandas as pd
from photos import backbone_of

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder, make_birds
from protoclf.metrics import interpretability_report


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        train, test, parts = data(args, folder)
        columns = {}
        for name, clf in settings(args).items():
            start = time.perf_counter()
            clf.fit(*train)
            fitted = time.perf_counter()
            options = {"n_perturbed": args.n_perturbed, "random_state": args.seed}
            options["metrics"] = args.metrics
            report = interpretability_report(clf, *test, parts, draw_from=train, **options)
            columns[name] = report.apply(written, axis=1)
            columns[name]["seconds, fit + metrics"] = (
                f"{fitted - start:.0f} + {time.perf_counter() - fitted:.0f}"
            )
            print(name, report.round(3).to_string(), sep="\n", flush=True)
    table = pd.DataFrame(columns)
    print("\n| metric |", *(f"{name} |" for name in table))
    print("|" + " --- |" * (1 + len(table.columns)))
    for metric, row in table.iterrows():
        print(f"| {metric} |", *(f"{value} |" for value in row))


def written(row):
    """Return a value, its interval and the baseline as text."""
    digits = 0 if row["unit"] == "model" else 2
    text = f"{row['value']:.{digits}f}"
    if pd.notna(row["low"]):
        text += f" ({row['low']:.2f}, {row['high']:.2f})"
    return text if pd.isna(row["baseline"]) else f"{text} [{row['baseline']:.{digits}f}]"


def settings(args):
    """Return unfitted classifiers by name."""
    backbone, norm = backbone_of(args.backbone)
    common = {
        "weights": None,
        "normalization": norm,
        "image_size": args.image_size,
        "random_state": args.seed,
        "verbose": 0,
    }
    scratch, paper = {}, {}
    if not args.images:  # from scratch, which the rates for pretrained weights do not do
        common |= {"batch_size": 16}
        scratch = {"lr": 5e-3, "backbone_lr": 5e-3, "joint_epochs": args.epochs}
        paper = {"backbone_lr": 1e-3, "lr_schedule": "cosine", "joint_epochs": args.epochs * 2 // 3}
    number = {"prototypes_per_class": args.prototypes}
    paper = {"backbone": backbone, **common, **paper, **number}
    defaults = {"backbone": backbone, "train_backbone": not args.images, **common, **scratch}
    classifiers = {
        "paper's settings": ProtoPNetClassifier.paper(**paper),
        "defaults": ProtoPNetClassifier(**defaults, **number),
        'defaults, "auto"': ProtoPNetClassifier(**defaults, prototypes_per_class="auto"),
    }
    if args.images and not args.paper:
        del classifiers["paper's settings"]
    return classifiers


def data(args, folder):
    """Return training images, test images, and where the parts of the latter are, if known."""
    if args.images:
        return load_folder(args.images), load_folder(args.test or args.images), None
    n = args.per_class
    train = make_birds(f"{folder}/train", n, args.image_size)
    X, y, parts = make_birds(f"{folder}/test", max(1, n // 2), args.image_size, start=n)
    return train[:2], (X, y), parts


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--test", help="another one, to measure on")
    parser.add_argument("--backbone", help="default: efficientnet_lite0; for birds, small_cnn")
    parser.add_argument("--image-size", type=int, help="default: 128 for birds, 224 for photos")
    parser.add_argument("--per-class", type=int, default=40, help="birds to train on")
    parser.add_argument("--prototypes", type=int, default=10, help="per class")
    parser.add_argument("--epochs", type=int, default=40, help="on the birds")
    parser.add_argument("--paper", action="store_true", help="also on photos: trains the backbone")
    parser.add_argument("--n-perturbed", type=int, default=60)
    parser.add_argument("--metrics", nargs="+", help="rows; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    args.backbone = args.backbone or ("efficientnet_lite0" if args.images else "small_cnn")
    args.image_size = args.image_size or (224 if args.images else 128)
    if args.quick:
        args.image_size, args.per_class, args.prototypes = 32, 8, 2
        args.epochs, args.n_perturbed = 1, 2
    return args


if __name__ == "__main__":
    main()
