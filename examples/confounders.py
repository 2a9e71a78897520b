"""A mark that betrays a class: find the prototypes that look at it, and forbid it.

    python examples/confounders.py

Training birds of three classes have a mark in a corner; test birds have none. A ProtoPNet is
trained, `find_confounders` ranks its prototypes, and those on a mark are removed, or forbidden in
further training until none is left. Prints the test accuracy of each, beside those of a ProtoPNet
that was trained on with nothing forbidden, and of one without marks, and writes pictures of
prototypes before and after to the folder confounders_output (or --output).
"""

import argparse
from copy import deepcopy
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.editing import forbid, remove
from protoclf.explanation import BOX
from protoclf.metrics import PartMasks, find_confounders
from protoclf.plotting import plot_prototypes

MARKS = {  # one of each pair of twins, so that the mark tells them apart, and nothing else has to
    "crested mossling": "tag",
    "bar-winged duskfinch": "sun",
    "long-billed reedpiper": "leaf",
}
SIZE = 96  # pixels
MISSED = 0.3  # of a similarity of 1: the prototype looked at what was covered
MOST_ROUNDS = 4


def main() -> None:
    args = arguments()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(args.seeds):
        rows.append(run(args, output, seed))
        print(pd.Series(rows[-1]).to_string(), "\n", flush=True)
    print(pd.DataFrame(rows).agg(["mean", "min", "max"]).round(3).T.to_string())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="confounders_output", help="where to write")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of joint training")
    parser.add_argument("--per-class", type=int, default=20, help="birds of a class to train on")
    return parser.parse_args()


def run(args, output: Path, seed: int) -> dict[str, float]:
    """Return the test accuracy of every classifier."""
    n = args.per_class
    birds = output / "birds"
    draw = {"image_size": SIZE, "random_state": seed}
    X, y, parts = make_birds(birds / f"marked-{seed}", n, confounder=MARKS, **draw)
    clean = make_birds(birds / f"clean-{seed}", n, **draw)[:2]
    valid = make_birds(birds / f"valid-{seed}", 10, start=n, **draw)[:2]
    test = make_birds(birds / f"test-{seed}", 30, start=n + 10, **draw)[:2]

    clf = classifier(args.epochs, seed).fit(X, y)
    accuracy = {"with marks": clf.score(*test)}
    accuracy["with marks, trained on"] = deepcopy(clf).partial_fit(X, y).score(*test)
    bird = PartMasks(clf, X, parts[parts["part"] != "mark"])
    suspects = find_confounders(clf, X, y, masks=bird, X_valid=valid[0], y_valid=valid[1])
    print(f"test accuracy {accuracy['with marks']:.3f}; prototypes to look at first:")
    print(suspects[["prototype", "class", "weight", "signs", "reasons"]].head(8).to_string())
    ids = on_mark(clf, parts)
    print(
        f"on a mark: {ids}; where find_confounders has them: {places(suspects, ids)}\n", flush=True
    )
    save_pictures(clf, ids, output / f"before-{seed}.png")
    if ids and leaves_each_class_one(clf, ids):
        accuracy["prototypes on marks removed"] = remove(clf, ids, reason="mark").score(*test)

    rounds = 0
    while ids and rounds < MOST_ROUNDS:
        clf = forbid(clf, ids, X, y, reason="mark", epochs=args.epochs)
        rounds += 1
        accuracy[f"marks forbidden, {rounds}"] = clf.score(*test)
        ids = on_mark(clf, parts)
        print(f"round {rounds}: accuracy {clf.score(*test):.3f}, on a mark {ids}", flush=True)
    accuracy["marks forbidden, at the end"] = clf.score(*test)
    save_pictures(clf, replaced(clf), output / f"after-{seed}.png")
    accuracy["without marks"] = classifier(args.epochs, seed).fit(*clean).score(*test)
    return accuracy


def classifier(epochs: int, seed: int) -> ProtoPNetClassifier:
    return ProtoPNetClassifier(
        "small_cnn",
        weights=None,
        image_size=SIZE,
        prototypes_per_class=3,
        lambda_patch=0.0,  # the paper's costs: with the patch cost, prototypes keep to the birds
        joint_epochs=epochs,
        batch_size=16,
        lr=5e-3,
        backbone_lr=5e-3,
        random_state=seed,
        verbose=0,
    )


def on_mark(clf: ProtoPNetClassifier, parts: pd.DataFrame) -> list[int]:
    """Return the prototypes that miss the mark when it is covered in the image they are from."""
    marks = parts[parts["part"] == "mark"].set_index("path")[BOX]
    table = clf.prototypes_[clf.prototypes_["source"].isin(marks.index)]
    if not len(table):
        return []
    covered = []
    for source in table["source"]:
        pixels = np.array(PIL.Image.open(source))
        x0, y0, x1, y1 = marks.loc[source].astype(int)
        pixels[y0:y1, x0:x1] = pixels.mean((0, 1))
        covered.append(pixels)
    left = clf.transform(np.stack(covered))[np.arange(len(table)), table["prototype"]]
    return table["prototype"][left < 1 - MISSED].tolist()


def places(suspects: pd.DataFrame, ids: list[int]) -> list[int]:
    """Return the places of prototypes in the ranking, from 1."""
    return (1 + np.flatnonzero(suspects["prototype"].isin(ids))).tolist()


def leaves_each_class_one(clf: ProtoPNetClassifier, ids: list[int]) -> bool:
    return clf.prototypes_.drop(index=ids)["class"].nunique() == len(clf.classes_)


def replaced(clf: ProtoPNetClassifier) -> list[int]:
    """Return the prototypes that were forbidden, which are elsewhere now."""
    return sorted(set(clf.edits_["prototype"])) if hasattr(clf, "edits_") else []


def save_pictures(clf: ProtoPNetClassifier, ids: list[int], path: Path) -> None:
    if ids:
        matplotlib.use("Agg")
        plot_prototypes(clf, prototypes=ids).figure_.savefig(path, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
