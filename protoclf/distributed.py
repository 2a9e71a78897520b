"""`DistributedProtoPNetClassifier`: one fit by several processes, each with a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from skorch.callbacks import PrintLog
from skorch.dataset import unpack_data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from protoclf.classifier import ProtoPNetClassifier
from protoclf.parameters import with_parameters_of
from protoclf.processes import OneProcess

_KINDS = "NO", "MULTI_CPU", "MULTI_GPU"
_OPTIONS = (  # of a loader, which the one of parts of batches has too
    *("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "persistent_workers"),
    *("prefetch_factor", "timeout", "multiprocessing_context"),
)


@with_parameters_of(ProtoPNetClassifier)
class DistributedProtoPNetClassifier(ProtoPNetClassifier):
    """A `ProtoPNetClassifier` that several processes fit together, by Hugging Face Accelerate.

    Every process runs the same script, calls `fit` with the same data, and ends with the same
    model. Each computes its part of every training batch, of the backbone's features and of the
    projection's search; the start and the last layer, which are small, are computed by all.

    `fit` has to be called by all processes, all other methods by any of them.

    Parameters
    ----------
    backbone : str or nn.Module, default="resnet18"
    accelerator : accelerate.Accelerator
        Knows the processes, and the device of each. Of its options mixed precision is in use;
        accumulation of gradients, FSDP and DeepSpeed are refused.
    **parameters
        Those of `ProtoPNetClassifier`; `device` is the accelerator's, and `batch_size` counts the
        images of one step on all processes together, so that settings need no change with their
        number.

    Raises
    ------
    ValueError
        If `fit` finds options of the accelerator that it cannot heed.

    Notes
    -----
    The joint loss is that of the whole batch: with n processes each has about ``batch_size / n``
    of its images, and gradients are averaged by the weights of the parts. Two things see their own
    part alone: the patch cost, and batch normalization that learns its statistics, unless the
    backbone has ``torch.nn.SyncBatchNorm``; at the end of an epoch the running statistics are those
    of the first process. Every process decodes all images, and holds all features.

    `save` writes what `ProtoPNetClassifier.load` reads, without Accelerate; call it where
    ``accelerator.is_main_process``.

    skorch's `AccelerateMixin` is not used: it prepares a network once, for one kind of training,
    and hands out parts of every data set.
    """

    def __init__(
        self, backbone: str | nn.Module = "resnet18", *, accelerator: Any, **parameters: Any
    ) -> None:
        super().__init__(backbone, **parameters)
        self.accelerator = accelerator

    # skorch's hooks -------------------------------------------------------------------------------

    def check_training_readiness(self):
        """Refuse options of the accelerator that would not be heeded (called by skorch)."""
        super().check_training_readiness()
        kind = self.accelerator.distributed_type.value
        if kind not in _KINDS:
            raise ValueError(
                f"The accelerator is set to {kind}; it must be one of {', '.join(_KINDS)}."
            )
        if self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "The accelerator must not accumulate gradients: all images of a step are on the "
                "processes at once. Lower batch_size, or use more processes."
            )
        if vars(self)["device"] != "auto":
            raise ValueError('The accelerator knows the device: leave device at "auto".')

    def initialize_callbacks(self):
        """Build the callbacks; the log is the first process's alone (called by skorch)."""
        super().initialize_callbacks()
        for _, callback in self.callbacks_:
            if isinstance(callback, PrintLog) and not self.accelerator.is_main_process:
                callback.sink = _silent
        return self

    @contextmanager
    def data_parallel(self) -> Iterator[None]:
        """Average gradients over the processes, for the parts that a stage trains."""
        from accelerate.optimizer import AcceleratedOptimizer

        plain, scaler = self.optimizer_, self.accelerator.scaler
        # as `prepare` makes it, which would keep it, and the network, for as long as itself
        self.optimizer_ = AcceleratedOptimizer(plain, scaler=scaler)  # may scale gradients
        if self.accelerator.num_processes > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.__dict__["_replica"] = DistributedDataParallel(self.module_, device_ids=ids)
        try:
            yield
        finally:
            self.__dict__.pop("_replica", None)
            self.optimizer_ = plain

    def network_for(self, training: bool) -> nn.Module:
        """Return what runs batches: in training the network that averages gradients."""
        return self.__dict__.get("_replica", self.module_) if training else self.module_

    def get_iterator(
        self, dataset: Dataset, training: bool = False, rows: Sequence[int] | None = None
    ):
        """Return a loader of batches (called by skorch); in training, of this process's parts."""
        loader = super().get_iterator(dataset, training, rows)
        if not training:
            return loader
        parts = PartOfBatch(
            *(len(loader.dataset), loader.batch_size),
            *(self.accelerator.process_index, self.accelerator.num_processes),
            lambda: self.seed_ + len(self.history),
            loader.drop_last,
        )
        options = {name: getattr(loader, name) for name in _OPTIONS}
        return DataLoader(loader.dataset, batch_sampler=parts, **options)

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to: a model that was saved needs no accelerator.

        Raises
        ------
        TypeError
        """
        raise TypeError("Load it as ProtoPNetClassifier.load(folder), which needs no accelerator.")

    def get_loss(self, y_pred, y_true, X=None, training=False) -> Tensor:
        """Return the loss of a batch; in training, so that their mean is that of all parts."""
        loss = super().get_loss(y_pred, y_true, X=X, training=training)
        if not training:
            return loss
        weight = X.get("sample_weight", torch.ones(len(y_true)))
        own = weight.sum().to(self.device)
        total = self.accelerator.reduce(own, "sum").clamp_min(torch.finfo(own.dtype).tiny)
        return loss * (self.accelerator.num_processes * own / total)

    def train_step_single(self, batch, **fit_params):
        """Compute the gradients of one batch (called by skorch).

        The loss that is recorded is that of all parts of the batch.
        """
        self._set_training(True)
        inputs, y = unpack_data(batch)
        with self.accelerator.autocast():
            outputs = self.infer(inputs, **fit_params)
            loss = self.get_loss(outputs, y, X=inputs, training=True)
        self.accelerator.backward(loss)
        self.accelerator.unscale_gradients(self.optimizer_)  # callbacks may clip them
        return {"loss": self.accelerator.reduce(loss.detach(), "mean"), "y_pred": outputs}

    def _step_optimizer(self, step_fn):
        step_fn()
        self.optimizer_.step()

    # What the stages ask for ----------------------------------------------------------------------

    @property
    def processes(self) -> OneProcess:
        """The processes that fit the network together; outside of a fit, this one."""
        return SeveralProcesses(self.accelerator) if self._fitting else OneProcess()

    def agree(self) -> None:
        """Take over the network of the first process, whose rounding may differ."""
        module = self.module_
        heads = module.prototypes, module.owner, module.last_layer.weight
        agreed = self.processes.agreed([head.detach().cpu() for head in heads])
        if len(agreed[1]) != len(module.owner):
            prototypes, owner, weight = (head.to(self.device) for head in agreed)
            self.replace_prototypes(prototypes, owner, weight)
        self.processes.synchronize([*module.parameters(), *module.buffers()])

    @property
    def device(self) -> torch.device:
        """The accelerator's device."""
        return getattr(self.accelerator, "device", torch.device("cpu"))  # `fit` checks what it is

    @device.setter
    def device(self, value: Any) -> None:
        self.__dict__["device"] = value


