"""How a fit scales with processes: one against two, each with one thread, on drawn birds.

pip install "protoclf[processes]"
python examples/benchmarks/processes.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

COUNTS = (1, 2)
STAGES = ("joint", "projection", "last layer")


def main():
    args = arguments()
    if args.folder:
        fit(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        from protoclf.datasets import make_birds

        make_birds(Path(folder) / "birds", args.per_class, args.image_size)
        rounds = [{n: in_processes(n, folder, args) for n in COUNTS} for _ in range(args.rounds)]
    print(f"{args.backbone} at {args.image_size}, {8 * args.per_class} images, one thread each")
    print(f"{'processes':>10}" + "".join(f"{stage + ', s':>16}{'ratio':>7}" for stage in STAGES))
    for n in COUNTS:
        cells = []
        for stage in STAGES:
            seconds, of_one = (median_of(rounds, k, stage) for k in (n, COUNTS[0]))
            cells.append(f"{seconds:16.2f}{seconds / of_one:7.2f}")
        print(f"{n:>10}" + "".join(cells))


def median_of(rounds, n, stage):
    """Return the median seconds of a stage over rounds of runs."""
    return statistics.median(one[n][stage] for one in rounds)


def in_processes(n, folder, args):
    """Fit in n processes; return the seconds of an epoch of each stage."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n), __file__, "--folder", folder]
    for name in ("backbone", "image_size", "batch", "epochs", "per_class"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    history = pd.read_csv(Path(folder) / "history.csv")
    return history.groupby("stage")["dur"].median()


def fit(args):
    """Fit as one of several processes; the first one writes the history."""
    from accelerate import Accelerator

    from protoclf.datasets import load_folder
    from protoclf.distributed import DistributedProtoPNetClassifier

    accelerator = Accelerator(cpu=True)
    X, y = load_folder(Path(args.folder) / "birds")
    clf = DistributedProtoPNetClassifier(
        args.backbone,
        accelerator=accelerator,
        weights=None,
        image_size=args.image_size,
        prototypes_per_class=min(10, args.per_class),
        batch_size=args.batch,
        joint_epochs=args.epochs,
        random_state=0,
        verbose=0,
    )
    clf.fit(X, y)
    if accelerator.is_main_process:
        rows = [{"stage": row["stage"], "dur": row["dur"]} for row in clf.history]
        pd.DataFrame(rows).to_csv(Path(args.folder) / "history.csv", index=False)
    accelerator.end_training()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--per-class", type=int, default=16, help="birds of each of 8 classes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="seconds; figures mean nothing")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.per_class = "small_cnn", 32, 2
        args.epochs, args.rounds = 1, 1
    return args


if __name__ == "__main__":
    main()
