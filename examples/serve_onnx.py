"""Predict and explain with NumPy, Pillow and ONNX Runtime alone: neither torch nor protoclf.

    python examples/serve_onnx.py model.onnx photo.jpg [...] [--top 5]

`model.onnx` is what `protoclf.onnx_export.export_onnx` wrote. Prints the scoring sheet of each
photo: the one that `ProtoPNetClassifier.explain` gives. What went wrong with a photo is said at the
end, with exit status 1.
"""

import argparse
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BOX = ("x0", "y0", "x1", "y1")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Service:
    """A classifier from an ONNX file."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["protoclf"])
        weights, prototypes = self.about["weights"], self.about["prototypes"]
        self.weight = np.zeros((len(self.about["classes"]), len(prototypes["class"])))  # (C, m)
        self.weight[weights["class"], weights["prototype"]] = weights["weight"]

    def explain(self, path):
        """Return (class, logit, probability) of a photo, and the rows of its scoring sheet."""
        pixels, size = model_input(path, self.about["image_size"], self.about["resize"])
        logits, activations, cells, maps = (
            output[0] for output in self.session.run(None, {"images": pixels[None]})
        )
        c = int(logits.argmax())
        contributions = self.weight[c] * activations  # (m,)
        used = np.flatnonzero(contributions)
        rows = [
            {
                "prototype": int(j),
                "prototype_class": self.about["prototypes"]["class"][j],
                "similarity": float(activations[j]),
                "weight": float(self.weight[c, j]),
                "contribution": float(contributions[j]),
                "row": int(cells[j, 0]),
                "col": int(cells[j, 1]),
                **dict(zip(BOX, self.original(self.high_activation(maps[j]), size), strict=True)),
                **self.receptive_field(*cells[j], size),
                "source": self.about["prototypes"]["source"][j],
                **{f"source_{side}": self.about["prototypes"][side][j] for side in BOX},
            }
            for j in used[np.argsort(-contributions[used], kind="stable")]
        ]
        probability = np.exp(logits - logits.max())[c] / np.exp(logits - logits.max()).sum()
        return (self.about["classes"][c], float(logits[c]), float(probability)), rows

    def high_activation(self, similarities, percentile=95):
        """Return the box of what is at least this percentile of a map (H', W'), upsampled."""
        rows, cols = self.about["prototype_size"]
        height, width = similarities.shape
        cells = np.full((height + rows - 1, width + cols - 1), -np.inf)  # the best that covers it
        for i in range(rows):
            for j in range(cols):
                part = cells[i : i + height, j : j + width]
                np.maximum(part, similarities, out=part)
        side = self.about["image_size"]
        down, right = (bicubic(n, side) for n in cells.shape)
        pixels = down @ (cells - cells.min()) @ right.T  # (S, S)
        rank = int(np.ceil(round(percentile / 100 * (pixels.size - 1), 6)))
        threshold = np.partition(pixels, rank, axis=None)[rank] - 1e-5 * pixels.max()
        x, y = (np.flatnonzero((pixels >= threshold).any(axis)) for axis in (0, 1))
        return x[0], y[0], x[-1] + 1, y[-1] + 1

    def receptive_field(self, row, col, size):
        """Return all pixels that a patch sees."""
        fields = self.about["receptive_field"]
        (y0, y1), (x0, x1) = fields["rows"][row], fields["cols"][col]
        box = self.original((x0, y0, x1, y1), size)
        return {f"rf_{side}": value for side, value in zip(BOX, box, strict=True)}

    def original(self, box, size):
        """Map a box from the model's input to whole pixels of the photo."""
        start, shown = shown_part(size, self.about["resize"])
        scale = np.tile(shown / self.about["image_size"], 2)
        x0, y0, x1, y1 = np.tile(start, 2) + scale * box
        low = np.floor(np.array([x0, y0]) + 1e-6).astype(int).clip(0, np.array(size) - 1)
        high = np.ceil(np.array([x1, y1]) - 1e-6).astype(int).clip(low + 1, size)
        return (*low.tolist(), *high.tolist())


def model_input(path, side, resize):
    """Return pixels (3, S, S) uint8 of a photo, and its width and height as it is looked at."""
    with Image.open(path) as image:
        full = image.size
        shrink = min(8, min(full) // (2 * side))
        if shrink >= 2:  # a JPEG much larger than the input is decoded at 1/2, 1/4 or 1/8
            factor = 1 << (shrink.bit_length() - 1)
            image.draft(None, (full[0] // factor, full[1] // factor))
        image.load()
        start, shown = shown_part(full, resize)
        box = np.concatenate([start, start + shown]) / round(full[0] / image.size[0])
        small = image.convert("RGB").resize(
            (side, side), Image.Resampling.BILINEAR, box=tuple(box), reducing_gap=3.0
        )
        turned = image.getexif().get(0x0112) in SIDEWAYS
    pixels = np.asarray(ImageOps.exif_transpose(small)).transpose(2, 0, 1)
    return pixels, full[::-1] if turned else full


def shown_part(size, resize):
    """Return the corner and the sides of the part of a photo that the model sees, in pixels."""
    size = np.array(size, float)
    shown = size if resize == "squash" else np.repeat(size.min(), 2)
    return (size - shown) / 2, shown


def bicubic(n_in, n_out):
    """Return the matrix (n_out, n_in) of bicubic interpolation as torch has it: a = -0.75."""
    at = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    matrix = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        cell = np.floor(at) + tap
        t = np.abs(at - cell)
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        index = cell.clip(0, n_in - 1).astype(int)
        np.add.at(matrix, (np.arange(n_out), index), np.where(t <= 1, near, far))
    return matrix


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="file of export_onnx")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--top", type=int, default=5, help="rows of a sheet")
    args = parser.parse_args()
    service, failed = Service(args.model), []
    for photo in args.photos:
        try:
            (label, logit, probability), rows = service.explain(photo)
        except Exception as error:  # a damaged file can raise nearly anything in a decoder
            failed.append(f"{photo}: {type(error).__name__}: {error}")
            continue
        print(f"{photo}: {label}, logit {logit:.3f}, probability {probability:.3f}")
        for row in rows[: args.top]:
            likeness = "is unlike" if row["similarity"] < 0 else "looks like"
            print(
                "  {contribution:8.3f} = {similarity:.3f} x {weight:.3f}  ({x0}, {y0}, {x1}, {y1})"
                " {likeness} prototype {prototype} of {prototype_class}, ({source_x0}, "
                "{source_y0}, {source_x1}, {source_y1}) of {source}".format(
                    likeness=likeness, **row
                )
            )
        rest = sum(row["contribution"] for row in rows[args.top :])
        print(f"  {rest:8.3f}   {max(0, len(rows) - args.top)} more")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
