"""The translation networks, single-modal: a MiT encoder with a mirrored decoder, and the encoder alone for discriminators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.block import EPS
from tokenfusion.backbones.mit import Layout, MiT, MiTBlock, Pyramid, Stage, drop_rates, to_tokens
from tokenfusion.fusion.fusers import Grid

LAYOUT = Layout(heads=(1, 2, 4, 8, 16), reductions=(16, 8, 4, 2, 1), stem=(3, 2))
NARROW, WIDE = (32, 64, 128, 256, 512), (64, 128, 256, 512, 1024)
WIDTHS = {"xs": (32, 48, 64, 128, 160), "ti": NARROW, "s": NARROW, "b0": NARROW}  # all others: WIDE
DEPTHS = {
    "xs": (1, 1, 1, 2, 2),  # ours, for minutes on a processor
    "ti": (2, 2, 2, 2, 2),  # the paper's Ti, 10 layers; the released b0 is the same
    "s": (3, 4, 4, 6, 3),  # the paper's S, 20 layers at the same widths; which stage has how many is our choice
    "b0": (2, 2, 2, 2, 2),
    "b1": (2, 2, 2, 2, 2),
    "b2": (3, 4, 4, 6, 3),
    "b3": (3, 4, 4, 18, 3),
    "b4": (3, 8, 8, 27, 3),
    "b5": (3, 6, 6, 40, 3),
}
MULTIPLE = 32  # height and width of what a pyramid of five halvings takes


class Enlarge(nn.Module):
    """Pixel shuffle by two, then a 1x1 convolution."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels // 4, dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(F.pixel_shuffle(image, 2).contiguous(memory_format=torch.channels_last))


class MirrorStage(nn.Module):
    """Doubles the map, adds the encoder's of the same size, blocks, norm.

    Args:
        name: what reports call it.
        channels: of the map before it.
        encoder: the stage that it mirrors.
        skip: index of that stage.
        drop_paths: stochastic depth of its blocks.
    """

    is_decoder = True

    def __init__(
        self,
        name: str,
        channels: int,
        encoder: Stage,
        heads: int,
        reduction: int,
        skip: int,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.name, self.dim, self.stride, self.skip = name, encoder.dim, encoder.stride, skip
        self.embed = Enlarge(channels, self.dim)
        self.blocks = nn.ModuleList(MiTBlock(self.dim, heads, reduction, rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(self.dim, eps=EPS)

    def enter(self, image: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Grid]:
        """The stage's tokens and their grid, from the map before it and the encoder's map of its own size."""
        x = self.embed(image) + maps[self.skip]
        return to_tokens(x), (x.shape[2], x.shape[3])


class MirroredMiT(Pyramid):
    """Five encoder stages that halve the map, four decoder stages that double it again, with additive skips.

    Args:
        widths, depths: of the five encoder stages; the decoder has those of the first four, backwards.
        channels: of the input image.
        drop_path: stochastic depth of the encoder's last block; the decoder's blocks take the same rising list from its start.

    Shape: ``[B, channels, H, W] ->`` nine normed maps with strides 2 4 8 16 32 16 8 4 2; H and W are multiples of 32.

    Raises:
        ValueError: as :class:`~tokenfusion.backbones.mit.MiT`, and where a width is no multiple of 4.
    """

    multiple = MULTIPLE

    def __init__(self, widths: Sequence[int], depths: Sequence[int], channels: int = 3, drop_path: float = 0.1) -> None:
        if any(width % 4 for width in widths):
            raise ValueError(f"widths {list(widths)} must be multiples of 4: pixel shuffle makes one channel of four")
        encoder = MiT(widths, depths, channels, drop_path, LAYOUT, "enc").parts()
        rates = iter(drop_rates(drop_path, sum(depths)))
        decoder = [
            MirrorStage(
                f"dec{step + 1}",
                widths[skip + 1],
                encoder[skip],
                LAYOUT.heads[skip],
                LAYOUT.reductions[skip],
                skip,
                [next(rates) for _ in range(depths[skip])],
            )
            for step, skip in enumerate(reversed(range(len(widths) - 1)))
        ]
        super().__init__([*encoder, *decoder])


def generator(variant: str, drop_path: float = 0.1) -> MirroredMiT:
    """``"ti"`` or ``"s"`` (the paper's), ``"b0"`` to ``"b5"`` (the released ones) or ``"xs"``, freshly initialised."""
    return MirroredMiT(*_sizes(variant), drop_path=drop_path)


def discriminator(variant: str, drop_path: float = 0.1) -> MiT:
    """The encoder of the generator of that name for pairs of images (6 channels), freshly initialised."""
    return MiT(*_sizes(variant), 6, drop_path, LAYOUT, "dis")


def _sizes(variant: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if variant not in DEPTHS:
        raise ValueError(f"variant must be one of {', '.join(DEPTHS)}, not {variant!r}")
    return WIDTHS.get(variant, WIDE), DEPTHS[variant]


def padded(image: Tensor) -> Tensor:
    """Grow an image ``[B, C, H, W]`` at its right and lower border to multiples of 32 pixels, repeating its edge."""
    height, width = image.shape[-2:]
    extra = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    return F.pad(image, extra, mode="replicate") if any(extra) else image
