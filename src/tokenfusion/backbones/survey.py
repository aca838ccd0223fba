"""What a foreign network is made of: its transformer blocks, where each can be fused, and why others cannot."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenfusion.backbones.calls import Call, noisy, seen
from tokenfusion.backbones.plan import BlockPlan, Layout, Order, Parts, Survey
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Grid

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn|feed_?forward|intermediate", re.IGNORECASE)
DROP = re.compile(r"drop", re.IGNORECASE)
DROP_PATH = re.compile(r"drop_?path", re.IGNORECASE)
NORM = re.compile(r"norm|affine", re.IGNORECASE)


def is_norm(module: nn.Module) -> bool:
    """A layer that norms: its class says so, and its parameters, if any, are one number per channel.

    It may drop and activate too, in children without parameters (timm's BatchNormAct2d).
    """
    kind = type(module)
    if not NORM.search(kind.__name__) or kind.__module__.startswith("torch.nn.utils"):  # there are norms of weights
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


def survey(network: nn.Module, example: Any, run: Any) -> Survey:
    """Run a network once and see where its blocks can be fused.

    Args:
        network: any module; its mode and weights stay as they are.
        example: an input ``[2, ...]``.
        run: calls the network: ``run(example)``.

    Raises:
        UserError: where no block can be fused; the first reason is told. Where chance decides which tokens or blocks are run.
    """
    _check_all_kept(network)
    blocks, kind = candidates(network), type(network).__name__
    if not blocks:
        raise UserError(f"{kind} has no transformer blocks ({_nearest(network)}); wanted a transformer")
    shown, before = noisy(example), _chance()
    try:
        calls, stems = seen(network, blocks, shown, run)
    except UserError:
        if shown is example:
            raise
        shown = example  # its numbers are not any numbers: some choose a row of a table
        calls, stems = seen(network, blocks, shown, run)
    if not all(map(torch.equal, before, _chance())) and _differ(calls, seen(network, blocks, shown, run)[0]):
        raise UserError(
            f"{kind} draws which tokens its blocks are given, in each stream others, in evaluation too; switch that off"
        )
    plans, skipped = _plans(network, blocks, calls, shown.shape, shown is not example)
    if not plans:
        name, reason = next(iter(skipped.items()))
        raise UserError(f"{kind} cannot be fused: block {name} ({type(blocks[name]).__name__}) {reason}")
    see_it = [call for call in stems if call.given is not None and call.given[:2] == shown.shape[:2]]
    stem = see_it[0].name if len(see_it) == 1 and see_it[0].given == shown.shape else None
    return Survey(plans, skipped, stem)


def _check_all_kept(network: nn.Module) -> None:
    """Raise a UserError where a network leaves patches or blocks out in training: each stream would lack others."""
    kind = type(network).__name__
    for name, module in network.named_modules():
        drops = name.rpartition(".")[2] == "patch_drop" or type(module).__name__ == "PatchDropout"
        if drops and getattr(module, "prob", 0) > 0:
            raise UserError(f"{kind} drops patches in training, in each stream others; set patch_drop_rate=0")
        for owner in (module, getattr(module, "config", None)):
            rate = getattr(owner, "layerdrop", 0)
            if isinstance(rate, float) and rate > 0:
                raise UserError(
                    f"{kind} leaves whole blocks out in training (layerdrop {rate:g}), and with them their exchange; set "
                    "layerdrop=0 in its config"
                )


def _chance() -> list[Tensor]:
    """The state of the random generators: whether anything was drawn can be told from it."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _differ(calls: list[Call], again: list[Call]) -> bool:
    """Whether the first block was given other tokens the second time."""
    first, second = calls[0].tokens, again[0].tokens
    return first is not None and second is not None and not torch.equal(first, second)


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


def _plans(
    network: nn.Module, blocks: dict[str, nn.Module], calls: list[Call], example: torch.Size, is_noise: bool
) -> tuple[list[BlockPlan], dict[str, str]]:
    """Plans of the blocks that were called, in that order; the reasons of those that cannot be fused.

    ``is_noise``: no two samples of the example have anything in common.
    """
    plans: list[BlockPlan] = []
    called = [call.name for call in calls]
    skipped = {name: "is not run in the forward pass" for name in blocks if name not in called}
    detection = getattr(getattr(network, "config", None), "num_detection_tokens", 0)
    told = getattr(network, "num_prefix_tokens", None)  # timm
    known: dict[int, tuple[Grid | None, int, int]] = {}  # by number of tokens: the map, the tokens beside it, behind it
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
        grid, prefix, suffix = Layout(parts.order).grid(call.given), 0, detection
        if parts.order == "tokens":
            tokens = call.given[1]
            if tokens not in known:
                before, behind = _still(call, detection) if is_noise else (0, 0)
                usual = [beside for _, beside, _ in known.values()]
                grid, prefix = _map(call, usual, told, before + behind, example)
                known[tokens] = grid, prefix, detection + (behind if before + behind <= prefix else 0)
            grid, prefix, suffix = known[tokens]
        size = (parts.dim, call.given[1:].numel())
        stage = plans[-1].stage + (size != last) if plans else 0
        last = size
        plans.append(BlockPlan(call.name, parts, stage, prefix, suffix, grid))
    if plans and not _is_raster(plans[0], calls[0], example):
        plans = [replace(plan, grid=None) for plan in plans]
    return plans, skipped


def _parts(block: nn.Module, call: Call, batch: int) -> Parts | str:
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


def _order_of(call: Call, dim: int) -> Order:
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


def _still(call: Call, suffix: int) -> tuple[int, int]:
    """How many tokens before the others, and behind them, are the same whatever the input is; zeros where all are."""
    if call.tokens is None:
        return 0, 0
    moved = _moved(Layout("tokens", suffix).tokens(call.tokens)).sum(-1).amax(0)
    moving = (moved > 1e-8 * moved.max()).nonzero().flatten().tolist()
    return (moving[0], len(moved) - 1 - moving[-1]) if moving else (0, 0)


def _map(call: Call, prefixes: list[int], told: int | None, still: int, example: torch.Size) -> tuple[Grid | None, int]:
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


def _is_raster(plan: BlockPlan, call: Call, example: torch.Size) -> bool:
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
