"""What is known of a foreign network's blocks: how their tokens lie, which of their children do what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenfusion.fusion.fusers import Grid

Order = Literal["tokens", "last", "first"]  # [B, N, C]; [B, ..., C]; [B, C, H, W]


class Layout(NamedTuple):
    """How a block lays out its tokens, and the way to ``[B, N, C]`` and back.

    Args:
        order: where the channels stand.
        suffix: tokens behind the map's (YOLOS' detection tokens); they are shown before it.
    """

    order: Order
    suffix: int = 0

    def tokens(self, x: Tensor) -> Tensor:
        if self.order == "first":
            return x.flatten(2).transpose(1, 2)
        x = x.flatten(1, -2)
        return x.roll(self.suffix, 1) if self.suffix else x

    def back(self, tokens: Tensor, like: Tensor) -> Tensor:
        """``[B, N, C]`` in the shape of ``like``."""
        if self.order == "first":
            return tokens.transpose(1, 2).reshape(like.shape)
        tokens = tokens.roll(-self.suffix, 1) if self.suffix else tokens
        return tokens.reshape(like.shape)

    def grid(self, shape: torch.Size) -> Grid | None:
        """Rows and columns where the shape tells them."""
        if self.order == "first":
            return shape[2], shape[3]
        return (shape[1], shape[2]) if self.order == "last" and len(shape) == 4 else None


class Parts(NamedTuple):
    """What a block is made of; names are those of its children.

    Attributes:
        dim: token width C.
        order: of its input; ``branch_order`` of its attention's residual branch; ``norm_order`` of the normed tokens.
        norm: what stands before attention; None in blocks that norm behind it.
        attention: the child that attends.
        is_global: attention sees all tokens of a sample at once, and is given nothing else.
        branch: the child that ends the attention's residual branch: its input is the branch (drop path); None: what the
            attention gives.
    """

    dim: int
    order: Order
    branch_order: Order
    norm_order: Order | None
    norm: str | None
    attention: str
    is_global: bool
    branch: str | None


@dataclass(frozen=True)
class BlockPlan:
    """Where one block can be fused.

    Attributes:
        name: in the network, ``blocks.3``.
        parts: of the block.
        stage: runs of blocks of one width and number of tokens are a stage.
        prefix: class, register and detection tokens; the last ``suffix`` of them stand behind the map's tokens.
        grid: rows and columns at the example's size; None where the order of the tokens is unknown.
    """

    name: str
    parts: Parts
    stage: int
    prefix: int
    suffix: int
    grid: Grid | None

    @property
    def dim(self) -> int:
        return self.parts.dim

    @property
    def layout(self) -> Layout:
        """Of the block's input and output."""
        return Layout(self.parts.order, self.suffix)

    @property
    def branch_layout(self) -> Layout:
        return Layout(self.parts.branch_order, self.suffix)

    @property
    def norm_layout(self) -> Layout | None:
        return None if self.parts.norm_order is None else Layout(self.parts.norm_order, self.suffix)


@dataclass(frozen=True)
class Survey:
    """A network's blocks in the order in which they run, those that cannot be fused with the reason, and its first layer."""

    blocks: list[BlockPlan]
    skipped: dict[str, str]
    stem: str | None  # the convolution that sees the input, where it is the only one
