"""Every token attends to the tokens of the other streams at its own place (pixel-wise cross-modal attention)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenfusion.fusion.baselines import keys_of
from tokenfusion.fusion.fusers import Context, Fuser


class CrossAttention(Fuser):
    """A token attends to itself and to the other streams' tokens at its place; the result is added to it (GeminiFusion).

    Pixel-wise fusion (Jia et al., ICML 2024), linear in the number of tokens. For a stream's token x and the others' y::

        Q = x W_Q    K = [(x + noise_K) W_K, x phi(x, y) W_K]    V = [(x + noise_V) W_V, y W_V]

    The relation phi tells what y is worth to x: the softmax of a linear layer on both. The noise is learnt, one per fuser
    (blocks that share a fuser share it). With more than two streams the attention goes over all that are present (ours). It
    works on the residual branch of attention, and its output projection starts at zero (ours): a pretrained network starts as
    it is.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        heads: of attention; fewer where the width is no multiple of them.
    """

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0, heads: int = 8) -> None:
        super().__init__(dim, modalities, stage, seed)
        if heads < 1:
            raise ValueError(f"heads must be at least 1, not {heads}")
        if modalities == 1:  # nobody to attend to, nothing to learn
            return
        self.heads = math.gcd(heads, dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.of_own, self.of_other = nn.Linear(dim, 1), nn.Linear(dim, 1, bias=False)  # of both side by side: phi
        self.noise_k, self.noise_v = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        for noise in (self.noise_k, self.noise_v):
            nn.init.trunc_normal_(noise, std=0.02)
        nn.init.zeros_(self.proj.weight)

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        if self.modalities == 1:
            return attended
        weights = self._weights(attended, ctx.present)  # [M, M, B, N, heads]
        taken = torch.einsum("mjbnh,jbnhd->mbnhd", weights, self._headed(self.v(attended)))
        own = weights.diagonal().movedim(-1, 0).unsqueeze(-1)
        taken = taken + own * self._headed(self.v(self.noise_v))
        return attended + self.proj(taken.flatten(-2))

    def _weights(self, x: Tensor, present: Tensor | None) -> Tensor:
        """How much stream m takes of stream j: ``[M, M, B, N, heads]``, 1 in sum over j."""
        q, k = self._headed(self.q(x)), self._headed(self.k(x))
        scale = q.shape[-1] ** -0.5
        own = (q * (k + self._headed(self.k(self.noise_k)))).sum(-1) * scale
        # a softmax over two outputs is the sigmoid of their difference
        relation = torch.sigmoid(self.of_own(x).unsqueeze(1) + self.of_other(x).unsqueeze(0))  # [M, M, B, N, 1]
        others = relation * ((q * k).sum(-1) * scale).unsqueeze(1)
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)[:, :, None, None, None]
        logits = torch.where(itself, own.unsqueeze(1), others)
        if present is not None:
            logits = logits.masked_fill(~keys_of(present)[:, :, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(1)

    def _headed(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
