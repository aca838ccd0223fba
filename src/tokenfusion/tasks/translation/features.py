"""Feature extractors for FID and KID: the Inception network, DINOv2, plain pixels, or any torch module of one's own."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.errors import UserError, first_line, require
from tokenfusion.tasks.translation.dinov2 import read_dinov2

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Features(nn.Module):
    """A network as a feature extractor: uint8 ``[B, 3, H, W]`` of any size -> float32 ``[B, D]``.

    Always in eval mode, without gradients, in full precision.

    Args:
        network: maps uint8 ``[B, 3, H, W]`` to ``[B, D]``.
        name: stands beside every figure that is made with it; otherwise the network's own name, or that of its class.

    Raises:
        UserError: where the network returns something else.
    """

    def __init__(self, network: nn.Module, name: str = "") -> None:
        super().__init__()
        self.name = name or str(getattr(network, "name", type(network).__name__))
        self.network = network
        self.train()

    def train(self, mode: bool = True) -> Features:
        """Stays in eval mode, whoever asks."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            found = self.network(images)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            raise UserError(
                f"features: {self.name} returned {shape} for {len(images)} images; wanted [images, features]"
            )
        return found.float()


def as_features(part: object) -> Features:
    """What a recipe names as its extractor: any torch module will do.

    Raises:
        UserError: where it is none.
    """
    if isinstance(part, Features):
        return part
    if not isinstance(part, nn.Module):
        raise UserError(
            f"features: wanted a torch module that maps uint8 images to features, got {type(part).__name__}"
        )
    return Features(part)


def to_uint8(coded: Tensor) -> Tensor:
    """Images in -1..1, of any shape -> the 8-bit images that extractors take."""
    return ((coded.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def inception(weights: str) -> Features:
    """torch-fidelity's port of the original network, 2048 features: figures compare with published FID and KID.

    Args:
        weights: the file ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases
            (``pt_inception-2015-12-05-6726825d.pth`` is the same), or ``owner/repo/file`` on the hub. Nothing else is fetched.

    Raises:
        UserError: where the file is missing or is another one; it is never unpickled then.
    """
    content = _inception_file(weights).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != INCEPTION_SHA256:
        raise UserError(
            f"{weights}: SHA-256 is {found[:16]}..., {INCEPTION_FILE} has {INCEPTION_SHA256[:16]}...: a damaged copy, or "
            "not the weights that FID is defined with; get the file again"
        )
    library = require("torch_fidelity.feature_extractor_inceptionv3", "fid")
    with torch.random.fork_rng(devices=[]):  # a fresh network draws weights before it reads them
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], io.BytesIO(content))
    return Features(_First(network), "inception-v3-compat 2048")


class _First(nn.Module):
    """The network's first output; it resizes to 299 x 299 as TensorFlow 1 did."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def _inception_file(weights: str) -> Path:
    if Path(weights).is_file():
        return Path(weights)
    where = f"wanted {INCEPTION_FILE} of torch-fidelity's releases (github.com/toshas/torch-fidelity)"
    parts = re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w./-]+)", weights)
    if not parts:
        raise UserError(f"{weights}: no such file; {where}, or owner/repo/file on the hub")
    from huggingface_hub import hf_hub_download  # heavy import, and only needed here

    try:
        return Path(hf_hub_download(*parts.groups()))
    except Exception as error:  # the hub's client raises many kinds; each means "not from there"
        reason = first_line(error, 120)
        raise UserError(f"{weights}: no such file, and not fetched from the hub ({reason}); {where}") from None


def dinov2(weights: str) -> Features:
    """The class token of a DINOv2 transformer: an alternative to Inception (Stein et al., NeurIPS 2023).

    Figures compare only with others of the same network. For ``weights`` and errors see
    :func:`tokenfusion.tasks.translation.dinov2.read_dinov2`.
    """
    return Features(read_dinov2(weights))


def pixels(size: int = 8) -> Features:
    """The image itself, averaged to ``size`` x ``size`` x 3 numbers in -1..1: needs no weights.

    Sees colours and layout, not detail: a yardstick where nothing better is at hand.
    """
    return Features(_Pixels(size), f"pixels {size}x{size}")


class _Pixels(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, self.size).flatten(1)
