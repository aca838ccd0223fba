"""One network as a column of blocks that run one by one, between its own stem and its own tail.

The network keeps its own forward pass. A rehearsal runs it up to its last block, which tells what the first block is given
and with which arguments the others are called. Then the blocks run, one by one. A replay runs the forward pass again and
hands out what the blocks gave, so that the network's own tail answers. The cost is one more stem.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from tokenfusion.backbones.calls import evaluating, first_tensor
from tokenfusion.backbones.foreign import Position, answer_of, call, kind_of, position_of
from tokenfusion.backbones.grids import grid_at
from tokenfusion.backbones.held import Door, FusedBlock, Step, hold_blocks
from tokenfusion.backbones.survey import survey
from tokenfusion.errors import UserError
from tokenfusion.fusion.batch_norms import has_batch_norm, still
from tokenfusion.fusion.fusers import Context, Entry, Grid, NoFusion
from tokenfusion.fusion.modality import silenced


class _Reached(Exception):
    """A rehearsal has come to the last block."""


class Cue(NamedTuple):
    """With what a network calls one of its blocks, beside the tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Rehearsal:
    """Every block gives back its input; the last one ends the forward pass."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.x: Tensor | None = None
        self.cues: list[Cue] = []

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        if self.x is None:
            self.x = x
        self.cues.append(Cue(args, kwargs))
        is_last = place.index == self.column.depth - 1
        if is_last and not torch.compiler.is_exporting():  # torch.export wants every module that it entered to end
            raise _Reached
        more = self.column.more[place.index]
        return x if more is None else (x, *[None] * more)


class _Replay:
    """Every block gives what it gave in lockstep."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = outputs

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        return self.outputs[place.index]


class _Trial:
    """Every block runs; noted are what it gives, and whether the next one is given that very tensor, untouched."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.is_plain = True
        self.left: tuple[int, int] | None = None  # where the tokens lie, and how often they were written to

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        self.is_plain &= self.left in (None, (x.data_ptr(), x._version))
        output = place.block(x, *args, **kwargs)
        tokens = cast("Tensor", first_tensor(output))
        self.left = tokens.data_ptr(), tokens._version
        self.outputs.append(output)
        return output


class _Turn:
    """A block runs on what was decided."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        return place.under(self.step, x, args, kwargs)


def _called(place: FusedBlock, step: Step, is_whole: bool, x: Tensor, args: Any, kwargs: Any) -> Any:
    """A block called as its network calls it, so that whoever wrapped it (FSDP) is asked; on what was decided."""
    before, place.door.run = place.door.run, _Turn(step)
    try:
        with nullcontext() if is_whole else still(place.block):
            return place(x, *args, **kwargs)
    finally:
        place.door.run = before


