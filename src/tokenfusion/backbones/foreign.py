"""How networks of timm and of Hugging Face are asked: their input, their features, their position embeddings."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.backbones.weights import hub_file
from tokenfusion.errors import UserError, first_line, nearest, require
from tokenfusion.fusion.fusers import Grid

POSITION = re.compile(r"(^|\.)(pos_embed|position_embeddings?)(\.weight)?$")


def kind_of(network: nn.Module) -> str:
    """``"timm"``, ``"hf"`` or ``"module"``, told by what the network offers."""
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return "timm"
    return "hf" if hasattr(network, "main_input_name") and hasattr(network, "config") else "module"


def library(kind: str) -> Any:
    """timm or transformers.

    Raises:
        UserError: where it is not installed.
    """
    return require("timm", "hf") if kind == "timm" else require("transformers", "hf")


def call(network: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Features of the last layer and the network's own answer; for other modules the answer twice."""
    kind = kind_of(network)
    if kind == "timm" and not _is_headless(network):
        features = network.forward_features(x)  # type: ignore[operator]
        return features, network.forward_head(features)  # type: ignore[operator]
    if kind == "hf":
        output = network(**{str(network.main_input_name): x}, **_resampling(network, x))
        return getattr(output, "last_hidden_state", None), output
    output = network(x)
    return output, output


def _resampling(network: Any, x: Tensor) -> dict[str, bool]:
    """What has a network of Hugging Face resample its positions, for images of another size than it is made for."""
    asked, own = "interpolate_pos_encoding", _image_size(network.config)
    is_other = x.dim() > 3 and own is not None and own != tuple(x.shape[-2:])
    return {asked: True} if is_other and asked in inspect.signature(network.forward).parameters else {}


