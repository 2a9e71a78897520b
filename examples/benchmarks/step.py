"""A joint training step against one of the same backbone with pooling and a linear layer.

Forward, loss, backward and Adam, on the same batch of images; both with the memory layout and the
allocator settings of protoclf. Memory is the peak of a second step beyond network, gradients,
optimizer and inputs.
"statistics kept" is what a fit does with pretrained weights: batch-norm layers keep theirs, and a
batch is taken in pieces of 8 images.

    python examples/benchmarks/step.py
"""

import argparse
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from measuring import alternate, extra_memory, in_fresh_process
from torch import nn

from protoclf.acceleration import keep_freed_memory
from protoclf.backbones import build_backbone
from protoclf.folding import find_folds
from protoclf.losses import ProtoPNetLoss
from protoclf.micro_batches import pieces_by_class
from protoclf.network import ProtoPNet, PrototypeSpec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main():
    args = arguments()
    keep_freed_memory()
    if args.memory_of:
        step = FORMS[args.memory_of](args)
        step()  # after which there are gradients and moments of Adam
        print(extra_memory(step))
        return
    print(f"{args.backbone} at {args.image_size}, m={args.prototypes}, batch {args.batch}")
    seconds = alternate({name: make(args) for name, make in FORMS.items()}, args.rounds)
    memory = {name: memory_of(name, args) for name in FORMS}
    print(f"{'step':>28} {'seconds':>8} {'ratio':>6} {'extra MB':>9} {'ratio':>6}")
    for name in FORMS:
        print(
            f"{name:>28} {seconds[name]:8.2f} {seconds[name] / seconds['linear']:6.3f}"
            f" {memory[name]:9.0f} {memory[name] / memory['linear']:6.3f}"
        )


def linear(args, statistics_kept=False):
    """Global average pooling and a linear layer."""
    torch.manual_seed(0)
    backbone, images, y = common(args)
    head = nn.Linear(channels_of(backbone, args), args.classes)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    backbone.train()
    if statistics_kept:
        for layer in backbone.modules():
            layer.train(not isinstance(layer, nn.BatchNorm2d))
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-4)

    def step():
        pixels = images.to(memory_format=torch.channels_last).float() / 255
        loss = F.cross_entropy(head(backbone((pixels - mean) / std).mean((2, 3))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def protopnet(args, latent_dim=None, statistics_kept=False, piece=None):
    """Prototypes and all three costs, as weighted by default; `piece` images at a time."""
    torch.manual_seed(0)
    backbone, images, y = common(args)
    owner = (torch.arange(args.prototypes) % args.classes).sort().values.tolist()
    spec = PrototypeSpec(owner, args.classes, (1, 1), "cosine" if latent_dim is None else "log")
    net = ProtoPNet(backbone, channels_of(backbone, args), spec, latent_dim, IMAGENET)
    net.channels_last = True
    net.train_only(("backbone", "add_on", "prototypes"))
    if statistics_kept:
        give_statistics(net.backbone)
        net.keep_statistics(True)
        net.folds = find_folds(net.backbone, args.image_size)
    net.train()
    criterion = ProtoPNetLoss(net.owner, lambda_clst=0.8, lambda_sep=0.08, lambda_patch=0.8)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    pieces = pieces_by_class(y, piece or args.batch)

    def step():
        optimizer.zero_grad()
        with net.sharing_a_fold() if piece else nullcontext():
            for positions, share in criterion.shares(pieces, y):
                criterion(net(images[positions]), y[positions], share=share).backward()
        optimizer.step()

    return step


def give_statistics(backbone):
    """As if the weights came with some."""
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.fill_(1.01)


FORMS = {
    "linear": linear,
    "protopnet": protopnet,
    "protopnet, paper's D=128": partial(protopnet, latent_dim=128),
    "linear, statistics kept": partial(linear, statistics_kept=True),
    "protopnet, statistics kept": partial(protopnet, statistics_kept=True),
    "protopnet, ... 8 at a time": partial(protopnet, statistics_kept=True, piece=8),
}


def common(args):
    backbone = build_backbone(args.backbone, None).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (args.batch, 3, args.image_size, args.image_size)).byte()
    return backbone, images, torch.arange(args.batch) % args.classes


@torch.no_grad()
def channels_of(backbone, args):
    return backbone.eval()(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]


def memory_of(name, args):
    options = ["--memory-of", name]
    for option in ("backbone", "image_size", "prototypes", "classes", "batch"):
        options += [f"--{option.replace('_', '-')}", getattr(args, option)]
    return in_fresh_process(__file__, *options)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet34")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--prototypes", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    parser.add_argument("--memory-of", choices=list(FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.batch, args.rounds = "small_cnn", 32, 4, 1
        args.prototypes, args.classes = 20, 4
    return args


if __name__ == "__main__":
    main()
