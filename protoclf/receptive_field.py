"""What a backbone gives and sees: its channels, its grid of cells, and the pixels of each cell.

Nothing is assumed about a backbone but that it maps images (N, 3, S, S) to a feature map
(N, C, h, w); `measure` finds the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from warnings import warn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
_Intervals = tuple[NDArray[np.int64], NDArray[np.int64]]  # first pixel, last pixel + 1


@dataclass(frozen=True)
class BackboneGeometry:
    """The feature map of a backbone, and which pixels each of its cells sees.

    The receptive field is measured when it is first asked for: the support of the gradient of a
    cell with respect to the pixels, on a copy of the backbone in which no gradient can vanish.
    It is the local field. Operations over the whole image that only rescale the map, that is
    global average pooling inside a squeeze-and-excitation gate, and the statistics of group,
    instance and spatial layer normalisation, make every cell depend a little on every pixel;
    they are left out of the boxes, and `global_context` tells that they are there. Any other
    operation over the whole image, such as attention, makes the box of each cell the whole image.

    Parameters
    ----------
    image_size : int
        Side S of the square model input, in pixels.
    channels : int
        Channels C of the feature map.
    height, width : int
        Cells of the feature map.
    stride : (float, float)
        Pixels of the model input from one cell to the next, down and right.
    """

    image_size: int
    channels: int
    height: int
    width: int
    stride: tuple[float, float]
    _structure: nn.Module = field(repr=False, compare=False)

    def cell_box(
        self,
        row: ArrayLike,
        col: ArrayLike,
        rows: int = 1,
        cols: int = 1,
    ) -> tuple[NDArray[np.int64], ...]:
        """Return the pixels that a patch of `rows` x `cols` cells sees.

        Parameters
        ----------
        row, col : int or array of int, shape (...)
            The upper left cell of the patch.
        rows, cols : int, default=1
            Cells of the patch.

        Returns
        -------
        x0, y0, x1, y1 : arrays of int64, shape (...)
            Half-open box in pixels of the model input, within the image.
        """
        (y0, y1), (x0, x1) = self._fields
        row, col = np.broadcast_arrays(row, col)
        _check_inside(row, rows, self.height, "row")
        _check_inside(col, cols, self.width, "col")
        return x0[col], y0[row], x1[col + cols - 1], y1[row + rows - 1]

    def n_patches(self, rows: int, cols: int) -> tuple[int, int]:
        """Return how many patches of `rows` x `cols` cells a column and a row of the map have."""
        return self.height - rows + 1, self.width - cols + 1

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Height and width in pixels of the largest box of a cell, at most `image_size`."""
        (y0, y1), (x0, x1) = self._fields
        return int((y1 - y0).max()), int((x1 - x0).max())

    @property
    def global_context(self) -> bool:
        """Whether cells also depend on the whole image, through gates or normalisation."""
        return self._measured[1]

    @property
    def _fields(self) -> tuple[_Intervals, _Intervals]:
        return self._measured[0]

    @cached_property
    def _measured(self) -> tuple[tuple[_Intervals, _Intervals], bool]:
        try:
            found = _in_fresh_thread(_measure_fields, self._structure, self.image_size)
            cells = tuple(len(first) for first, _ in found[0])
            if cells != (self.height, self.width):
                raise ValueError(f"stand-ins for its layers lead to {cells[0]} x {cells[1]} cells")
            return found
        except Exception as error:
            warn(
                f"The receptive field of the backbone could not be measured ({error}); every cell "
                "is taken to see the whole image.",
                UserWarning,
                stacklevel=4,
            )
            rows, cols = (_whole(n, self.image_size) for n in (self.height, self.width))
            return (rows, cols), True


def measure(backbone: nn.Module, image_size: int) -> BackboneGeometry:
    """Measure the feature map of a backbone, without changing or moving it.

    Parameters
    ----------
    backbone : nn.Module
        Maps (N, 3, S, S) to (N, C, h, w); on any device.
    image_size : int
        Side S of the model input, in pixels.

    Returns
    -------
    BackboneGeometry

    Raises
    ------
    ValueError
        If the image is too small for the backbone, or what comes out is no feature map.

    Examples
    --------
    >>> from protoclf.backbones import SmallCNN
    >>> geometry = measure(SmallCNN(), image_size=128)
    >>> geometry.channels, geometry.height, geometry.width
    (128, 16, 16)
    >>> geometry.receptive_field
    (57, 57)
    """
    channels, height, width = _in_fresh_thread(_map_shape, backbone, image_size)
    return BackboneGeometry(
        image_size=image_size,
        channels=channels,
        height=height,
        width=width,
        stride=_in_fresh_thread(_measure_stride, backbone, image_size, height, width),
        _structure=_in_fresh_thread(_copy_structure, backbone, "cpu"),
    )


