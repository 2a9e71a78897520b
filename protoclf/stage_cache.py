"""What stages without gradients make of a frozen backbone's features, kept under `memory`.

The start and the projection depend on the training images, their classes, weights and groups, on
the network as it comes to them and on a few parameters; not on the last layer's. The candidates of
a search have most of that in common. What they find is looked up by all that it depends on, this
package's code included, so that nothing that is found can be out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclf.array_store import ArrayStore
from protoclf.features import Arrays, FitData
from protoclf.fingerprints import code_digest, described, state_digest
from protoclf.image_errors import ImageError
from protoclf.net import SkorchProtoPNet
from protoclf.torch_settings import float32_matmul_precision

LARGEST = 2**27
"""Bytes of a result that is worth keeping (128 MiB)."""


def remembered(
    net: SkorchProtoPNet,
    data: FitData,
    what: Any,
    state: Mapping[str, Tensor],
    work: Callable[[], Arrays],
) -> Arrays:
    """Return what `work` returns, from an earlier fit if possible.

    Parameters
    ----------
    net : SkorchProtoPNet
        Of its parameters, those of loading features and its seed are seen to here.
    data : FitData
    what : object
        Name and all other parameters of the work, as its `repr` tells them.
    state : mapping of str to Tensor
        What the work uses of the network beside the backbone.
    work : callable
        Computes named arrays, from training images, their classes and weights, and the above.

    Returns
    -------
    mapping of str to Tensor or ndarray
    """
    folder, key = net.memory_folder, _key(net, data, what, state)
    if folder is None or key is None:
        return work()
    store = ArrayStore(folder / "stages")
    found: Arrays | None = store.get_several(key)
    if found is None:
        found = work()
        size = sum(value.nbytes for value in found.values())
        if size <= LARGEST and data.train_features.known:
            store.put_several(key, {name: _array(value) for name, value in found.items()})
    return found


def _key(net: SkorchProtoPNet, data: FitData, what: Any, state: Mapping[str, Tensor]) -> str | None:
    """Digest all that the result depends on; None where it cannot be kept."""
    if net.memory_folder is None or net.backbone_trained_ or net.processes.count > 1:
        return None
    try:
        images = data.image_digests
    except ImageError:  # the stage itself says what is wrong
        return None
    labels = {"y": data.train_y}
    if data.train_weight is not None:
        labels["weight"] = data.train_weight
    loader = net.iterator_valid
    parts = (
        *(code_digest(), data.backbone_fingerprint, state_digest(state), state_digest(labels)),
        *(what, net.module_.similarity, net.seed_),
        # what rounding depends on: the batches, and how matrices are multiplied
        *(net.batch_size, net.images_at_once()),
        *(described(net.get_params_for("iterator_valid")), described(loader)),
        *(torch.get_num_threads(), float32_matmul_precision()),
        *(torch.backends.cpu.get_cpu_capability(), images),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
