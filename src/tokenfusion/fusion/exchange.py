"""Keep a token or let another stream's token stand in for it (Eq. 6), and what was exchanged, in figures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def substitute(tokens: Tensor, stand_in: Tensor, replaced: Tensor) -> Tensor:
    """``e * I[s >= theta] + Proj(e) * I[s < theta]`` (Eq. 6), without a branch, so that it compiles and exports.

    Args:
        tokens: own tokens ``[..., N, C]``.
        stand_in: the projected tokens of the other stream ``[..., N, C]``.
        replaced: true where the stand-in is taken ``[..., N]``.
    """
    return torch.where(replaced.unsqueeze(-1), stand_in, tokens)


def below(scores: Tensor, threshold: float) -> Tensor:
    """Which tokens are replaced: ``s < theta``; with theta = 1 all of them, a score that rounds to 1 too."""
    return torch.ones_like(scores, dtype=torch.bool) if threshold >= 1 else scores < threshold


class ExchangeRates(NamedTuple):
    """Shares in 0..1, per modality ``[M]``."""

    exchanged: Tensor  # of all tokens of the stream that have a stand-in
    donor_below: Tensor  # of the exchanged tokens: those whose donor scores below the threshold too (0 where none was)


def exchange_rates(
    scores: Tensor, donor_scores: Tensor, threshold: float, present: Tensor | None = None, has: Tensor | None = None
) -> ExchangeRates:
    """How much each stream received, and from donors of what worth.

    A donor below the threshold gives next to nothing under the released rule (it is weighed by its own score): attention is
    then pruned, not exchanged. That share is the first figure to look at.

    Args:
        scores: ``[M, B, N]``.
        donor_scores: the score of the token that would stand in, ``[M, B, N]``.
        threshold: theta.
        present: bool ``[M, B]``; samples whose stream is missing are not counted for it.
        has: bool ``[M, B, N]``, which tokens have a stand-in; None = all.
    """
    counted = torch.ones_like(scores, dtype=torch.bool) if has is None else has
    if present is not None:
        counted = counted & present.unsqueeze(-1)
    replaced, tokens = below(scores, threshold) & counted, counted.sum((1, 2))
    count = replaced.sum((1, 2))
    both = (replaced & below(donor_scores, threshold)).sum((1, 2))
    return ExchangeRates(count / tokens.clamp(min=1), both / count.clamp(min=1))
