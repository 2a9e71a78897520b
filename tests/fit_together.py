"""Fits of one process, run by several at once: see test_distributed.py."""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from skorch.callbacks import EarlyStopping
from skorch.dataset import ValidSplit
from torch import nn

from protoclf.distributed import DistributedProtoPNetClassifier

SMALL = {"image_size": 32, "prototypes_per_class": 2, "batch_size": 8, "verbose": 0}
FROZEN = {"train_backbone": False, "random_state": 0}
FITS = {  # what is fitted -> its parameters
    "frozen": FROZEN,
    "distinct": FROZEN | {"distinct": "images", "prototype_size": (2, 2), "lambda_l1": "cv"},
    "auto": FROZEN | {"prototypes_per_class": "auto"},
    "few batches": FROZEN | {"batch_size": 64},
    "warm-up": FROZEN
    | {"warmup_epochs": 2, "latent_dim": 6, "similarity": "log", "lambda_patch": 0.0},
    "joint": {
        "joint_epochs": 2,
        "augmentation": None,
        "lambda_patch": 0.0,  # each process looks for the nearest image in its part of the batch
        "random_state": 0,
    },
    "all at once": {
        "backbone": "small_cnn",
        "warmup_epochs": 1,
        "joint_epochs": 3,
        "cycles": 2,
        "augmented_views": 1,
        "train_split": ValidSplit(4, stratified=True),
        "callbacks": [EarlyStopping("train_loss", patience=1)],
        "lambda_l1": 1e-3,
        "random_state": None,
    },
}


def backbone():
    """Return one without batch normalization, whose statistics are of a part of the batch."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.Tanh()),
    )


def photos():
    """33 pictures, so that a last batch of 8 has one image, of three classes; weights."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
    y = np.repeat(["a", "b", "c"], 11)
    X[np.arange(33), :, :, np.repeat([0, 1, 2], 11)] //= 2
    return X, y, rng.uniform(0.5, 2, 33)


def parameters(name):
    """Return what to make a classifier with."""
    return {"backbone": backbone()} | SMALL | FITS[name]


def main(folder):
    """Fit all; each process writes what it got, and only the first one predicts."""
    accelerator = Accelerator(cpu=True)
    X, y, weight = photos()
    for name in FITS:
        clf = DistributedProtoPNetClassifier(accelerator=accelerator, **parameters(name))
        clf.fit(X, y, sample_weight=weight)
        file = folder / f"{name}.{accelerator.num_processes}.{accelerator.process_index}"
        state = clf.module_.state_dict()
        history = [(row["stage"], row["train_loss"]) for row in clf.history]
        torch.save((state, clf.prototypes_, clf.last_layer_result_, history), file)
        if accelerator.is_main_process:
            clf.predict(X)
            clf.save(folder / f"{name} {accelerator.num_processes}")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
