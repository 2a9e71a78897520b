"""Accuracy with few photos and few classes: a ProtoPNet on a frozen backbone beside a black box.

    python examples/benchmarks/few_photos.py --train photos/train

Some classes are drawn, and so many photos of each of them to train on; all others of these classes
are held out. The black box is scikit-learn's logistic regression on the standardised and pooled
features of the same backbone, its C cross-validated: once by accuracy, once by log-loss. Where a
class has fewer photos than a ProtoPNet has prototypes, it has as many prototypes as photos.
"""

import argparse
import tempfile
from itertools import product

import numpy as np
import pandas as pd
from accuracy import pooled
from black_box import logistic_regression
from photos import photos, protopnet_on
from sklearn.base import clone
from stage_scores import accuracy_and_log_loss

PROTOTYPES = 10


def main() -> None:
    args = arguments()
    paths, y = photos(args.train, args.quick)
    check(args, y)
    features = pooled(args.backbone, args.image_size, paths)
    tables = []
    with tempfile.TemporaryDirectory() as memory:
        unfitted = protopnet_on(args.backbone, args.image_size, memory=memory)
        for case in product(args.classes, args.photos):
            rows = []
            for draw in range(args.draws):
                train, held_out = drawn(y, *case, draw)
                rows += protopnets(unfitted, paths, y, train, held_out, case[1], draw)
                rows += black_boxes(features, y, train, held_out)
            table = pd.DataFrame(rows).groupby("model", sort=False).mean()
            tables.append(pd.concat([table], keys=[case], names=["classes", "photos"]))
            print(tables[-1].round(3).to_string(), flush=True)
    table = pd.concat(tables)
    for score in table:
        print(f"\n{score}\n{table[score].unstack('model', sort=False).round(3).to_string()}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="or a torchvision name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4, 10])
    parser.add_argument("--photos", type=int, nargs="+", default=[6, 12, 24, 48], help="of a class")
    parser.add_argument("--draws", type=int, default=6, help="of classes and photos")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size = "small_cnn", 32
        args.classes, args.photos, args.draws = [2], [4], 1
    return args


def check(args, y):
    """Exit where the folder has too few classes, or too few photos to hold some out."""
    classes, counts = np.unique(y, return_counts=True)
    if max(args.classes) > len(classes) or max(args.photos) >= counts.min():
        raise SystemExit(
            f"--train has {len(classes)} classes, with {counts.min()} photos or more each: take no "
            "more --classes, and fewer --photos, so that some are held out."
        )


def drawn(y, n_classes, n_photos, draw):
    """Return positions of photos to train on and of those held out, of some of the classes."""
    rng = np.random.default_rng([n_classes, n_photos, draw])
    train, held_out = [], []
    for c in rng.choice(np.unique(y), n_classes, replace=False):
        mine = rng.permutation(np.flatnonzero(y == c))
        train.append(mine[:n_photos])
        held_out.append(mine[n_photos:])
    return np.concatenate(train), np.concatenate(held_out)


def protopnets(unfitted, paths, y, train, held_out, n_photos, seed):
    """Yield a row for each number of prototypes."""
    numbers = {f"{PROTOTYPES} per class": min(PROTOTYPES, n_photos), "auto": "auto"}
    for name, number in numbers.items():
        clf = clone(unfitted).set_params(prototypes_per_class=number, random_state=seed)
        clf.fit(paths[train], y[train])
        scores = accuracy_and_log_loss(
            y[held_out], clf.predict_proba(paths[held_out]), clf.classes_
        )
        yield {"model": f"ProtoPNet, {name}", **scores}


def black_boxes(features, y, train, held_out):
    """Yield a row for each way to choose a penalty."""
    for name, scoring in {"accuracy": "accuracy", "log-loss": "neg_log_loss"}.items():
        model = logistic_regression(scoring).fit(features[train], y[train])
        probability = model.predict_proba(features[held_out])
        scores = accuracy_and_log_loss(y[held_out], probability, model.classes_)
        yield {"model": f"logistic regression, C by {name}", **scores}


if __name__ == "__main__":
    main()
