"""The projection, from images to moved prototypes, against one forward pass over the same images.

The pass of the backbone is part of both; the last column is what the search for the nearest
patches, reading them, their boxes and all activations for the last layer add to it.

    python examples/benchmarks/projection.py
"""

import argparse
from functools import partial

import numpy as np
import torch
from measuring import alternate

from protoclf import ProtoPNetClassifier
from protoclf.features import FitData
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.stages import Projection


def main():
    args = arguments()
    wrong = [m for m in args.prototypes if m % args.classes]
    if wrong:
        raise SystemExit(f"--prototypes {wrong[0]} is no multiple of --classes {args.classes}.")
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (args.images, args.image_size, args.image_size, 3), dtype=np.uint8)
    print(f"{args.backbone} at {args.image_size}, {args.images} images")
    print(f"{'prototypes':>11} {'pass':>8} {'projection':>11} {'ratio':>6}")
    for m in args.prototypes:
        y = np.arange(args.images) % args.classes
        net = initialized(args, m // args.classes)
        dataset = ImageDataset(Images(X), net.preprocessing_, y).keep()
        forms = {"pass": partial(one_pass, net, dataset), "ours": partial(project, net, dataset)}
        seconds = alternate(forms, args.rounds)
        ratio = seconds["ours"] / seconds["pass"]
        print(f"{m:11d} {seconds['pass']:6.2f} s {seconds['ours']:9.2f} s {ratio:6.3f}", flush=True)


def initialized(args, prototypes_per_class):
    """Return a network of random weights, in front of its projection."""
    net = ProtoPNetClassifier(
        args.backbone,
        weights=None,
        image_size=args.image_size,
        prototypes_per_class=prototypes_per_class,
        random_state=0,
        verbose=0,
    )
    net.classes_inferred_ = np.arange(args.classes)
    net.preprocessing_ = Preprocessing(args.image_size)
    net.initialize()
    net.prepare_processor()
    net.callbacks_ = []
    return net


@torch.no_grad()
def one_pass(net, dataset):
    for inputs, _ in net.get_iterator(dataset):
        net.module_.eval().features(inputs["images"])


def project(net, dataset):
    Projection(None).run(net, FitData(net, dataset, None))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet34")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.rounds = "small_cnn", 32, 1
        args.images = 64  # so many that the pass folds batch norm, as at full size
        args.prototypes, args.classes = [8, 16], 4
    return args


if __name__ == "__main__":
    main()
