"""The networks that a ProtoPNet is compared with, trained as plainly as it gets."""

from contextlib import nullcontext

import torch
from torch import nn


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
