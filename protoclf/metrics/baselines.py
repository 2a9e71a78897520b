"""What a metric is worth by chance: the same classifier with prototypes at random patches."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from protoclf.activations import Activations
from protoclf.features import FeatureDataset, FitData
from protoclf.fitted import check_classifier
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.localization import pair_boxes
from protoclf.metrics.streams import codes_of
from protoclf.patch_search import view_activations
from protoclf.projection import Sources, read_patches
from protoclf.rules import SEED
from protoclf.self_matches import replace_self_matches
from protoclf.stages import LastLayer
from protoclf.torch_datasets import unpacked

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier


@torch.no_grad()
def random_prototypes(
    clf: ProtoPNetClassifier, X: Any, y: ArrayLike, *, random_state: int = 0
) -> ProtoPNetClassifier:
    """Return the classifier with its prototypes moved to random patches of their classes.

    Backbone and add-on layers stay as they are. The last layer is solved again, with the same
    penalty. On its own image, the activation of each prototype is replaced by the median of its
    class, as with ``self_matches="median"``.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one.
    X, y : images and labels
        Images from which patches are drawn, with replacement, and on which the last layer is
        solved: the images that are measured, or the training images. A class without an image in X
        draws from all images.
    random_state : int, default=0

    Returns
    -------
    ProtoPNetClassifier
        A new one, fitted. It has seen the labels of X, so its accuracy on X says nothing.
    """
    SEED.check(random_state=random_state)
    check_classifier(clf)
    X, y = unpacked(X, y)
    images = Images(X)
    codes = codes_of(clf, y, len(images))
    drawn = copy.deepcopy(clf)
    drawn.prepare_processor()
    dataset = ImageDataset(images, drawn.preprocessing_, codes)
    data = FitData(drawn, dataset, None)
    sources = _draw(drawn, codes, np.random.default_rng(random_state))
    box = _place(drawn, data.train_features, sources)
    _, right = drawn.geometry_.n_patches(*drawn.module_.prototype_size)
    row, col = np.divmod(sources.cell, right)
    moved = sources.distance
    drawn.sources_ = {"image": sources.image, "row": row, "col": col, "box": box, "moved": moved}
    drawn.activations_ = _activations(drawn, data, sources)
    LastLayer(clf.lambda_l1_, "keep", clf.last_layer_result_.lambda_l2).solve(drawn)
    drawn._keep_sources(dataset)
    for name in ("activations_", "last_layer_path_"):  # neither is of the training images
        drawn.__dict__.pop(name, None)
    return drawn


def _draw(clf: ProtoPNetClassifier, codes: np.ndarray, rng: np.random.Generator) -> Sources:
    """Draw an image and a patch of it for each prototype."""
    owner = clf.module_.owner.cpu().numpy()
    image = np.zeros(len(owner), np.int64)
    for c in np.unique(owner):
        mine, own = owner == c, np.flatnonzero(codes == c)
        image[mine] = rng.choice(own if len(own) else len(codes), mine.sum())
    down, right = clf.geometry_.n_patches(*clf.module_.prototype_size)
    cell = rng.integers(0, down * right, len(owner))
    return Sources(image, cell, np.zeros(len(owner)))


def _place(clf: ProtoPNetClassifier, features: FeatureDataset, sources: Sources) -> np.ndarray:
    """Write the patches into the prototypes; return their boxes (m, 4), on the model input."""
    module, side = clf.module_, clf.preprocessing_.image_size
    box = np.zeros((len(sources.image), 4))
    for index, patches, z, sample in read_patches(
        clf.latents(features), sources, module.prototype_size
    ):
        order = sample.argsort(kind="stable")
        mine, where = torch.from_numpy(index[order]), torch.from_numpy(sample[order])
        module.prototypes[mine] = patches[order]
        found = pair_boxes(module, z, where.to(z.device), mine.to(z.device), side, 95)
        box[index[order]] = found.cpu().numpy()
    return box


def _activations(clf: ProtoPNetClassifier, data: FitData, sources: Sources) -> Activations:
    """Return the activations of the images, those of prototypes on their own images replaced."""
    module, y = clf.module_, data.train_y
    distance = torch.cat([module.nearest(z)[0] for z, _ in clf.latents(data.train_features)])
    image = torch.from_numpy(sources.image)
    weights = clf.weights_of(y.numpy(), clf.classes_, None)
    weight = None if weights is None else torch.from_numpy(weights)
    g, views = module.activations(distance), view_activations(clf, data)
    found = Activations(g, y, module.owner, len(clf.classes_), weight, views).cpu()
    return found.changed(lambda g: replace_self_matches(g, y, y[image], image))
