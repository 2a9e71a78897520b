"""A fitted classifier as one ONNX file: a service predicts and explains without torch.

Needs ``pip install "protoclf[onnx]"``. N images, C classes, m prototypes, H' x W' patches of the
latent map.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclf.explanation import BOX
from protoclf.files import file_to_write, replaced
from protoclf.fitted import check_classifier
from protoclf.network import ProtoPNet

if TYPE_CHECKING:
    from protoclf.classifier import ProtoPNetClassifier

METADATA_KEY = "protoclf"
OUTPUTS = ("logits", "activations", "cells", "maps")

_FORMAT = 1  # of the description
_TOLERANCE = 1e-3  # of the self-check: absolute, and relative to the largest value


def export_onnx(clf: ProtoPNetClassifier, path: str | os.PathLike[str]) -> Path:
    """Write a fitted classifier to an ONNX file, with all that its scoring sheets need.

    The graph takes pixels as they come from resizing, any number of images at a time, and
    computes in float32 whatever `precision` is; the prototype layer of "log" similarity in
    float64, as near matches ask for. ``examples/serve_onnx.py`` predicts and explains from the
    file with NumPy, Pillow and ONNX Runtime alone.

    Parameters
    ----------
    clf : ProtoPNetClassifier
        A fitted one. Of an ensemble, export each member: their logits add up.
    path : str or path
        Where to write. A file there is replaced only once the new one is complete and checked.

    Returns
    -------
    Path
        The file written. Its input and outputs:

        - images (N, 3, S, S), uint8 : RGB, resized to `image_size` as `resize` says
        - logits (N, C), float32
        - activations (N, m), float32 : the similarity of each prototype's nearest patch
        - cells (N, m, 2), int64 : row and column of that patch
        - maps (N, m, H', W'), float32 : the similarity of every patch

        Its metadata hold a JSON object under the key "protoclf":

        - format : 1
        - classes : the C labels
        - image_size, resize : what becomes of an image before the graph
        - prototype_size : H1 and W1
        - receptive_field : the pixels of the input that a patch sees, half-open; "rows" has
          (y0, y1) for each of the H' rows, "cols" (x0, x1) for each of the W' columns
        - weights : the entries of the last layer other than 0, as lists "class", "prototype",
          "weight" of equal length; classes and prototypes are indices
        - prototypes : lists of length m: "class", the owner's label, and "source",
          "source_index", "x0", "y0", "x1", "y1", what the prototype is a part of

    Raises
    ------
    ImportError
        If a package that this needs is not installed.
    RuntimeError
        If the backbone cannot be exported, or ONNX Runtime computes something else than torch.

    Examples
    --------
    >>> from protoclf import ProtoPNetClassifier
    >>> from protoclf.datasets import make_birds
    >>> from protoclf.onnx_export import export_onnx
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> paths, labels, _ = make_birds(folder, n_per_class=4, image_size=64)
    >>> clf = ProtoPNetClassifier("small_cnn", image_size=64, prototypes_per_class=2,
    ...                           joint_epochs=1, random_state=0, verbose=0).fit(paths, labels)
    >>> export_onnx(clf, folder + "/birds.onnx").name
    'birds.onnx'
    """
    _import_runtime()
    check_classifier(clf)
    target = file_to_write(path)
    exported = _Exported(clf.plain_module).eval()
    program = _program(exported, clf.preprocessing_.image_size)
    program.model.metadata_props[METADATA_KEY] = json.dumps(_description(clf), allow_nan=False)
    with replaced(target) as temporary:
        program.save(temporary, external_data=False)
        _check(temporary, exported, clf.preprocessing_.image_size)
    return target


class _Exported(nn.Module):
    """A ProtoPNet whose prototype layer is plain tensor algebra: no blocks, no operators of ours.

    All distances at once, expanded as ||z||^2 - 2 z.p + ||p||^2 like those of `distance_maps`.
    In float32 that loses the digits that the logarithm of a near match needs, but not those of a
    cosine.
    """

    def __init__(self, network: ProtoPNet) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu()
        self.network.half_precision = False
        self.network.channels_last = False
        self.wide = torch.float64 if network.similarity == "log" else torch.float32

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what `OUTPUTS` names, for images (N, 3, S, S) uint8."""
        net = self.network
        z = net.latents(net.features(images))  # (N, D, H, W)
        rows, cols = net.prototype_size
        patches = z.flatten(2) if rows == cols == 1 else F.unfold(z, (rows, cols))  # (N, K, L)
        x = patches.to(self.wide)
        p = net.scaled_prototypes().flatten(1).to(self.wide)  # (m, K)
        squares = x.square().sum(1)[:, None] + p.square().sum(1)[:, None]  # (N, m, L)
        distances = (squares - 2 * p @ x).clamp(min=0)  # (N, m, L)
        nearest, cell = distances.min(2)  # (N, m) each
        g = net.activations(nearest).float()  # (N, m)
        width = z.shape[3] - cols + 1
        cells = torch.stack([cell // width, cell % width], dim=2)  # (N, m, 2)
        maps = net.activations(distances).float().unflatten(2, (-1, width))  # (N, m, H', W')
        return net.last_layer(g), g, cells, maps


def _program(exported: _Exported, side: int) -> torch.onnx.ONNXProgram:
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="cpu")
    try:
        program = torch.onnx.export(
            exported,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise RuntimeError(
            "The network cannot be exported to ONNX: its backbone does what torch.onnx cannot "
            f"express for batches of any size.\n{error}"
        ) from error
    assert program is not None, "the exporter that torch.export feeds returns its program"
    return program


def _description(clf: ProtoPNetClassifier) -> dict[str, Any]:
    """Return what a service must know beside the graph, as JSON takes it."""
    network, geometry, table = clf.plain_module, clf.geometry_, clf.prototypes_
    rows, cols = network.prototype_size
    down, right = map(np.arange, geometry.n_patches(rows, cols))
    _, y0, _, y1 = geometry.cell_box(down, 0, rows, cols)  # (H',) each
    x0, _, x1, _ = geometry.cell_box(0, right, rows, cols)  # (W',) each
    classes, prototypes = np.nonzero(clf.coef_)
    return {
        "format": _FORMAT,
        "classes": clf.classes_.tolist(),
        "image_size": clf.preprocessing_.image_size,
        "resize": clf.preprocessing_.resize,
        "prototype_size": [rows, cols],
        "receptive_field": {
            "rows": np.stack([y0, y1], axis=1).tolist(),
            "cols": np.stack([x0, x1], axis=1).tolist(),
        },
        "weights": {
            "class": classes.tolist(),
            "prototype": prototypes.tolist(),
            "weight": clf.coef_[classes, prototypes].tolist(),
        },
        "prototypes": table[["class", "source", "source_index", *BOX]].to_dict("list"),
    }


def _check(path: Path, exported: _Exported, side: int) -> None:
    """Compare ONNX Runtime with the network itself, on random pixels in a batch of another size."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, side, side), dtype=np.uint8)
    session = _import_runtime().InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(OUTPUTS[:2], {"images": pixels})
    with torch.no_grad():
        logits, distance, _ = exported.network(torch.from_numpy(pixels))
    expected = (logits.numpy(), exported.network.activations(distance).numpy())
    for name, got, wanted in zip(OUTPUTS[:2], found, expected, strict=True):
        off = float(np.abs(got - wanted).max())
        if not off <= _TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise RuntimeError(
                f"The exported model computes other {name} than torch, by up to {off:.3g}: the "
                "backbone has an operation that torch.onnx or ONNX Runtime gets wrong. Nothing "
                "was written."
            )


def _import_runtime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  for torch.onnx
    except ImportError as error:
        raise ImportError(
            "export_onnx needs onnx, onnxscript and onnxruntime; install them: "
            'pip install "protoclf[onnx]"'
        ) from error
    return onnxruntime
