"""Whether the highest contribution points at the part that tells a bird from its twin.

The drawn birds come in pairs of twins that differ in one annotated part. Prints the share of test
pictures in which the box of the highest contribution overlaps that part, beside boxes of the same
sizes at random places, for both ways to find boxes.

    python examples/benchmarks/parts.py --seeds 3
"""

import argparse
import tempfile

import numpy as np
import pandas as pd

from protoclf import ProtoPNetClassifier
from protoclf.datasets import make_birds
from protoclf.explanation import BOX

DRAWS = 20  # random places for each box


def main():
    args = arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        n = args.per_class
        train = make_birds(f"{folder}/train", n, args.image_size)
        test = make_birds(f"{folder}/test", max(1, n // 2), args.image_size, start=n)
        for seed in range(args.seeds):
            rows += measured(args, train, test, seed)
    table = pd.DataFrame(rows).groupby("boxes", sort=False)
    print(table.agg(["mean", "std"]).round(3).to_string())


def measured(args, train, test, seed):
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=args.image_size,
        prototypes_per_class=5,
        joint_epochs=args.epochs,
        batch_size=16,
        lr=5e-3,
        backbone_lr=5e-3,
        lambda_l1=1e-3,
        random_state=seed,
        verbose=0,
    ).fit(*train[:2])
    parts = test[2][test[2]["distinguishing"]].set_index("path")
    rng = np.random.default_rng(seed)
    for attribution in ("upsampled", "gradient"):
        best = clf.explain(test[0], top=1, attribution=attribution)
        best = best[best["rank"] == 1]
        boxes, part = best[BOX].to_numpy(int), parts.loc[best["path"], BOX].to_numpy(int)
        size = boxes[:, 2:] - boxes[:, :2]
        starts = [rng.integers(0, args.image_size - size + 1) for _ in range(DRAWS)]
        random = [np.concatenate([start, start + size], axis=1) for start in starts]
        yield {
            "boxes": attribution,
            "overlap": overlapping(boxes, part),
            "random": np.mean([overlapping(places, part) for places in random]),
            "area": (size.prod(1) / args.image_size**2).mean(),
            "accuracy": clf.score(*test[:2]),
        }


def overlapping(boxes, part):
    """Return the share of boxes that overlap the part in their image."""
    start, stop = np.maximum(boxes, part)[:, :2], np.minimum(boxes, part)[:, 2:]
    return (start < stop).all(1).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--per-class", type=int, default=40, help="birds to train on")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.per_class, args.image_size = 1, 8, 32
    return args


if __name__ == "__main__":
    main()
