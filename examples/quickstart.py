"""Train a ProtoPNet, compare it with a black box, and read one of its scoring sheets.

    python examples/quickstart.py                      # on birds that it draws itself
    python examples/quickstart.py --images FOLDER      # on a folder with a folder for each class

Writes sheet.csv and explanation.png to the folder quickstart_output (or --output).
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.augmentation import AugmentedDataset, augmentation_of
from protoclf.backbones import SmallCNN
from protoclf.datasets import load_folder, make_birds
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.parameters import normalization
from protoclf.plotting import plot_explanation

IMAGE_SIZE = 128  # pixels
SETTINGS = {"batch_size": 8, "lr": 2e-3, "optimizer": torch.optim.Adam, "train_split": None}
SHEET_COLUMNS = ["prototype", "similarity", "weight", "contribution", "x0", "y0", "x1", "y1"]


def main() -> None:
    args = arguments()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    train, test = load(args, output)
    print(f"{len(train[0])} training images, {len(test[0])} test images\n", flush=True)

    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=IMAGE_SIZE,
        prototypes_per_class=args.prototypes,
        warmup_epochs=0,  # the backbone starts from scratch: there is nothing to keep frozen
        joint_epochs=args.epochs,
        backbone_lr=SETTINGS["lr"],
        lambda_l1=1e-3,
        distinct="patches",  # no part of an image twice in a sheet
        random_state=args.seed,
        **SETTINGS,
    )
    start = time.perf_counter()
    clf.fit(*train)
    print(f"\nProtoPNet fitted in {time.perf_counter() - start:.0f} s; now a black box", flush=True)
    baseline = accuracy_of_black_box(train, test, args.epochs, args.seed)
    print(f"test accuracy, ProtoPNet                       {clf.score(*test):.3f}")
    print(f"test accuracy, black box on the same backbone  {baseline:.3f}")
    explain(clf, test, output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder with a folder of images for each class")
    parser.add_argument("--output", default="quickstart_output", help="where to write")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of joint training")
    parser.add_argument("--prototypes", type=int, default=10, help="prototypes per class")
    parser.add_argument("--per-class", type=int, default=40, help="birds of a class to train on")
    parser.add_argument("--seed", type=int, default=0, help="of either training")
    return parser.parse_args()


def load(args: argparse.Namespace, output: Path):
    """Return (paths, labels) for training and for testing."""
    if args.images is None:
        n = args.per_class
        print("Drawing birds: eight classes, in four pairs of twins that differ in one part")
        train = make_birds(output / "birds" / "train", n, IMAGE_SIZE)
        test = make_birds(output / "birds" / "test", 20, IMAGE_SIZE, start=n)  # other pictures
        return train[:2], test[:2]
    paths, labels = load_folder(args.images)
    a, b, y_a, y_b = train_test_split(
        paths, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return (a, y_a), (b, y_b)


def accuracy_of_black_box(train, test, epochs: int, seed: int) -> float:
    """Train the same backbone with pooling and a linear layer, on the same augmented images."""
    torch.manual_seed(seed)
    classes, targets = np.unique(train[1], return_inverse=True)
    preprocessing = Preprocessing(IMAGE_SIZE)
    images = ImageDataset(Images(train[0]), preprocessing, targets).keep()
    net = NeuralNetClassifier(
        BlackBox,
        module__n_classes=len(classes),
        criterion=nn.CrossEntropyLoss,
        max_epochs=epochs,
        iterator_train__shuffle=True,
        iterator_train__collate_fn=ImageDataset.collate,
        iterator_valid__collate_fn=ImageDataset.collate,
        callbacks=[LRScheduler("CosineAnnealingLR", T_max=epochs)],
        device="cuda" if torch.cuda.is_available() else "cpu",
        verbose=0,
        **SETTINGS,
    )
    net.fit(AugmentedDataset(images, augmentation_of("default")), None)
    predicted = net.predict(ImageDataset(Images(test[0]), preprocessing))
    return float(np.mean(classes[predicted] == test[1]))


class BlackBox(nn.Module):
    """The backbone, global max-pooling and a linear layer."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalization("imagenet"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.backbone = SmallCNN()
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, n_classes))

    def forward(self, images, index=None):
        """Return the logits of uint8 images; which ones they are is not used."""
        return self.head(self.backbone((images / 255 - self.mean) / self.std))


def explain(clf: ProtoPNetClassifier, test, output: Path) -> None:
    """Print and save the sheet of the first test image that is classified rightly."""
    right = np.flatnonzero(clf.predict(test[0]) == test[1])
    index = int(right[0]) if len(right) else 0
    sheet = clf.explain([test[0][index]], classes="top2", attribution="gradient")
    print(f"\nScoring sheet of {test[0][index]}, which is a {test[1][index]}:")
    for name, rows in sheet.groupby("class", sort=False):
        first = rows.iloc[0]
        verdict = "predicted" if first["is_predicted"] else "its rival"
        print(f"\n{verdict}: {name}, probability {first['probability']:.3f}")
        print(rows[SHEET_COLUMNS].to_string(index=False, float_format="{:.2f}".format))
        print(f"sum of contributions {rows['contribution'].sum():.4f} = logit {first['logit']:.4f}")
    sheet.to_csv(output / "sheet.csv", index=False)
    matplotlib.use("Agg")
    display = plot_explanation(clf, test[0][index], attribution="gradient")
    display.figure_.savefig(output / "explanation.png", dpi=100)
    print(f"\nSaved {output / 'sheet.csv'} and {output / 'explanation.png'}")


if __name__ == "__main__":
    main()
