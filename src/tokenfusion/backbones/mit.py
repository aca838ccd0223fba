"""Mix Transformer, the hierarchical encoder of SegFormer (Xie et al., 2021): B0 to B5, single-modal and fusion-blind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenfusion.backbones.block import EPS, PreNormBlock, multi_head
from tokenfusion.fusion.fusers import Grid
from tokenfusion.fusion.memory import linears_behind

WIDTHS = {"b0": (32, 64, 160, 256)}  # all others: 64 128 320 512
DEPTHS = {
    "b0": (2, 2, 2, 2),
    "b1": (2, 2, 2, 2),
    "b2": (3, 4, 6, 3),
    "b3": (3, 4, 18, 3),
    "b4": (3, 8, 27, 3),
    "b5": (3, 6, 40, 3),
}


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """``[B, N, C] -> [B, C, H, W]`` without a copy: the result is a channels-last tensor."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, N, C]``; without a copy where the map is channels-last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """Overlapping patches: a strided convolution, then a norm over the tokens."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(image.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Self-attention whose keys and values come from a spatially reduced map."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim, eps=EPS) if reduction > 1 else None

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """The tokens that keys and values are made of: ``[B, N, C] -> [B, N / reduction^2, C]``."""
        if self.sr is None or self.norm is None:
            return x
        return self.norm(to_tokens(self.sr(to_map(x, grid))))

    def forward(self, x: Tensor, grid: Grid, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x [B, N, C]`` to its own reduced map, or to ``context [B, K, C]`` where ``mask [B, K]`` is true."""
        context = self.reduce(x, grid) if context is None else context
        k, v = self.kv(context).chunk(2, -1)
        return self.proj(multi_head(self.q(x), k, v, self.heads, mask))


class MixMLP(nn.Module):
    """MLP with a depth-wise 3x3 convolution, which tells the tokens where they stand."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.dwconv(to_map(self.fc1(x), grid))
        learns = self.training and next(self.fc2.parameters()).requires_grad  # a frozen product keeps no input
        return linears_behind(None, [self.fc2], to_tokens(x), learns)


class MiTBlock(PreNormBlock):
    """Attention to a reduced map, and an MLP with a convolution."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__(dim, Attention(dim, heads, reduction), MixMLP(dim, 4 * dim), drop_path)


class Stage(nn.Module):
    """Patch embedding, blocks, norm: divides the map by the patch's stride.

    Args:
        name: what reports call it.
        stride: pixels of the image per token, along each axis.
        patch: kernel and stride of the embedding.
    """

    is_decoder = False

    def __init__(
        self,
        name: str,
        channels: int,
        dim: int,
        heads: int,
        reduction: int,
        drop_paths: Sequence[float],
        stride: int,
        patch: tuple[int, int],
    ) -> None:
        super().__init__()
        self.name, self.dim, self.stride = name, dim, stride
        self.embed = PatchEmbedding(channels, dim, *patch)
        self.blocks = nn.ModuleList(MiTBlock(dim, heads, reduction, rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def enter(self, image: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Grid]:
        """The stage's tokens ``[B, N, C]`` and their grid, from the map before it; ``maps`` are those of all earlier stages."""
        return self.embed(image)


class Pyramid(nn.Module):
    """Stages in a row, each on the normed map of the one before.

    Shape: ``[B, channels, H, W] ->`` the normed map of every stage, ``[B, C_s, ceil(H / stride_s), ceil(W / stride_s)]``.
    """

    smallest = 32  # pixels along each axis
    multiple = 1  # images are padded to multiples of this

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.apply(initialise)

    def parts(self) -> list[Stage]:
        """The stages, typed."""
        return cast("list[Stage]", list(self.stages))

    @property
    def dims(self) -> list[int]:
        return [stage.dim for stage in self.parts()]

    @property
    def channels(self) -> int:
        """Of the input image."""
        return self.parts()[0].embed.proj.in_channels

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for stage in self.parts():
            tokens, grid = stage.enter(image, maps)
            for block in stage.blocks:
                tokens = block(tokens, grid)
            image = to_map(stage.norm(tokens), grid)
            maps.append(image)
        return maps


class Layout(NamedTuple):
    """What tells one pyramid from another beside widths and depths."""

    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    stem: tuple[int, int] = (7, 4)  # kernel and stride of the first patch embedding; the later ones have 3 and 2


SEGFORMER = Layout()


class MiT(Pyramid):
    """A pyramid of at most as many stages as its layout has, SegFormer's four; any image of at least 32 x 32 pixels.

    Args:
        widths: channels of the stages.
        depths: blocks per stage.
        channels: of the input image.
        drop_path: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        layout: SegFormer's unless said otherwise.
        name: what stages are called before their number.

    Raises:
        ValueError: where widths and depths are not one per stage, or a width cannot be shared out to its heads.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        channels: int = 3,
        drop_path: float = 0.1,
        layout: Layout = SEGFORMER,
        name: str = "stage",
    ) -> None:
        if len(widths) != len(depths) or len(widths) > len(layout.heads):
            raise ValueError(f"widths {list(widths)}, depths {list(depths)}: wanted {len(layout.heads)} of each")
        if any(width % heads for width, heads in zip(widths, layout.heads, strict=False)):
            raise ValueError(f"widths {list(widths)} must be multiples of the stages' heads {list(layout.heads)}")
        rates = iter(drop_rates(drop_path, sum(depths)))
        inputs = (channels, *widths[:-1])
        super().__init__(
            [
                Stage(
                    f"{name}{s + 1}",
                    inputs[s],
                    widths[s],
                    layout.heads[s],
                    layout.reductions[s],
                    [next(rates) for _ in range(depths[s])],
                    layout.stem[1] * 2**s,
                    layout.stem if s == 0 else (3, 2),
                )
                for s in range(len(widths))
            ]
        )


def drop_rates(last: float, blocks: int) -> list[float]:
    """Stochastic depth per block, rising linearly from 0 to ``last``.

    Raises:
        ValueError: where that is no rate that leaves something, 0 <= last < 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path is {last}; wanted 0 or more, and less than 1")
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def mit(variant: str, channels: int = 3, drop_path: float = 0.1) -> MiT:
    """MiT ``"b0"`` to ``"b5"``, freshly initialised."""
    if variant not in DEPTHS:
        raise ValueError(f"MiT variant must be one of {', '.join(DEPTHS)}, not {variant!r}")
    return MiT(WIDTHS.get(variant, (64, 128, 320, 512)), DEPTHS[variant], channels, drop_path)


def initialise(module: nn.Module) -> None:
    """Linear: truncated normal 0.02; convolution: normal sqrt(2 / fan_out); biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
