r"""Whether what an explanation points at is what decides: boxes of sheets, Grad-CAM and LIME.

Two tables. The first covers the boxes of scoring sheets, by `protoclf.metrics.deletion_score`:
how far similarity and logit fall, against boxes of the same size elsewhere. The second covers the
most important pixels of each image by four methods, a tenth and a fifth of the image, and reports
how far the probability of the predicted class falls, against covering random regions of that size.
Grad-CAM and LIME (captum) explain a black box on the same backbone: average pooling and logistic
regression.

    pip install captum
    python examples/benchmarks/attributions.py --output docs/attributions.png
    python examples/benchmarks/attributions.py --images photos/train --test photos/test \
        --backbone efficientnet_lite0
"""

import argparse
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import LayerGradCam, Lime
from photos import backbone_of
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from protoclf import ProtoPNetClassifier
from protoclf.attribution import gradient_maps
from protoclf.datasets import load_folder, make_birds
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.localization import upsample
from protoclf.metrics import cover, deletion_score

SHARES = (0.1, 0.2)  # of the image that is covered
GRID = 7  # LIME's superpixels: squares of an image
CONTROLS = 8


def main():
    args = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        (X, y), (X_test, _) = data(args, folder)
        clf = classifier(args).fit(X, y)
        box = black_box(clf, X, y)
        X_test = np.random.default_rng(0).permutation(np.asarray(X_test, object))[: args.n]
        print(boxes(args, clf, X_test).to_string(index=False))
        print(regions(args, clf, box, X_test).to_string(index=False))
        if args.output:
            draw(clf, box, X_test[:4]).savefig(args.output, dpi=80)


def boxes(args, clf, X):
    """Return the first table; a gradient's boxes are smaller, so that it comes twice."""
    rows = []
    for attribution, percentile in (("upsampled", 95), ("gradient", 95), ("gradient", 85)):
        start = time.perf_counter()
        given = {"attribution": attribution, "percentile": percentile}
        clf.explain(X, top=3, **given)
        seconds = time.perf_counter() - start
        table = deletion_score(clf, X, **given)
        more = {"similarity": table["similarity_drop"] - table["control_similarity_drop"]}
        more["logit"] = table["logit_drop"] - table["control_logit_drop"]
        row = {**given, "area": table["area"].mean(), "explain_s": seconds}
        for name, values in more.items():
            row |= {name: values.mean(), f"{name}_se": values.sem()}
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def regions(args, clf, box, X):
    """Return the second table."""
    dataset = ImageDataset(Images(X), clf.preprocessing_)
    draws = torch.Generator().manual_seed(0)
    rows = []
    for i in range(len(X)):
        image = dataset.__getitems__([i])[0]["images"][0]
        for method, (model, importance) in METHODS.items():
            network = clf.module_ if model == "ProtoPNet" else box
            start = time.perf_counter()
            found = importance(clf, network, image)
            row = {"model": model, "method": method, "s": time.perf_counter() - start}
            noise = torch.rand(CONTROLS, GRID, GRID, generator=draws)
            maps = torch.cat([found[None], upsample(noise, *image.shape[1:])])
            for share in SHARES:
                drop = probability_drop(network, image, maps, share)
                row[f"drop, {share:.0%}"] = drop[0]
                row[f"random, {share:.0%}"] = drop[1:].mean()
            rows.append(row)
    return pd.DataFrame(rows).groupby(["model", "method"], sort=False).mean().round(3).reset_index()


@torch.no_grad()
def probability_drop(network, image, maps, share):
    """Return how far the predicted class's probability falls without the top of each map."""
    k = int(share * maps[0].numel())
    threshold = maps.flatten(1).topk(k, dim=1).values[:, -1]
    probability = scores(
        network, torch.cat([image[None], cover(image, maps >= threshold[:, None, None])])
    )
    c = probability[0].argmax()
    return (probability[0, c] - probability[1:, c]).numpy()


def scores(network, images):
    out = network(images)
    return (out[0] if isinstance(out, tuple) else out).softmax(1)


def sheet_map(clf, network, image):
    """Sum the similarity maps of the predicted class's sheet, times their weights."""
    with torch.no_grad():
        z = network.latents(network.features(image[None]))
        weight = network.last_layer.weight[network.compare(z)[0][0].argmax()]  # (m,)
        used = weight.clamp_min(0).nonzero()[:, 0]
        maps = network.similarity_maps(z, used)[0]  # (k, H', W')
        return upsample((weight[used, None, None] * maps).sum(0, keepdim=True), *image.shape[1:])[0]


def gradient_map(clf, network, image):
    """Sum the gradient maps of the three highest contributions, times their weights."""
    with torch.no_grad():
        logits, distance, _ = network(image[None])
        weight = network.last_layer.weight[logits[0].argmax()].clamp_min(0)
        contribution = weight * network.activations(distance)[0]
    top = contribution.topk(3).indices
    maps = (weight[top, None, None] * gradient_maps(network, image, top)).sum(0)
    cells = nn.functional.adaptive_avg_pool2d(maps[None, None], 4 * GRID)[0]  # blurs
    return upsample(cells, *image.shape[1:])[0]


