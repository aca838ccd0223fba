"""DINOv2 as a feature extractor, from weights in Hugging Face's names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.weights import StateDict, fetch
from tokenfusion.errors import UserError, require

SIZE = 224  # pixels of its input
HEAD = 64  # channels of an attention head, in every published size
LETTERS = {384: "s", 768: "b", 1024: "l", 1536: "g"}  # the published sizes by width
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dinov2(nn.Module):
    """uint8 ``[B, 3, H, W]`` -> class tokens of the last layer ``[B, C]``; images are resized to 224 x 224."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # of bytes the CPU makes what Pillow makes, which the published figures were made with
        resized = F.interpolate(images.cpu(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
        x = resized.to(self.mean.device).float() / 255
        return self.network((x - self.mean) / self.std).last_hidden_state[:, 0]


def read_dinov2(weights: str) -> Dinov2:
    """Build the network that the weights' shapes tell of; its name says the size, e.g. ``dinov2-vits14``.

    Args:
        weights: ``.npz`` or ``.safetensors`` file, folder or hub id (``facebook/dinov2-small``) with the names of Hugging
            Face's Dinov2Model.

    Raises:
        UserError: where the weights cannot be read, or are of another network.
    """
    state = {key.removeprefix("dinov2."): value.float() for key, value in fetch(weights).items()}
    unused = ("classifier.", "embeddings.mask_token")
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layer.")}
    try:
        width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
        positions = state["embeddings.position_embeddings"].shape[1] - 1
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{weights}: no weights of a DINOv2 in Hugging Face's names (Dinov2Model)") from None
    library = require("transformers", "hf")
    config = library.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // HEAD, 1),
        image_size=math.isqrt(positions) * patch,
        patch_size=patch,
        use_mask_token=False,
        use_swiglu_ffn="encoder.layer.0.mlp.weights_in.weight" in state,
    )
    size = f"{LETTERS.get(width, f'{width}x{len(layers)}-')}{patch}"
    return Dinov2(_load(library, config, state, weights), f"dinov2-vit{size}")


def _load(library: ModuleType, config: object, state: StateDict, weights: str) -> nn.Module:
    """Through the library's own loader: its releases name the layers differently, and it knows all the names."""
    with _quiet(library.logging):
        try:
            network, told = library.Dinov2Model.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True
            )
        except (RuntimeError, ValueError):
            raise UserError(f"{weights}: the shapes of its tensors are not those of a DINOv2") from None
    wrong = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    if wrong:
        raise UserError(
            f"{weights}: not the weights of a Dinov2Model: {wrong[0]} is missing or unknown ({len(wrong)} keys)"
        )
    return network


@contextlib.contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    """No second progress bar, no table: what is wrong is said in one line."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
