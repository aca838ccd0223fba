"""Foreign blocks in their places: their own forward pass runs, a fuser decides inside it, through hooks on their children."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tokenfusion.backbones.calls import first_parameter, first_tensor, given_by_name
from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.errors import UserError
from tokenfusion.fusion.baselines import keys_of
from tokenfusion.fusion.batch_norms import TOLD
from tokenfusion.fusion.fusers import Context, Entry, Fuser
from tokenfusion.fusion.modality import PerModality, merge, split


class Runner(Protocol):
    """A forward pass that has the say over its blocks."""

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any: ...


class Step(NamedTuple):
    """A block that is running."""

    fuser: Fuser
    entry: Entry
    ctx: Context


class Door(threading.local):
    """What the blocks of one network share while it runs: empty between two forward passes, and every thread's own."""

    def __init__(self) -> None:
        self.run: Runner | None = None
        self.step: Step | None = None

    def __reduce__(self) -> tuple[type[Door], tuple[()]]:
        return Door, ()


class _Hook:
    """A method of a place as a hook; where a layer is copied alone, as peft does to train it, the place stays the same."""

    def __init__(self, place: FusedBlock, method: str) -> None:
        self.__self__, self.method = place, method

    def __call__(self, *args: Any) -> Any:
        return getattr(self.__self__, self.method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(memo.get(id(self.__self__), self.__self__), self.method)


class FusedBlock(nn.Module):
    """A foreign block in its place; outside of a fused forward pass it runs as if it stood there alone.

    Its own forward pass does the work. The fuser decides on its input, on what its norm gives (the paper's rule, channels)
    and on its attention's residual branch, through hooks on the block's children.
    """

    def __init__(self, block: nn.Module, plan: BlockPlan, index: int, modalities: int, door: Door) -> None:
        super().__init__()
        self.block, self.plan, self.index, self.modalities, self.door = block, plan, index, modalities, door
        attention = block.get_submodule(plan.parts.attention)
        self.named, self.named_in_attention = first_parameter(block), first_parameter(attention)
        first = inspect.signature(block.forward).parameters.get(self.named)
        self.is_keyword = first is not None and first.kind is first.KEYWORD_ONLY
        attention.register_forward_pre_hook(_Hook(self, "_unite"), with_kwargs=True)
        attention.register_forward_hook(_Hook(self, "_divide"))
        if plan.parts.branch is None:
            attention.register_forward_hook(_Hook(self, "_behind_attention"))
        else:
            block.get_submodule(plan.parts.branch).register_forward_pre_hook(_Hook(self, "_at_branch"))
        if plan.parts.norm is not None:
            block.get_submodule(plan.parts.norm).register_forward_hook(_Hook(self, "_behind_norm"))

    def __getattr__(self, name: str) -> Any:
        """What the network asks its block for, which is one level deeper now."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "block" not in modules:
            raise AttributeError(name)
        return getattr(modules["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.door.run
        if run is None:
            return self.block(*args, **kwargs)
        if args:
            return run.block(self, args[0], args[1:], kwargs)
        name = given_by_name(self.named, kwargs)
        return run.block(self, kwargs[name], (), {key: value for key, value in kwargs.items() if key != name})

    def run(
        self, x: Tensor, fuser: Fuser, ctx: Context, args: Any, kwargs: Any
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        """The block on all streams ``x`` ``[M*B, ...]``: its output, the scores ``[M, B, N]``, what is carried on."""
        ctx = replace(ctx)  # computed again in a backward pass, it starts from the same
        entry = fuser.enter(split(self.plan.layout.tokens(x), self.modalities), ctx)
        return self.under(Step(fuser, entry, ctx), x, args, kwargs), entry.scores, ctx.carried

    def under(self, step: Step, x: Tensor, args: Any, kwargs: Any) -> Any:
        """The block on the tokens that were decided on, in the shape of its own input ``x``: its output."""
        self.door.step = step
        told, TOLD.present = TOLD.present, step.ctx.present  # computed again in a backward pass, nobody else says it
        try:
            x = self.plan.layout.back(merge(step.entry.x), x)
            if step.entry.beside is None:
                return self._called(x, args, kwargs)
            output = self._called(torch.cat([x, merge(step.entry.beside)], 1), args, kwargs)
            whole = cast("Tensor", first_tensor(output))
            step.fuser.carry(split(whole[:, x.shape[1] :], self.modalities), step.ctx)
            own = whole[:, : x.shape[1]]
            return (own, *output[1:]) if isinstance(output, tuple) else own
        finally:
            self.door.step, TOLD.present = None, told

    def _called(self, x: Tensor, args: Any, kwargs: Any) -> Any:
        return self.block(**{self.named: x}, **kwargs) if self.is_keyword else self.block(x, *args, **kwargs)

    def _at_branch(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        step = self.door.step
        if step is None:
            return None
        self.door.step = None  # a drop path that serves the MLP too is called once more
        return (self._leave(step, args[0]), *args[1:])

    def _behind_attention(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self.door.step
        if step is None:
            return None
        self.door.step = None
        if isinstance(output, tuple):
            return (self._leave(step, output[0]), *output[1:])
        return self._leave(step, output)

    def _leave(self, step: Step, x: Tensor) -> Tensor:
        layout = self.plan.branch_layout
        left = step.fuser.leave(split(layout.tokens(x), self.modalities), step.entry.scores, step.ctx)
        return layout.back(merge(left), x)

    def _behind_norm(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        step = self.door.step
        if step is None or self.plan.norm_layout is None:
            return None
        if step.entry.weight is None and not step.fuser.works_on_normed:
            return None
        normed = split(self.plan.norm_layout.tokens(output), self.modalities)
        return self.plan.norm_layout.back(merge(step.fuser.between(normed, module, step.entry, step.ctx)), output)

    def _unite(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention over the union of the streams: every sample's tokens of all streams in one row."""
        step = self.door.step
        if step is None or not step.fuser.attends_to_all:
            return None
        name = "" if args else given_by_name(self.named_in_attention, kwargs)
        x = split(kwargs[name] if name else args[0], self.modalities)  # [M, B, N, C]
        if step.ctx.present is not None:
            there = keys_of(step.ctx.present).t().repeat_interleave(x.shape[2], 1)[:, None, None]
            mask = torch.zeros_like(there, dtype=x.dtype).masked_fill(~there, float("-inf"))
            kwargs = {**kwargs, _mask_argument(module): mask}
            args = args[:1]
        united = x.transpose(0, 1).flatten(1, 2)
        return ((), {**kwargs, name: united}) if name else ((united, *args[1:]), kwargs)

    def _divide(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self.door.step
        if step is None or not step.fuser.attends_to_all:
            return None
        x = cast("Tensor", first_tensor(output))
        divided = merge(x.unflatten(1, (self.modalities, -1)).transpose(0, 1))
        return (divided, *output[1:]) if isinstance(output, tuple) else divided


def _mask_argument(attention: nn.Module) -> str:
    """What an attention calls the mask of its keys.

    Raises:
        UserError: where it takes none.
    """
    names = inspect.signature(attention.forward).parameters
    for name in ("attn_mask", "attention_mask"):
        if name in names:
            return name
    raise UserError(
        f"{type(attention).__name__} takes no mask, so a missing modality cannot be left out of a union of keys"
    )


def check_unfused(network: nn.Module) -> None:
    """Raise a ValueError where a network is part of a fused one already."""
    if any(isinstance(module, PerModality | FusedBlock) for module in network.modules()):
        raise ValueError("this network is fused already: a network is fused once; copy.deepcopy it before")


def hold_blocks(network: nn.Module, plans: Sequence[BlockPlan], modalities: int, door: Door) -> list[FusedBlock]:
    """Put every planned block of a network, in its place, into the hands of a :class:`FusedBlock`."""
    places = []
    for index, plan in enumerate(plans):
        parent, _, name = plan.name.rpartition(".")
        place = FusedBlock(network.get_submodule(plan.name), plan, index, modalities, door)
        setattr(network.get_submodule(parent), name, place)
        places.append(place)
    return places