def _image_size(config: Any) -> Grid | None:
    """Rows and columns in pixels that a config of Hugging Face tells, if any."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None


def _is_headless(network: nn.Module) -> bool:
    """An encoder of timm whose head only says that there is none."""
    code = getattr(network.forward_head, "__code__", None)
    return code is not None and "NotImplementedError" in code.co_names


def answer_of(output: Any, batch: int | None = None) -> Tensor:
    """The tensor of an answer that an ensemble can average: logits, else pooled features, else the first tensor.

    Args:
        output: a tensor, a tuple, a dict, or a model output of Hugging Face.
        batch: its number of samples; what has another first size (a loss beside it) is passed over.

    Raises:
        UserError: where there is none.
    """
    named = output if isinstance(output, Mapping) else {}
    values = output.to_tuple() if hasattr(output, "to_tuple") else list(named.values()) or output
    found = [named.get(name, getattr(output, name, None)) for name in ("logits", "pooler_output")]
    found += values if isinstance(values, tuple | list) else [values]
    tensor = next((t for t in found if isinstance(t, Tensor) and (batch is None or t.shape[:1] == (batch,))), None)
    if tensor is None:
        raise UserError(f"the network answers with {type(output).__name__}, which holds no tensor to average")
    return tensor


def timm_network(name: str, **arguments: Any) -> nn.Module:
    """A network of timm without its classifier; ``pretrained=True`` fetches its weights from the hub.

    Args:
        name: as in ``timm.list_models()``.
        arguments: of ``timm.create_model``. ``dynamic_img_size`` is on where the network knows it: images of any size.

    Raises:
        UserError: unknown name; arguments that the network refuses; weights that cannot be fetched.
    """
    timm = require("timm", "hf")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}; {nearest(name, timm.list_models())[:200]}")
    arguments = {"num_classes": 0, **arguments}
    for more in ({"dynamic_img_size": True}, {}):
        try:
            return timm.create_model(name, **{**more, **arguments})
        except TypeError as error:  # a family that does not know the additional argument, or one of the user's
            refused: Exception = error
        except Exception as error:  # whatever the many constructors and the hub's client raise
            refused = error
            break
    raise UserError(f"timm/{name}: {first_line(refused)}")


def hf_network(name: str, pretrained: bool = False) -> nn.Module:
    """A network of Hugging Face, from a folder with a config.json or a hub id; ``pretrained`` loads its weights too.

    Raises:
        UserError: where neither the folder nor the hub has it.
    """
    transformers = require("transformers", "hf")
    try:
        if not Path(name).exists():
            hub_file(name, "config.json")  # fails at once where the hub is out of reach
        if pretrained:
            return transformers.AutoModel.from_pretrained(name)
        return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"hf/{name}: {first_line(error)}") from None


def weight_of(network: nn.Module) -> Tensor:
    """One of the weights, without its gradient: they tell device and precision."""
    return next((p.detach() for p in network.parameters() if p.is_floating_point()), torch.zeros(()))


def example_of(network: nn.Module) -> Tensor:
    """Two inputs of zeros, of the size that a network of timm or Hugging Face is made for, where and of what its weights are.

    Raises:
        UserError: for other modules, and where the config does not tell its size: give one yourself.
    """
    kind = kind_of(network)
    some = weight_of(network)
    if kind == "timm":
        cfg = getattr(network, "pretrained_cfg", {})
        channels, *size = cfg.get("input_size", (3, 224, 224))
        if isinstance(cfg.get("first_conv"), str):
            channels = getattr(network.get_submodule(cfg["first_conv"]), "in_channels", channels)
        size = getattr(getattr(network, "patch_embed", None), "img_size", None) or size
        return some.new_zeros(2, channels, *size)
    if kind == "hf":
        config: Any = network.config
        if network.main_input_name == "input_values":  # spectrograms: time, frequencies
            length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
            if length is None or bins is None:
                raise UserError(
                    f"{type(network).__name__}: its config does not tell the size of its input_values; give fuse() an "
                    "example= input [B, ...]"
                )
            return some.new_zeros(2, length, bins)
        rows, columns = _image_size(config) or (224, 224)
        return some.new_zeros(2, getattr(config, "num_channels", 3), rows, columns)
    raise UserError(f"{type(network).__name__} is not of timm or Hugging Face: give fuse() an example= input [B, ...]")


def position_parameter(network: nn.Module, dim: int) -> str | None:
    """Name of the absolute position embedding ``[1, n, C]``, None where the network has none of that form."""
    for name, parameter in network.named_parameters():
        is_position = name.rpartition(".")[2] in ("pos_embed", "position_embeddings", "position_embedding")
        if is_position and parameter.dim() == 3 and parameter.shape[0] == 1 and parameter.shape[2] == dim:
            return name
    return None


def resampled_table(table: Tensor, length: int, grid: Grid) -> Tensor:
    """A position embedding ``[1, extra + side * side, C]`` of a square image for another grid: ``[1, length, C]``.

    The rows before the map's (class, register tokens) stay; where the target has fewer of them, the first ones go.
    """
    if table.shape[1] == length:
        return table
    side, extra = math.isqrt(table.shape[1]), length - grid[0] * grid[1]
    own = table.shape[1] - side * side
    image = table[:, own:].transpose(1, 2).unflatten(2, (side, side)).float()
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, own - extra : own], image.flatten(2).transpose(1, 2).to(table.dtype)], 1)


class Position:
    """A network's own position embedding, for residual positional alignment.

    Args:
        name: of the parameter in the network, ``[1, extra + h * w + suffix, C]``, the same without the first axis, or
            ``[1, h, w, C]``.
        grid: rows and columns of the first block's map.
        suffix: tokens behind the map's.
    """

    def __init__(self, name: str, grid: Grid, suffix: int) -> None:
        self.name, self.grid, self.suffix = name, grid, suffix

    def on(self, network: nn.Module, grid: Grid, prefix: int) -> Tensor:
        """``[prefix + N, C]``, zeros at the prefix, gradient stopped; resampled where the map has another size."""
        table = network.get_parameter(self.name).detach().flatten(0, -2)
        tokens = self.grid[0] * self.grid[1]
        own = table[len(table) - self.suffix - tokens : len(table) - self.suffix]
        if grid != self.grid:
            image = own.t().unflatten(1, self.grid).unsqueeze(0).float()
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
            own = image[0].flatten(1).t().to(table.dtype)
        return F.pad(own, (0, 0, prefix, 0))


def position_of(network: nn.Module, plans: Sequence[BlockPlan]) -> Position | None:
    """The position embedding that alignment re-adds, None where the network has none that it adds to its tokens."""
    first = plans[0]
    if first.grid is None:
        return None
    for name, parameter in network.named_parameters():
        fits = POSITION.search(name) and parameter.dim() > 1 and parameter.shape[-1] == first.dim
        rows = parameter.numel() // first.dim - first.grid[0] * first.grid[1] - first.layout.suffix
        if fits and 0 <= rows <= first.prefix:
            return Position(name, first.grid, first.layout.suffix)
    return None
