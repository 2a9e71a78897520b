"""The networks that a ProtoPNet is compared with, trained as plainly as it gets."""

import torch
from torch import nn


def train_network(net, optimizer, epochs, y, batch_of):
    """Minimise the cross-entropy, with a cosine schedule; `batch_of` maps indices to inputs."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(y)).split(32):
            loss = nn.functional.cross_entropy(net(batch_of(index)), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
