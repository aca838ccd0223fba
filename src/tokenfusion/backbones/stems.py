"""Inputs of other channel counts: the first convolution, adapted from the pretrained one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenfusion.errors import UserError
from tokenfusion.fusion.modality import split


def adapted_weight(weight: Tensor, channels: int) -> Tensor:
    """The kernel ``[out, in, ...]`` for another number of input channels, which answers a grey picture as before.

    One channel: the sum over the inputs. More: the inputs repeated in order, scaled by in / channels, so that the answer to
    equal channels keeps its size.
    """
    own = weight.shape[1]
    if channels == own:
        return weight.clone()
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // own), *[1] * (weight.dim() - 2))[:, :channels]
    return repeated * (own / channels)


def adapted_stem(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution for another number of input channels, with weights made from the given one's."""
    stem = copy.deepcopy(conv)
    stem.in_channels = channels
    stem.weight = nn.Parameter(adapted_weight(conv.weight.detach(), channels), conv.weight.requires_grad)
    return stem


class Stems(nn.Module):
    """The first convolution per number of channels; called on the stack ``[M*B, C, H, W]``, padded with zeros to one C.

    Args:
        conv: the pretrained one, kept for the modalities that have its channels.
        channels: of each modality, in order.
    """

    def __init__(self, conv: nn.Conv2d, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.own = channels, conv.in_channels
        self.convs = nn.ModuleDict(
            {str(n): conv if n == conv.in_channels else adapted_stem(conv, n) for n in sorted(set(channels))}
        )

    def adapted(self) -> list[nn.Module]:
        """Those that were made here: all but the pretrained one."""
        return [conv for n, conv in self.convs.items() if n != str(self.own)]

    @property
    def weight(self) -> Tensor:
        """Of one of them: some networks ask their first layer for its dtype."""
        return next(iter(self.convs.values())).weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        streams = split(x, len(self.channels))
        return torch.cat([self.convs[str(n)](s[:, :n]) for n, s in zip(self.channels, streams, strict=True)])


def adapt_stem(network: nn.Module, name: str | None, channels: Mapping[str, int]) -> list[str]:
    """Give a network stems for its modalities' channels, in place; returns what was done, in sentences.

    Raises:
        UserError: where the network has no convolution at its input, or one in groups.
    """
    if any(n < 1 for n in channels.values()):
        raise UserError(f"channels must be at least 1; got {dict(channels)}")
    conv = None if name is None else network.get_submodule(name)
    own = conv.in_channels if isinstance(conv, nn.Conv2d) else None
    if all(n == own for n in channels.values()):
        return []
    if not isinstance(conv, nn.Conv2d) or name is None or conv.groups > 1:
        raise UserError(
            f"{type(network).__name__} has no plain convolution at its input that other channels could go to"
        )
    parent_name, _, child = name.rpartition(".")
    parent = network.get_submodule(parent_name)
    setattr(parent, child, Stems(conv, tuple(channels.values())))
    for module in network.modules():  # Hugging Face compares the input with this
        if getattr(module, "num_channels", None) == own:
            module.num_channels = max(channels.values())  # type: ignore[assignment]
    told = "summed over its {} input channels", "repeated over the channels and scaled by {}/{}"
    return [
        f"{modality}: {n} channel{'s' * (n > 1)}; {name} starts from the weights of {own} channels, "
        + (told[0].format(own) if n == 1 else told[1].format(own, n))
        for modality, n in channels.items()
        if n != own
    ]
