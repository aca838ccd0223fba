"""Lambda of every stage: one number, or steered to the share of tokens that is wanted exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn


class Pressure(nn.Module):
    """``lambda`` times the l1 norm of the scores (Eq. 5); lambda follows a target rate where one is given, which is ours.

    A token below the threshold gets no gradient from the task, so a fixed lambda ends with nothing or everything exchanged.
    The steered one is the state of a controller, ``lambda = level + gain x (target - rate)``, where ``level`` sums up
    ``pull x (target - rate)`` over the steps: it grows while a stage exchanges too little, and below zero lifts scores again.

    Args:
        factor: lambda; with a target rate the one to start from.
        stages: number of stages S, each with a lambda of its own.
        target: wanted share of exchanged tokens, 0..1; None keeps lambda as it is.
        pieces: how often it is called in a step.
        gain, pull: of the controller, per step.

    Shape: norms and, with a target, rates of the stages, S scalars each -> the loss ``[]``.
    """

    level: Tensor

    def __init__(
        self,
        factor: float,
        stages: int,
        target: float | None = None,
        pieces: int = 1,
        gain: float = 1.0,
        pull: float = 0.02,
    ) -> None:
        super().__init__()
        if target is not None and not 0 <= target <= 1:
            raise ValueError(f"the target rate must be in 0..1, not {target}")
        self.factor, self.target, self.gain, self.pull = factor, target, gain, pull / pieces
        if target is not None:
            self.register_buffer("level", torch.full((stages,), factor))

    @property
    def is_on(self) -> bool:
        """Whether there is anything to press."""
        return self.factor > 0 or self.target is not None

    def levels(self) -> list[Tensor]:
        """Lambda of every stage so far; none where it is one fixed number."""
        return [] if self.target is None else list(self.level)

    def forward(self, norms: Sequence[Tensor], rates: Sequence[Tensor] = ()) -> Tensor:
        stacked = torch.stack(list(norms))
        if self.target is None:
            return self.factor * stacked.sum()
        missing = self.target - _over_processes(torch.stack(list(rates)).detach().to(self.level))
        if self.training:
            self.level += self.pull * missing
        return ((self.level + self.gain * missing).to(stacked) * stacked).sum()


def _over_processes(rates: Tensor) -> Tensor:
    """The mean over all processes, which must not end with different lambdas."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rates
    total = rates.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
