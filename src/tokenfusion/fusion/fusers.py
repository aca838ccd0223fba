"""How the streams exchange information inside a block: the contract, no fusion, and TokenFusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.fusion.allocation import partners, present_partners, take
from tokenfusion.fusion.exchange import ExchangeRates, below, exchange_rates, substitute
from tokenfusion.fusion.modality import merge, split
from tokenfusion.fusion.scores import ScorePredictor

Grid = tuple[int, int]


class Block(Protocol):
    """What a fuser needs of a pre-norm block; every call takes the merged stack ``[M*B, N, C]``."""

    norm1: Any
    norm2: Any
    attention: Any  # (tokens, grid, context=None, mask=None); .reduce(tokens, grid) makes a stream's own context
    mlp: Any  # (tokens, grid)
    drop: Any  # stochastic depth

    def feed(self, x: Tensor, grid: Grid) -> Tensor: ...  # mlp(norm2(x))


@dataclass
class Context:
    """What a fuser knows beside the tokens.

    Attributes:
        grid: rows and columns of the token map, N tokens.
        prefix: leading tokens (class, register, detection) before these, that are never scored, exchanged or counted.
        position: embedding ``[prefix + N, C]`` that residual positional alignment re-adds before this block, gradient stopped.
        present: bool ``[M, B]``, or None where every modality is there.
        carried: what a method takes along from block to block of one width, ``[B, K, C]``.
        block: index of the block among those that run in a row.
    """

    grid: Grid
    prefix: int = 0
    position: Tensor | None = None
    present: Tensor | None = None
    carried: Tensor | None = None
    block: int = 0

    def align(self, x: Tensor) -> Tensor:
        """Re-add the position embedding, where the model has residual positional alignment."""
        return x if self.position is None else x + self.position


class Entry(NamedTuple):
    """What a fuser decides where a block begins."""

    x: Tensor  # [M, B, prefix + N, C]: the tokens that the block works on
    scores: Tensor | None = None  # [M, B, N]; None where the method does not score
    weight: Tensor | None = None  # [M, B, prefix + N], what the normed tokens are weighed by before attention
    beside: Tensor | None = None  # [M, B, K, C]: tokens of the method's own that attend and are attended to beside x


class Fuser(nn.Module):
    """How one block runs on all streams, from three decisions: :meth:`enter`, :meth:`between`, :meth:`leave`.

    They are made before the block, between its norm and its attention, and behind its attention. ``fuser(block, x, ctx) ->
    (x, scores)`` runs a block of the contract: ``x [M, B, prefix + N, C]``, ``scores [M, B, N]`` or None. Blocks that run
    themselves (those of foreign networks) call the decisions from inside.

    Args:
        dim: token width C.
        modalities: number of streams M.
        stage: index of the stage, which has its own group allocation.
        seed: of the group allocation.
    """

    threshold: float | None = None
    works_on_normed = False  # decides on normed tokens too, which takes a norm before attention
    uses_scales = False  # reads the scales of that norm, one per channel
    adds_tokens = False  # uses Entry.beside, which takes blocks that treat their tokens as a set
    can_be_pressed = True  # of methods with a threshold: the l1 norm lowers its scores
    attends_to_all = False  # every stream's queries attend to the keys of all streams

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.modalities = modalities
        self.stage = stage
        self.seed = seed

    def enter(self, x: Tensor, ctx: Context) -> Entry:
        """Before the block, on its input ``x [M, B, prefix + N, C]``."""
        return Entry(ctx.align(x))

    def between(self, normed: Tensor, norm: nn.Module, entry: Entry, ctx: Context) -> Tensor:
        """Between ``norm`` and attention, on the normed tokens ``[M, B, prefix + N, C]``."""
        return normed if entry.weight is None else normed * entry.weight.unsqueeze(-1)

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        """Behind the block's attention, on that residual branch ``[M, B, prefix + N, C]`` before it is added."""
        return attended

    def carry(self, beside: Tensor, ctx: Context) -> None:
        """Take along what became of ``Entry.beside``, ``[M, B, K, C]``."""

    def forward(self, block: Block, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        entry = self.enter(x, ctx)
        normed = self.between(split(block.norm1(merge(entry.x)), len(x)), block.norm1, entry, ctx)
        attended = split(block.attention(merge(normed), ctx.grid), len(x))
        return residual(block, entry.x, self.leave(attended, entry.scores, ctx), ctx.grid), entry.scores

    def stand_in(self, x: Tensor, present: Tensor | None) -> Tensor:
        """For every token the same position of the modality allotted to it (Eq. 2 and 3 with h = identity, Eq. 7)."""
        if present is None and self.modalities <= 2:
            return x if self.modalities == 1 else x.flip(0)
        partner = partners(self.modalities, x.shape[2], self.seed, self.stage, x.device)
        return take(x, partner if present is None else present_partners(partner, present))

    def rates(self, scores: Tensor, present: Tensor | None = None) -> ExchangeRates:
        """What this fuser exchanged, from the scores that it returned."""
        assert self.threshold is not None, "only fusers with a threshold exchange by score"
        own = torch.arange(self.modalities, device=scores.device).view(-1, 1, 1).expand_as(scores)
        has = self.stand_in(own, present) != own  # a stream that is alone has nobody to stand in
        return exchange_rates(scores, self.stand_in(scores, present), self.threshold, present, has)


FuserFactory = Callable[[int, int, int], Fuser]  # (dim, modalities, stage)


def residual(block: Block, x: Tensor, attended: Tensor, grid: Grid) -> Tensor:
    """Both residual steps of a pre-norm block (Eq. 1), from what its attention gave; all ``[M, B, N, C]``."""
    y = merge(x) + block.drop(merge(attended))
    return split(y + block.drop(block.feed(y, grid)), x.shape[0])


class NoFusion(Fuser):
    """The streams never meet before the ensemble ("late ensemble"; with one modality: the plain network)."""


class TokenFusion(Fuser):
    """Uninformative tokens are substituted by aligned tokens of another modality (Sec. 3.2, 3.3).

    ``rule="released"``: the score weighs the attention output, and where it is below the threshold that residual branch is
    replaced by the partner's (weighed by the partner's score); the residual stream keeps its own token. Every published
    checkpoint works so. ``rule="paper"``: whole tokens are substituted before the layer (Eq. 6), then the score weighs the
    input of attention (Eq. 4); a substituted token brings its score along.

    Args:
        dim, modalities, stage, seed: see :class:`Fuser`.
        rule: ``"released"`` or ``"paper"``.
        threshold: theta, 0.02 in the released code and Sec. 4 (1e-2 in Sec. 3.2); 1.0 exchanges everything.
        init_bias: see :class:`~tokenfusion.fusion.scores.ScorePredictor`.
    """

    def __init__(
        self,
        dim: int,
        modalities: int,
        stage: int = 0,
        seed: int = 0,
        rule: Literal["released", "paper"] = "released",
        threshold: float = 0.02,
        init_bias: float | None = None,
    ) -> None:
        super().__init__(dim, modalities, stage, seed)
        if rule not in ("released", "paper"):
            raise ValueError(f"rule must be 'released' or 'paper', not {rule!r}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, not {threshold}")
        self.rule = rule
        self.threshold: float = threshold
        self.score = ScorePredictor(dim, modalities, init_bias)

    @property
    def works_on_normed(self) -> bool:  # type: ignore[override]
        return self.rule == "paper"

    def enter(self, x: Tensor, ctx: Context) -> Entry:
        if self.rule == "released":
            x = ctx.align(x)
            return Entry(x, self._scores(x, ctx))
        scores = self._scores(x, ctx)
        weight = self._exchange(_pad_prefix(scores, ctx.prefix).unsqueeze(-1), scores, ctx).squeeze(-1)
        return Entry(ctx.align(self._exchange(x, scores, ctx)), scores, weight)  # Eq. 6, "before each layer"; Eq. 4

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        if self.rule == "paper" or scores is None:
            return attended
        return self._exchange(attended * _pad_prefix(scores, ctx.prefix).unsqueeze(-1), scores, ctx)

    def _scores(self, x: Tensor, ctx: Context) -> Tensor:
        scores = self.score(x[:, :, ctx.prefix :] if ctx.prefix else x)
        # a missing modality is uninformative everywhere: the method itself fills it in
        return scores if ctx.present is None else scores * ctx.present.unsqueeze(-1)

    def _exchange(self, x: Tensor, scores: Tensor, ctx: Context) -> Tensor:
        if self.modalities == 1:
            return x
        return behind_prefix(
            x, ctx.prefix, lambda e: substitute(e, self.stand_in(e, ctx.present), below(scores, self.threshold))
        )


def behind_prefix(x: Tensor, prefix: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the map's tokens of ``x [M, B, prefix + N, C]`` and leave those before them alone."""
    return torch.cat([x[:, :, :prefix], change(x[:, :, prefix:])], 2) if prefix else change(x)


def _pad_prefix(scores: Tensor, prefix: int) -> Tensor:
    """Prefix tokens are weighed by one."""
    return F.pad(scores, (prefix, 0), value=1.0) if prefix else scores
