"""The pre-norm transformer block that the backbones share, and attention in several heads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from tokenfusion.fusion.fusers import Grid

EPS = 1e-6


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention in ``heads``: ``[B, N, C]``, ``[B, K, C]``, ``[B, K, C] -> [B, N, C]``.

    Args:
        mask: bool ``[B, K]``, keys that may be attended to.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class PreNormBlock(nn.Module):
    """Attention, then MLP, each on normed tokens and added to them; its parts are what a fuser works with.

    Args:
        dim: token width.
        attention, mlp: ``(tokens [B, N, C], grid) -> [B, N, C]``.
        drop_path: stochastic depth of both residual branches.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp
        self.drop = StochasticDepth(drop_path, "row")

    def feed(self, x: Tensor, grid: Grid) -> Tensor:
        return self.mlp(self.norm2(x), grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), grid))
        return x + self.drop(self.feed(x, grid))
