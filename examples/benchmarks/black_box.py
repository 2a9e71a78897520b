"""What a ProtoPNet is compared with, trained as plainly as it gets."""

from contextlib import nullcontext

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

PENALTIES = {"C": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]}


def logistic_regression(scoring="accuracy"):
    """Return one for pooled features, which chooses its penalty by 4-fold cross-validation."""
    search = GridSearchCV(LogisticRegression(max_iter=1000), PENALTIES, scoring=scoring, cv=4)
    return make_pipeline(StandardScaler(), search)


def train_network(net, optimizer, epochs, y, batch_of, settled=(), precision=None):
    """Minimise the cross-entropy, with a cosine schedule; `batch_of` maps indices to inputs.

    The layers `settled` stay in evaluation mode; `precision` is a context to compute logits in.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        net.train()
        for layer in settled:
            layer.eval()
        for index in torch.randperm(len(y)).split(32):
            with precision or nullcontext():
                logits = net(batch_of(index))
            loss = nn.functional.cross_entropy(logits.float(), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
