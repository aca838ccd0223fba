"""What a foreign network is made of: its transformer blocks, where each can be fused, and why others cannot."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenfusion.backbones.plan import BlockPlan, Layout, Order, Parts, Survey
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Grid

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn|feed_?forward|intermediate", re.IGNORECASE)
DROP = re.compile(r"drop", re.IGNORECASE)
DROP_PATH = re.compile(r"drop_?path", re.IGNORECASE)
NORM = re.compile(r"norm|affine", re.IGNORECASE)


@dataclass
class _Call:
    """What was seen of one call of a module."""

    name: str
    given: torch.Size | None
    gave: torch.Size | None = None
    is_alone: bool = True  # no tensor and no size beside the first argument
    pair: Grid | None = None  # two whole numbers among the arguments: rows and columns
    children: list[_Call] = field(default_factory=list)
    tokens: Tensor | None = None  # what it was given, where its shape is a new one or has two readings
    maps: list[Grid] = field(default_factory=list)  # rows and columns that convolutions outside blocks gave before


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode for a while; every module's own mode comes back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def first_tensor(value: Any) -> Tensor | None:
    """The tensor, or the first one of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def first_name(module: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """By which name a module that is called by name alone is given its tokens: its first one, else the first one given."""
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return first if first in kwargs else next(iter(kwargs), None)


def is_norm(module: nn.Module) -> bool:
    """A layer that norms: its class says so, and its parameters, if any, are one number per channel.

    It may drop and activate too, in children without parameters (timm's BatchNormAct2d).
    """
    if not NORM.search(type(module).__name__):
        return False
    if getattr(module, "normalized_shape", None) == (1,):  # one channel, normed, is its bias and no more
        return False
    own = {id(p) for p in module.parameters(recurse=False)}
    return all(id(p) in own and p.dim() <= 1 for p in module.parameters())


def _child(module: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Children whose name or class fits, dropout left out."""
    return [
        name
        for name, child in module.named_children()
        if (pattern.search(name) or pattern.search(type(child).__name__))
        and not DROP.search(name)
        and not is_norm(child)
    ]


def candidates(network: nn.Module) -> dict[str, nn.Module]:
    """Modules with an attention and an MLP of their own, none inside another."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        attention = _child(module, ATTENTION)
        others = [child for child in _child(module, MLP) if child not in attention]
        if name and not inside and attention and others:
            found[name] = module
    return found


@contextmanager
def _watched(
    network: nn.Module, blocks: dict[str, nn.Module], calls: list[_Call], stems: list[_Call]
) -> Iterator[None]:
    """Note every call of the blocks, of their children, and of the convolutions outside them."""
    handles: list[Any] = []
    open_calls: list[_Call] = []
    maps: list[Grid] = []

    def begin(name: str, into: list[_Call] | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = None if args else first_name(module, kwargs)
            x = first_tensor(args) if args else first_tensor(kwargs.get(first or ""))
            more = [*args[1:], *(value for key, value in kwargs.items() if key != first)]
            call = _Call(name, None if x is None else x.shape, None, _is_nothing(more), _pair(more))
            if into is not None:
                is_either = x is not None and x.dim() == 4 and x.shape[1] == x.shape[3]
                is_new = not into or into[-1].given != call.given
                if x is not None and (is_either or is_new):
                    call.tokens = x.clone()  # a block may write to its own
                call.maps = list(maps)
                into.append(call)
            elif open_calls:
                open_calls[-1].children.append(call)
            open_calls.append(call)

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        y = first_tensor(output)
        open_calls.pop().gave = None if y is None else y.shape

    def convolved(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            stems.append(_Call(name, args[0].shape, output.shape))
            if output.dim() == 4:
                maps.append((output.shape[2], output.shape[3]))

        return hook

    try:
        for name, block in blocks.items():
            handles.append(block.register_forward_pre_hook(begin(name, calls), with_kwargs=True))
            handles.append(block.register_forward_hook(end))
            for child_name, child in block.named_children():
                handles.append(child.register_forward_pre_hook(begin(child_name, None), with_kwargs=True))
                handles.append(child.register_forward_hook(end))
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not any(
                name.startswith(f"{b}.") for b in blocks
            ):
                handles.append(module.register_forward_hook(convolved(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_nothing(values: list[Any]) -> bool:
    """Arguments that say nothing of positions or sizes."""
    return not any(isinstance(v, Tensor | tuple | list) or type(v) is int for v in values)


def _pair(values: list[Any]) -> Grid | None:
    for value in values:
        if isinstance(value, tuple | list | torch.Size) and len(value) == 2 and all(type(n) is int for n in value):
            return int(value[0]), int(value[1])
    numbers = [value for value in values if type(value) is int]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def survey(network: nn.Module, example: Any, run: Any) -> Survey:
    """Run a network once and see where its blocks can be fused.

    Args:
        network: any module; its mode and weights stay as they are.
        example: an input ``[2, ...]``.
        run: calls the network: ``run(example)``.

    Raises:
        UserError: where no block can be fused; the first reason is told.
    """
    blocks, kind = candidates(network), type(network).__name__
    if not blocks:
        raise UserError(f"{kind} has no transformer blocks ({_nearest(network)}); wanted a transformer")
    shown = noisy(example)
    try:
        calls, stems = _seen(network, blocks, shown, run)
    except UserError:
        if shown is example:
            raise
        shown = example  # its numbers are not any numbers: some choose a row of a table
        calls, stems = _seen(network, blocks, shown, run)
    plans, skipped = _plans(network, blocks, calls, shown.shape, shown is not example)
    if not plans:
        name, reason = next(iter(skipped.items()))
        raise UserError(f"{kind} cannot be fused: block {name} ({type(blocks[name]).__name__}) {reason}")
    see_it = [call for call in stems if call.given is not None and call.given[:2] == shown.shape[:2]]
    stem = see_it[0].name if len(see_it) == 1 and see_it[0].given == shown.shape else None
    return Survey(plans, skipped, stem)


def _nearest(network: nn.Module) -> str:
    """What a network without blocks has in their place."""
    for name, module in network.named_modules():
        attention = _child(module, ATTENTION)
        if name and attention:
            return (
                f"{name}, of class {type(module).__name__}, has an attention, {attention[0]}, but no MLP: no child whose "
                "name or class says mlp, ffn, feed_forward or intermediate"
            )
    return "no module with an attention and an MLP"


def _seen(network: nn.Module, blocks: dict[str, nn.Module], example: Any, run: Any) -> tuple[list[_Call], list[_Call]]:
    """The calls of the blocks and of the convolutions outside them, in the order of a forward pass."""
    calls: list[_Call] = []
    stems: list[_Call] = []
    with evaluating(network), torch.no_grad(), _watched(network, blocks, calls, stems):
        try:
            run(example)
        except UserError:
            raise
        except Exception as error:  # whatever a foreign module raises
            given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
            told = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(
                f"{type(network).__name__} does not run on an example of {given} ({told[0]}); give example="
            ) from error
    return calls, stems


def noisy(example: Any) -> Any:
    """Inputs that tell where a token looks, and which tokens look nowhere: noise, in every sample other noise.

    Of images four: noise, the same with other noise in its left half, in its upper half, and all over. Whole numbers stay as
    they are.
    """
    if not isinstance(example, Tensor) or not example.dim() or not example.is_floating_point():
        return example
    generator = torch.Generator().manual_seed(0)
    if example.dim() != 4:
        return example[0] + torch.randn((max(4, len(example)), *example.shape[1:]), generator=generator).to(example)
    some, other = torch.randn((2, *example.shape[1:]), generator=generator).to(example)
    rows = example[0] + torch.stack([some, some, some, other])
    rows[1, :, :, : example.shape[3] // 2] = other[:, :, : example.shape[3] // 2]
    rows[2, :, : example.shape[2] // 2] = other[:, : example.shape[2] // 2]
    return rows


def _plans(
    network: nn.Module, blocks: dict[str, nn.Module], calls: list[_Call], example: torch.Size, is_noise: bool
) -> tuple[list[BlockPlan], dict[str, str]]:
    """Plans of the blocks that were called, in that order; the reasons of those that cannot be fused.

    ``is_noise``: no two samples of the example have anything in common.
    """
    plans: list[BlockPlan] = []
    called = [call.name for call in calls]
    skipped = {name: "is not run in the forward pass" for name in blocks if name not in called}
    suffix = getattr(getattr(network, "config", None), "num_detection_tokens", 0)
    told = getattr(network, "num_prefix_tokens", None)  # timm
    seen: dict[int, tuple[Grid | None, int, int]] = {}  # by number of tokens: the map, the tokens beside it, behind it
    last = None  # width and number of tokens of the block before
    for call in calls:
        if called.count(call.name) > 1:
            skipped[call.name] = "runs more than once in a forward pass"
            continue
        parts = _parts(blocks[call.name], call, example[0])
        if isinstance(parts, str):
            skipped[call.name] = parts
            continue
        assert call.given is not None
        grid, prefix = Layout(parts.order).grid(call.given), 0
        if parts.order == "tokens":
            tokens = call.given[1]
            if tokens not in seen:
                before, behind = _still(call, suffix) if is_noise else (0, 0)
                usual = [beside for _, beside, _ in seen.values()]
                grid, prefix = _map(call, usual, told, before + behind, example)
                seen[tokens] = grid, prefix, suffix + (behind if before + behind <= prefix else 0)
            grid, prefix, suffix = seen[tokens]
        size = (parts.dim, call.given[1:].numel())
        stage = plans[-1].stage + (size != last) if plans else 0
        last = size
        plans.append(BlockPlan(call.name, parts, stage, prefix, suffix, grid))
    if plans and not _is_raster(plans[0], calls[0], example):
        plans = [replace(plan, grid=None) for plan in plans]
    return plans, skipped


def _parts(block: nn.Module, call: _Call, batch: int) -> Parts | str:
    """What a block is made of, or what it lacks."""
    if call.given is None or call.gave is None:
        return "takes or gives no tensor first"
    if len(call.given) < 3 or call.given[0] != batch:
        return f"works on {list(call.given)}, not on one row of tokens per sample (of {batch})"
    if call.gave != call.given:
        return "changes the number or the width of its tokens"
    names = [child.name for child in call.children]
    attentions = [name for name in names if name in _child(block, ATTENTION)]
    if len(attentions) != 1:
        return f"has {len(attentions)} attentions in a row ({', '.join(attentions) or 'none is called'}); wanted one"
    at = names.index(attentions[0])
    before = [name for name in names[:at] if name in _child(block, MLP)]
    if before and isinstance(block.get_submodule(attentions[0]), nn.Linear):
        return f"has its attention and its MLP in pieces ({attentions[0]}, {before[0]}), as parallel blocks do"
    if before:
        return "has its MLP before its attention"
    dim = _width(block, call.given)
    order = _order_of(call, dim)
    known = {call.given: order}
    attention = call.children[at]
    drop = next((child for child in call.children[at:] if DROP_PATH.search(child.name)), None)
    branch = attention.gave if drop is None else drop.given
    branch_order = None if branch is None else known.get(branch, _order(branch, dim))
    if branch is None or branch_order is None or branch.numel() != call.given.numel():
        return f"has an attention branch of another shape ({None if branch is None else list(branch)}) than its tokens"
    norm, norm_order = None, None
    for child in call.children[:at]:
        whole = child.gave is not None and child.gave.numel() == call.given.numel()
        if whole and is_norm(block.get_submodule(child.name)):
            gave = cast("torch.Size", child.gave)
            norm, norm_order = child.name, known.get(gave, _order(gave, dim))
    is_global = attention.given == call.given and len(call.given) == 3 and attention.is_alone
    return Parts(
        *(dim, order, branch_order, norm_order),
        norm=None if norm_order is None else norm,
        attention=attention.name,
        is_global=is_global,
        branch=None if drop is None else drop.name,
    )


def _width(block: nn.Module, given: torch.Size) -> int:
    """Channels of the block's tokens: of its first and its last axis the one that more of its weights work on."""
    if len(given) == 3:
        return given[2]
    sizes = [p.shape[0] if p.dim() == 1 else p.shape[1] for p in block.parameters() if p.dim()]
    return given[1] if sizes.count(given[1]) > sizes.count(given[-1]) else given[-1]


def _order_of(call: _Call, dim: int) -> Order:
    """Order of a block's input; where a map is as wide as its channels are many, the noise in halves of the image tells."""
    given = cast("torch.Size", call.given)
    is_either = len(given) == 4 and given[1] == given[3] == dim
    if not is_either or call.tokens is None or given[0] != 4:
        return cast("Order", _order(given, dim))
    moved = _moved(call.tokens)
    return "first" if _by_row(moved.sum(1)) > _by_row(moved.sum(3)) else "last"


def _order(shape: torch.Size, dim: int) -> Order | None:
    if shape[-1] == dim:
        return "tokens" if len(shape) == 3 else "last"
    return "first" if len(shape) == 4 and shape[1] == dim else None


def _still(call: _Call, suffix: int) -> tuple[int, int]:
    """How many tokens before the others, and behind them, are the same whatever the input is; zeros where all are."""
    if call.tokens is None:
        return 0, 0
    moved = _moved(Layout("tokens", suffix).tokens(call.tokens)).sum(-1).amax(0)
    moving = (moved > 1e-8 * moved.max()).nonzero().flatten().tolist()
    return (moving[0], len(moved) - 1 - moving[-1]) if moving else (0, 0)


def _map(
    call: _Call, prefixes: list[int], told: int | None, still: int, example: torch.Size
) -> tuple[Grid | None, int]:
    """Rows and columns of the map among the tokens, and the number of tokens beside it.

    Told by the block's arguments, else by the convolutions before it, else by the input's proportions. Tokens that stand
    still whatever the input is are none of the map's, unless the network itself says so.
    """
    assert call.given is not None
    tokens = call.given[1]
    usual = [*reversed(prefixes), told or 0, still, 0]  # beside the map: as in earlier blocks, as the network says
    usual = [beside for beside in usual if beside >= still or beside == told]
    maps = [call.pair] if call.pair is not None else []
    maps += sorted(set(call.maps), key=math.prod, reverse=True)
    for grid in maps:
        if tokens - math.prod(grid) in usual:
            return grid, tokens - math.prod(grid)
    if (prefixes or told or still) and (found := _in_proportion(tokens, usual, example)):
        return found
    for grid in maps:
        if 1 < math.prod(grid) <= tokens - still:
            return grid, tokens - math.prod(grid)
    return _in_proportion(tokens, usual, example) or (None, usual[0])


def _in_proportion(tokens: int, prefixes: list[int], example: torch.Size) -> tuple[Grid, int] | None:
    """A map with the proportions of the input image."""
    for prefix in prefixes if len(example) == 4 else []:
        rows = round((max(tokens - prefix, 0) * example[2] / example[3]) ** 0.5)
        columns = rows * example[3] // example[2]
        if rows and rows * columns == tokens - prefix and rows * example[3] == columns * example[2]:
            return (rows, columns), prefix
    return None


def _is_raster(plan: BlockPlan, call: _Call, example: torch.Size) -> bool:
    """The first block's tokens stand row by row: noise in an image's left half is left, in its upper half above.

    Tokens that stand otherwise (by window, by mask unit) have one half of the change in either half. In a map of less than
    seven rows or columns this tells nothing, for convolutions have looked at the whole image then: its proportions must do.
    """
    if plan.grid is None or call.name != plan.name or call.tokens is None or len(example) != 4:
        return True
    if not 0.5 <= plan.grid[0] * example[3] / (plan.grid[1] * example[2]) <= 2:
        return False
    if min(plan.grid) < 7:
        return True
    moved = _moved(plan.layout.tokens(call.tokens))[:, plan.prefix :].sum(-1)
    return _by_row(moved.unflatten(1, plan.grid)) > 0.6


def _moved(tokens: Tensor) -> Tensor:
    """By how much other noise in an image's left half, in its upper half, and all over changed the tokens, squared."""
    return (tokens[1:] - tokens[:1]).float().square()


def _by_row(moved: Tensor) -> float:
    """Share of the change ``[2, rows, columns]`` that is left for noise in the left half, above for noise in the upper half."""
    left, upper = moved[0].sum(0), moved[1].sum(1)  # of every column; of every row
    return min(float(half[: (len(half) + 1) // 2].sum() / half.sum()) for half in (left, upper))
