"""What a foreign block lacks for a fuser."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from tokenfusion.backbones.calls import first_tensor
from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.backbones.survey import is_norm
from tokenfusion.errors import first_line
from tokenfusion.fusion.fusers import Fuser
from tokenfusion.fusion.modality import PerModality

OWN_TOKENS = "attends inside windows, to a pooled map, or with positions given to it"


def misfit(fuser: Fuser, plan: BlockPlan, block: nn.Module) -> str | None:
    """What a block lacks for a fuser; None where they fit."""
    if fuser.works_on_normed and plan.parts.norm is None:
        return "has no norm before its attention, where the method works on the normed tokens"
    if fuser.uses_scales and not _has_scales(plan, block):
        return "has a norm before its attention that scales no channels"
    if fuser.adds_tokens:
        return _not_a_set(plan, block)
    return _not_united(plan, block) if fuser.attends_to_all else None


def _has_scales(plan: BlockPlan, block: nn.Module) -> bool:
    """Whether the norm's ``weight`` scales its channels: where it is zero, the norm gives one thing whatever it is given."""
    norm = block.get_submodule(cast("str", plan.parts.norm))
    norm = copy.deepcopy(norm[0] if isinstance(norm, PerModality) else norm).float().eval()
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (plan.dim,):
        return False
    shape = (2, plan.dim, 3, 3) if plan.parts.norm_order == "first" else (2, 3, 3, plan.dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():
        weight.zero_()
        return bool(torch.equal(norm(x), norm(-x)))


def _not_a_set(plan: BlockPlan, block: nn.Module) -> str | None:
    """Why a block cannot run on more tokens than its map's: all of it must treat its tokens as a set."""
    if plan.parts.order != "tokens":
        return "works on a map, beside which no tokens can stand"
    if not plan.parts.is_global:
        return OWN_TOKENS
    return _told_apart(block, plan.dim, "works on", "tells its tokens where they stand")


def _not_united(plan: BlockPlan, block: nn.Module) -> str | None:
    """Why an attention cannot attend over a union of streams: it must treat its tokens as a set."""
    if not plan.parts.is_global:
        return f"{OWN_TOKENS}, which a union of streams does not have"
    attention = block.get_submodule(plan.parts.attention)
    if any(is_norm(module) for module in attention.modules()):
        return "norms queries and keys privately inside its attention"
    told = _told_apart(attention, plan.dim, "attends to", "tells its attention where a token stands")
    if told is None and not _is_mean(attention, plan.dim):
        return "weighs tokens by numbers that do not add up to one, so that a union of streams counts them twice"
    return told


def _is_mean(attention: nn.Module, dim: int) -> bool:
    """Whether every token twice gives what each token once gives: the weights of an attention sum to one (CaiT's do not)."""
    generator = torch.Generator().manual_seed(0)
    attention, some = _copied(attention), next(attention.parameters())
    x = torch.randn(1, 6, dim, generator=generator).to(some.device, torch.float32)
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.dim() == 1:  # biases are zero at the start, and not for long
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.2)
        once, twice = (first_tensor(attention(z)) for z in (x, torch.cat([x, x], 1)))
    return once is not None and twice is not None and torch.allclose(twice[:, :6], once, rtol=1e-3, atol=1e-4)


def _copied(part: nn.Module) -> nn.Module:
    """To be tried out, in single precision: half would not tell."""
    return copy.deepcopy(part).float().eval()


def _told_apart(part: nn.Module, dim: int, works_on: str, places: str) -> str | None:
    """How a block's attention, or the whole of it, tells tokens by their places apart; None where it does not."""
    some = next(part.parameters())
    x = torch.randn(1, 6, dim, generator=torch.Generator().manual_seed(0)).to(some.device)
    try:
        part = _copied(part)
        with torch.no_grad():
            y, turned = (first_tensor(part(z)) for z in (x, x.flip(1)))
    except Exception as error:  # whatever a foreign module raises
        if isinstance(error, TypeError):
            return f"cannot be tried out alone ({first_line(error)})"
        return f"{works_on} a fixed number of tokens only ({first_line(error)})"
    close = y is not None and turned is not None and torch.allclose(y.flip(1), turned, rtol=1e-3, atol=1e-4)
    return None if close else places
