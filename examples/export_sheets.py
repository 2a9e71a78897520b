"""Every test image's scoring sheet in one Parquet file, and a question that pandas answers of it.

    python examples/export_sheets.py
    python examples/export_sheets.py --images FOLDER

The question: which prototypes cause the wrong predictions? A prototype is to blame for a wrong
prediction by what it adds to the predicted class more than to the true one; these differences of
an image sum to the difference of the two logits. Needs pyarrow.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder, make_birds


def main() -> None:
    args = arguments()
    clf, paths, labels = classifier_and_images(args)
    train, test, y_train, y_test = train_test_split(
        paths, labels, stratify=labels, random_state=0, test_size=0.3
    )
    clf.fit(train, y_train)

    sheets = clf.explain(test, classes="all")
    sheets["true_class"] = y_test[sheets["sample"]]
    sheets.to_parquet(args.output)

    sheets = pd.read_parquet(args.output)  # from here on pandas alone
    predicted = sheets[sheets["is_predicted"]].groupby("sample")[["class", "true_class"]].first()
    wrong = predicted.index[predicted["class"] != predicted["true_class"]]
    print(f"{len(predicted)} test images, {len(wrong)} wrong; {len(sheets)} rows in {args.output}")
    of_wrong = sheets[sheets["sample"].isin(wrong)]
    sign = of_wrong["is_predicted"].astype(int) - (of_wrong["class"] == of_wrong["true_class"])
    blame = (of_wrong["contribution"] * sign).groupby(of_wrong["prototype"])
    about = sheets.groupby("prototype")[["prototype_class", "source"]].first()
    table = about.join(blame.agg(blame="sum")).sort_values("blame", ascending=False)
    print(table.head(10).round(2).to_string())


def classifier_and_images(args):
    """Return an unfitted classifier, paths and labels."""
    if args.images:
        clf = ProtoPNetClassifier("resnet18", train_backbone=False, random_state=0)
        return clf, *load_folder(args.images)
    paths, labels, _ = make_birds(tempfile.mkdtemp(), n_per_class=20, image_size=128)
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=128,
        prototypes_per_class=5,
        joint_epochs=args.epochs,
        lr=5e-3,
        backbone_lr=5e-3,
        batch_size=16,
        random_state=0,
    )
    return clf, paths, labels


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument(
        "--output", type=Path, default="sheets.parquet", help="where to write the sheets"
    )
    parser.add_argument("--epochs", type=int, default=10, help="for drawn birds")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder '{args.output.parent}'; make it first")
    return args


if __name__ == "__main__":
    main()
