"""Backbones: the convolutional part f of a ProtoPNet, from a name, a file or a user's own module.

A backbone maps images (N, 3, S, S) to a feature map (N, C, h, w).
"""

from __future__ import annotations

import copy
import difflib
import http.client
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from protoclf.messages import first_few
from protoclf.torch_settings import ShapesOnly

# What comes before the pooling and the classifier, by torchvision's file of the family.
_CONVOLUTIONAL_PARTS = {
    "alexnet": ("features",),
    "convnext": ("features",),
    "densenet": ("features",),
    "efficientnet": ("features",),
    "mnasnet": ("layers",),
    "mobilenetv2": ("features",),
    "mobilenetv3": ("features",),
    "regnet": ("stem", "trunk_output"),
    "resnet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "shufflenetv2": ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    "squeezenet": ("features",),
    "vgg": ("features",),
}
_TABLES = (dict, OrderedDict)
_OWN_MODULE = "any nn.Module that maps images (N, 3, S, S) to a feature map (N, C, h, w)"


def build_backbone(
    backbone: str | nn.Module, weights: str | os.PathLike[str] | None = "DEFAULT"
) -> nn.Module:
    """Return the feature extractor that `backbone` stands for, with its weights.

    Parameters
    ----------
    backbone : str or nn.Module
        A name from `available_backbones`, or a module that maps images (N, 3, S, S) to a feature
        map (N, C, h, w). A module is copied, and never changed; TorchScript's cannot be.
    weights : str, path or None, default="DEFAULT"
        - "DEFAULT": torchvision's best weights of a torchvision backbone; random ones for
          "small_cnn", which has no others; a module keeps its own.
        - the name of torchvision weights, such as "IMAGENET1K_V1".
        - a path to a state dict, saved by `torch.save` or as .safetensors. For a torchvision
          backbone this may be the state dict of the whole model: its classifier is ignored.
        - None: random weights; a module keeps its own.

    Returns
    -------
    nn.Module
        Maps a float tensor (N, 3, S, S) to (N, C, h, w). The parameters of a torchvision backbone
        have the same names as in torchvision.

    Raises
    ------
    RuntimeError
        If weights cannot be downloaded.
    TypeError
        If `backbone` or `weights` is of another type, or `backbone` is a TorchScript module.
    ValueError
        If the name is unknown, or the weights are, a state dict does not fit, or a module cannot be
        copied.
    """
    _check_weights_type(weights)
    if isinstance(backbone, nn.Module):
        return _build_own(_copied_backbone(backbone), "this module", weights)
    if not isinstance(backbone, str):
        raise TypeError(f"backbone must be a name or {_OWN_MODULE}, got {backbone!r}.")
    if backbone == "small_cnn":
        return _build_own(SmallCNN(), "small_cnn", weights)
    return _build_torchvision(backbone, weights)


def available_backbones() -> list[str]:
    """Return every name that `build_backbone` takes.

    Returns
    -------
    list of str
        Sorted; "small_cnn" and the supported torchvision models.

    Examples
    --------
    >>> "resnet18" in available_backbones()
    True
    """
    names = torchvision.models.list_models(module=torchvision.models)
    return sorted(["small_cnn", *(n for n in names if _family(n) in _CONVOLUTIONAL_PARTS)])


class SmallCNN(nn.Sequential):
    """A compact CNN for small pictures, to be trained from scratch on a CPU.

    Six blocks of convolution, batch normalisation and ReLU. One cell per 8 x 8 pixels, each of
    which sees 57 x 57 pixels: a part of a picture of 64 to 128 pixels, not the whole.

    Parameters
    ----------
    channels : int, default=128
        Channels C of the feature map.

    Notes
    -----
    Maps (N, 3, S, S) to (N, channels, ceil(S / 8), ceil(S / 8)).
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__(
            _conv_block(3, 16, kernel=5, stride=2),  # (N, 16, S/2, S/2)
            _conv_block(16, 32, kernel=3, stride=2),  # (N, 32, S/4, S/4)
            _conv_block(32, 48, kernel=3, stride=1),
            _conv_block(48, 64, kernel=3, stride=2),  # (N, 64, S/8, S/8)
            _conv_block(64, 96, kernel=3, stride=1),
            _conv_block(96, channels, kernel=3, stride=1),  # (N, channels, S/8, S/8)
        )


def _conv_block(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def copied(net: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Most of what Python would copy are tables of hooks, a dozen for each layer: empty ones are made.
    """
    tables = (v for layer in net.modules() for v in vars(layer).values() if type(v) in _TABLES)
    return copy.deepcopy(net, {id(table): type(table)() for table in tables if not table})


def _check_weights_type(weights: Any) -> None:
    if weights is not None and not isinstance(weights, str | os.PathLike):
        raise TypeError(
            f"weights must be None, a name such as 'DEFAULT' or a path, got {weights!r}."
        )


