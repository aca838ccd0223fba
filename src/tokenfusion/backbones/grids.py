"""Rows and columns of a block's map, in inputs of other sizes than the one that a network was surveyed with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Grid


def grid_at(plan: BlockPlan, x: Tensor, size: torch.Size, example_size: torch.Size) -> Grid:
    """Rows and columns of a block's map, from its input and the sizes of the network's input now and when it was surveyed."""
    if plan.grid is None:
        return 1, x[0].numel() // plan.dim - plan.prefix
    told = plan.layout.grid(x.shape)
    return told if told is not None else grid_of_tokens(plan, x.shape[1] - plan.prefix, size, example_size)


def grid_of_tokens(plan: BlockPlan, tokens: int, size: Sequence[int], example_size: Sequence[int]) -> Grid:
    """Rows and columns of a map of so many tokens, in the proportions that it had when it was surveyed.

    Args:
        plan, tokens: the block, and how many of its tokens are the map's.
        size, example_size: of the network's input, now and when it was surveyed; the last two count.

    Raises:
        UserError: where no map of so many tokens has these proportions.
    """
    if plan.grid is None:
        return 1, tokens
    now, then = (size[-2], size[-1]), (example_size[-2], example_size[-1])
    if now == then:
        return plan.grid
    is_image = len(example_size) > 2
    found = _strided(plan.grid, tokens, now, then) or _in_proportion(plan.grid, tokens, now, then) if is_image else None
    if found is not None:
        return found
    if plan.grid[0] * plan.grid[1] == tokens:  # the network resizes its input by itself
        return plan.grid
    raise UserError(
        f"block {plan.name}: how its {tokens} tokens stand in an input of {now[0]}x{now[1]} is unknown ({plan.grid[0]}x"
        f"{plan.grid[1]} in the example of {then[0]}x{then[1]}); give inputs of the example's size, or example= of this one"
    )


def _strided(grid: Grid, tokens: int, size: Grid, example: Grid) -> Grid | None:
    """The map of so many tokens by a stride, equal along both axes, that gives the surveyed map in the example.

    What is left of an image behind the last stride is dropped, or padded.
    """
    for stride in range(max(1, example[0] // (grid[0] + 1)), example[0] // max(1, grid[0] - 1) + 1):
        for missing in (0, stride - 1):
            then = (example[0] + missing) // stride, (example[1] + missing) // stride
            rows, columns = (size[0] + missing) // stride, (size[1] + missing) // stride
            if then == grid and rows * columns == tokens:
                return rows, columns
    return None


def _in_proportion(grid: Grid, tokens: int, size: Grid, example: Grid) -> Grid | None:
    """Of the maps of so many tokens the one whose proportions are nearest to the surveyed map's, scaled as the input is.

    The surveyed map may have lost a row or a column to rounding, or won one; so far, scaled, a map may lie beside it.
    """
    rows, columns = (
        range((n - 1) * now // then, -(-(n + 1) * now // then) + 1)
        for n, now, then in zip(grid, size, example, strict=True)
    )
    fitting = [(n, tokens // n) for n in rows if n and tokens % n == 0 and tokens // n in columns]
    tall, wide = grid[0] * size[0] * example[1], grid[1] * size[1] * example[0]
    return min(fitting, key=lambda pair: abs(pair[0] * wide - pair[1] * tall), default=None)