def _check_inside(start: NDArray[Any], size: int, cells: int, name: str) -> None:
    if size < 1 or np.any(start < 0) or np.any(start + size > cells):
        raise IndexError(f"The patch of {size} cells from {name} {start} leaves the {cells} cells.")


def _in_fresh_thread(function: Callable[..., T], *args: Any) -> T:
    """Call where no grad mode, default device or tensor mode of the caller is in force."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def _map_shape(backbone: nn.Module, image_size: int) -> tuple[int, int, int]:
    try:
        out = _forward_on_meta(backbone, image_size)
    except Exception:  # some operation has no meta version, or the image is too small
        out = _forward_zeros(backbone, image_size)
    if not isinstance(out, Tensor):
        raise ValueError(f"The backbone must return a tensor (N, C, h, w), got {type(out)}.")
    if out.ndim != 4 or out.shape[0] != 2:
        raise ValueError(
            "The backbone must map images (N, 3, S, S) to a feature map (N, C, h, w); for N = 2 "
            f"it returned shape {tuple(out.shape)}. Pass its convolutional part, for instance "
            "nn.Sequential(*list(model.children())[:-2])."
        )
    if 0 in out.shape:
        raise ValueError(f"image_size={image_size} leaves no cell of the feature map.")
    return out.shape[1], out.shape[2], out.shape[3]


def _forward_on_meta(backbone: nn.Module, image_size: int) -> Any:
    """Run the shapes alone: no memory, no arithmetic."""
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    return _copy_structure(backbone, "meta")(images)


def _forward_zeros(backbone: nn.Module, image_size: int) -> Any:
    net = copy.deepcopy(backbone).eval()
    like = next((p for p in net.parameters()), torch.empty(0))
    with torch.no_grad():
        try:
            return net(like.new_zeros(2, 3, image_size, image_size))
        except Exception as error:
            raise ValueError(
                f"The backbone fails on images of shape (2, 3, {image_size}, {image_size}); is "
                f"image_size={image_size} too small for it? {error}"
            ) from error


def _measure_stride(
    backbone: nn.Module, image_size: int, height: int, width: int
) -> tuple[float, float]:
    """Count the cells that a wider margin of the image adds; by proportion where none can."""
    margin = 6720  # a multiple of 2^6, 3, 5 and 7
    try:
        larger = _forward_on_meta(backbone, image_size + margin)
        more_rows, more_cols = larger.shape[2] - height, larger.shape[3] - width
        return margin / more_rows, margin / more_cols
    except Exception:
        return image_size / height, image_size / width


def _copy_structure(backbone: nn.Module, device: str) -> nn.Module:
    """Copy the architecture: each weight becomes a one seen as an array of the weight's shape."""
    memo: dict[int, Any] = {}
    for p in backbone.parameters():
        memo[id(p)] = nn.Parameter(_ones_like(p, device), requires_grad=False)
    for b in backbone.buffers():
        memo[id(b)] = _ones_like(b, device) if _is_weight(b) else b.detach().to(device, copy=True)
    return copy.deepcopy(backbone, memo).eval()


def _is_weight(buffer: Tensor) -> bool:
    """Whether values do not matter (other than, say, indices), or there are none to read."""
    has_values = type(buffer) is Tensor and not buffer.is_meta
    return buffer.is_floating_point() or not has_values


def _ones_like(weight: Tensor, device: str) -> Tensor:
    dtype = torch.float64 if device == "cpu" and weight.is_floating_point() else weight.dtype
    return torch.ones((), dtype=dtype, device=device).expand(weight.shape)


# The receptive field ---------------------------------------------------------------------------
# A cell sees a pixel if a change of the pixel can change the cell. The gradient tells, provided
# that none vanishes by accident (a ReLU that is off, a maximum elsewhere, weights that cancel) or
# by underflow (hence float64). So each operation is run as a stand-in that passes on positive
# gradients over the same windows: a convolution or a pooling as an average, an activation or a
# normalisation as the identity.


def _measure_fields(
    structure: nn.Module, image_size: int
) -> tuple[tuple[_Intervals, _Intervals], bool]:
    """Return pixel rows [y0, y1) of each row of cells, the same of columns, and global context."""
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.float64, requires_grad=True)
    with _StandIns() as stand_ins:
        z = structure(image)  # (1, C, h, w)
    z = (z * _factors(z.shape[1], 3)).sum(dim=(0, 1))  # (h, w)
    height, width = z.shape
    rows, cols = _whole(height, image_size), _whole(width, image_size)
    for i in range(max(height, width)):  # down the diagonal: each row and each column once
        row, col = min(i, height - 1), min(i, width - 1)
        _write_support(z[row, col], image, (rows, row), (cols, col))
    return (rows, cols), stand_ins.global_context


