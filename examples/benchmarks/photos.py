"""The photos of a benchmark, a folder of class folders or drawn birds, and models of them."""

import atexit
import shutil
import tempfile

import numpy as np

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder, make_birds


def photos(folder, quick=False, n_per_class=20):
    """Return paths and labels of `folder`, or of birds where it is None, as arrays."""
    if folder is None:
        target = tempfile.mkdtemp(prefix="birds-")
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        paths, labels, _ = make_birds(target, n_per_class=8 if quick else n_per_class)
    else:
        paths, labels = load_folder(folder)
    return np.asarray(paths, dtype=object), np.asarray(labels)


def backbone_of(name):
    """Return (backbone, normalization): "efficientnet_lite0" to 2 with weights, others random."""
    if not name.startswith("efficientnet_lite"):
        return name, "imagenet"
    if name[-1] not in "012":
        raise SystemExit(f"{name}: there are weights of efficientnet_lite0, 1 and 2.")
    from efficientnet_lite import NORMALIZATION, EfficientNetLite

    return EfficientNetLite(int(name[-1])), NORMALIZATION


def protopnet_on(name, image_size, **settings):
    """Return a ProtoPNet on the backbone of that name, frozen unless the settings say otherwise."""
    backbone, norm = backbone_of(name)
    common = {"train_backbone": False, "random_state": 0, "verbose": 0}
    return ProtoPNetClassifier(
        backbone,
        weights=None,
        normalization=norm,
        image_size=image_size,
        **(common | settings),
    )
