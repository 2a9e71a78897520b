"""Accuracy on images left out, at the points of a fit where it may be lost."""

import torch
from sklearn.metrics import log_loss
from skorch.callbacks import Callback

from protoclf.features import extract_features
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.last_layer import solve_last_layer


class StageAccuracy(Callback):
    """Records, in `accuracy`: before the projection, after it, and with the last layer solved.

    "before, solved" is the accuracy before the projection with a last layer that was solved for
    the prototypes as they were: what the network would reach without a projection.

    Parameters
    ----------
    train, held_out : (paths, labels)
    """

    def __init__(self, train, held_out):
        self.train = train
        self.held_out = held_out

    def on_epoch_end(self, net, **_):
        """Measure, where this row of the history ends a stage."""
        stage = net.history[-1, "stage"]
        if stage == "joint":
            self._joint_epochs = getattr(self, "_joint_epochs", 0) + 1
            if self._joint_epochs < net.joint_epochs * net.cycles:
                return
            train, held_out = self._features(net, self.train), self._features(net, self.held_out)
            self.accuracy = {"before": score(held_out, net.module_.last_layer.weight)}
            self.accuracy["before, solved"] = score(held_out, solved(net, train))
        elif stage in ("projection", "last layer") and hasattr(self, "accuracy"):
            held_out = self._features(net, self.held_out)
            name = "projected" if stage == "projection" else "delivered"
            self.accuracy[name] = score(held_out, net.module_.last_layer.weight)

    def _features(self, net, data):
        """Activations and classes of some images, under the network as it is now."""
        y = torch.from_numpy((data[1][:, None] == net.classes_).argmax(1))
        images = ImageDataset(Images(list(data[0])), Preprocessing(net.image_size), y)
        features = extract_features(net, images)
        with torch.no_grad():
            distance = torch.cat([net.module_.compare(z)[1] for z, _ in net.latents(features)])
            return net.module_.activations(distance), features.y


def solved(net, train):
    """Return the last layer that is optimal for these activations."""
    g, y = train
    owner, n_classes = net.module_.owner, len(net.classes_)
    return solve_last_layer(g.double(), y, owner, net.lambda_l1, n_classes=n_classes).weight


def scored(y, probability, classes):
    """Accuracy and log-loss, of which the latter tells small differences apart sooner."""
    accuracy = float((classes[probability.argmax(1)] == y).mean())
    return {"accuracy": accuracy, "log_loss": log_loss(y, probability, labels=classes)}


def score(data, weight):
    """Accuracy of a last layer."""
    g, y = data
    return float(((g @ weight.to(g).T).argmax(1) == y).float().mean())