def _write_support(
    cell: Tensor, image: Tensor, rows: tuple[_Intervals, int], cols: tuple[_Intervals, int]
) -> None:
    """Write the first and last row and column of pixels with a gradient of `cell`."""
    if not cell.requires_grad:
        return
    (gradient,) = torch.autograd.grad(cell, image, retain_graph=True, allow_unused=True)
    if gradient is None:
        return
    seen = (gradient != 0)[0].any(dim=0)  # (S, S)
    for (intervals, i), dim in ((rows, 1), (cols, 0)):
        positions = seen.any(dim=dim).nonzero()
        if len(positions):
            intervals[0][i], intervals[1][i] = int(positions[0]), int(positions[-1]) + 1


def _whole(cells: int, image_size: int) -> _Intervals:
    return np.zeros(cells, dtype=np.int64), np.full(cells, image_size, dtype=np.int64)


class _StandIns(TorchFunctionMode):
    """Runs each operation of torch, wherever it is called, as its stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.global_context = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in _GATES:
            return _one(args[0])
        if name in _LOCAL or name in _NORMALISATIONS:
            self.global_context |= name in _NORMALISATIONS and _over_space(name, args)
            return args[0]
        out = _WINDOWS.get(name, function)(*args, **kwargs)
        if name in _POOLINGS and _is_pooled(args[0], out):
            self.global_context = True
            return torch.ones_like(out)
        return out


_LOCAL = {
    *("batch_norm", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu"),
    *("elu", "elu_", "selu", "celu", "gelu", "silu", "mish", "softplus", "threshold"),
    *("hardtanh", "hardtanh_", "hardswish", "clamp", "clamp_"),
}
_GATES = {"sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_"}
_NORMALISATIONS = {"group_norm", "instance_norm", "layer_norm"}
_POOLINGS = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax"}


def _over_space(name: str, args: tuple[Any, ...]) -> bool:
    return name != "layer_norm" or len(args[1]) > 1  # over channels alone: one number


def _is_pooled(x: Tensor, out: Tensor) -> bool:
    """Whether maps (N, C, h, w) of several cells became (N, C) or (N, C, 1, 1)."""
    maps = x.ndim == 4 and x.shape[2] * x.shape[3] > 1
    return maps and out.numel() == x.shape[0] * x.shape[1] and out.shape[:2] == x.shape[:2]


def _one(x: Tensor) -> Tensor:
    """Return ones with the gradient of `x`: no chain of layers can overflow or saturate."""
    return x - x.detach() + 1


def _conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    kernel = _uniform_kernel(x, weight)
    out = F.conv2d(x.mean(1, keepdim=True), kernel, None, stride, padding, dilation)
    return _one(out) * _factors(weight.shape[0], 3)  # (N, C, h, w)


def _conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    out = F.conv_transpose2d(
        x.mean(1, keepdim=True), _uniform_kernel(x, weight), None, stride, padding,
        output_padding, 1, dilation,
    )  # fmt: skip
    return _one(out) * _factors(weight.shape[1] * groups, 3)  # (N, C, h, w)


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    return _one(x.mean(-1, keepdim=True)) * _factors(weight.shape[0], 1)  # (..., C)


def _max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    if dilation in (1, (1, 1)):
        return _one(F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode))
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    kernel = x.new_ones(x.shape[1], 1, *sides)
    rows, cols = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode).shape[2:]
    x = F.pad(x, (0, x.shape[3], 0, x.shape[2]))  # for windows that end beyond it
    stride = kernel_size if stride is None else stride
    out = F.conv2d(x, kernel, None, stride, padding, dilation, x.shape[1])
    return _one(out[..., :rows, :cols])


def _max_pool2d_with_indices(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    _, indices = F.max_pool2d(x, *args, **kwargs | {"return_indices": True})
    return _max_pool2d(x, *args, **kwargs), indices


_WINDOWS: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "max_pool2d_with_indices": _max_pool2d_with_indices,
    "adaptive_max_pool2d": lambda x, size, **_: _one(F.adaptive_avg_pool2d(x, size)),
}


def _uniform_kernel(x: Tensor, weight: Tensor) -> Tensor:
    window = weight.shape[2:]
    return x.new_full((1, 1, *window), 1 / window.numel())


def _factors(channels: int, ndim: int) -> Tensor:
    """Spread numbers between 0.5 and 1.5 over the first axis, so that no two channels cancel."""
    golden = torch.arange(1, channels + 1, dtype=torch.float64) * 0.6180339887498949
    return (golden % 1 + 0.5).reshape(-1, *[1] * (ndim - 1))
