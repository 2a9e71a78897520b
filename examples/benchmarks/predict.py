"""predict and explain against the bare backbone's forward pass on the same paths.

"plain" is what one writes first: a DataLoader over PIL images and float32; it runs before the
others in a process of its own, whose allocator nobody touched. "tuned" is the same pass with
protoclf's decoding, memory layout, allocator settings and, where the processor is fast at it,
bfloat16.

    python examples/benchmarks/predict.py --images photos/test --backbone efficientnet_lite0
"""

import argparse
from functools import partial

import PIL.Image
import torch
from measuring import alternate, in_fresh_process
from photos import backbone_of, photos, protopnet_on
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from protoclf.backbones import build_backbone
from protoclf.parameters import normalization


def main():
    args = arguments()
    paths, y = photos(args.images, args.quick)
    if args.plain:
        print(plain(args, paths))
        return
    clf = protopnet_on(args.backbone, args.image_size, prototypes_per_class=args.prototypes)
    clf.fit(paths, y)
    forms = {
        "tuned": partial(tuned, clf, paths),
        "predict": partial(clf.predict, paths),
        "explain": partial(clf.explain, paths),
        "explain, top=5": partial(clf.explain, paths, top=5),
    }
    seconds = {"plain": plain_in_fresh_process(args)} | alternate(forms, args.rounds)
    print(f"{args.backbone} at {args.image_size}, {len(paths)} images, bfloat16: {half(clf)}")
    print(f"{'':>14} {'seconds':>8} {'/ plain':>8} {'/ tuned':>8} {'/ predict':>10}")
    for name, value in seconds.items():
        ratios = [value / seconds[other] for other in ("plain", "tuned", "predict")]
        print(f"{name:>14} {value:8.2f} {ratios[0]:8.3f} {ratios[1]:8.3f} {ratios[2]:10.3f}")


def half(clf):
    return clf.module_.half_precision


@torch.no_grad()
def plain(args, paths):
    """Seconds of a DataLoader, PIL, float32."""
    backbone, norm = backbone_of(args.backbone)
    backbone = build_backbone(backbone, None).eval()
    mean, std = normalization(norm)
    transform = v2.Compose(
        [
            v2.Resize(args.image_size),
            v2.CenterCrop(args.image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            with PIL.Image.open(paths[i]) as image:
                return transform(image.convert("RGB"))

    def one_pass():
        for batch in DataLoader(Photos(), batch_size=32):
            backbone(batch)

    return alternate({"plain": one_pass}, args.rounds)["plain"]


def plain_in_fresh_process(args):
    options = ["--plain", "--backbone", args.backbone, "--image-size", args.image_size]
    options += ["--rounds", args.rounds] + ["--quick"] * args.quick
    return in_fresh_process(__file__, *options, *(["--images", args.images] if args.images else []))


@torch.no_grad()
def tuned(clf, paths):
    for inputs, _ in clf.get_iterator(clf.get_dataset(paths)):
        clf.module_.features(inputs["images"])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="resnet34")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--prototypes", type=int, default=10, help="per class")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.prototypes, args.rounds = "small_cnn", 32, 2, 1
    return args


if __name__ == "__main__":
    main()
