"""Aligned streams as one tensor, and private copies of a layer inside a shared network (Sec. 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenfusion.fusion.batch_norms import TOLD, has_batch_norm, of_present


def merge(x: Tensor) -> Tensor:
    """``[M, B, ...]`` to ``[M*B, ...]``: how a shared layer sees all streams at once."""
    return x.flatten(0, 1)


def split(x: Tensor, modalities: int) -> Tensor:
    """``[M*B, ...]`` back to ``[M, B, ...]``."""
    return x.unflatten(0, (modalities, -1))


def presence(
    modalities: Sequence[str], inputs: Mapping[str, Any], present: Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """Who is there, bool ``[M, B]``: whose input is given and whom ``present`` does not deny; None = everyone.

    Raises:
        ValueError: where ``present`` has another type or shape.
    """
    wanted, is_tensor = (len(modalities), batch), isinstance(present, Tensor)
    if present is not None and not (is_tensor and present.shape == wanted and present.dtype == torch.bool):
        got = f"{present.dtype} {list(present.shape)}" if is_tensor else type(present).__name__
        raise ValueError(f"present must be bool {list(wanted)} (modalities, samples); got {got}")
    given = [name in inputs for name in modalities]
    if all(given):
        return present
    there = torch.tensor(given, device=device).unsqueeze(1)
    return there.expand(-1, batch) if present is None else present & there


def check_named(modalities: Sequence[str], inputs: object) -> None:
    """Raise a ValueError where inputs are not given by name."""
    if not isinstance(inputs, Mapping):
        raise ValueError(f'wanted inputs by name, {{"{modalities[0]}": tensor, ...}}; got {type(inputs).__name__}')


def check_names(modalities: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Raise a ValueError where inputs are named otherwise than the modalities, or are none."""
    check_named(modalities, inputs)
    if not inputs or any(name not in modalities for name in inputs):
        raise ValueError(f"inputs must be some of {', '.join(modalities)}; got {', '.join(inputs) or 'none'}")


def check_tensors(inputs: Mapping[str, Any], least: int = 1) -> None:
    """Raise a ValueError where an input is no tensor of at least so many dimensions."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.dim() < least:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            form = "[B, ...]" if least == 1 else "[B, C, ...]"
            raise ValueError(f"{name} must be a tensor {form}; got {got}; leave a missing modality's name out")


def silenced(x: Tensor, present: Tensor | None) -> Tensor:
    """``[M, B, ...]``, or ``[B, ...]`` of one stream, with zeros where a modality is missing.

    What a broken sensor sent, NaN too, goes no further.
    """
    return x if present is None else torch.where(_there(x, present), x, 0)


def _there(x: Tensor, present: Tensor) -> Tensor:
    """Who is present, ``[M, B]`` or ``[B]``, with as many dimensions as x has."""
    return present.view(*present.shape, *[1] * (x.dim() - present.dim()))


class PerModality(nn.Module):
    """One copy of a module per modality, called on the merged stack ``[M*B, ...]``; elsewhere it is a list of its copies.

    The paper shares attention and MLP and keeps the norms private ("shared MSA & MLP, unshared LN", Table 8). The copies
    start equal, so a pretrained single-modal network stays what it was. What a network asks the layer for (its weight's
    dtype), the first copy says. In training, what norms by the statistics of a batch sees the samples alone that have its
    modality, where the forward pass tells who is present.

    Args:
        module: the layer to copy.
        modalities: number of streams M.
    """

    def __init__(self, module: nn.Module, modalities: int) -> None:
        super().__init__()
        for m in range(modalities):
            self.add_module(str(m), copy.deepcopy(module))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            first = self.__dict__.get("_modules", {}).get("0")
            if first is None:
                raise
            return getattr(first, name)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(cast("dict[str, nn.Module]", self._modules).values())

    def forward(self, x: Tensor, *args: object) -> Tensor:
        if len(self) == 1:
            return cast("Tensor", self[0](x, *args))
        streams, present = split(x, len(self)), TOLD.present
        if present is None or not self.training or not has_batch_norm(self[0]):
            return torch.cat([own(stream, *args) for own, stream in zip(self, streams, strict=True)])
        rows = present.repeat_interleave(streams.shape[1] // present.shape[1], 1)  # windows are several to a sample
        seen = zip(self, streams, rows, strict=True)
        return torch.cat([of_present(own, stream, there, *args) for own, stream, there in seen])


Kinds = tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]


def make_private(network: nn.Module, modalities: int, kinds: Kinds) -> nn.Module:
    """Replace, in place, every layer of the given kinds by :class:`PerModality` copies of it; returns the network.

    Args:
        network: any module.
        modalities: number of streams M.
        kinds: classes, or a function that says of a layer whether it is to be private.

    Raises:
        ValueError: where the network has private layers already; give a fresh one or a deep copy.
    """
    if any(isinstance(module, PerModality) for module in network.modules()):
        raise ValueError("this network has private layers already: a network is fused once; copy.deepcopy it before")
    return _replace(network, modalities, kinds)


def _replace(network: nn.Module, modalities: int, kinds: Kinds) -> nn.Module:
    for name, child in network.named_children():
        if isinstance(child, kinds) if isinstance(kinds, tuple) else kinds(child):
            setattr(network, name, PerModality(child, modalities))
        else:
            _replace(child, modalities, kinds)
    return network
