"""Make the saved model of this version that later ones must be able to load.

Run it once for each format: python tests/data/make_saved_model.py. The images are drawn by
arithmetic, so that they are the same everywhere.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.saved_model import VERSION

HERE = Path(__file__).parent


def drawn_images():
    """Twelve images of 40 x 32 pixels, half with a disc and half with stripes; labels."""
    y, x = np.mgrid[:32, :40]
    images, labels = [], []
    for k in range(6):
        disc = (y - 10 - 2 * k) ** 2 + (x - 16 - k) ** 2 < 50
        stripes = (x + k * y // 2) % (5 + k % 3) < 2
        for shape, label in ((disc, "disc"), (stripes, "stripes")):
            grey = 40 + 2 * x + 3 * y + 5 * k
            pixels = np.stack([np.where(shape, 250 - 9 * i, grey - 20 * i) for i in range(3)], -1)
            images.append(pixels.clip(0, 255).astype(np.uint8))
            labels.append(label)
    return np.stack(images), np.array(labels)


def tiny_backbone():
    """The backbone of the saved model, with other weights."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 2, 2), nn.ReLU())


def main():
    images, labels = drawn_images()
    torch.manual_seed(0)
    clf = ProtoPNetClassifier(
        tiny_backbone(),
        image_size=32,
        prototypes_per_class=2,
        latent_dim=6,
        similarity="log",
        lambda_l1="cv",
        warmup_epochs=2,
        joint_epochs=4,
        optimizer__weight_decay=1e-3,
        precision="float32",
        device="cpu",
        random_state=0,
        verbose=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        paths = [f"{i}.png" for i in range(len(images))]
        for path, pixels in zip(paths, images, strict=True):
            PIL.Image.fromarray(pixels).save(path)
        clf.fit(paths, labels).save(HERE / f"saved_model_{VERSION}", thumbnails=24, overwrite=True)
        boxes = clf.explain(images)[["x0", "y0", "x1", "y1"]].to_numpy()
    expected = {
        "logits": clf.module_(clf.get_dataset(images).decoded(np.arange(len(images))))[0].tolist(),
        "classes": clf.predict(images).tolist(),
        "boxes": boxes.tolist(),
    }
    file = HERE / f"saved_model_{VERSION}_expected.json"
    file.write_text(json.dumps(expected) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