def _copied_backbone(net: nn.Module) -> nn.Module:
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError(
            "backbone is a TorchScript module, whose layers torch can neither copy nor freeze. "
            "Pass the nn.Module that it was made of."
        )
    try:
        return copied(net)
    except RuntimeError as error:  # a result of its parameters, which torch does not copy
        raise ValueError(
            f"backbone cannot be copied ({_shorten(str(error), first=0)}) If it keeps what it "
            "computed as an attribute, clear that, or compute it under torch.no_grad()."
        ) from error


def _build_own(net: nn.Module, name: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    wrong = {p.dtype for p in net.parameters() if p.is_floating_point()} - {torch.float32}
    if wrong:
        raise ValueError(
            f"The parameters of {name} are {', '.join(sorted(map(str, wrong)))}; they must be "
            "torch.float32, backbone.float(). Half precision is a matter of precision=."
        )
    if weights is None or weights == "DEFAULT":
        return net
    if not Path(weights).is_file():
        raise ValueError(
            f"weights={str(weights)!r} is not a file; {name} takes None, 'DEFAULT' or a path to "
            "a state dict."
        )
    return _load_state(net, _read_state(Path(weights)), source=str(weights))


def _build_torchvision(name: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    parts = _CONVOLUTIONAL_PARTS[_check_name(name)]
    state = _find_state(name, weights)  # before the model is built: a wrong name fails at once
    # random weights that others replace would be most of the work, in each fit of a search
    with nullcontext() if state is None else ShapesOnly():
        children = dict(torchvision.models.get_model(name, weights=None).named_children())
    net = nn.Sequential()
    for part in parts:
        net.add_module(part, children.pop(part))
    if _family(name) == "densenet":  # its forward ends the features with a ReLU of its own
        net.add_module("relu", nn.ReLU(inplace=True))
    if state is None:
        return net
    return _load_state(net, state, source=f"weights={str(weights)!r}", ignored=children)


def _check_name(name: str) -> str:
    """Return the family of a torchvision name, or say what is wrong with it."""
    known = available_backbones()
    if name in known:
        return _family(name)
    if name in torchvision.models.list_models(module=torchvision.models):
        families = ", ".join(sorted(_CONVOLUTIONAL_PARTS))
        raise ValueError(
            f"backbone={name!r} is a torchvision model of a family that is not supported. "
            f"Supported: small_cnn, the torchvision families {families}, and {_OWN_MODULE}."
        )
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if re.match("efficientnet.lite", name.lower()):
        hint = " EfficientNet-lite is a module: see examples/benchmarks/efficientnet_lite.py."
    raise ValueError(
        f"backbone={name!r} is unknown.{hint} `available_backbones()` lists the names; "
        f"{_OWN_MODULE} may be passed too."
    )


def _family(name: str) -> str:
    return torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def _find_state(name: str, weights: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    published = torchvision.models.get_model_weights(name).__members__
    if weights is None:
        state = None
    elif weights in published:
        state = _download(name, published[str(weights)])
    elif Path(weights).is_file():
        state = _read_state(Path(weights))
    else:
        raise ValueError(
            f"weights={str(weights)!r} is neither a file nor the name of weights of {name} "
            f"({', '.join(published)})."
        )
    if state is not None and _family(name) == "densenet":
        # The published files are older than torchvision's names: "norm.1" is "norm1" today.
        return {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", k): v for k, v in state.items()}
    return state


def _download(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise RuntimeError(
            f"The weights {weights.name} of {name} could not be downloaded from {weights.url} "
            f"({error}). Ways out: weights=None (random weights), weights=<path to a state dict "
            "that you have downloaded elsewhere>, or backbone=<your own nn.Module>."
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file, and unwrap it."""
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, safetensors.SafetensorError),
        *(RuntimeError, EOFError, ValueError),
    ) as error:
        raise ValueError(f"{path} is not a file of tensors only: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{path} holds no state dict (a mapping from names to tensors).")
    return dict(state)


def _load_state(
    net: nn.Module, state: dict[str, Tensor], source: str, ignored: Iterable[str] = ()
) -> nn.Module:
    """Load `state` into `net`; the keys of the children named in `ignored` may be there."""
    own = net.state_dict()
    for prefix in ("module.", "_orig_mod."):  # left by DataParallel and torch.compile
        if all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    dropped = set(ignored)
    state = {k: v for k, v in state.items() if k.partition(".")[0] not in dropped}
    without_values = any(isinstance(value, Tensor) and value.is_meta for value in own.values())
    if without_values:
        known = {k for k, v in state.items() if k in own and isinstance(v, Tensor)}
        state = {k: _cast(v, own[k]) if k in known else v for k, v in state.items()}
    try:
        missing, unexpected = net.load_state_dict(state, strict=False, assign=without_values)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{source} does not fit the backbone: {_shorten(str(error))}") from error
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit the backbone: missing {first_few(missing, 3)}, "
            f"unexpected {first_few(unexpected, 3)}."
        )
    return net


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy on the CPU with the type of another, its numbers one after the other."""
    return value.to("cpu", like.dtype, copy=True, memory_format=torch.contiguous_format)


def _shorten(message: str, first: int = 1) -> str:
    return " ".join(line.strip() for line in message.splitlines()[first:4])
