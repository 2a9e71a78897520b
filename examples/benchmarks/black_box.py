"""How the black boxes of the benchmarks are trained."""

import torch
from torch import nn

from protoclf.acceleration import has_fast_bfloat16


def train_network(net, optimizer, epochs, y, batch_of):
    """Minimise the cross-entropy of `net(batch_of(index))`, the rates falling along a cosine.

    In bfloat16 on a processor that is fast at it, as a `ProtoPNetClassifier` does.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    half = has_fast_bfloat16("cpu")
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(y)).split(32):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(batch_of(index))
            loss = nn.functional.cross_entropy(logits.float(), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
