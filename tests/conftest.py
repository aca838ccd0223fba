"""What several tests share: one thread, small networks, and the way to recorded data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tokenfusion.backbones.mit import MiT
    from tokenfusion.tasks.segmentation.model import FusedSegmenter

sys.path.insert(0, str(Path(__file__).parent))  # golden_rules

NAMES = ("rgb", "depth", "thermal", "normal", "shade")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tests' tensors are small, and several workers share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Tests may draw from torch's generator; each starts from the same state, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings."""
    folder = os.environ.get("TOKENFUSION_DATA")
    if not folder:
        pytest.skip("TOKENFUSION_DATA is not set: no real recordings here")
    if not Path(folder).is_dir():
        pytest.skip(f"TOKENFUSION_DATA={folder} is no folder: no real recordings here")
    return Path(folder)


def _shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer a generic value: private copies differ, scores straddle 0.5, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if value.dim() > 1 and "embedding" not in name:
                gain = 6.0 if value.shape[0] == 2 else 1.0  # the last layer of a score network has two outputs
                value.copy_(noise * gain / value[0].numel() ** 0.5)
            else:
                value.add_(0.1 * noise)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.mul_(torch.exp(0.1 * torch.randn(value.shape, generator=generator)))
    return module


def _small_mit(depths: tuple[int, ...] = (1, 2, 1, 1), drop_path: float = 0.1) -> MiT:
    from tokenfusion.backbones.mit import MiT

    return MiT((8, 16, 20, 32), depths, drop_path=drop_path)


def _small_segmenter(
    fuser: Callable[..., nn.Module], modalities: int = 2, classes: int = 5, **options: object
) -> FusedSegmenter:
    from tokenfusion.backbones.fused import FusedBackbone
    from tokenfusion.tasks.segmentation.head import SegFormerHead
    from tokenfusion.tasks.segmentation.model import FusedSegmenter

    backbone = FusedBackbone(_small_mit(), NAMES[:modalities], fuser, **options)  # type: ignore[arg-type]
    model = FusedSegmenter(backbone, SegFormerHead(backbone.dims, classes, width=16))
    return _shake(model).eval()  # type: ignore[return-value]


@pytest.fixture(scope="session")
def shake() -> Callable[..., nn.Module]:
    """``shake(module, seed=0)``: generic parameters in place."""
    return _shake


@pytest.fixture(scope="session")
def small_mit() -> Callable[..., MiT]:
    """``small_mit(depths=..., drop_path=...)``: a MiT of some thousand parameters."""
    return _small_mit


@pytest.fixture(scope="session")
def small_segmenter() -> Callable[..., FusedSegmenter]:
    """``small_segmenter(fuser, modalities=2, classes=5, **options of FusedBackbone)``, shaken, in eval mode."""
    return _small_segmenter


@pytest.fixture(scope="session")
def images() -> Callable[..., dict[str, torch.Tensor]]:
    """``images(modalities, batch=2, size=(64, 96))``: named noise, the same on every call."""

    def make(modalities: int, batch: int = 2, size: tuple[int, int] = (64, 96)) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {name: torch.randn(batch, 3, *size, generator=generator) for name in NAMES[:modalities]}

    return make
