"""The fused generator, and the discriminator that judges its branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mirror import padded
from tokenfusion.backbones.mit import initialise
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.fusers import NoFusion
from tokenfusion.fusion.modality import merge, split


class TranslationOutput(NamedTuple):
    """Images in -1..1, and the scores that decided what was exchanged."""

    images: dict[str, Tensor]  # of the modalities that are present: [B, 3, H, W]
    ensemble: Tensor  # [B, 3, H, W]
    scores: list[Tensor]  # per fused block [M, B, N]
    present: Tensor | None  # bool [M, B], None where every modality is there


def start_small(layer: nn.Conv2d) -> None:
    """A last layer whose outputs start near zero.

    The rule for the other convolutions looks at the few outputs alone: it starts with saturated images and judgements of
    plus and minus thirty, which take thousands of steps to undo.
    """
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(cast("Tensor", layer.bias))


class ImageHead(nn.Module):
    """Pixel shuffle by two, two 1x1 convolutions, tanh: ``[B, C, H / 2, W / 2] -> [B, 3, H, W]`` in -1..1.

    Nothing stands between the two convolutions, so they are applied as their product.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim // 4, dim, 1)
        self.project = nn.Conv2d(dim, 3, 1)
        initialise(self.expand)
        start_small(self.project)

    def forward(self, image: Tensor) -> Tensor:
        project = self.project.weight.flatten(1)
        weight = (project @ self.expand.weight.flatten(1))[..., None, None]
        bias = project @ cast("Tensor", self.expand.bias) + cast("Tensor", self.project.bias)
        return torch.tanh(F.conv2d(F.pixel_shuffle(image, 2), weight, bias))


class FusedTranslator(nn.Module):
    """Turns aligned images of several modalities into one of another: every stream makes its own, a learned ensemble the last.

    Args:
        backbone: a fused :class:`~tokenfusion.backbones.mirror.MirroredMiT`.

    Example: ``output = model({"shade": shade, "edge_texture": edges}); output.ensemble``
    """

    def __init__(self, backbone: FusedBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ImageHead(backbone.dims[-1])
        self.ensemble = LearnedEnsemble(len(backbone.modalities))

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.backbone.modalities

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> TranslationOutput:
        """The image of every stream that was given, and of their ensemble.

        Args:
            inputs: ``{name: [B, 3, H, W]}`` in -1..1, of any size: padded to multiples of 32, the images cropped back. Names
                may be missing.
            present: bool ``[M, B]``, which samples have which modality.
        """
        features = self.backbone({name: padded(x) for name, x in inputs.items()}, present)
        height, width = next(iter(inputs.values())).shape[-2:]
        images = split(self.head(merge(features.maps[-1]))[..., :height, :width], len(self.modalities))
        named = {name: images[i] for i, name in enumerate(self.modalities) if name in inputs}
        return TranslationOutput(named, self.ensemble(images, features.present), features.scores, features.present)


class Discriminator(nn.Module):
    """Judges pairs of an input and an image, branch by branch with shared weights and private norms: one logit per 32x32 patch.

    Args:
        backbone: a pyramid for 6 channels, shared by the modalities without fusion.

    Shape: ``{name: [B, 3, H, W]}, {name: [B, 3, H, W]} -> [M, B, 1, ceil(H / 32), ceil(W / 32)]``.
    A branch whose name is left out is judged on zeros.
    """

    def __init__(self, backbone: FusedBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.project = nn.Conv2d(backbone.dims[-1], 1, 1)
        start_small(self.project)

    def forward(self, inputs: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> Tensor:
        pairs = {name: padded(torch.cat([inputs[name], image], 1)) for name, image in images.items()}
        features = self.backbone(pairs)
        return split(self.project(merge(features.maps[-1])), len(self.backbone.modalities))


def discriminator(network: nn.Module, modalities: tuple[str, ...]) -> Discriminator:
    """A discriminator from a single-modal pyramid: its streams never meet."""
    return Discriminator(FusedBackbone(network, modalities, NoFusion))  # type: ignore[arg-type]
