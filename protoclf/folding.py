"""Batch-norm layers that keep their statistics, folded into the convolutions before them.

You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024: the same
function with the same gradients, and a feature map fewer to compute and to keep for each pair.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Folds = tuple[tuple[str, str], ...]
"""Pairs of a convolution and the batch-norm layer behind it, by their names in the backbone."""

Layer = TypeVar("Layer", bound=nn.Module)

_TOLERANCE = 1e-6  # of the largest value, in float64


def find_folds(backbone: nn.Module, image_size: int) -> Folds:
    """Return the pairs whose fold changes neither the output nor a gradient of the backbone.

    Tried out on a copy of it in float64, in training mode but for the batch-norm layers, and with
    made-up statistics: those of a new layer would hide a mistake. Where the backbone does not run
    so, or the fold changes anything, there are none.
    """
    return _found(_tried_out, backbone, image_size)


def find_evaluation_folds(backbone: nn.Module, image_size: int) -> Folds:
    """Return the pairs whose fold does not change what the backbone finds in evaluation mode.

    Tried out like those of `find_folds`. None where hooks watch a layer: they would see a copy.
    """
    if any(map(_is_watched, backbone.modules())):
        return ()
    return _found(_tried_out_in_evaluation, backbone, image_size)


def folded_copy(backbone: nn.Module, folds: Folds) -> nn.Module:
    """Return a copy for evaluation in which convolutions do what batch-norm layers did."""
    copied = copy.deepcopy(backbone).requires_grad_(False).eval()
    for name, norm_name in folds:
        convolution, norm = _as(nn.Conv2d, copied, name), _as(nn.BatchNorm2d, copied, norm_name)
        weight, bias = _folded(convolution, norm)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        parent, _, own = norm_name.rpartition(".")
        setattr(copied.get_submodule(parent), own, nn.Identity())
    return copied.requires_grad_(False)


@contextmanager
def folded(
    backbone: nn.Module, folds: Folds, keep_statistics: Collection[str], shared: bool = False
) -> Iterator[None]:
    """Let the convolutions do what those of the batch-norm layers do that keep their statistics.

    A `shared` fold is for several passes forward and back: it is computed once, and gradients
    reach the parameters on leaving.
    """
    pairs = [
        (_as(nn.Conv2d, backbone, convolution), _as(nn.BatchNorm2d, backbone, norm))
        for convolution, norm in folds
        if norm in keep_statistics
    ]
    try:
        fold = [tensor for pair in pairs for tensor in _folded(*pair)]
        used = [t.detach().requires_grad_(t.requires_grad) for t in fold] if shared else fold
        for (convolution, norm), weight, bias in zip(pairs, used[::2], used[1::2], strict=True):
            vars(convolution).update(weight=weight, bias=bias)  # found before the parameters
            vars(norm)["forward"] = _identity
        yield
        if shared:
            _carry_on([(a, b.grad) for a, b in zip(fold, used, strict=True) if b.grad is not None])
    finally:
        for convolution, norm in pairs:
            for layer, name in ((convolution, "weight"), (convolution, "bias"), (norm, "forward")):
                vars(layer).pop(name, None)


def _carry_on(gradients: list[tuple[Tensor, Tensor]]) -> None:
    """Carry gradients of tensors on to the parameters that they were computed from."""
    if gradients:
        tensors, of_tensors = zip(*gradients, strict=True)
        torch.autograd.backward(tensors, of_tensors)


def _as(kind: type[Layer], backbone: nn.Module, name: str) -> Layer:
    layer = backbone.get_submodule(name)
    assert isinstance(layer, kind)
    return layer


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean
    if convolution.bias is not None:
        mean = mean - convolution.bias
    bias = -mean * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return convolution.weight * scale[:, None, None, None], bias


def _identity(x: Tensor) -> Tensor:
    return x


def _found(
    tried_out: Callable[[nn.Module, Tensor], Folds], backbone: nn.Module, image_size: int
) -> Folds:
    """Return the folds that a trial on a copy in float64 finds, with made-up statistics."""
    if not any(type(layer) is nn.BatchNorm2d for layer in backbone.modules()):
        return ()
    try:
        draws = torch.Generator().manual_seed(0)  # torch's own may be a fit's in another thread
        trial = copy.deepcopy(backbone).cpu().double().requires_grad_().train()
        for norm in trial.modules():
            if type(norm) is nn.BatchNorm2d:
                norm.eval()
                for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                    if tensor is not None:
                        tensor.data.uniform_(0.5, 1.5, generator=draws)
        side = image_size, image_size
        image = torch.randn(1, 3, *side, dtype=torch.float64, generator=draws)
        return tried_out(trial, image)
    except Exception:  # whatever a user's module raises
        return ()


def _tried_out(backbone: nn.Module, image: Tensor) -> Folds:
    with torch.random.fork_rng(devices=[]):  # of the fit that asks
        folds, expected = _observed(backbone, image, _output_and_gradients)
        with folded(backbone, folds, [norm for _, norm in folds]):
            found = _output_and_gradients(backbone, image)
    return folds if _are_same(expected, found) else ()


@torch.no_grad()
def _tried_out_in_evaluation(backbone: nn.Module, image: Tensor) -> Folds:
    folds, expected = _observed(backbone.eval(), image, _output)
    return folds if _are_same(expected, _output(folded_copy(backbone, folds), image)) else ()


def _are_same(expected: list[Tensor], found: list[Tensor]) -> bool:
    pairs = zip(expected, found, strict=True)
    return all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in pairs)


def _observed(
    backbone: nn.Module, image: Tensor, run: Callable[[nn.Module, Tensor], list[Tensor]]
) -> tuple[Folds, list[Tensor]]:
    """Return convolutions whose output is what a batch-norm layer takes, each called once.

    And what `run`, which calls the backbone once, returns.
    """
    names = {layer: name for name, layer in backbone.named_modules()}
    made_by: dict[int, tuple[Tensor, nn.Module]] = {}  # tensors are kept, so that no id comes twice
    folds: list[tuple[nn.Module, nn.Module]] = []
    calls = Counter[nn.Module]()

    def after_convolution(layer: nn.Module, _: object, output: Tensor) -> None:
        calls[layer] += 1
        made_by[id(output)] = output, layer

    def before_norm(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[layer] += 1
        if id(inputs[0]) in made_by:
            folds.append((made_by[id(inputs[0])][1], layer))

    hooks = [
        layer.register_forward_hook(after_convolution)
        if _is_plain_convolution(layer)
        else layer.register_forward_pre_hook(before_norm)
        for layer in names
        if _is_plain_convolution(layer) or _is_plain_norm(layer)
    ]
    expected = run(backbone, image)
    for hook in hooks:
        hook.remove()
    pairs = (pair for pair in folds if calls[pair[0]] == calls[pair[1]] == 1)
    return tuple((names[convolution], names[norm]) for convolution, norm in pairs), expected


def _is_plain_convolution(layer: nn.Module) -> bool:
    """Return whether the weight is a parameter, not computed from others."""
    if not isinstance(layer, nn.Conv2d) or hasattr(type(layer), "weight") or _is_watched(layer):
        return False
    return isinstance(layer._parameters.get("weight"), nn.Parameter)


def _is_plain_norm(layer: nn.Module) -> bool:
    """Return whether nothing but statistics, scale and shift is at work, no method of its own."""
    plain = type(layer) is nn.BatchNorm2d and "forward" not in vars(layer)
    return plain and layer.running_var is not None and not _is_watched(layer)


def _is_watched(layer: nn.Module) -> bool:
    """Return whether somebody's hooks see what goes in or comes out."""
    forward = layer._forward_pre_hooks, layer._forward_hooks
    return any((*forward, layer._backward_pre_hooks, layer._backward_hooks))


def _output(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    return [backbone(image)]


def _output_and_gradients(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the output, and of each gradient two numbers: they tell as much as all.

    A gradient is gone before the next is computed: together they are as large as the weights.
    """
    torch.manual_seed(1)  # the same dropout each time
    parameters = list(backbone.parameters())
    told: dict[Tensor, Tensor] = {}

    def tell(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        told[parameter] = torch.stack([gradient.sum(), gradient.norm()])

    hooks = [p.register_post_accumulate_grad_hook(tell) for p in parameters]
    output = backbone(image)
    (output * torch.randn_like(output)).sum().backward()
    for hook in hooks:
        hook.remove()
    return [output.detach(), *(told[p] for p in parameters if p in told)]
