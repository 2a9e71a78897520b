"""Time, memory and accuracy of a whole fit, beside CaBRNet's ProtoPNet.

    python examples/benchmarks/fit.py --cabrnet-venv cabrnet-venv --data photos --repeats 3

The same photos, backbone, starting weights, epochs and batch size: warm-up, joint training,
projection and last layer, on the CPU. Only protoclf's defaults augment the photos. `photos` has
the folders train and test, each with a folder for each class; without --data, drawn birds.

- CaBRNet: its command `cabrnet train`, in an environment of its own, which is made if missing.
  Its last layer is trained for 20 epochs, its default.
- protoclf, paper: `ProtoPNetClassifier.paper`, one cycle.
- protoclf, defaults: no add-on layers, cosines, selected prototypes, augmentation.
  --set tune_allocator=False changes parameters of both.

Each fit is a process of its own, in turns; the table has medians. fit_s leaves out imports and
testing. peak_mb is the peak resident memory of the process, imports included; imports_mb is what
they take before the fit begins. Neither side starts other processes, unless --workers lets CaBRNet
load images in some: their memory, most of it shared, is not counted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from command_line import add_set, settings_of

# torch and protoclf are imported where they are used, never in this process: a child's ru_maxrss
# starts from its parent's.

CABRNET = "cabrnet==1.2"
QUICK = {
    "per_class": 6,
    "image_size": 64,
    "prototypes": 2,
    "warmup_epochs": 1,
    "joint_epochs": 1,
    "last_layer_epochs": 2,
    "batch_size": 16,
    "repeats": 1,
}
GOAL = {"time_ratio": 1 / 3, "memory_ratio": 1 / 2}


def main() -> None:
    args = arguments()
    if args.quick:
        vars(args).update(QUICK)
    python = cabrnet_python(args.cabrnet_venv, install=not args.quick)
    with tempfile.TemporaryDirectory() as scratch:
        settings = prepared(args, Path(scratch))
        rows = []
        for seed in range(args.repeats):
            for model, fit in sides(python, Path(scratch)).items():
                rows.append({"model": model, **fit(settings | {"seed": seed})})
                print(rows[-1], flush=True)
    report(pd.DataFrame(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cabrnet-venv", help=f"environment with {CABRNET}; made if missing")
    parser.add_argument("--data", help="folder with train and test; default: drawn birds")
    parser.add_argument("--per-class", type=int, default=40, help="birds of a class to train on")
    parser.add_argument("--backbone", default="resnet18", help="a resnet or vgg of torchvision")
    parser.add_argument("--weights", help="state dict of the whole backbone; default: random ones")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--prototypes", type=int, default=10, help="prototypes per class")
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--joint-epochs", type=int, default=2)
    parser.add_argument("--last-layer-epochs", type=int, default=20, help="CaBRNet's only")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="CaBRNet's data-loading processes")
    parser.add_argument("--repeats", type=int, default=1)
    add_set(parser)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it works, no more")
    return parser.parse_args()


def cabrnet_python(venv: str | None, install: bool) -> Path | None:
    """Return the interpreter that has CaBRNet, or None where there is none to be had."""
    if venv is None:
        print("CaBRNet is left out: name an environment for it with --cabrnet-venv.")
        return None
    folder = Path(venv).absolute() / "bin"
    python = folder / "python"
    if not (folder / "cabrnet").exists():
        if not install:
            print(f"CaBRNet is left out: it is not in {folder}, and --quick does not install it.")
            return None
        print(f"Installing {CABRNET} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", CABRNET], check=True)
    return python


def prepared(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the settings, with data and weights that all sides read."""
    settings = vars(args) | {
        "data": str(Path(args.data).resolve() if args.data else scratch / "birds"),
        "weights": str(Path(args.weights).resolve() if args.weights else scratch / "weights.pth"),
        "set": settings_of(args),
    }
    if args.data is None:
        in_fresh_process(draw_birds, settings)
    for part in ("train", "test"):
        if not Path(settings["data"], part).is_dir():
            raise SystemExit(f"--data {args.data} has no folder {part}.")
    classes = [folder for folder in Path(settings["data"], "train").iterdir() if folder.is_dir()]
    settings["n_classes"] = len(classes)
    if args.weights is None:
        in_fresh_process(save_random_weights, settings)
    return settings


