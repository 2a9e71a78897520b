"""Accuracy and time of a ProtoPNet on a pretrained backbone, beside black boxes on the same one.

    python examples/benchmarks/accuracy.py --train photos/train --test photos/test
    python examples/benchmarks/accuracy.py --train photos/train --fine-tune 10

A class of fewer images than --prototypes has as many prototypes as images.
Without --test, 4-fold cross-validation on the training folder: the way to choose settings.
The black boxes: scikit-learn's logistic regression, its C cross-validated, on the standardised and
pooled features (its time is that of one pass over the training images), and with --fine-tune the
same CNN with pooling and a linear layer, trained with the same augmentation, rates, epochs and
precision: with batch-norm statistics learned anew, and with those that came with the weights.
These take as long as the ProtoPNet each; --without-cnn leaves them out.
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from black_box import logistic_regression, train_network
from command_line import add_set, settings_of, value_of
from photos import backbone_of, photos, protopnet_on
from sklearn.model_selection import StratifiedKFold
from stage_scores import StageScores, accuracy_and_log_loss
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclf import ProtoPNetClassifier
from protoclf.acceleration import keep_freed_memory
from protoclf.augmentation import augment_mildly
from protoclf.backbones import build_backbone
from protoclf.datasets import load_folder
from protoclf.decoding import decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images
from protoclf.parameters import normalization


def main() -> None:
    args = arguments()
    paths, y = photos(args.train, args.quick)
    test = load_folder(args.test) if args.test else None
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for train, held_out in splits(paths, y, test, seed, args.folds):
            for model in models(args, first=test is None or seed == args.first_seed):
                torch.manual_seed(seed)
                rows.append(model(args, train, held_out, seed))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby("model", sort=False)
    print(table.agg(["mean", "std"]).round(4).to_string())


def models(args, first):
    """Yield functions of (args, train, held_out, seed)."""
    if first:  # nothing random in it
        yield linear
    if args.fine_tune and not args.without_cnn:
        yield lambda *given: cnn(*given, keep_statistics=False)
        yield lambda *given: cnn(*given, keep_statistics=True)
    for k in args.prototypes:
        yield lambda *given, k=k: protopnet(*given, k)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", help="folder of class folders")
    parser.add_argument("--test", help="folder of class folders; default: cross-validation")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="or a torchvision name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--fine-tune", type=int, default=0, metavar="EPOCHS", help="default: frozen"
    )
    parser.add_argument("--without-cnn", action="store_true", help="no fine-tuned black boxes")
    parser.add_argument("--prototypes", nargs="+", default=["5", "10"], help='numbers, or "auto"')
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=4, help="how many of the four folds")
    add_set(parser)
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.fine_tune = "small_cnn", 32, 1
        args.prototypes, args.folds = ["1", "auto"], 1
    return args


def splits(paths, y, test, seed, folds):
    """Yield (train, held out), each (paths, labels)."""
    paths = np.asarray(paths, dtype=object)
    if test is not None:
        yield (paths, y), test
        return
    everything = StratifiedKFold(4, shuffle=True, random_state=seed).split(paths, y)
    for a, b in list(everything)[:folds]:
        yield (paths[a], y[a]), (paths[b], y[b])


def linear(args, train, held_out, seed):
    start = time.perf_counter()
    features = pooled(args.backbone, args.image_size, train[0])
    seconds = time.perf_counter() - start
    model = logistic_regression().fit(features, train[1])
    held_out_features = pooled(args.backbone, args.image_size, held_out[0])
    probability = model.predict_proba(held_out_features)
    scores = accuracy_and_log_loss(held_out[1], probability, model.classes_)
    return {"model": "logistic regression", **scores, "fit_s": seconds}


def pooled(name, image_size, paths):
    """Pooled features of the backbone as given, (n, D), with the tuned allocator and layout."""
    backbone, prepare = prepared(name)
    pixels, _ = decode(Images(list(paths)), Preprocessing(image_size))
    with torch.inference_mode():
        batches = [backbone.eval()(prepare(p)).mean((2, 3)) for p in pixels.split(32)]
    return torch.cat(batches).numpy()


def prepared(name):
    """Return the backbone and what turns uint8 images into its input."""
    keep_freed_memory()
    backbone, norm = backbone_of(name)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in normalization(norm))
    backbone = build_backbone(backbone, None).to(memory_format=torch.channels_last)
    return backbone, lambda x: ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def cnn(args, train, held_out, seed, keep_statistics):
    """Fine-tune with Adam, the ProtoPNet's rate for the backbone, and a cosine schedule."""
    start = time.perf_counter()
    backbone, prepare = prepared(args.backbone)
    pixels, _ = decode(Images(list(train[0])), Preprocessing(args.image_size))
    classes, y = np.unique(train[1], return_inverse=True)
    y = torch.from_numpy(y)
    with torch.no_grad():
        channels = backbone(prepare(pixels[:2])).shape[1]
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, len(classes)))
    net = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), head)
    rates = ProtoPNetClassifier(**settings_of(args))
    groups = [{"params": backbone.parameters(), "lr": rates.backbone_lr}]
    optimizer = torch.optim.Adam([*groups, {"params": head.parameters()}], lr=rates.lr)

    def augmented(index):
        return prepare(augment_mildly(pixels[index]))

    settled = [m for m in backbone.modules() if keep_statistics and isinstance(m, _BatchNorm)]
    half = "precision=bfloat16" in args.set
    precision = torch.autocast("cpu", torch.bfloat16, enabled=half)
    train_network(net, optimizer, args.fine_tune, y, augmented, settled, precision)
    seconds = time.perf_counter() - start
    pixels, _ = decode(Images(list(held_out[0])), Preprocessing(args.image_size))
    with torch.no_grad(), precision:
        logits = torch.cat([net.eval()(prepare(p)).double() for p in pixels.split(32)])
    name = f"CNN, {args.fine_tune} epochs, statistics {'kept' if keep_statistics else 'learned'}"
    scores = accuracy_and_log_loss(held_out[1], logits.softmax(1).numpy(), classes)
    return {"model": name, **scores, "fit_s": seconds}


def at_most_images(k, y):
    """Return k for each class, or as many as it has images where these are fewer; "auto" stays."""
    if not isinstance(k, int):
        return k
    classes, counts = np.unique(y, return_counts=True)
    return dict(zip(classes, np.minimum(k, counts).tolist(), strict=True))


def protopnet(args, train, held_out, seed, k):
    stages = StageScores(train, held_out)
    settings = {
        "train_backbone": bool(args.fine_tune),
        "joint_epochs": args.fine_tune,
        "prototypes_per_class": at_most_images(value_of(k), train[1]),
        "random_state": seed,
        "callbacks": [stages] if args.fine_tune else None,
    }
    clf = protopnet_on(args.backbone, args.image_size, **settings | settings_of(args))
    start = time.perf_counter()
    clf.fit(train[0], train[1])
    seconds = time.perf_counter() - start
    return {
        "model": f"protopnet, {k} per class",
        **accuracy_and_log_loss(held_out[1], clf.predict_proba(held_out[0]), clf.classes_),
        "fit_s": seconds,
        "prototypes": clf.n_prototypes_,
        "nonzero": int((clf.coef_ != 0).sum()),
        "moved": clf.prototypes_["moved"].mean(),
        **stages.row,
    }


if __name__ == "__main__":
    main()
