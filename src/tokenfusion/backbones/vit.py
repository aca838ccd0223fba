"""The plain vision transformer (Dosovitskiy et al., 2021) in the sizes of DeiT: single-modal and fusion-blind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.block import EPS, PreNormBlock, multi_head
from tokenfusion.backbones.mit import drop_rates, to_map, to_tokens
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Grid


class Size(NamedTuple):
    """Width, number of blocks, heads."""

    dim: int
    depth: int
    heads: int


SIZES = {"ti": Size(192, 12, 3), "s": Size(384, 12, 6), "b": Size(768, 12, 12)}  # DeiT's
PATCH = 16  # pixels along each axis
GRID = (14, 14)  # of a 224 x 224 image


class PatchEmbedding(nn.Module):
    """Patches side by side: what is left over at the right and lower border is dropped, as DeiT and YOLOS do."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, PATCH, PATCH)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(images)
        return to_tokens(x), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Self-attention of all tokens; to a given context where there is one."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """The tokens that keys and values are made of: all of them."""
        return x

    def forward(self, x: Tensor, grid: Grid, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x [B, N, C]`` to itself, or to ``context [B, K, C]`` where ``mask [B, K]`` is true."""
        if context is None:
            parts = self.qkv(x).chunk(3, -1)
        else:
            dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            keys_values = F.linear(context, weight[dim:], bias[dim:])
            parts = (F.linear(x, weight[:dim], bias[:dim]), *keys_values.chunk(2, -1))
        q, k, v = parts
        return self.proj(multi_head(q, k, v, self.heads, mask))


class MLP(nn.Module):
    """Two linear layers, GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(PreNormBlock):
    """Attention of all tokens to all, and an MLP. Class and detection tokens take part in all of it."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__(dim, Attention(dim, heads), MLP(dim, 4 * dim), drop_path)


class ViT(nn.Module):
    """A class token and the patches of an image of any size of at least 16 x 16 pixels, through blocks of one width.

    Args:
        dim, depth, heads: width, blocks, heads of attention.
        channels: of the input image.
        grid: rows and columns that the position embedding is learned at; other sizes are resampled bicubically.
        drop_path: stochastic depth of the last block; it rises linearly from 0.

    Shape: ``[B, channels, H, W] ->`` normed tokens ``[B, 1 + h*w, C]`` with h = H // 16, w = W // 16: the class token, then
    the patches row by row. Pixels beyond the last whole patch are not seen.

    Raises:
        ValueError: where the width cannot be shared out to the heads, the grid has no patch, or drop_path is no rate.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, channels: int = 3, grid: Grid = GRID, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of the heads, {heads}")
        if min(grid) < 1:
            raise ValueError(f"grid {grid}: wanted at least one row and one column of patches")
        self.dim, self.depth, self.grid = dim, depth, grid
        self.patch_embed = PatchEmbedding(channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, rate) for rate in drop_rates(drop_path, depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(initialise)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The first block's tokens ``[B, 1 + h*w, C]`` and their grid.

        Raises:
            UserError: where the images are smaller than one patch.
        """
        if min(images.shape[-2:]) < PATCH:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise UserError(f"an image of {size} pixels is too small: at least {PATCH}x{PATCH} is wanted")
        x, grid = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + resampled(self.pos_embed, self.grid, grid), grid

    def forward(self, images: Tensor) -> Tensor:
        tokens, grid = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return self.norm(tokens)


def vit(variant: str, channels: int = 3, drop_path: float = 0.0) -> ViT:
    """DeiT ``"ti"``, ``"s"`` or ``"b"`` without its classifier, freshly initialised."""
    if variant not in SIZES:
        raise ValueError(f"ViT variant must be one of {', '.join(SIZES)}, not {variant!r}")
    return ViT(*SIZES[variant], channels=channels, drop_path=drop_path)


def resampled(position: Tensor, source: Grid, target: Grid) -> Tensor:
    """Position embeddings ``[K, 1 + h*w, C]`` brought bicubically from one grid to another; the class token's row stays."""
    if source == target:
        return position
    image = F.interpolate(to_map(position[:, 1:], source), size=target, mode="bicubic", align_corners=False)
    return torch.cat([position[:, :1], to_tokens(image)], 1)


def initialise(module: nn.Module) -> None:
    """Linear: truncated normal 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
