"""Accuracy against the number of prototypes, over the weights of the cluster and separation costs.

    python examples/search_prototypes.py                                  # drawn birds
    python examples/search_prototypes.py --images FOLDER                  # your photos
    python examples/search_prototypes.py --images FOLDER --groups groups.csv

A grid search over lambda_clst and lambda_sep scores each pair twice on held-out images: accuracy,
and how many prototypes the last layer makes use of. Writes search.png and search.csv. Photos of one
specimen, patient or place belong on one side of a split: groups.csv has the columns path, below
FOLDER, and group.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder, make_birds
from protoclf.scorers import n_prototypes_scorer

GRID = {"lambda_clst": [0.0, 0.2, 0.8, 3.2], "lambda_sep": [0.0, 0.08, 0.32]}
COLUMNS = {
    "param_lambda_clst": "lambda_clst",
    "param_lambda_sep": "lambda_sep",
    "mean_test_accuracy": "accuracy",
    "std_test_accuracy": "accuracy_std",
    "mean_test_prototypes": "n_prototypes",
    "std_test_prototypes": "n_prototypes_std",
}


def main() -> None:
    args = arguments()
    clf, X, y = classifier_and_images(args)
    groups = None if args.groups is None else groups_of(X, args)
    folds = StratifiedKFold if groups is None else StratifiedGroupKFold
    search = GridSearchCV(
        clf,
        {name: values[:2] for name, values in GRID.items()} if args.quick else GRID,
        scoring={"accuracy": "accuracy", "prototypes": n_prototypes_scorer},
        refit=False,
        cv=folds(args.folds, shuffle=True, random_state=0),
        n_jobs=args.jobs,
    )
    search.fit(X, y, groups=groups)
    table = pd.DataFrame(search.cv_results_)[list(COLUMNS)].rename(columns=COLUMNS)
    table["n_prototypes"] = -table["n_prototypes"]  # a score is better when higher
    table["best"] = on_the_front(table)
    print(table.sort_values("n_prototypes").round(3).to_string(index=False))
    table.to_csv(f"{args.output}.csv", index=False)
    draw(table).savefig(f"{args.output}.png", dpi=120)
    print(f"Saved {args.output}.csv and {args.output}.png")


def classifier_and_images(args: argparse.Namespace):
    """Return an unfitted classifier and images.

    The backbone is frozen and runs once for each image of the whole search; what the two costs
    shape are the prototypes and the add-on layers in front of them.
    """
    folder = Path(tempfile.mkdtemp())
    frozen = {"train_backbone": False, "memory": folder / "features", "random_state": 0}
    frozen |= {"lambda_l1": 5e-4, "lambda_l2": 0.0}  # a squared penalty keeps most of them in use
    if args.images:
        X, y = load_folder(args.images)
        clf = ProtoPNetClassifier(
            args.backbone,
            prototypes_per_class=args.prototypes,
            latent_dim=128,
            warmup_epochs=1 if args.quick else 10,
            verbose=0,
            **frozen,
        )
        return clf, np.array(X, dtype=object), y
    n, few = (9, 1) if args.quick else (20, 20)
    X, y, _ = make_birds(folder / "birds", n, image_size=64)
    settings = {
        "image_size": 64,
        "prototypes_per_class": args.prototypes,
        "batch_size": 16,
        "lr": 5e-3,
    }
    others, names, _ = make_birds(folder / "others", 2 * n, image_size=64, start=n)
    learnt = ProtoPNetClassifier(
        "small_cnn", joint_epochs=few, backbone_lr=5e-3, random_state=0, verbose=0, **settings
    ).fit(others, names)
    clf = ProtoPNetClassifier(
        learnt.module_.backbone, latent_dim=32, warmup_epochs=few, **frozen, verbose=0, **settings
    )
    return clf, np.array(X, dtype=object), y


def groups_of(X: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return the group of each image, from the CSV file."""
    table = pd.read_csv(args.groups, dtype=str)
    known = dict(zip(table["path"], table["group"], strict=True))
    names = [Path(path).relative_to(args.images).as_posix() for path in X]
    missing = [name for name in names if name not in known]
    if missing:
        raise SystemExit(f"{args.groups} has no group for {len(missing)} images: {missing[:3]} ...")
    return np.array([known[name] for name in names])


def on_the_front(table: pd.DataFrame) -> list[bool]:
    """Return whether no other pair is as accurate with fewer prototypes, or better with as many."""
    accuracy, count = table["accuracy"].to_numpy(), table["n_prototypes"].to_numpy()
    as_good = (accuracy >= accuracy[:, None]) & (count <= count[:, None])
    better = (accuracy > accuracy[:, None]) | (count < count[:, None])
    return (~(as_good & better).any(1)).tolist()


def draw(table: pd.DataFrame) -> plt.Figure:
    """Draw a point for each pair, with the standard deviations over the folds."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for clst, rows in table.groupby("lambda_clst"):
        axes.errorbar(
            rows["n_prototypes"],
            rows["accuracy"],
            xerr=rows["n_prototypes_std"],
            yerr=rows["accuracy_std"],
            fmt="o",
            elinewidth=0.5,
            label=f"{clst:g}",
        )
    front = table[table["best"]].sort_values("n_prototypes")
    axes.plot(front["n_prototypes"], front["accuracy"], "k--", linewidth=1, zorder=0)
    for row in table.itertuples():
        axes.annotate(
            f"{row.lambda_sep:g}",
            (row.n_prototypes, row.accuracy),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.legend(title="lambda_clst")
    axes.set(xlabel="prototypes in use", ylabel="accuracy, held out")
    axes.set_title("Numbers beside the points: lambda_sep. Dashed: nothing is better in both")
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--groups", help="CSV file of the group of each image")
    parser.add_argument("--backbone", default="resnet18", help="for your photos")
    parser.add_argument("--prototypes", type=int, default=5, help="prototypes per class")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="n_jobs of the search")
    parser.add_argument("--output", default="search", help="where to write, without .png")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    args = parser.parse_args()
    if args.groups and not args.images:
        parser.error("--groups needs --images")
    return args


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
