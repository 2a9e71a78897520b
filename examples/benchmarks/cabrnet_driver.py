"""CaBRNet's side of `fit.py`: trains its ProtoPNet, and prints what was measured as one JSON line.

    python cabrnet_driver.py FOLDER

It runs in the environment that CaBRNet is installed in. FOLDER holds settings.json, written by
`fit.py`; CaBRNet's configuration and output go there too. Training is its own command,
`cabrnet train`, with the schedule of its configuration for CUB-200, cut to one cycle.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import cabrnet.archs.protopnet.decision  # noqa: F401 - now, not when the clock runs
import torch
import yaml
from cabrnet.apps import train
from cabrnet.archs.protopnet.model import ProtoPNet
from cabrnet.main import main as cabrnet_command

THREADS = torch.get_num_threads()
MEASURED: dict[str, Any] = {"evaluation_s": 0.0}
SOURCE_LAYERS = {"resnet": "layer4", "vgg": "features"}  # by torchvision's family of backbones


class MeasuredProtoPNet(ProtoPNet):
    """CaBRNet's ProtoPNet, with a clock; its configuration names the class to build."""

    def train_epoch(self, *args, **kwargs):
        """Report the epoch's number among its metrics.

        After the last epoch CaBRNet goes back to the best one, by training accuracy, and that may
        be one from before the projection and the last layer. With the number as the metric, all
        stages count.
        """
        return super().train_epoch(*args, **kwargs) | {"epoch": kwargs["epoch_idx"]}

    def evaluate(self, *args, **kwargs):
        """Keep test accuracy, and what the fit had used before; testing is not part of a fit."""
        MEASURED["peak_mb"] = peak_mb()
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        MEASURED["evaluation_s"] += time.perf_counter() - start
        MEASURED["accuracy"] = metrics["test_set/accuracy"]
        return metrics


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    configurations = {
        "model_arch": model_arch(settings),
        "training": training(settings),
        "dataset": dataset(settings),
    }
    for name, configuration in configurations.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    train.execute = timed(train.execute)  # the command looks it up when it runs
    run_command(folder, settings["seed"])
    seconds = MEASURED["execute_s"] - MEASURED["evaluation_s"]
    names = ("accuracy", "peak_mb", "imports_mb")
    print(json.dumps({"fit_s": seconds, **{n: MEASURED[n] for n in names}, "versions": versions()}))


def run_command(folder: Path, seed: int) -> None:
    options = {
        "--config-dir": folder,
        "--output-dir": folder / "output",
        "--logger-file": folder / "cabrnet.log",
        "--device": "cpu",
        "--seed": seed,
    }
    sys.argv = ["cabrnet", "train", "--save-best", "epoch", "max"]
    sys.argv += [str(word) for option in options.items() for word in option]
    cabrnet_command()


def timed(execute):
    """Return `execute` with a clock around it: all imports are done when the command calls it.

    The command imports all of CaBRNet, and pacmap among it takes as many threads as there are
    cores. Where OMP_NUM_THREADS asks for fewer, they are in each other's way: back to that.
    """

    def run(args) -> None:
        torch.set_num_threads(THREADS)
        MEASURED["imports_mb"] = peak_mb()
        start = time.perf_counter()
        execute(args)
        MEASURED["execute_s"] = time.perf_counter() - start

    return run


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> str:
    names = ("cabrnet", "torch", "torchvision")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{found}, {torch.get_num_threads()} of {os.cpu_count()} threads"


# CaBRNet's configuration ------------------------------------------------------------------------


def model_arch(settings: dict[str, Any]) -> dict[str, Any]:
    """Backbone, two 1 x 1 convolutions and a sigmoid, uniform prototypes: as in the paper."""
    backbone = settings["backbone"]
    layer = next(v for family, v in SOURCE_LAYERS.items() if backbone.startswith(family))
    return {
        "top_arch": {"module": __name__, "name": MeasuredProtoPNet.__name__},
        "extractor": {
            "backbone": {"arch": backbone, "layer": layer, "weights": settings["weights"]},
            "add_on": {
                "init_mode": "PROTOPNET",
                "conv1": convolution(),
                "act1": {"type": "ReLU"},
                "conv2": convolution(),
                "act2": {"type": "Sigmoid"},
            },
        },
        "similarity": {"name": "ProtoPNetSimilarity"},
        "classifier": {
            "module": "cabrnet.archs.protopnet.decision",
            "name": "ProtoPNetClassifier",
            "params": {
                "num_classes": settings["n_classes"],
                "num_proto_per_class": settings["prototypes"],
                "proto_init_mode": "UNIFORM",
            },
        },
    }


def convolution() -> dict[str, Any]:
    """Return a new one each time: CaBRNet writes the input channels into it."""
    return {"type": "Conv2d", "params": {"out_channels": 128, "kernel_size": 1, "bias": True}}


def training(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the paper's rates; projection and last layer come in the last epoch, once."""
    warmup, epochs = settings["warmup_epochs"], settings["warmup_epochs"] + settings["joint_epochs"]
    heads = {"addons": {"lr": 3e-3, "weight_decay": 1e-3}, "prototypes": {"lr": 3e-3}}
    backbone = {"backbone": {"lr": 1e-4, "weight_decay": 1e-3}}
    step = {"type": "StepLR", "params": {"step_size": 5, "gamma": 0.1}}
    periods = {
        "warmup": {
            "epoch_range": [0, warmup - 1],
            "freeze": ["backbone", "last_layer"],
            "optimizers": "warmup_optimizer",
        },
        "main_training": {
            "epoch_range": [warmup, epochs - 1],
            "freeze": "last_layer",
            "optimizers": "joint_optimizer",
        },
    }
    return {
        "param_groups": {
            "backbone": "extractor.convnet",
            "addons": "extractor.add_on",
            "prototypes": "classifier.prototypes",
            "last_layer": "classifier.last_layer",
        },
        "optimizers": {
            "warmup_optimizer": {"type": "Adam", "groups": heads},
            "joint_optimizer": {"type": "Adam", "groups": backbone | heads, "scheduler": step},
            "last_layer_optimizer": {"type": "Adam", "groups": {"last_layer": {"lr": 1e-4}}},
        },
        "num_epochs": epochs,
        "periods": {n: p for n, p in periods.items() if p["epoch_range"][0] <= p["epoch_range"][1]},
        "auxiliary_info": {
            "projection_config": {
                "start_epoch": epochs - 1,
                "frequency": epochs,
                "num_ft_epochs": settings["last_layer_epochs"],
            }
        },
    }


def dataset(settings: dict[str, Any]) -> dict[str, Any]:
    """Folders of images, squashed to a square, through torch's loader."""
    data, side = Path(settings["data"]), settings["image_size"]
    normalize = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    transform = {
        "resize": {"type": "Resize", "params": {"size": [side, side]}},
        "to_tensor": {"type": "ToTensor"},
        "normalize": {"type": "Normalize", "params": normalize},
    }

    def images(part: str, shuffle: bool) -> dict[str, Any]:
        return {
            "module": "torchvision.datasets",
            "name": "ImageFolder",
            "params": {"root": str(data / part), "transform": transform},
            "batch_size": settings["batch_size"],
            "shuffle": shuffle,
            "num_workers": settings["workers"],
        }

    return {
        "train_set": images("train", shuffle=True),
        "projection_set": images("train", shuffle=False),
        "test_set": images("test", shuffle=False),
    }


if __name__ == "__main__":
    main()
