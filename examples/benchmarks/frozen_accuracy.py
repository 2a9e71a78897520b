"""Accuracy and time of a ProtoPNet on a frozen, pretrained backbone, beside the black box.

    python examples/benchmarks/frozen_accuracy.py --train photos/train --test photos/test

Without --test, 4-fold cross-validation on the training folder: the way to choose settings.
The black box is scikit-learn's logistic regression, its C cross-validated, on the standardised
and pooled features of the same backbone; its time is that of one pass over the training images.
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from efficientnet_lite import NORMALIZATION, EfficientNetLite0
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder
from protoclf.decoding import decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images


def main() -> None:
    args = arguments()
    backbone = EfficientNetLite0()
    paths, y = load_folder(args.train)
    test = load_folder(args.test) if args.test else None
    rows = []
    for seed in range(args.seeds):
        for train, held_out in splits(paths, y, test, seed):
            if test is None or seed == 0:  # nothing random in it
                rows.append(black_box(backbone, train, held_out))
                print(rows[-1], flush=True)
            for k in args.prototypes:
                rows.append(protopnet(backbone, train, held_out, k, seed, args))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby("model", sort=False)
    print(table.agg(["mean", "std"]).round(4).to_string())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="folder of class folders")
    parser.add_argument("--test", help="folder of class folders; default: cross-validation")
    parser.add_argument("--prototypes", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters")
    return parser.parse_args()


def splits(paths, y, test, seed):
    """Yield (train, held out), each (paths, labels)."""
    paths = np.asarray(paths, dtype=object)
    if test is not None:
        yield (paths, y), test
        return
    for a, b in StratifiedKFold(4, shuffle=True, random_state=seed).split(paths, y):
        yield (paths[a], y[a]), (paths[b], y[b])


def black_box(backbone, train, held_out):
    start = time.perf_counter()
    features = pooled(backbone, train[0])
    seconds = time.perf_counter() - start
    rates = {"C": [1e-3, 3e-3, 1e-2, 3e-2]}
    search = GridSearchCV(LogisticRegression(max_iter=1000), rates, cv=4)
    model = make_pipeline(StandardScaler(), search).fit(features, train[1])
    accuracy = model.score(pooled(backbone, held_out[0]), held_out[1])
    return {"model": "logistic regression", "accuracy": accuracy, "fit_s": seconds}


def pooled(backbone, paths):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZATION)
    pixels, _ = decode(Images(list(paths)), Preprocessing(224))
    with torch.inference_mode():
        batches = [backbone.eval()((p / 255 - mean) / std).mean((2, 3)) for p in pixels.split(32)]
    return torch.cat(batches).numpy()


def protopnet(backbone, train, held_out, k, seed, args):
    extra = dict(item.split("=", 1) for item in args.set)
    extra = {name: _value(value) for name, value in extra.items()}
    clf = ProtoPNetClassifier(
        backbone,
        train_backbone=False,
        normalization=NORMALIZATION,
        prototypes_per_class=k,
        random_state=seed,
        verbose=0,
        **extra,
    )
    start = time.perf_counter()
    clf.fit(train[0], train[1])
    seconds = time.perf_counter() - start
    return {
        "model": f"protopnet, {k} per class",
        "accuracy": clf.score(*held_out),
        "fit_s": seconds,
        "nonzero": int((clf.coef_ != 0).sum()),
        "residual": clf.last_layer_result_.residual,
    }


def _value(text):
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return {"None": None, "True": True, "False": False}.get(text, text)


if __name__ == "__main__":
    main()
