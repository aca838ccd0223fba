"""The fused segmenter: a fused pyramid, one head for all streams, a learned ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from tokenfusion.backbones.dense import FusedPyramid
from tokenfusion.fusion.batch_norms import on_rows
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.modality import merge, split


class SegmentationOutput(NamedTuple):
    """Logits at the size of the finest map (1/4 of the image with MiT), and the scores that decided what was exchanged."""

    logits: dict[str, Tensor]  # of the modalities that are present: [B, K, h, w]
    ensemble: Tensor  # [B, K, h, w]
    scores: list[Tensor]  # per fused block [M, B, N]
    present: Tensor | None  # bool [M, B], None where every modality is there


class FusedSegmenter(nn.Module):
    """Segments aligned images of several modalities.

    Args:
        backbone: the fused pyramid: MiT's, or that of a network of timm or Hugging Face.
        head: maps of one stream to logits; shared by the streams.

    Example: ``output = model({"rgb": rgb, "depth": depth}); output.ensemble.argmax(1)``
    """

    def __init__(self, backbone: FusedPyramid, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.ensemble = LearnedEnsemble(len(backbone.modalities))

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.backbone.modalities

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> SegmentationOutput:
        """Logits of every stream that was given, and of their ensemble.

        Args:
            inputs: ``{name: [B, 3, H, W]}`` normalised; names may be missing.
            present: bool ``[M, B]``, which samples have which modality.
        """
        features = self.backbone(inputs, present)
        maps, present = [merge(x) for x in features.maps], features.present
        if present is None or not self.training:
            logits = self.head(maps)
        else:  # its batch norm is for what there is
            logits = on_rows(lambda *some: self.head(some), present.flatten(), *maps)
        logits = split(logits, len(self.modalities))
        named = {name: logits[i] for i, name in enumerate(self.modalities) if name in inputs}
        ensemble = self.ensemble(logits, present)
        return SegmentationOutput(named, ensemble, features.scores, present)
