"""Accuracy of an ensemble of ProtoPNets on frozen backbones, beside its members and black boxes.

    python examples/benchmarks/ensemble.py --images photos/train

4-fold cross-validation. The black boxes: logistic regression, its C cross-validated, on the
standardised and pooled features of each backbone. "sum" adds up the logits of all three, "mean"
has the same classes and less confidence.
"""

import argparse
import tempfile

import numpy as np
import pandas as pd
from accuracy import pooled
from black_box import logistic_regression
from photos import photos, protopnet_on
from scipy.special import softmax
from sklearn.model_selection import StratifiedKFold
from stage_scores import accuracy_and_log_loss

from protoclf import ProtoPNetEnsemble


def main() -> None:
    args = arguments()
    paths, y = photos(args.images, args.quick)
    features = {name: pooled(name, size, paths) for name, size in args.backbones.items()}
    rows = []
    with tempfile.TemporaryDirectory() as memory:
        folds = StratifiedKFold(4, shuffle=True, random_state=0).split(paths, y)
        for train, held_out in list(folds)[: args.folds]:
            fold = protopnets(args, memory, paths, y, train, held_out)
            fold += black_boxes(args, features, y, train, held_out)
            print(pd.DataFrame(fold).round(4).to_string(), flush=True)
            rows += fold
    table = pd.DataFrame(rows).groupby(["model", "logits of"], sort=False)
    print(table.agg(["mean", "std"]).round(4).to_string())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--prototypes", type=int, default=10)
    parser.add_argument("--folds", type=int, default=4, help="how many of the four folds")
    parser.add_argument("--jobs", type=int, default=1, help="members fitted at the same time")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    sizes = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
    args.backbones = {"small_cnn": 32, "resnet18": 64} if args.quick else sizes
    if args.quick:
        args.prototypes, args.folds = 2, 1
    return args


def protopnets(args, memory, paths, y, train, held_out):
    """Return a row for each member and two for the ensemble, whose sheet is checked."""
    members = [(name, member(args, memory, name)) for name in args.backbones]
    ensemble = ProtoPNetEnsemble(members, n_jobs=args.jobs, verbose=0)
    ensemble.fit(paths[train], y[train])
    logits = {
        name: clf.decision_function(paths[held_out])
        for name, clf in ensemble.named_estimators_.items()
    }
    logits["sum"] = ensemble.decision_function(paths[held_out])
    sheet = ensemble.explain(paths[held_out])
    totals = sheet.groupby("sample")["contribution"].sum()
    logit = sheet.groupby("sample")["logit"].first()
    assert np.allclose(totals, logit, atol=1e-3), "a sheet sums to the ensemble's logit"
    return rows_of("ProtoPNet", logits, ensemble.classes_, y[held_out])


def member(args, memory, name):
    number = {"prototypes_per_class": args.prototypes}
    return protopnet_on(name, args.backbones[name], memory=memory, **number)


def black_boxes(args, features, y, train, held_out):
    """Return a row for the logistic regression on each backbone, and two for all of them."""
    logits = {}
    for name, pooled_features in features.items():
        model = logistic_regression().fit(pooled_features[train], y[train])
        logits[name] = model.decision_function(pooled_features[held_out])
    logits["sum"] = sum(logits.values())
    return rows_of("logistic regression", logits, model.classes_, y[held_out])


def rows_of(model, logits, classes, y):
    """Return rows of accuracy and cross-entropy, of each (n, C) and of the mean of the logits."""
    rows = []
    for name, values in (logits | {"mean": logits["sum"] / (len(logits) - 1)}).items():
        probability = softmax(values.astype(float), axis=1)
        scores = accuracy_and_log_loss(y, probability, classes)
        rows.append({"model": model, "logits of": name, **scores})
    return rows


if __name__ == "__main__":
    main()