def grad_cam(clf, network, image):
    c = int(network(image[None])[0].argmax())
    cells = LayerGradCam(network, network.backbone).attribute(image[None].float(), target=c)
    return upsample(cells[0].detach().float(), *image.shape[1:])[0]


def lime(clf, network, image):
    c = int(network(image[None])[0].argmax())
    at = torch.arange(image.shape[1]) * GRID // image.shape[1]
    squares = (GRID * at[:, None] + at)[None, None]
    explainer = Lime(lambda x: network(x).softmax(1), SkLearnRidge(alpha=1.0))
    mean = image.float().mean((1, 2))[None, :, None, None]
    found = explainer.attribute(
        image[None].float(),
        target=c,
        feature_mask=squares,
        baselines=mean.expand(1, *image.shape),
        n_samples=200,
        perturbations_per_eval=25,
    )
    return found[0, 0].float()


METHODS = {
    "scoring sheet, upsampled": ("ProtoPNet", sheet_map),
    "scoring sheet, gradient": ("ProtoPNet", gradient_map),
    "Grad-CAM": ("black box", grad_cam),
    "LIME": ("black box", lime),
}


class BlackBox(nn.Module):
    """The same backbone with average pooling and a linear layer."""

    def __init__(self, module, linear):
        super().__init__()
        self.backbone, self.linear = module.backbone, linear
        self.scale, self.shift = 1 / (255 * module.std), module.mean / module.std

    def forward(self, images):
        """Return the logits of images (n, 3, S, S) in 0..255."""
        return self.linear(self.backbone(images * self.scale - self.shift).mean((2, 3)).float())


@torch.no_grad()
def black_box(clf, X, y):
    dataset = ImageDataset(Images(X), clf.preprocessing_)
    batches = np.array_split(np.arange(len(X)), -(-len(X) // 32))
    features = [clf.module_.features(dataset.__getitems__(b)[0]["images"]) for b in batches]
    pooled = torch.cat([f.float().mean((2, 3)) for f in features]).numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    scaler, regression = (step for _, step in model.fit(pooled, y).steps)
    linear = nn.Linear(pooled.shape[1], len(regression.classes_))
    weight = regression.coef_ / scaler.scale_
    linear.weight.copy_(torch.from_numpy(weight))
    linear.bias.copy_(torch.from_numpy(regression.intercept_ - weight @ scaler.mean_))
    return BlackBox(clf.module_, linear).eval()


def draw(clf, box, X):
    """Draw a row for each image: the image, and what each method points at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * (1 + len(METHODS)), 2.3 * len(X)), layout="constrained")
    axes = figure.subplots(len(X), 1 + len(METHODS), squeeze=False)
    dataset = ImageDataset(Images(X), clf.preprocessing_)
    for i, line in enumerate(axes):
        image = dataset.__getitems__([i])[0]["images"][0]
        picture = image.permute(1, 2, 0).numpy()
        for axis in line:
            axis.set_axis_off()
            axis.imshow(picture)
        for axis, (model, importance) in zip(line[1:], METHODS.values(), strict=True):
            found = importance(clf, clf.module_ if model == "ProtoPNet" else box, image)
            axis.imshow(picture.mean(2), cmap="gray")
            axis.imshow(found.numpy(), cmap="viridis", alpha=0.6)
    axes[0, 0].set_title("image", fontsize=10)
    for axis, method in zip(axes[0, 1:], METHODS, strict=True):
        axis.set_title(method.replace(", ", ",\n"), fontsize=10)
    return figure


def data(args, folder):
    if args.images:
        return load_folder(args.images), load_folder(args.test or args.images)
    n, size = (3, 32) if args.quick else (40, args.image_size)
    train = make_birds(f"{folder}/train", n_per_class=n, image_size=size)
    test = make_birds(f"{folder}/test", n_per_class=n, image_size=size, start=n)
    return train[:2], test[:2]


def classifier(args):
    backbone, norm = backbone_of(args.backbone)
    settings = {"weights": None, "normalization": norm, "verbose": 0, "random_state": 0}
    if args.backbone == "small_cnn":  # from scratch
        settings |= {"joint_epochs": args.epochs, "lr": 5e-3, "backbone_lr": 5e-3, "batch_size": 16}
    else:
        settings |= {"train_backbone": False}
    return ProtoPNetClassifier(
        backbone, image_size=args.image_size, prototypes_per_class=args.prototypes, **settings
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--test", help="another one, to explain")
    parser.add_argument("--backbone", default="small_cnn")
    parser.add_argument("--image-size", type=int, help="default: 128 for birds, 224 for photos")
    parser.add_argument("--prototypes", type=int, default=5, help="per class")
    parser.add_argument("--epochs", type=int, default=40, help="of small_cnn")
    parser.add_argument("-n", type=int, default=60, help="images to explain")
    parser.add_argument("--output", help="where to save a picture of four images")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    args.image_size = args.image_size or (224 if args.images else 128)
    if args.quick:
        args.image_size, args.prototypes, args.epochs, args.n = 32, 3, 2, 6
    return args


if __name__ == "__main__":
    main()
