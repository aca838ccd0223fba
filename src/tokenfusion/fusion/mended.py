"""TokenFusion with its exchange mended: the better-scored stream gives, within a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from tokenfusion.fusion.exchange import substitute
from tokenfusion.fusion.fusers import Context, Entry, Fuser, behind_prefix
from tokenfusion.fusion.scores import ScorePredictor

EVEN = 0.5  # r where both score alike


class Shares(ScorePredictor):
    """``r = s / (s + s_partner)`` of every token, at least 0.5 where the budget is spent.

    Scores start equal, and so do the shares: all at 0.5.

    Args:
        dim, modalities: see :class:`~tokenfusion.fusion.scores.ScorePredictor`.
        budget: largest share of a stream's tokens that stays below 0.5: those whose partners are furthest ahead.

    Shape: ``[M, B, N, C] -> [M, B, N]``; ``stand_in`` gives every token's partner its place.
    """

    def __init__(self, dim: int, modalities: int, budget: float) -> None:
        super().__init__(dim, modalities)
        self.budget = budget
        for net in self.nets:
            nn.init.zeros_(cast("nn.Linear", cast("nn.Sequential", net)[-1]).weight)

    def forward(self, x: Tensor, stand_in: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        margins = self.margins(x)
        exact = torch.promote_types(margins.dtype, torch.float32)  # half a type tells no two scores near 0.5 apart
        return self.weighed(margins.to(exact).sigmoid(), stand_in)

    def weighed(self, s: Tensor, stand_in: Callable[[Tensor], Tensor]) -> Tensor:
        """What scores ``[M, B, N]`` come to beside those of their partners; where both are 0, 0.5."""
        total = s + stand_in(s)
        shares = torch.where(total > 0, s / total.clamp(min=torch.finfo(s.dtype).tiny), EVEN)
        count = int(self.budget * s.shape[-1])
        if count == s.shape[-1]:
            return shares
        furthest = shares.topk(count, dim=-1, largest=False).indices  # by rank: where shares tie the budget holds too
        in_budget = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, furthest, True)
        return torch.where(in_budget, shares, shares.clamp(min=EVEN))


class MendedFusion(Fuser):
    """A token's attention output gives way to its partner's where the partner scores higher. Ours.

    Under the released rule most donors are below the threshold themselves and come weighed by their own small scores: attention
    is pruned there, not exchanged. Here scores only weigh against each other. With ``r = s / (s + s_partner)``, which is what
    the fuser returns as its scores, a token with ``r < 1/2`` becomes ``r x own + (1 - r) x stand-in``: half of each where the
    partner is hardly ahead, all of the stand-in where the token is worth nothing. The others stay as they are. The l1 norm has
    no hold on such scores, for what one stream loses the other wins.

    All scores start equal, so that the model starts exactly as the unfused one. Tokens that stay teach their scores through the
    straight-through estimate of the choice: the gradient that the blend would have.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        budget: largest share of a stream's tokens that is exchanged, 0..1; those whose partners are furthest ahead.
        whole: the stand-in takes the token's place entirely, however little its partner is ahead.
    """

    threshold: float | None = EVEN  # None of a single stream
    can_be_pressed = False

    def __init__(
        self, dim: int, modalities: int, stage: int = 0, seed: int = 0, budget: float = 0.5, whole: bool = False
    ) -> None:
        super().__init__(dim, modalities, stage, seed)
        if not 0 <= budget <= 1:
            raise ValueError(f"budget must be in 0..1, not {budget}")
        self.whole = whole
        if modalities == 1:  # nobody to compare with
            self.threshold = None
            return
        self.score = Shares(dim, modalities, budget)

    def enter(self, x: Tensor, ctx: Context) -> Entry:
        x = ctx.align(x)
        if self.threshold is None:
            return Entry(x)
        shares: Tensor = self.score(x[:, :, ctx.prefix :], lambda s: self.stand_in(s, ctx.present))
        return Entry(x, shares if ctx.present is None else shares * ctx.present.unsqueeze(-1))

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        if scores is None:
            return attended
        return behind_prefix(attended, ctx.prefix, lambda x: self._exchanged(x, scores, ctx.present))

    def _exchanged(self, x: Tensor, scores: Tensor, present: Tensor | None) -> Tensor:
        stand_in, r = self.stand_in(x, present), scores.unsqueeze(-1).to(x.dtype)
        given = stand_in if self.whole else r * x + (1 - r) * stand_in
        if not self.training:
            return substitute(x, given, scores < EVEN)
        estimate = (r - r.detach()) * (x - stand_in).detach()  # zero, with the gradient of the blend
        return substitute(x + estimate, given + estimate if self.whole else given, scores < EVEN)
