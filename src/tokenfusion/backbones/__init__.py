"""Single-modal networks, and the composer that runs them on several modalities."""

from tokenfusion.backbones.fused import FusedBackbone, FusedFeatures
from tokenfusion.backbones.mit import MiT

__all__ = ["FusedBackbone", "FusedFeatures", "MiT"]
