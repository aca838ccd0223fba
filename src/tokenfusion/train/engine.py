"""Devices, processes and precision: Lightning Fabric behind one door.

Fabric launches the processes, picks the devices and talks between them. Gradients are averaged here, after a phase's
backward, and not by DistributedDataParallel while it runs: a task has several phases per forward, losses that use
parameters of their own, and parts that a batch may leave unused. DDP's reducer can deal with none of these unasked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenfusion.errors import UserError

T = TypeVar("T")

BUCKET = 2**25  # gradient elements that travel together: bounds the extra memory

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """This process's place among all of them, and what they do together.

    Args:
        devices: processes, one device each; ``"auto"`` = every GPU, or one process on the CPU.
        precision: ``"32"``, ``"bf16"`` or ``"fp16"``: the last two are autocast, weights stay as they are.
        accelerator: ``"auto"`` (GPUs where there are any), ``"cpu"`` or ``"cuda"``.

    Raises:
        UserError: where the machine has not what is asked for, or a launcher started another number of processes.
    """

    def __init__(self, devices: int | str = 1, precision: str = "32", accelerator: str = "auto") -> None:
        from lightning_fabric import Fabric  # takes seconds: only those who train wait for it

        gpus = torch.cuda.device_count()
        kind = ("cuda" if gpus else "cpu") if accelerator == "auto" else accelerator
        count = _count(devices, kind, gpus)
        self.fabric = Fabric(accelerator=kind, devices=count, strategy="ddp" if count > 1 else "auto")
        self.fabric.launch()
        self.precision = precision
        self.scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world(self) -> int:
        return self.fabric.world_size

    @property
    def is_first(self) -> bool:
        """True in the one process that writes."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run; a batch is not cast, so that coordinates and depths keep all their digits."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def to_device(self, batch: T) -> T:
        """A batch of any structure on this process's device."""
        return self.fabric.to_device(batch)

    def adopt(self, task: nn.Module) -> None:
        """Bring a task to the device, equal in all processes."""
        self.fabric.to_device(task)
        self._copy_from_first([t.data for t in (*task.parameters(), *task.buffers())])

    def share_buffers(self, task: nn.Module) -> None:
        """The first process's buffers (running means) for all; before evaluation."""
        self._copy_from_first([b.data for b in task.buffers()])

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss, scaled where fp16 needs it."""
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip_norm: float | None = None
    ) -> None:
        """Average the gradients over all processes, clip, step, forget the gradients."""
        self._average_gradients(parameters)
        if clip_norm is not None:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        self.scaler.step(optimizer)  # leaves the step out where an fp16 gradient overflowed
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes: for the counts of a metric."""
        return self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over all processes."""
        return self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all processes."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def gather(self, value: T) -> list[T]:
        """Every process's value of any kind, in all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value, in all of them."""
        return value if self.world == 1 else self.fabric.broadcast(value)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            self.fabric.barrier()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Where the first process fails, those that it started do not wait for it for ever."""
        try:
            yield
        except BaseException:
            launcher = getattr(self.fabric.strategy, "launcher", None)
            for process in getattr(launcher, "procs", []):
                process.kill()
            raise

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.world == 1:
            return tensor
        moved = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(moved, operation)
        return moved.to(tensor.device)

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.world == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        gradients = []
        for parameter, used in zip(parameters, has.tolist(), strict=True):
            if used and parameter.grad is None:  # unused here, used elsewhere
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            torch.distributed.all_reduce(flat)
            _spread(flat / self.world, bucket)

    @torch.no_grad()
    def _copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            torch.distributed.broadcast(flat, 0)
            _spread(flat, bucket)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type together, at most about ``BUCKET`` elements at a time."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _count(devices: int | str, kind: str, gpus: int) -> int:
    """The number of processes, checked against the machine and against torchrun."""
    launched = int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else None
    if kind == "cuda" and not gpus:
        raise UserError("train.accelerator is cuda, but PyTorch sees no GPU here: use cpu or auto")
    everything = launched or (gpus if kind == "cuda" else 1)
    count = everything if devices == "auto" else int(devices)
    if launched is not None and launched != count:
        raise UserError(f"torchrun started {launched} processes, but train.devices is {devices}: make them equal")
    if kind == "cuda" and count > gpus:
        raise UserError(f"train.devices is {count}, but PyTorch sees {gpus} GPU(s) here: lower it")
    return count
