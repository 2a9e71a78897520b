"""A rare class beside a common one: what `self_matches` and `class_weight` do, and a black box.

    python examples/benchmarks/imbalance.py --train photos/train

Two classes are drawn, a few photos of one and three quarters of the other's to train on; all others
of both are held out. The backbone is frozen. The black box is scikit-learn's logistic regression on
the standardised and pooled features of the same backbone, its C cross-validated by log-loss, which
counts the photos of both classes alike. A ProtoPNet has ten prototypes of a class, or as many as it
has photos where these are fewer; or "auto". Means over the draws, and their standard errors.
"""

import argparse
import tempfile
from itertools import product

import numpy as np
import pandas as pd
from accuracy import pooled
from black_box import logistic_regression
from few_photos import PROTOTYPES
from photos import photos, protopnet_on
from sklearn.base import clone
from sklearn.metrics import log_loss, recall_score
from sklearn.utils.class_weight import compute_sample_weight

WEIGHTS = {"": None, ", balanced": "balanced"}


def main() -> None:
    args = arguments()
    paths, y = photos(args.train, args.quick)
    if max(args.photos) >= np.unique(y, return_counts=True)[1].min():
        raise SystemExit("--photos must be fewer than a class has, so that some are held out.")
    features = pooled(args.backbone, args.image_size, paths)
    with tempfile.TemporaryDirectory() as memory:
        unfitted = protopnet_on(args.backbone, args.image_size, memory=memory)
        for n in args.photos:
            rows = []
            for draw in range(args.draws):
                rare, train, held_out = drawn(y, n, draw)
                rows += protopnets(unfitted, paths, y, train, held_out, rare, draw)
                rows += black_boxes(features, y, train, held_out, rare)
            table = pd.DataFrame(rows).groupby("model", sort=False).agg(["mean", "sem"])
            print(f"\n{n} photos of the rare class\n{table.round(3).to_string()}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="or a torchvision name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--photos", type=int, nargs="+", default=[6, 12, 24], help="of the rare")
    parser.add_argument("--draws", type=int, default=12, help="of classes and photos")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.photos, args.draws = "small_cnn", 32, [4], 1
    return args


def drawn(y, n, draw):
    """Return a rare class, positions of photos of two classes to train on, and of the others."""
    rng = np.random.default_rng([n, draw])
    rare, common = rng.choice(np.unique(y), 2, replace=False)
    few, many = (rng.permutation(np.flatnonzero(y == c)) for c in (rare, common))
    enough = len(many) * 3 // 4
    train, held_out = (few[:n], many[:enough]), (few[n:], many[enough:])
    return rare, np.concatenate(train), np.concatenate(held_out)


def protopnets(unfitted, paths, y, train, held_out, rare, seed):
    """Yield a row for each treatment of the classes' weights and of self-matches."""
    classes, counts = np.unique(y[train], return_counts=True)
    each = dict(zip(classes, np.minimum(counts, PROTOTYPES).tolist(), strict=True))
    clf = clone(unfitted).set_params(random_state=seed)
    for numbers, (name, weight) in product((each, "auto"), WEIGHTS.items()):
        prototypes = ", auto prototypes" if numbers == "auto" else ""
        for rule in ("auto", "keep", "median"):
            clf.set_params(prototypes_per_class=numbers, class_weight=weight, self_matches=rule)
            probability = clf.fit(paths[train], y[train]).predict_proba(paths[held_out])
            scores = scored(y[held_out], probability, clf.classes_, rare)
            yield {"model": f'ProtoPNet{prototypes}, self_matches="{rule}"{name}', **scores}


def black_boxes(features, y, train, held_out, rare):
    """Yield a row for each weight of the classes."""
    for name, weight in WEIGHTS.items():
        model = logistic_regression("neg_log_loss")
        model.set_params(**{f"{model.steps[-1][0]}__estimator__class_weight": weight})
        model.fit(features[train], y[train])
        probability = model.predict_proba(features[held_out])
        scores = scored(y[held_out], probability, model.classes_, rare)
        yield {"model": f"logistic regression{name}", **scores}


def scored(y, probability, classes, rare):
    """Return balanced accuracy, the rare class's recall, and log-loss with both classes alike."""
    answers = classes[probability.argmax(1)]
    recalls = recall_score(y, answers, labels=classes, average=None)
    return {
        "balanced accuracy": recalls.mean(),
        "recall of the rare class": recalls[list(classes).index(rare)],
        "log-loss, balanced": log_loss(
            y, probability, labels=classes, sample_weight=compute_sample_weight("balanced", y)
        ),
    }


if __name__ == "__main__":
    main()
