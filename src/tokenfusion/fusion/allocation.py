"""Which modality stands in for which token when there are more than two (Eq. 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _mixed(h: Any) -> Any:
    """The finaliser of MurmurHash3 on 32-bit values, for numbers and int64 tensors alike (their product may wrap)."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def shuffled_ranks(tokens: int, seed: int, stage: int, stream: int, device: torch.device | None = None) -> Tensor:
    """A permutation of 0..N-1 that is a pure function of its arguments, from integer arithmetic alone.

    No random generator is asked, so it traces, exports and is the same on every device: tokens are sorted by a hash of
    their index.
    """
    key = _mixed(_mixed(_mixed(seed % 2**32) + stage) + stream)
    hashed = _mixed((torch.arange(tokens, device=device) + key) & 0xFFFFFFFF)
    hashed = _mixed((hashed + key) & 0xFFFFFFFF)
    return hashed.argsort().argsort()  # no two hashes are equal


def partners(modalities: int, tokens: int, seed: int, stage: int = 0, device: torch.device | None = None) -> Tensor:
    """The fixed group allocation ``a_{m'}(m)`` as an index: the modality that stands in for each token (Eq. 7).

    For every stream the N tokens fall at random into M-1 groups of equal size (up to one token), one per other modality. It
    is drawn once: a pure function of (seed, stage, N), so that any image size has its own fixed allocation.

    Args:
        modalities: M >= 1; with one stream its own index is returned (nothing can stand in).
        tokens: N.
        seed: of the run.
        stage: stages draw independently.
        device: where the index is wanted.

    Returns:
        int64 ``[M, N]`` with values in 0..M-1; for M > 1 never the stream's own index.
    """
    own = torch.arange(modalities, device=device).unsqueeze(1)
    if modalities <= 2:
        return (modalities - 1 - own).expand(modalities, tokens)
    ranks = [shuffled_ranks(tokens, seed, stage, m, device) for m in range(modalities)]
    return (own + 1 + torch.stack(ranks) % (modalities - 1)) % modalities


def present_partners(partner: Tensor, present: Tensor) -> Tensor:
    """Where the allotted modality is missing from a sample, the next one that is present takes its place.

    Args:
        partner: ``[M, N]`` from :func:`partners`.
        present: bool ``[M, B]``.

    Returns:
        int64 ``[M, B, N]``; the stream's own index where no other modality is present: nobody can stand in.
    """
    modalities = partner.shape[0]
    own = torch.arange(modalities, device=partner.device).unsqueeze(1)
    choice = own.unsqueeze(-1).expand(modalities, present.shape[1], partner.shape[1])
    for step in reversed(range(modalities - 1)):  # the last one written is the first choice
        # the others stand in a circle behind the receiver: go on from the one that was allotted
        candidate = (own + 1 + ((partner - own - 1) % modalities + step) % (modalities - 1)) % modalities
        there = present[candidate.unsqueeze(1), torch.arange(present.shape[1], device=present.device).view(1, -1, 1)]
        choice = torch.where(there, candidate.unsqueeze(1), choice)
    return choice


def take(x: Tensor, partner: Tensor) -> Tensor:
    """The partner's entries: ``x [M, B, N, ...]`` picked along M by ``partner [M, N]`` or ``[M, B, N]``."""
    if partner.dim() == 2:
        partner = partner.unsqueeze(1).expand(x.shape[:3])
    partner = partner.reshape(partner.shape + (1,) * (x.dim() - 3)).expand(x.shape)
    return x.gather(0, partner)
