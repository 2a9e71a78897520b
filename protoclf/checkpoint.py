"""The state of an unfinished fit on disk, from which the same fit goes on.

One file, written whole or not at all, after the start and after every epoch. It holds tensors and
plain values alone, so that reading one runs no code, and behind them a checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from protoclf.files import check, replaced, write_checked
from protoclf.fingerprints import described
from protoclf.fit_key import changes

if TYPE_CHECKING:
    from protoclf.net import SkorchProtoPNet
    from protoclf.stages import Stage

FILE = "checkpoint.pt"
_FORMAT = "protoclf checkpoint 2"
_TYPES = {
    **dict.fromkeys(("format", "split", "history"), str),
    **dict.fromkeys(("seed", "stage", "epochs"), int),
    **dict.fromkeys(("key", "network", "optimizer", "callbacks"), dict),
    "backbone_trained": bool,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written, or is one of another fit."""


class Checkpoint:
    """Where an unfinished fit is kept.

    Parameters
    ----------
    folder : path
        Made if need be.
    key : dict of str to str
        What the fit depends on: see `fit_key`.
    writes : bool, default=True
        Whether this process is the one that writes.

    Attributes
    ----------
    stage, epochs : int
        Where the fit goes on: position of a stage in the schedule, and its epochs that are done.
    seed : int or None
        The seed of the fit, once one was begun.

    Raises
    ------
    CheckpointError
        If the folder is a file, or holds a checkpoint that is damaged, or of other parameters or
        other data.
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: dict[str, str], writes: bool = True
    ) -> None:
        if Path(folder).is_file():
            raise CheckpointError(f"checkpoint must be a folder; {str(folder)!r} is a file.")
        self.file = Path(folder) / FILE
        self.key = key
        self.writes = writes
        self._state = self._read() if self.file.exists() else None
        self.stage = self._state["stage"] if self._state else 0
        self.epochs = self._state["epochs"] if self._state else 0
        self.seed: int | None = self._state["seed"] if self._state else None

    def restore(self, net: SkorchProtoPNet, stages: Sequence[Stage], train: np.ndarray) -> None:
        """Give a net, freshly initialized, the state that was kept, if there is one.

        `stages` are the schedule, `train` the positions of the training images.
        """
        self._split = described(train)
        if self._state is None:
            return
        state, self._state = self._state, None
        if state["split"] != self._split:
            raise self._refusal("is of another train_split, which may lack a random_state")
        if not self._is_before_the_end_of(stages):
            raise self._refusal("is of a step that this fit does not have")
        try:
            network = state["network"]
            shape = network["prototypes"].shape
            if shape[1:] != net.module_.prototypes.shape[1:]:
                raise ValueError(f"prototypes of shape {tuple(shape)}")
            net.set_state(network)
            net.optimizer_.load_state_dict(state["optimizer"])
            net.history[:] = map(dict, json.loads(state["history"]))
            net.backbone_trained_ = state["backbone_trained"]
            _restore_callbacks(net, state["callbacks"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(f"does not fit the network: {error}") from error

    def write(self, net: SkorchProtoPNet, stage: int, epochs: int) -> None:
        """Keep the state of a net at a place in the schedule, in place of the one before.

        Raises
        ------
        CheckpointError
            If it cannot be written; what was kept before stays.
        """
        self.stage, self.epochs = stage, epochs
        if not self.writes:
            return
        state = {
            "format": _FORMAT,
            "key": self.key,
            "seed": net.seed_,
            "split": self._split,
            "stage": stage,
            "epochs": epochs,
            "history": json.dumps(net.history.to_list(), default=_json),
            "backbone_trained": net.backbone_trained_,
            "network": net.plain_module.state_dict(),
            "optimizer": net.optimizer_.state_dict(),
            "callbacks": _states_of_callbacks(net),
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.file) as temporary:
                write_checked(temporary, lambda stream: torch.save(state, stream))
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # which torch's writer hides
                raise error.__context__ from None
            raise CheckpointError(
                f"The checkpoint {str(self.file)!r} cannot be written ({error}). The one before "
                "is as it was: with room on the disk, the same fit goes on from it."
            ) from error

    def remove(self) -> None:
        """Forget the fit, which is done."""
        if self.writes:
            self.file.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            check(self.file)
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            _check_fields(state)
        except Exception as error:  # whatever else may stand there
            raise self._refusal("is damaged, or not one of this version of protoclf") from error
        differing = changes(state["key"], self.key)
        if differing:
            raise self._refusal(f"is of another fit: {differing}")
        return state

    def _is_before_the_end_of(self, stages: Sequence[Stage]) -> bool:
        left = stages[self.stage :]
        return bool(left) and self.epochs <= getattr(left[0], "epochs", 0)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {str(self.file)!r} {what}. Give `checkpoint` another folder, or "
            "delete it to begin anew: unless a fit that runs now wrote it, such as one of a "
            "search, whose fits cannot share a folder."
        )


def _check_fields(state: dict[str, Any]) -> None:
    """Raise for fields that no `write` has kept."""
    typed = all(isinstance(state[name], kind) for name, kind in _TYPES.items())
    counts = [state[name] for name in ("seed", "stage", "epochs")]
    if not typed or state["format"] != _FORMAT or not 0 <= min(counts) <= max(counts) < 2**31:
        raise ValueError("fields of another format, or out of their range")
    if not all(type(value) is str for value in state["key"].values()):
        raise ValueError("a key that describes no fit")


def _states_of_callbacks(net: SkorchProtoPNet) -> dict[str, dict[str, Any]]:
    """Return what callbacks remember, as far as it is plain: counts, best values, best weights."""
    return {
        name: {key: _plain(value) for key, value in vars(callback).items() if _is_plain(value)}
        for name, callback in net.callbacks_
    }


def _restore_callbacks(net: SkorchProtoPNet, states: dict[str, dict[str, Any]]) -> None:
    for name, callback in net.callbacks_:
        state = states.get(name, {})
        if not _is_plain(state) or any(callable(getattr(callback, own, None)) for own in state):
            raise ValueError(f"what the callback {name!r} remembers would replace its methods")
        vars(callback).update(state)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(v) for key, v in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, np.number | np.bool_ | np.str_ | Tensor):
        return True
    return type(value) in (type(None), bool, int, float, str)  # subclasses could not be read


def _plain(value: Any) -> Any:
    """Return numbers of numpy as those of Python, in whatever holds them."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
