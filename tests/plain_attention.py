"""Attention written out, to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenfusion.backbones.mit import MiTBlock


def attend(block: MiTBlock, queries: Tensor, keys: Tensor) -> Tensor:
    """Explicit softmax attention, head by head."""
    attention = block.attention
    width = queries.shape[-1] // attention.heads
    q, (k, v) = attention.q(queries), attention.kv(keys).chunk(2, -1)
    heads = []
    for h in range(attention.heads):
        part = slice(h * width, (h + 1) * width)
        weight = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)).softmax(-1)
        heads.append(weight @ v[..., part])
    return attention.proj(torch.cat(heads, -1))
