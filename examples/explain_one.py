"""Why is this image what the classifier says it is? One image, as a table and as a picture.

    python examples/explain_one.py                                    # a drawn bird
    python examples/explain_one.py --images FOLDER photo.jpg          # your photos

Prints the totals of the likeliest two classes and what separates them, prototype by prototype,
and writes explanation.png.
"""

import argparse
import tempfile

import matplotlib

from protoclf import ProtoPNetClassifier
from protoclf.datasets import load_folder, make_birds
from protoclf.plotting import plot_explanation
from protoclf.sheets import class_totals, compare


def main() -> None:
    args = arguments()
    if args.images:
        paths, labels = load_folder(args.images)
        clf = ProtoPNetClassifier("resnet18", train_backbone=False, random_state=0)
    else:
        folder = tempfile.mkdtemp()
        paths, labels, _ = make_birds(folder, n_per_class=20, image_size=128)
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
    image, training = (args.image, paths) if args.image else (paths[0], paths[1:])
    clf.fit(training, labels[-len(training) :])

    sheet = clf.explain([image], classes="top2")
    print(class_totals(sheet).drop(columns=["sample", "path"]).to_string(index=False))
    print(compare(sheet).head(8).drop(columns=["sample", "path"]).to_string(index=False))
    matplotlib.use("Agg")
    plot_explanation(clf, image).figure_.savefig(args.output)
    print(f"Saved {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", nargs="?", help="default: the first of the training images")
    parser.add_argument("--images", help="folder of class folders to learn from")
    parser.add_argument("--output", default="explanation.png", help="where to save the picture")
    parser.add_argument("--epochs", type=int, default=20, help="for drawn birds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
