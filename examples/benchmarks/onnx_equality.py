"""Whether an exported classifier computes what the original does, and how fast it is.

    python examples/benchmarks/onnx_equality.py --train photos/train --test photos/test

Prints the largest differences between ONNX Runtime and torch over all test photos, from the same
pixels, the share of equal cells and predictions, and how many photos a second each of them does.
Fails if a logit or an activation differs by more than 1e-4.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from measuring import alternate
from photos import photos, protopnet_on

from protoclf.image_dataset import ImageDataset
from protoclf.images import Images
from protoclf.onnx_export import export_onnx

TOLERANCE = 1e-4


def main():
    args = arguments()
    paths, y = photos(args.train, args.quick)
    test, _ = photos(args.test, args.quick)
    rows = [measured(args, paths, y, test, similarity) for similarity in ("cosine", "log")]
    print(pd.DataFrame(rows).T.to_string(header=False))
    worst = max(row[name] for row in rows for name in ("logits", "activations"))
    assert worst <= TOLERANCE, f"differs by {worst:.2e}"


def measured(args, paths, y, test, similarity):
    clf = protopnet_on(
        args.backbone,
        args.image_size,
        similarity=similarity,
        prototypes_per_class=args.prototypes,
        precision="float32",
    ).fit(paths, y)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(clf, Path(folder) / "model.onnx")
        size = file.stat().st_size / 2**20
        session = onnxruntime.InferenceSession(file, session_options(), ["CPUExecutionProvider"])
    pixels = ImageDataset(Images(test), clf.preprocessing_).decoded(np.arange(len(test)))
    batches = pixels.split(args.batch)

    def with_onnx():
        outputs = [session.run(None, {"images": batch.numpy()}) for batch in batches]
        return [np.concatenate(output) for output in zip(*outputs, strict=True)]

    def with_torch():
        return [torch.cat(output).numpy() for output in zip(*map(outputs_of, batches), strict=True)]

    @torch.no_grad()
    def outputs_of(batch):
        module = clf.module_
        z = module.latents(module.features(batch))
        logits, distance, cell = module.compare(z)
        return logits, module.activations(distance), cell, module.similarity_maps(z)

    found, expected = with_onnx(), with_torch()
    seconds = alternate({"torch": with_torch, "ONNX Runtime": with_onnx}, args.rounds)
    differences = [
        float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True) if a.ndim == b.ndim
    ]
    width = expected[3].shape[3]
    cells = found[2][..., 0] * width + found[2][..., 1]
    return {
        "similarity": similarity,
        "photos": len(test),
        "largest logit": float(np.abs(expected[0]).max()),
        "logits": differences[0],
        "activations": differences[1],
        "maps": differences[2],
        "equal cells": float((cells == expected[2]).mean()),
        "equal predictions": float((found[0].argmax(1) == expected[0].argmax(1)).mean()),
        "file, MiB": round(size, 1),
        **{f"{name}, photos/s": round(len(test) / s, 1) for name, s in seconds.items()},
    }


def session_options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", help="folder of class folders to fit on; default: drawn birds")
    parser.add_argument("--test", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--prototypes", type=int, default=10, help="of each class")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    parser.add_argument("--quick", action="store_true", help="drawn birds, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size, args.prototypes, args.rounds = "small_cnn", 48, 2, 1
    return args


if __name__ == "__main__":
    main()
