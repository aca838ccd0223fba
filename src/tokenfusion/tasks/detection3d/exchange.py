"""How one stream's tokens take in the projected tokens of another: TokenFusion and what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.fusion.exchange import below, substitute
from tokenfusion.fusion.scores import ScorePredictor

Exchanged = tuple[Tensor, Tensor | None]  # tokens [B, N, C]; scores [B, N] where the method scores


class Exchange(nn.Module):
    """``exchange(tokens [B, N, C], stand_in [B, N, C], has [B, N]) -> (tokens, scores [B, N] or None)``.

    Streams of different kinds share no blocks, so what they exchange is decided here, on the tokens of one of them: a layer's
    keys, an image's patches. Tokens without a stand-in (``has`` false: no view shows the point) stay as they are.

    Args:
        dim: token width C.
        seed: of what a method draws.
    """

    threshold: float | None = None

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        raise NotImplementedError


class NoExchange(Exchange):
    """The streams never meet."""

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        return tokens, None


class TokenExchange(Exchange):
    """Score, weigh, and let the stand-in take the place of what scores below the threshold (Eq. 4, 6).

    A point that no view shows has nothing to be compared with: it is neither weighed nor replaced, so that a scene without
    images goes through the points' network as if there were no fusion.

    Args:
        dim, seed: see :class:`Exchange`.
        threshold: theta; 0.02 in the released code.
        init_bias: see :class:`~tokenfusion.fusion.scores.ScorePredictor`.
    """

    def __init__(self, dim: int, seed: int = 0, threshold: float = 0.02, init_bias: float | None = None) -> None:
        super().__init__(dim, seed)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, not {threshold}")
        self.threshold: float = threshold
        self.score = ScorePredictor(dim, 1, init_bias)

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        scores = torch.where(has, self.score(tokens[None])[0], 1.0)
        weighed = tokens * scores.unsqueeze(-1).to(tokens.dtype)
        return substitute(weighed, stand_in.to(tokens.dtype), below(scores, self.threshold) & has), scores


class RandomExchange(Exchange):
    """Each token is replaced at a fixed rate, whatever it holds; drawn anew in training, the same for ever in evaluation.

    Args:
        dim, seed: see :class:`Exchange`.
        rate: share of the tokens that have a stand-in.
    """

    def __init__(self, dim: int, seed: int = 0, rate: float = 0.3) -> None:
        super().__init__(dim, seed)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in 0..1, not {rate}")
        self.rate, self.seed = rate, seed

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        if self.training:
            draw = torch.rand(has.shape, device=tokens.device)
        else:  # on the CPU: equal on all devices
            draw = torch.rand(has.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(tokens.device)
        return substitute(tokens, stand_in.to(tokens.dtype), (draw < self.rate) & has), None


class AverageExchange(Exchange):
    """The mean of a token and its stand-in."""

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        return torch.where(has.unsqueeze(-1), (tokens + stand_in.to(tokens.dtype)) / 2, tokens), None


class ConcatExchange(Exchange):
    """A token beside its stand-in, brought back to the token's width by one linear layer; it starts as the token alone."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__(dim, seed)
        self.merge = nn.Linear(2 * dim, dim)
        with torch.no_grad():
            self.merge.weight.copy_(torch.cat([torch.eye(dim), torch.zeros(dim, dim)], 1))
            self.merge.bias.zero_()

    def forward(self, tokens: Tensor, stand_in: Tensor, has: Tensor) -> Exchanged:
        beside = stand_in.to(tokens.dtype) * has.unsqueeze(-1)
        return self.merge(torch.cat([tokens, beside], -1)), None