class Column:
    """One network as a column of blocks of one width and one number of tokens.

    Args:
        name: of its stream.
        network: its blocks are held in place by :class:`~tokenfusion.backbones.held.FusedBlock`.
        example: an input ``[B, ...]``.
        alignment: its own position embedding is re-added before every step but the first.

    Raises:
        UserError: where the network is a pyramid, or does more between its blocks than to call them.
    """

    def __init__(self, name: str, network: nn.Module, example: Tensor, alignment: bool) -> None:
        self.name, self.example, self.kind = name, example[:1], type(network).__name__
        self.example_size = example.shape
        seen = survey(network, example, lambda x: call(network, x))
        plans = seen.blocks
        is_image = example.dim() == 4 and (seen.stem is not None or kind_of(network) != "module")
        self.channels = example.shape[1] if is_image else None
        for before, plan in itertools.pairwise(plans):
            if plan.stage:
                width = f"width {before.dim} -> {plan.dim}" if plan.dim != before.dim else "its number of tokens"
                raise UserError(
                    f"{name}: {self.kind} is a pyramid, at block {plan.name} it changes ({width}); wanted blocks of one "
                    "width and one number of tokens; pyramids are fused as one shared network"
                )
        self.plan = plans[0]
        self.depth, self.dim, self.prefix = len(plans), self.plan.dim, self.plan.prefix
        self.door = Door()
        self.places = hold_blocks(network, plans, 1, self.door)
        self.position: Position | None = None
        self.more: list[int | None] = []  # how many values each block gives beside its tokens; None: no tuple
        try:
            if alignment:
                self.position = position_of(network, plans)
            with evaluating(network), torch.no_grad():
                self.answer = self._try_out(network, example)
        except BaseException:
            self.release(network)
            raise

    def release(self, network: nn.Module) -> None:
        """Give the network its own blocks back, without our hooks."""
        for place in self.places:
            for module in place.block.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    ours = [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is place]
                    for key in ours:
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
            parent, _, name = place.plan.name.rpartition(".")
            setattr(network.get_submodule(parent), name, place.block)

    def check_channels(self, x: Tensor) -> None:
        """Raise a ValueError where an image has other channels than the network takes."""
        if self.channels is not None and x.dim() == 4 and x.shape[1] != self.channels:
            raise ValueError(
                f"{self.name} is {list(x.shape)}, its {self.kind} takes {self.channels} channels; the stems of separate "
                "networks are not adapted: give a network that is made for other channels"
            )

    def _try_out(self, network: nn.Module, example: Tensor) -> torch.Size:
        """Compare the network in lockstep with itself; the shape of its answer."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(example.shape, generator=generator) if example.is_floating_point() else example
        x = drawn.to(example)
        trial = _Trial()
        expected = answer_of(self._run(network, x, trial)[1])
        self.more = [len(o) - 1 if isinstance(o, tuple | list) else None for o in trial.outputs]
        stream = Stream(self, network, x, None)
        self.tokens = stream.size[1]
        self.grid: Grid | None = None if self.plan.grid is None else stream.grid
        stream.advance(range(self.depth), None)
        got = answer_of(stream.replay()[1])
        same = got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        if not (same and trial.is_plain):
            raise UserError(
                f"{self.name}: {self.kind} does more between its blocks than to hand on their tokens; it cannot run in lockstep"
            )
        return expected.shape[1:]

    def _run(self, network: nn.Module, x: Tensor, runner: Any) -> tuple[Any, Any]:
        before, self.door.run = self.door.run, runner
        try:
            return call(network, x)
        finally:
            self.door.run = before

    def rehearse(self, network: nn.Module, x: Tensor) -> tuple[Tensor, list[Cue]]:
        """The first block's input, and every block's further arguments."""
        rehearsal = _Rehearsal(self)
        with suppress(_Reached), _statistics_kept(network):
            self._run(network, x, rehearsal)
        assert rehearsal.x is not None
        return rehearsal.x, rehearsal.cues

    def replay(self, network: nn.Module, x: Tensor, outputs: Sequence[Any]) -> tuple[Any, Any]:
        """Features and answer of the network whose blocks gave ``outputs``."""
        return self._run(network, x, _Replay(outputs))


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms norm as ever, and leave their running statistics to the replay."""
    tracking: list[Any] = [
        module for module in network.modules() if module.training and getattr(module, "track_running_stats", False)
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


class Stream:
    """One network in the middle of a forward pass.

    Args:
        column, network: which one.
        inputs: ``[B, ...]``.
        present: bool ``[B]``, or None where all samples have it; the others start as zeros after the stem, and the batch
            norms of the network go by their running statistics then, which what is missing must not change.
    """

    plain = NoFusion(0, 1)

    def __init__(self, column: Column, network: nn.Module, inputs: Tensor, present: Tensor | None) -> None:
        self.column, self.network, self.inputs, self.present = column, network, inputs, present
        self.is_whole = present is None or not (network.training and has_batch_norm(network)) or bool(present.all())
        with self._norms():
            x, self.cues = column.rehearse(network, inputs)
        self.x = silenced(x, present)
        self.outputs: list[Any] = []

    @property
    def grid(self) -> Grid:
        return grid_at(self.column.plan, self.x, self.inputs.shape, self.column.example.shape)

    @property
    def size(self) -> tuple[int, int]:
        """Samples and tokens of the map: ``B, N``."""
        x = self.tokens()
        return x.shape[0], x.shape[1] - self.column.prefix

    def tokens(self) -> Tensor:
        """``[B, prefix + N, C]``."""
        return self.column.plan.layout.tokens(self.x)

    def position(self) -> Tensor | None:
        """What alignment re-adds, ``[prefix + N, C]``."""
        at = self.column.position
        return None if at is None else at.on(self.network, self.grid, self.column.prefix)

    def advance(self, blocks: range, entry: Entry | None, recomputes: bool = False) -> None:
        """Run the next blocks, the first of them on what the exchange decided."""
        for index in blocks:
            place, cue = self.column.places[index], self.cues[index]
            step = Step(self.plain, entry or Entry(self.tokens()[None]), Context(self.grid, self.column.prefix))
            if recomputes and torch.is_grad_enabled():
                output = checkpoint.checkpoint(_called, place, step, self.is_whole, self.x, *cue, use_reentrant=False)
            else:
                output = _called(place, step, self.is_whole, self.x, *cue)
            self.outputs.append(output)
            self.x, entry = cast("Tensor", first_tensor(output)), None

    def replay(self) -> tuple[Any, Any]:
        with self._norms():
            return self.column.replay(self.network, self.inputs, self.outputs)

    def _norms(self) -> AbstractContextManager[None]:
        return nullcontext() if self.is_whole else still(self.network)