class SeveralProcesses(OneProcess):
    """The processes of an accelerator."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.is_first = accelerator.is_main_process
        self.count = accelerator.num_processes

    def own_rows(self, n: int, batch_size: int) -> Sequence[int]:
        """Return the positions, of n, that this process computes.

        The batches are those of one process, so that not even rounding differs. Where there are
        fewer of them than processes, each process computes them all.
        """
        starts = np.arange(0, n, batch_size)
        if len(starts) < self.count:
            return range(n)
        own = np.array_split(starts, self.count)[self.accelerator.process_index]
        return range(int(own[0]), min(int(own[-1]) + batch_size, n))

    def in_order(self, rows: Tensor, n: int) -> Tensor:
        """Return the rows (n, ...) of all processes, each of which passes its own."""
        if len(rows) == n:
            return rows
        from accelerate.utils import gather, pad_across_processes

        counts = gather(torch.tensor([len(rows)], device=self.accelerator.device)).tolist()
        here = rows.to(self.accelerator.device)
        padded = gather(pad_across_processes(here.contiguous(), dim=0))  # (count * most, ...)
        parts = padded.split(max(counts))
        whole = torch.cat([part[:k] for part, k in zip(parts, counts, strict=True)])
        return whole.to(rows.device)

    def own_seed(self, seed: int) -> int:
        """Return the seed of this process's random transforms, of one that all share."""
        return seed + self.accelerator.process_index * 2**32

    def agreed(self, value: Any) -> Any:
        """Return the first process's value."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order."""
        from accelerate.utils import gather_object

        return gather_object([value])

    @torch.no_grad()
    def synchronize(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.contiguous()))


def _silent(*_: Any) -> None:
    """Print nothing."""


class PartOfBatch(Sampler[list[int]]):
    """One process's part of each batch; all of one that has fewer images than processes.

    Of n images and of batches of all processes; `rank` is the number of this process of `count`.
    `seed` returns that of an epoch, the same in each process.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        rank: int,
        count: int,
        seed: Callable[[], int],
        drop_last: bool = False,
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.rank = rank
        self.count = count
        self.seed = seed
        self.drop_last = drop_last

    def __len__(self) -> int:
        return (self.n if self.drop_last else self.n + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed()))
        for batch in order.split(self.batch_size)[: len(self)]:
            whole = len(batch) < self.count
            part = batch if whole else batch.tensor_split(self.count)[self.rank]
            yield part.tolist()
