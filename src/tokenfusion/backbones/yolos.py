"""YOLOS (Fang et al., 2021): a plain vision transformer that finds boxes with a hundred learned tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.backbones.vit import PATCH, SIZES, Size, ViT, resampled
from tokenfusion.fusion.fusers import Grid


class YolosOutput(NamedTuple):
    """What the D detection tokens say."""

    logits: Tensor  # [B, D, classes + 1], the last one is "no object"
    boxes: Tensor  # [B, D, 4]: cx cy w h in 0..1 of the image


class Published(NamedTuple):
    """A published network: its size, and what its position embeddings are learned for."""

    size: Size
    image: tuple[int, int]  # rows, columns, in pixels
    mid: bool  # a position embedding after every block but the last


VARIANTS = {
    "xs": Published(Size(96, 6, 3), (192, 256), False),  # ours, for minutes on a processor
    "ti": Published(SIZES["ti"], (800, 1333), False),
    "s": Published(SIZES["s"], (512, 864), True),
    "s-dwr": Published(Size(330, 14, 6), (512, 864), True),  # deeper, narrower, as costly as s
    "b": Published(SIZES["b"], (800, 1344), True),
}


class Yolos(nn.Module):
    """Detection tokens behind the image's own, through all blocks of a ViT, and two heads on what becomes of them.

    ``embed``, ``block`` and ``head`` are what ``forward`` does, in steps: a fused model runs something else between them.

    Args:
        vit: the network; its ``grid`` is the one that all position embeddings are learned at.
        classes: that boxes can have.
        detections: D, the number of tokens and so of boxes.
        mid: with a position embedding after every block but the last.

    Shape: ``[B, channels, H, W] -> YolosOutput``, any H, W of at least 16.
    """

    patch = PATCH

    def __init__(self, vit: ViT, classes: int, detections: int = 100, mid: bool = False) -> None:
        super().__init__()
        self.vit = vit
        self.dim, self.depth, self.detections = vit.dim, vit.depth, detections
        self.det_token = nn.Parameter(torch.zeros(1, detections, vit.dim))
        self.det_pos_embed = nn.Parameter(torch.zeros(1, detections, vit.dim))
        self.mid_pos_embed = nn.Parameter(torch.zeros(vit.depth - 1, *vit.pos_embed.shape[1:])) if mid else None
        self.mid_det_pos_embed = nn.Parameter(torch.zeros(vit.depth - 1, detections, vit.dim)) if mid else None
        for embedding in self.parameters(recurse=False):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.class_head = three_layers(vit.dim, classes + 1)
        self.box_head = three_layers(vit.dim, 4)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The first block's tokens ``[B, 1 + h*w + D, C]``: class, patches row by row, detection; and their grid (h, w)."""
        tokens, grid = self.vit.embed(images)
        detection = (self.det_token + self.det_pos_embed).expand(len(tokens), -1, -1)
        return torch.cat([tokens, detection], 1), grid

    def block(self, index: int, tokens: Tensor, grid: Grid) -> Tensor:
        """Block ``index`` and, where there is one, the position embedding that is added after it."""
        tokens = self.vit.blocks[index](tokens, grid)
        if self.mid_pos_embed is None or self.mid_det_pos_embed is None or index == self.depth - 1:
            return tokens
        at = slice(index, index + 1)
        return tokens + torch.cat(
            [resampled(self.mid_pos_embed[at], self.vit.grid, grid), self.mid_det_pos_embed[at]], 1
        )

    def head(self, tokens: Tensor) -> YolosOutput:
        """Classes and boxes from the last block's tokens."""
        found = self.vit.norm(tokens[:, -self.detections :])
        return YolosOutput(self.class_head(found), self.box_head(found).sigmoid())

    def forward(self, images: Tensor) -> YolosOutput:
        tokens, grid = self.embed(images)
        for index in range(self.depth):
            tokens = self.block(index, tokens, grid)
        return self.head(tokens)


def yolos(
    variant: str = "ti",
    classes: int = 91,
    detections: int = 100,
    init_size: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    mid: bool | None = None,
) -> Yolos:
    """YOLOS ``"ti"``, ``"s"``, ``"s-dwr"`` or ``"b"`` as published, or our small ``"xs"``, freshly initialised.

    Args:
        classes: the published ones have COCO's 91.
        init_size: rows and columns in pixels of the image that position embeddings are learned for; None: as published.
        drop_path: stochastic depth of the last block.
        mid: with a position embedding after every block but the last; None: as published.
    """
    if variant not in VARIANTS:
        raise ValueError(f"YOLOS variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    size, image, has_mid = VARIANTS[variant]
    rows, columns = image if init_size is None else init_size
    if min(rows, columns) < PATCH:
        raise ValueError(f"init_size is {rows} x {columns} pixels; wanted an init_size of at least {PATCH} x {PATCH}")
    vit = ViT(*size, grid=(rows // PATCH, columns // PATCH), drop_path=drop_path)
    return Yolos(vit, classes, detections, has_mid if mid is None else mid)


def three_layers(dim: int, out: int) -> nn.Sequential:
    """The heads' MLP: ``dim -> dim -> dim -> out`` with ReLU between."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))
