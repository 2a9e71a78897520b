"""Time and memory of the prototype layer and of the last layer against their sizes, as a picture.

The prototype layer, forward and backward, against the images in a batch, the prototypes and the
cells of the map, one varied at a time; the last layer against images and prototypes. Straight
lines through the origin are what is hoped for.

    python examples/benchmarks/scaling.py --output docs/scaling.png
"""

import argparse
from functools import partial

import matplotlib
import torch
from last_layer import similarities
from measuring import alternate, extra_memory, in_fresh_process

from protoclf.last_layer import solve_last_layer
from protoclf.prototype_layer import min_distances

BASE = {"n": 40, "m": 1000, "cells": 196}
VARIED = {"n": [10, 20, 40, 80], "m": [250, 500, 1000, 2000], "cells": [49, 196, 400, 784]}
SOLVES = {"n": [750, 1500, 3000, 6000], "m": [125, 250, 500, 1000]}
SOLVE_BASE = {"n": 3000, "m": 500, "n_classes": 50}
LABELS = {"n": "images", "m": "prototypes", "cells": "cells H x W"}


def main():
    args = arguments()
    if args.layer_memory:
        print(layer_memory(*args.layer_memory))
        return
    table = {**layer_table(args), **solver_table(args)}
    for (what, name), rows in table.items():
        print(f"\n{what} against {LABELS[name]}")
        for size, seconds, memory in rows:
            print(f"{size:6d} {seconds:8.3f} s {memory:8.1f} MB")
    if args.output:
        draw(table, args.output)


def layer_table(args):
    table = {}
    for name, sizes in list(VARIED.items())[: 1 if args.quick else None]:
        settings = [BASE | {name: size} for size in sizes]
        if args.quick:
            settings = [{"n": 2, "m": 10, "cells": 16} | {name: s} for s in (9, 16)]
        forms = {s[name]: layer_step(**s) for s in settings}
        seconds = alternate(forms, args.rounds)
        table["prototype layer", name] = [
            (s[name], seconds[s[name]], memory_in_fresh_process(s)) for s in settings
        ]
    return table


def layer_step(n, m, cells):
    side = round(cells**0.5)
    z = torch.rand(n, 128, side, side, requires_grad=True)
    p = torch.rand(m, 128, 1, 1, requires_grad=True)

    def step():
        distance, _ = min_distances(z, p)
        torch.autograd.grad(torch.log1p(distance).mean(), (z, p))

    return step


def layer_memory(n, m, cells):
    layer_step(2, 10, 16)()
    return extra_memory(layer_step(n, m, cells))


def memory_in_fresh_process(settings):
    return in_fresh_process(__file__, "--layer-memory", *settings.values())


def solver_table(args):
    table = {}
    for name, sizes in SOLVES.items():
        settings = [SOLVE_BASE | {name: size} for size in sizes]
        if args.quick:
            settings = [{"n": 40, "m": 8, "n_classes": 4} | {name: s} for s in (40, 80)]
        forms = {s[name]: partial(solve_last_layer, *data(**s), 1e-4) for s in settings}
        seconds = alternate(forms, args.rounds)
        table["last layer", name] = [(size, t, float("nan")) for size, t in seconds.items()]
    return table


def data(n, m, n_classes):
    return similarities(n, m, n_classes, "cosine")


def draw(table, path):
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(table), 3), layout="constrained")
    for axes, ((what, name), rows) in zip(
        figure.subplots(1, len(table)), table.items(), strict=True
    ):
        sizes, seconds, memory = zip(*rows, strict=True)
        axes.plot(sizes, seconds, "ko-", label="seconds")
        axes.set(title=what, xlabel=LABELS[name], xlim=(0, None), ylim=(0, None))
        if what == "prototype layer":
            twin = axes.twinx()
            twin.plot(sizes, memory, "s--", color="0.6")
            twin.set(ylim=(0, None), ylabel="extra memory, MB (dashed)")
        axes.set_ylabel("seconds")
    figure.savefig(path, dpi=100)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="where to draw the picture")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    parser.add_argument("--layer-memory", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
