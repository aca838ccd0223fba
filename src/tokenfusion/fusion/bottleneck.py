"""Streams that meet in a few tokens (attention bottlenecks)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.fusion.baselines import present_mean
from tokenfusion.fusion.fusers import Block, Context, Entry, Fuser
from tokenfusion.fusion.modality import merge, split


class Bottleneck(Fuser):
    """Every stream attends to its own tokens and to K bottleneck tokens, the only ones through which streams meet (MBT).

    Attention bottlenecks (Nagrani et al., NeurIPS 2021): each stream updates a copy of the bottleneck tokens as if they were
    its own; the mean of the copies goes to the next block. Every fuser adds an offset of its own (blocks that share a fuser
    share it), and where the width changes the tokens start again from it (ours, for pyramids). Our blocks update them by
    attention alone, for the MLP of a MiT looks at a map, which they do not stand in; foreign blocks run on them whole.

    The copies of missing streams do not count.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        tokens: K, 4 in the paper.
    """

    adds_tokens = True

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0, tokens: int = 4) -> None:
        super().__init__(dim, modalities, stage, seed)
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {tokens}")
        self.offset = nn.Parameter(torch.empty(tokens, dim))
        nn.init.trunc_normal_(self.offset, std=0.02)

    def enter(self, x: Tensor, ctx: Context) -> Entry:
        beside = self.offset if ctx.carried is None else ctx.carried + self.offset
        return Entry(ctx.align(x), beside=beside.to(x.dtype).expand(*x.shape[:2], -1, -1))

    def carry(self, beside: Tensor, ctx: Context) -> None:
        ctx.carried = present_mean(beside, ctx.present)

    def forward(self, block: Block, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        entry = self.enter(x, ctx)
        assert entry.beside is not None
        whole = merge(torch.cat([entry.x, entry.beside], 2))
        normed, tokens = block.norm1(whole), x.shape[2]
        context = torch.cat([block.attention.reduce(normed[:, :tokens], ctx.grid), normed[:, tokens:]], 1)
        whole = whole + block.drop(block.attention(normed, ctx.grid, context=context))
        own, beside = whole[:, :tokens], whole[:, tokens:]
        self.carry(split(beside, len(x)), ctx)
        return split(own + block.drop(block.feed(own, ctx.grid)), len(x)), None
