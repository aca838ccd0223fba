"""What TokenFusion is compared with: every alternative is one more fuser over the same blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenfusion.fusion.allocation import shuffled_ranks
from tokenfusion.fusion.exchange import substitute
from tokenfusion.fusion.fusers import Block, Context, Fuser, behind_prefix, residual
from tokenfusion.fusion.modality import merge, split


class Concat(Fuser):
    """Token concatenation: every stream's queries attend to the keys and values of all streams ("alignment-agnostic", Table 2).

    Keys and values are reduced and normed per stream first, since MiT's spatial reduction needs a map. A missing stream's
    keys are masked, unless no stream is present in a sample.
    """

    attends_to_all = True

    def forward(self, block: Block, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        x = ctx.align(x)
        normed = block.norm1(merge(x))
        own = split(block.attention.reduce(normed, ctx.grid), x.shape[0])  # [M, B, K, C]
        context = own.transpose(0, 1).flatten(1, 2).repeat(x.shape[0], 1, 1)  # [M*B, M*K, C]
        mask = None
        if ctx.present is not None:
            mask = keys_of(ctx.present).t().repeat_interleave(own.shape[2], 1).repeat(x.shape[0], 1)
        attended = block.attention(normed, ctx.grid, context=context, mask=mask)
        return residual(block, x, split(attended, x.shape[0]), ctx.grid), None


def keys_of(present: Tensor) -> Tensor:
    """Whose keys are seen, bool ``[M, B]``: all of a sample without any stream, for a softmax over nothing is NaN."""
    return present | ~present.any(0)


def present_mean(x: Tensor, present: Tensor | None) -> Tensor:
    """``[M, B, N, C] -> [B, N, C]``: the mean over the streams that are present; zeros, where none is."""
    if present is None:
        return x.mean(0)
    there = present.to(x.dtype)
    return (x * (there / there.sum(0).clamp(min=1))[:, :, None, None]).sum(0)


class Average(Fuser):
    """Aligned features are averaged: every stream receives the mean attention output of the streams that are present."""

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        return present_mean(attended, ctx.present).expand_as(attended)


class Random(Fuser):
    """Tokens are exchanged at random, without scores ("random 10 % / 30 %", Table 5).

    In training every step draws anew from torch's generator. In evaluation every block's draw is fixed, so that figures repeat.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        rate: expected share of exchanged tokens, 0..1.
    """

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0, rate: float = 0.1) -> None:
        super().__init__(dim, modalities, stage, seed)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in 0..1, not {rate}")
        self.rate = rate

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        if self.modalities == 1:
            return attended
        return behind_prefix(
            attended,
            ctx.prefix,
            lambda e: substitute(e, self.stand_in(e, ctx.present), self._drawn(e, ctx.present, ctx.block)),
        )

    def _drawn(self, x: Tensor, present: Tensor | None, block: int) -> Tensor:
        if self.training:
            drawn = torch.rand(x.shape[:3], device=x.device) < self.rate
        else:
            rows = [-1 - m - block * len(x) for m in range(len(x))]  # the group allocation draws from 0 on
            ranks = [shuffled_ranks(x.shape[2], self.seed, self.stage, row, x.device) for row in rows]
            drawn = (torch.stack(ranks) < self.rate * x.shape[2]).unsqueeze(1).expand(x.shape[:3])
        return drawn if present is None else drawn | ~present.unsqueeze(-1)
