"""What a stream takes from another that shares no blocks with it: TokenFusion before a layer, and what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.fusion.allocation import shuffled_ranks
from tokenfusion.fusion.exchange import below, substitute
from tokenfusion.fusion.scores import ScorePredictor


class Exchange(nn.Module):
    """Two decisions on one stream's tokens ``[B, N, C]`` before a layer: :meth:`score` them, then :meth:`take` stand-ins.

    ``exchange(tokens, stand_in, has) -> (tokens, scores or None)`` makes both, and weighs tokens by their scores in between.
    Tokens that have no stand-in (``has`` false: no view shows the point) stay as they are; only :class:`ConcatExchange`
    learns to change them.

    Args:
        dim: token width C.
        seed: of what a method draws.
    """

    threshold: float | None = None  # theta, of methods that go by scores

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()

    def score(self, tokens: Tensor, has: Tensor) -> Tensor | None:
        """How informative the tokens are, ``[B, N]`` in 0..1, 1 without a stand-in; None of methods that do not score."""
        return None

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        """The tokens with stand-ins ``[B, N, C]`` for some of them."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scored, weighed (Eq. 4), exchanged; what weighs tokens elsewhere, behind a norm, asks for both decisions itself."""
        scores = self.score(tokens, has)
        weighed = tokens if scores is None else tokens * scores.unsqueeze(-1).to(tokens.dtype)
        return self.take(weighed, stand_in, has, scores), scores


class NoExchange(Exchange):
    """The streams never meet in their layers."""

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        return tokens


class TokenExchange(Exchange):
    """The stand-in takes the place of every token that scores below the threshold (Eq. 6).

    A token without a stand-in has nothing to be compared with: it is neither weighed nor replaced.

    Args:
        dim, seed: see :class:`Exchange`.
        threshold: theta, 0.02 in the released code and Sec. 4; 1.0 exchanges everything.
        init_bias: see :class:`~tokenfusion.fusion.scores.ScorePredictor`.
    """

    def __init__(self, dim: int, seed: int = 0, threshold: float = 0.02, init_bias: float | None = None) -> None:
        super().__init__(dim, seed)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, not {threshold}")
        self.threshold: float = threshold
        self.scorer = ScorePredictor(dim, 1, init_bias)

    def score(self, tokens: Tensor, has: Tensor) -> Tensor:
        return torch.where(has, self.scorer(tokens[None])[0], 1.0)

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return substitute(tokens, stand_in.to(tokens.dtype), below(scores, self.threshold) & has)


class AverageExchange(Exchange):
    """The mean of a token and its stand-in."""

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        return torch.where(has.unsqueeze(-1), (tokens + stand_in.to(tokens.dtype)) / 2, tokens)


class RandomExchange(Exchange):
    """Tokens are replaced at a fixed rate, whatever they hold; drawn anew in training, the same for ever in evaluation.

    Args:
        dim, seed: see :class:`Exchange`.
        rate: share of the tokens that have a stand-in, 0..1.
    """

    def __init__(self, dim: int, seed: int = 0, rate: float = 0.3) -> None:
        super().__init__(dim, seed)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in 0..1, not {rate}")
        self.rate, self.seed = rate, seed

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        if self.training:
            drawn = torch.rand(has.shape, device=has.device) < self.rate
        else:
            drawn = shuffled_ranks(has.shape[1], self.seed, 0, -1, has.device) < self.rate * has.shape[1]
        return substitute(tokens, stand_in.to(tokens.dtype), drawn & has)


class ConcatExchange(Exchange):
    """A token beside its stand-in, brought back to the token's width by one linear layer; it starts as the token alone.

    A token without a stand-in stands beside zeros. What the layer learns reaches it too.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__(dim, seed)
        self.merge = nn.Linear(2 * dim, dim)
        with torch.no_grad():
            self.merge.weight.copy_(torch.cat([torch.eye(dim), torch.zeros(dim, dim)], 1))
            self.merge.bias.zero_()

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        beside = stand_in.to(tokens.dtype) * has.unsqueeze(-1)
        merged: Tensor = self.merge(torch.cat([tokens, beside], -1))
        return merged.to(tokens.dtype)
