"""What the streams of a network share (Table 8): all layers but the norms, the norms too, or none."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tokenfusion.backbones.foreign import answer_of, call
from tokenfusion.backbones.stems import Stems
from tokenfusion.backbones.survey import is_norm
from tokenfusion.errors import UserError
from tokenfusion.fusion.modality import Kinds, PerModality, make_private

Sharing = Literal["default", "shared", "unshared"]


class OwnLayer(PerModality):
    """A layer that every stream has for itself."""


def divide(network: nn.Module, modalities: int, sharing: Sharing, norms: Kinds) -> None:
    """Give the streams of a network, in place, copies of the layers that they do not share; the copies start equal.

    Args:
        network: fresh, not fused before.
        modalities: number of streams M.
        sharing: ``"default"``: norms are private (the paper's choice). ``"shared"``: no layer is. ``"unshared"``: every layer
            is, linear, convolution, norm, layer scale. Parameters that belong to none (class tokens, position embeddings and
            tables) stay shared, and of stems for several numbers of channels there is one per number.
        norms: which layers are norms.

    Raises:
        ValueError: where sharing is another word, or the network has private layers already.
    """
    if sharing not in ("default", "shared", "unshared"):
        raise ValueError(f"sharing must be 'default', 'shared' or 'unshared', not {sharing!r}")
    make_private(network, modalities, norms if sharing == "default" else ())
    if sharing == "unshared":
        _own_layers(network, modalities)


def _own_layers(network: nn.Module, modalities: int) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.Linear | _ConvNd) or is_norm(child) or "LayerScale" in type(child).__name__:
            setattr(network, name, OwnLayer(child, modalities))
        elif not isinstance(child, Stems):
            _own_layers(child, modalities)


def check_divisible(network: nn.Module, modalities: int, example: Tensor) -> None:
    """Try on a copy whether every stream of a network can have layers of its own.

    A network may read a layer's weights instead of calling it, or call it on rows in another order than the streams'. As the
    copies start equal, nobody would notice before they have learned.

    Raises:
        UserError: where the other streams answer otherwise once the first one's layers are changed, or nothing at all.
    """
    trial = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(modalities, *example.shape[1:], generator=generator).to(example)
    cause: Exception | None = None
    reason = "it reads their weights, or does not keep the streams' order"
    try:
        with torch.no_grad():
            _own_layers(trial, modalities)
            before = answer_of(call(trial, x)[1], modalities)
            for module in trial.modules():
                for parameter in module[0].parameters() if isinstance(module, OwnLayer) else ():
                    parameter.mul_(0.5)
            if torch.equal(before[1:], answer_of(call(trial, x)[1], modalities)[1:]):
                return
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        cause, reason = error, "it runs one on something else than the streams' rows, or shapes its weights itself"
    kind = type(network).__name__
    raise UserError(
        f"sharing is 'unshared', but layers of {kind} cannot be divided ({reason}); choose default or shared"
    ) from cause
