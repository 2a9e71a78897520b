"""scikit-learn's handwritten digits, written as image files: a ProtoPNet from scratch.

A second domain, without pretrained weights: `small_cnn` at 32 x 32 pixels, beside the same network
with pooling and a linear layer, and k-nearest neighbours on the pixels.

    python examples/benchmarks/digits.py --seeds 3
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import torch
from black_box import train_network
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from stage_scores import StageScores
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.acceleration import keep_freed_memory
from protoclf.backbones import SmallCNN
from protoclf.decoding import decode
from protoclf.geometry import Preprocessing
from protoclf.images import Images

SIDE = 32  # pixels
# digits must not be mirrored, so that the augmentation of photos does not fit
SETTINGS = {"image_size": SIDE, "augmentation": None, "lr": 3e-3, "backbone_lr": 3e-3}


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        paths, y = write_digits(Path(folder), 200 if args.quick else None)
        rows = []
        for seed in range(args.seeds):
            split = train_test_split(paths, y, stratify=y, test_size=0.25, random_state=seed)
            train, test = split[::2], split[1::2]
            for model in (neighbours, cnn, protopnet):
                torch.manual_seed(seed)
                rows.append(model(args, train, test, seed))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby("model", sort=False)
    print(table.agg(["mean", "std"]).round(4).to_string())


def write_digits(folder, n):
    """Write the digits as PNG files; return paths and labels."""
    digits = load_digits()
    paths = []
    for i, image in enumerate(digits.images[:n]):
        paths.append(str(folder / f"{i}.png"))
        PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)).save(paths[-1])
    return np.array(paths, dtype=object), digits.target[:n]


def neighbours(args, train, test, seed):
    pixels = [
        decode(Images(list(p)), Preprocessing(8))[0][:, 0].flatten(1) for p, _ in (train, test)
    ]
    model = KNeighborsClassifier(3).fit(pixels[0], train[1])
    return {"model": "3 nearest neighbours", "accuracy": model.score(pixels[1], test[1])}


def cnn(args, train, test, seed):
    """Train the same backbone with pooling and a linear layer."""
    keep_freed_memory()
    pixels, test_pixels = (
        decode(Images(list(p)), Preprocessing(SIDE))[0].float() / 255 - 0.5
        for p, _ in (train, test)
    )
    y = torch.from_numpy(train[1])
    net = nn.Sequential(SmallCNN(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    start = time.perf_counter()
    train_network(net, optimizer, args.epochs, y, lambda index: pixels[index])
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = net.eval()(test_pixels).argmax(1).numpy() == test[1]
    return {"model": "the CNN alone", "accuracy": right.mean(), "fit_s": seconds}


def protopnet(args, train, test, seed):
    stages = StageScores(train, test)
    clf = ProtoPNetClassifier(
        "small_cnn",
        joint_epochs=args.epochs,
        prototypes_per_class=2 if args.quick else 10,
        random_state=seed,
        callbacks=[stages],
        verbose=0,
        **SETTINGS,
    )
    start = time.perf_counter()
    clf.fit(*train)
    seconds = time.perf_counter() - start
    accuracy = clf.score(*test)
    return {"model": "protopnet", "accuracy": accuracy, "fit_s": seconds} | stages.row


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few digits, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.epochs = 1
    return args


if __name__ == "__main__":
    main()