def draw_birds(settings: dict[str, Any]) -> None:
    from protoclf.datasets import make_birds

    data, n, side = Path(settings["data"]), settings["per_class"], settings["image_size"]
    make_birds(data / "train", n, side)
    make_birds(data / "test", n // 2, side, start=n)


def save_random_weights(settings: dict[str, Any]) -> None:
    """Draw weights, with the batch-norm statistics of some images, as pretrained ones have them."""
    import torch
    from torch import nn
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import get_model
    from torchvision.transforms.v2.functional import normalize, resize

    torch.manual_seed(0)
    net = get_model(settings["backbone"], weights=None)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # of all that they see
    images = sorted(Path(settings["data"], "train").glob("*/*"))[:: settings["n_classes"]]
    side = [settings["image_size"]] * 2
    batch = torch.stack([resize(decode_image(path, ImageReadMode.RGB), side) for path in images])
    with torch.no_grad():
        net(normalize(batch / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.save(net.state_dict(), settings["weights"])


def sides(python: Path | None, scratch: Path) -> dict[str, Any]:
    """Return what fits each model, in the order of the table."""
    ours = {
        "protoclf, paper": lambda settings: in_fresh_process(fit_paper, settings),
        "protoclf, defaults": lambda settings: in_fresh_process(fit_defaults, settings),
    }
    if python is None:
        return ours
    return {"CaBRNet": lambda settings: fit_cabrnet(python, scratch, settings)} | ours


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def fit_cabrnet(python: Path, scratch: Path, settings: dict[str, Any]) -> dict[str, Any]:
    driver = Path(__file__).with_name("cabrnet_driver.py")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        Path(folder, "settings.json").write_text(json.dumps(settings))
        done = subprocess.run([python, driver, folder], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"CaBRNet failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fit_paper(settings: dict[str, Any]) -> dict[str, Any]:
    """Fit the paper's ProtoPNet to whole images, squashed, as CaBRNet's configuration has them."""
    from protoclf import ProtoPNetClassifier

    return measured(
        ProtoPNetClassifier.paper(cycles=1, augmentation=None, resize="squash", **shared(settings)),
        settings,
    )


def fit_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    from protoclf import ProtoPNetClassifier

    return measured(ProtoPNetClassifier(**shared(settings)), settings)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that no side chooses for itself."""
    same = ("backbone", "weights", "image_size", "warmup_epochs", "joint_epochs", "batch_size")
    return {name: settings[name] for name in same} | {
        "prototypes_per_class": settings["prototypes"],
        "random_state": settings["seed"],
        "device": "cpu",
        "verbose": 0,
        **settings["set"],
    }


def measured(clf, settings: dict[str, Any]) -> dict[str, Any]:
    from protoclf.datasets import load_folder

    imports_mb = peak_mb()
    start = time.perf_counter()
    clf.fit(*load_folder(Path(settings["data"], "train")))
    seconds, peak = time.perf_counter() - start, peak_mb()
    accuracy = clf.score(*load_folder(Path(settings["data"], "test")))
    return {
        "fit_s": seconds,
        "accuracy": float(accuracy),
        "peak_mb": peak,
        "imports_mb": imports_mb,
        "versions": versions(),
    }


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> str:
    import os
    from importlib.metadata import version

    import torch

    found = ", ".join(f"{name} {version(name)}" for name in ("protoclf", "torch", "torchvision"))
    return f"{found}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def report(rows: pd.DataFrame) -> None:
    """Print the medians, as they are and beside CaBRNet's."""
    table = rows.groupby("model", sort=False).median(numeric_only=True)
    if "CaBRNet" not in table.index:
        print(f"\n{table.round(3).to_string()}\nWithout CaBRNet there is nothing to compare with.")
        return
    theirs = table.loc["CaBRNet"]
    table["time_ratio"] = table["fit_s"] / theirs["fit_s"]
    table["memory_ratio"] = table["peak_mb"] / theirs["peak_mb"]
    table["accuracy_gain"] = table["accuracy"] - theirs["accuracy"]
    print(f"\n{table.round(3).to_string()}\n")
    print("Goal: a third of CaBRNet's time, half of its memory, no less accuracy")
    for model, row in table.drop("CaBRNet").iterrows():
        met = {name: row[name] <= most for name, most in GOAL.items()}
        met["accuracy_gain"] = row["accuracy_gain"] >= 0
        missed = [name for name, holds in met.items() if not holds]
        print(f"{model}: {'missed: ' + ', '.join(missed) if missed else 'met'}")


if __name__ == "__main__":
    main()
