"""What each part of the method does to accuracy on images left out.

Each row changes one thing of the defaults (train/test split of drawn birds, trained from scratch,
or of a folder of photos on a pretrained backbone). "without projection" keeps the prototypes where
training left them, "without sign bounds" lets any prototype speak for or against any class. Both
have a last layer solved to its optimum, but on the images as they are: compare them with "last
layer without views".

    python examples/benchmarks/ablations.py --seeds 3
    python examples/benchmarks/ablations.py --images photos/train --backbone efficientnet_lite0
"""

import argparse

import pandas as pd
import torch
from photos import backbone_of, photos
from sklearn.model_selection import train_test_split
from stage_scores import StageScores, accuracy_and_log_loss

from protoclf import ProtoPNetClassifier
from protoclf.last_layer import solve_last_layer

ADD_ON = {"latent_dim": 128, "warmup_epochs": 5}  # the paper's
ROWS = {
    "defaults": {},
    "without Clst": {"lambda_clst": 0.0},
    "without Sep": {"lambda_sep": 0.0},
    "without both": {"lambda_clst": 0.0, "lambda_sep": 0.0},
    "the paper's costs: without the patch cost": {"lambda_patch": 0.0},
    "more weight on Clst": {"lambda_clst": 2.0},
    "batch-norm statistics learned": {"batch_norm": "train"},
    "k-means start": {"prototype_init": "kmeans"},
    "random start": {"prototype_init": "random"},
    "log similarity": {"similarity": "log"},
    "log, self-matches median": {"similarity": "log", "self_matches": "median"},
    "cosine, self-matches median": {"self_matches": "median"},
    "add-on layers": ADD_ON,
    "add-on layers, log similarity": ADD_ON | {"similarity": "log"},
    "add-on layers, random start": ADD_ON | {"prototype_init": "random"},
    "no augmentation": {"augmentation": None},
    "last layer without views": {"augmented_views": 0},
    "constant learning rates": {"lr_schedule": None},
    "distinct images": {"distinct": "images"},
    "auto prototypes": {"prototypes_per_class": "auto"},
    "lambda_l1 by cross-validation": {"lambda_l1": "cv"},
}


def main():
    args = arguments()
    paths, y = photos(args.images, args.quick, n_per_class=40)
    rows = []
    for seed in range(args.seeds):
        split = train_test_split(paths, y, stratify=y, test_size=0.25, random_state=seed)
        for name, change in ROWS.items():
            if args.rows and name not in args.rows:
                continue
            rows += measured(args, name, change, split[::2], split[1::2], seed)
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).groupby("row", sort=False).agg(["mean", "std"]).round(4).to_string())


def measured(args, name, change, train, test, seed):
    """Return the row of a change; for the defaults also the rows that read the same network."""
    stages = StageScores(train, test)
    clf = classifier(args, change, seed).set_params(callbacks=[stages] if args.epochs else None)
    clf.fit(*train)
    row = {"row": name, **accuracy_and_log_loss(test[1], clf.predict_proba(test[0]), clf.classes_)}
    row |= {"prototypes": clf.n_prototypes_, **stages.row}
    if name != "defaults":
        return [row]
    free = {"row": "without sign bounds", **without_bounds(clf, train, test)}
    scores = {name: row.get(f"before, solved {name}") for name in ("accuracy", "log_loss")}
    unprojected = {"row": "without projection", **scores}
    return [free, unprojected, row]


def without_bounds(clf, train, test):
    """Solve the last layer with weights of either sign.

    Each weight is the difference of two that keep the bounds, the second for the negated
    activation; at the optimum one of them is 0, so that the penalty is the same.
    """
    g = torch.from_numpy(clf.transform(train[0])).double()
    y = torch.from_numpy((train[1][:, None] == clf.classes_).argmax(1))
    owner = clf.module_.owner.repeat(2)
    both, ridge = torch.cat([g, -g], 1), {"lambda_l2": clf.last_layer_result_.lambda_l2}
    weight = solve_last_layer(both, y, owner, clf.lambda_l1_, **ridge).weight
    positive, negative = weight.chunk(2, dim=1)
    logits = torch.from_numpy(clf.transform(test[0])).double() @ (positive - negative).T
    return accuracy_and_log_loss(test[1], logits.softmax(1).numpy(), clf.classes_)


def classifier(args, change, seed):
    backbone, norm = backbone_of(args.backbone)
    settings = {"weights": None, "normalization": norm, "image_size": args.image_size}
    settings |= {"joint_epochs": args.epochs, "train_backbone": args.epochs > 0}
    settings |= {"prototypes_per_class": args.prototypes, "random_state": seed, "verbose": 0}
    if args.backbone == "small_cnn":  # from scratch
        settings |= {"lr": 5e-3, "backbone_lr": 5e-3, "batch_size": 16}
    return ProtoPNetClassifier(backbone, **(settings | change))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="small_cnn")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--prototypes", type=int, default=5, help="per class")
    parser.add_argument("--epochs", type=int, default=30, help="joint; 0 freezes the backbone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.image_size, args.prototypes, args.epochs = 32, 1, 1
        args.rows = ["defaults", "random start"]
    return args


if __name__ == "__main__":
    main()
