"""Channels whose norm gives them next to no scale are taken from the other streams (Eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tokenfusion.fusion.fusers import Context, Entry, Fuser, TokenFusion, behind_prefix
from tokenfusion.fusion.modality import PerModality


def scales_of(norm: nn.Module, modalities: int) -> Tensor:
    """``gamma [M, C]``: the channels' scales of the streams' norms."""
    own = list(norm) if isinstance(norm, PerModality) else [norm] * modalities
    return torch.stack([layer.get_parameter("weight") for layer in own])


def scale_penalty(scales: Sequence[Tensor]) -> Tensor:
    """The l1 norm of the norms' scales, sum over layers and modalities of ``|gamma|`` (Eq. 10), without its factor lambda_2.

    Args:
        scales: per fused block ``[M, C]``.
    """
    return torch.stack([gamma.abs().sum() for gamma in scales]).sum() if scales else torch.zeros(())


def others_mean(x: Tensor, present: Tensor | None) -> Tensor:
    """For every stream the mean of the others that are present, ``[M, B, N, C]``; itself where there is none."""
    modalities, batch = x.shape[:2]
    itself = torch.eye(modalities, dtype=x.dtype, device=x.device).unsqueeze(-1)
    there = x.new_ones(modalities, batch) if present is None else present.to(x.dtype)
    weight = (1 - itself) * there  # [M, M, B]: of stream j in what stream m is given
    count = weight.sum(1, keepdim=True)
    return torch.einsum("mjb,jbnc->mbnc", torch.where(count > 0, weight / count.clamp(min=1), itself), x)


def exchange_channels(normed: Tensor, scales: Tensor, threshold: float, present: Tensor | None = None) -> Tensor:
    """Channels ``|gamma| < threshold`` are replaced by the mean of the other streams' (Eq. 10's exchange; CEN).

    Args:
        normed: what the streams' norms give, ``[M, B, N, C]``.
        scales: of these norms, ``[M, C]``.
        threshold: 0 replaces nothing.
        present: bool ``[M, B]``; a missing stream gives nothing and takes every channel.
    """
    replaced = (scales.abs() < threshold)[:, None, None]
    if present is not None:
        replaced = replaced | ~present[:, :, None, None]
    return torch.where(replaced, others_mean(normed, present), normed)


def _checked(threshold: float) -> float:
    if not threshold >= 0:
        raise ValueError(f"the threshold of channels must be 0 or more, not {threshold}")
    return threshold


class _Channels(Fuser):
    """The exchange of channels, before whatever else a fuser does between norm and attention."""

    works_on_normed = True
    uses_scales = True
    channel_threshold: float

    def between(self, normed: Tensor, norm: nn.Module, entry: Entry, ctx: Context) -> Tensor:
        scales, least = scales_of(norm, len(normed)), self.channel_threshold
        exchanged = behind_prefix(normed, ctx.prefix, lambda e: exchange_channels(e, scales, least, ctx.present))
        return super().between(exchanged, norm, entry, ctx)


class ChannelExchange(_Channels):
    """Channels that a stream's norm scales to next to nothing are taken from the other streams, before attention (Eq. 10).

    Channel exchanging (CEN; Wang et al., NeurIPS 2020) as the paper's appendix has it: the private LayerNorm's scale takes the
    place of batch normalisation's, all scales are penalised (:func:`scale_penalty`), of every channel in every stream; CEN
    penalises each channel in one stream only. A missing stream takes all channels from those that are present.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        threshold: a channel is replaced where ``|gamma|`` is below it, 0.02 in CEN.
    """

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0, threshold: float = 0.02) -> None:
        super().__init__(dim, modalities, stage, seed)
        self.channel_threshold = _checked(threshold)


class TokenChannel(_Channels, TokenFusion):
    """TokenFusion, and channel exchange between norm and attention (Table 9, Eq. 10).

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        rule, threshold, init_bias: see :class:`~tokenfusion.fusion.fusers.TokenFusion`.
        channel_threshold: see :class:`ChannelExchange`.
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
        channel_threshold: float = 0.02,
    ) -> None:
        super().__init__(dim, modalities, stage, seed, rule, threshold, init_bias)
        self.channel_threshold = _checked(channel_threshold)
