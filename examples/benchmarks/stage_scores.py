"""Accuracy and log-loss on images left out, at the points of a fit where they may be lost."""

import torch
from sklearn.metrics import log_loss
from skorch.callbacks import Callback

from protoclf.activations import Activations
from protoclf.features import extract_features
from protoclf.geometry import Preprocessing
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.labels import encode
from protoclf.stages import LastLayer


class StageScores(Callback):
    """Records, in `row`, how good the network is on held-out images before the end of its fit.

    - "before": trained, in front of the last projection, with the fixed last layer of training
    - "before, solved": the same prototypes, with a last layer solved for them: what the network
      would reach without a projection
    - "projected": behind the projection, still with the fixed last layer

    Each as "before accuracy" and "before log_loss", and so on.

    Parameters
    ----------
    train, held_out : (paths, labels)
    """

    def __init__(self, train, held_out):
        self.train = train
        self.held_out = held_out
        self.row = {}
        self._joint_epochs = 0

    def on_epoch_end(self, net, **_):
        """Measure, where this row of the history ends a stage."""
        stage = net.history[-1, "stage"]
        self._joint_epochs += stage == "joint"
        if self._joint_epochs < net.joint_epochs * net.cycles:
            return
        if stage == "joint":
            held_out = self._activations(net, self.held_out)
            self._record(net, "before", held_out, net.module_.last_layer.weight)
            if net.lambda_l1 != "cv":  # which chooses behind the projection
                weight = solved(net, *self._activations(net, self.train))
                self._record(net, "before, solved", held_out, weight)
        elif stage == "projection" and self.row:
            held_out = self._activations(net, self.held_out)
            self._record(net, "projected", held_out, net.module_.last_layer.weight)

    def _record(self, net, name, held_out, weight):
        g, y = held_out
        probability = (g @ weight.to(g).T).double().softmax(1).cpu().numpy()
        scores = accuracy_and_log_loss(y, probability, net.classes_)
        self.row |= {f"{name} {score}": value for score, value in scores.items()}

    def _activations(self, net, data):
        """Activations of some images, under the network as it is now, and their labels."""
        codes = encode(data[1], net.classes_)[1]
        images = ImageDataset(Images(list(data[0])), Preprocessing(net.image_size), codes)
        features = extract_features(net, images)
        with torch.no_grad():
            distance = torch.cat([net.module_.compare(z)[1] for z, _ in net.latents(features)])
            return net.module_.activations(distance), data[1]


def solved(net, g, y):
    """Return the last layer that is optimal for these activations and labels, as a fit has it."""
    codes = torch.from_numpy(encode(y, net.classes_)[1]).to(g.device)
    activations = Activations(g.double(), codes, net.module_.owner, len(net.classes_))
    last_layer = LastLayer.of(net)
    (result,) = activations.solve([last_layer.lasso(net)], lambda_l2=last_layer.ridge(net))
    return result.weight


def accuracy_and_log_loss(y, probability, classes):
    """Return both: the log-loss tells small differences apart sooner."""
    accuracy = float((classes[probability.argmax(1)] == y).mean())
    return {"accuracy": accuracy, "log_loss": log_loss(y, probability, labels=classes)}
