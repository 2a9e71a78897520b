"""Fits that test_checkpoint.py stops; run as a script, one that kills its own process."""

import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
from skorch.callbacks import Callback

from protoclf import ProtoPNetClassifier
from protoclf.checkpoint import Checkpoint

FITS = {
    "joint": {},
    "two cycles": {"warmup_epochs": 2, "joint_epochs": 1, "cycles": 2, "latent_dim": 4},
    "auto": {"prototypes_per_class": "auto", "joint_epochs": 2, "augmented_views": 1},
    "frozen": {"train_backbone": False, "warmup_epochs": 2, "augmented_views": 1},
}


def classifier(name, **given):
    settings = {
        "weights": None,
        "image_size": 24,
        "prototypes_per_class": 2,
        "joint_epochs": 3,
        "batch_size": 6,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier("small_cnn", **settings | FITS[name] | given)


def pictures():
    """14 noisy pictures of two classes."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
    X[7:, :, :, 0] //= 3
    return X, np.repeat(["dark", "red"], 7)


class Stop(Callback):
    """Raises at the beginning of one row of the history; without parameters of its own."""

    def __init__(self, row=None, error=RuntimeError):
        self.plan_ = SimpleNamespace(row=row, error=error)

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == self.plan_.row:
            raise self.plan_.error("stopped")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Callback):
    def __init__(self, row):
        self.row = row

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == self.row:
            die()


def main(folder, moment):
    """Fit until it dies: before the start is done, in an epoch, in the projection, in a write."""
    row = {"start": None, "second epoch": 2, "projection": 4, "writing": None}[moment]
    if moment == "writing":
        fsync, count = os.fsync, []

        def cut_off(file):
            count.append(1)
            if len(count) == 3:
                os.ftruncate(file, 1000)
                die()
            fsync(file)

        os.fsync = cut_off
    if moment == "start":
        Checkpoint.restore = lambda *args: die()
    initialize = ProtoPNetClassifier.initialize_callbacks

    def with_death(clf):  # not among the parameters, which have to be those of the fit that goes on
        initialize(clf)
        clf.callbacks_.append(("die", DieAt(row)))
        return clf

    ProtoPNetClassifier.initialize_callbacks = with_death
    classifier("joint", checkpoint=folder).fit(*pictures())


if __name__ == "__main__":
    main(*sys.argv[1:])
