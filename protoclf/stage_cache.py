"""What stages without gradients make of a frozen backbone's features, kept under `memory`.

The start and the projection depend on the training images, their classes and weights, on the
network as it comes to them and on a few parameters; not on the last layer's. The candidates of a
search have most of that in common. What they find is looked up by all that it depends on, this
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
from protoclf.features import FitData
from protoclf.fingerprints import code_digest, state_digest
from protoclf.fit_key import described
from protoclf.images import ImageError
from protoclf.net import SkorchProtoPNet

Arrays = Mapping[str, Tensor | np.ndarray]


def remembered(
    net: SkorchProtoPNet, data: FitData, stage: Any, work: Callable[[], Arrays]
) -> Arrays:
    """Return what `work` returns, which depends on nothing but net, data and stage.

    Parameters
    ----------
    net : SkorchProtoPNet
        As it comes to the stage.
    data : FitData
    stage : dataclass
        Its fields are parameters that matter.
    work : callable
        Computes named arrays.

    Returns
    -------
    mapping of str to Tensor or ndarray
    """
    folder, key = net.memory_folder, _key(net, data, stage)
    if folder is None or key is None:
        return work()
    store = ArrayStore(folder / "stages")
    found: Arrays | None = store.get_several(key)
    if found is None:
        found = work()
        if data.images_unchanged():
            store.put_several(key, {name: _array(value) for name, value in found.items()})
    return found


def _key(net: SkorchProtoPNet, data: FitData, stage: Any) -> str | None:
    """Digest all that the result depends on; None where it cannot be kept."""
    if net.memory_folder is None or net.backbone_trained_ or not net.processes.is_alone:
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
        *(code_digest(), data.backbone_fingerprint, state_digest(net.head()), state_digest(labels)),
        *(stage, net.module_.similarity, described(net.prototypes_per_class), net.seed_),
        # what rounding depends on: the batches, and how matrices are multiplied
        *(net.batch_size, described(net.get_params_for("iterator_valid")), described(loader)),
        *(torch.get_num_threads(), torch.get_float32_matmul_precision()),
        *(torch.backends.cpu.get_cpu_capability(), images),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
