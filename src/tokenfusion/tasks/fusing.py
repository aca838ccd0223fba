"""What all tasks do with a fused backbone: build it from a recipe, leave modalities out, tell what was exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tokenfusion.backbones.dense import FusedPyramid
from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mit import Pyramid
from tokenfusion.backbones.sharing import Sharing
from tokenfusion.components import FUSER_GIVEN, maker
from tokenfusion.errors import UserError
from tokenfusion.fusion.channels import scale_penalty
from tokenfusion.fusion.exchange import ExchangeRates
from tokenfusion.fusion.fusers import Fuser, FuserFactory
from tokenfusion.fusion.pressure import Pressure
from tokenfusion.fusion.scores import Reduction, sparsity_loss

Rates = dict[str, ExchangeRates]  # block -> per modality [M]


class Fused(Protocol):
    """How a recipe fuses."""

    seed: int
    fuser: dict[str, Any]
    data: Any


class Pressed(Protocol):
    """How a loss presses scores and scales down."""

    sparsity: float
    scale_sparsity: float
    target_rate: float | None
    reduction: Reduction


class Placement(Protocol):
    """Where a model fuses."""

    score_nets: Literal["stage", "block"]
    placement: Literal["every", "last"]
    alignment: bool
    sharing: Sharing


def fuser_factory(recipe: Fused, trust: bool) -> FuserFactory:
    """What makes the recipe's fuser from (dim, modalities, stage)."""
    return partial(maker(recipe.fuser, "fuser", FUSER_GIVEN, trust), seed=recipe.seed)


def fused_backbone(network: Pyramid, recipe: Fused, model: Placement, trust: bool) -> FusedBackbone:
    """A single-modal network for the recipe's modalities, with its fuser.

    Raises:
        UserError: where the fuser refuses its arguments.
    """
    make, names = fuser_factory(recipe, trust), recipe.data.modalities
    try:
        return FusedBackbone(network, names, make, model.score_nets, model.placement, model.alignment, model.sharing)
    except (TypeError, ValueError) as error:
        raise UserError(f"fuser: {error}") from error


def drawn_presence(rate: float, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which modalities each sample keeps where each is left out at ``rate``: bool ``[M, B]``, one at least; None at rate 0."""
    if rate == 0:
        return None
    some = next(iter(inputs.values()))
    draw = torch.rand(len(inputs), some.shape[0], device=some.device)
    return (draw >= rate) | (draw == draw.max(0, keepdim=True).values)


class Sparsity(nn.Module):
    """What makes scores and scales decide: their l1 norms, times lambda_1 and lambda_2 (Eq. 10).

    Where a rate is wanted lambda_1 is steered, of every stage for itself.

    Args:
        loss: the recipe's section ``loss``.
        backbone: whose scores they are.
        pieces: in how many pieces a step's batch comes; the losses of a step are asked for so many times.

    Raises:
        UserError: where a rate is wanted that lambda has no hold on.
    """

    def __init__(self, loss: Pressed, backbone: FusedPyramid, pieces: int = 1) -> None:
        super().__init__()
        if loss.target_rate is not None:
            _check_steerable(loss, backbone)
        stages = [name.rpartition(".")[0] for name in backbone.block_names()]
        self.stages = list(dict.fromkeys(stages))
        self.members = [[i for i, stage in enumerate(stages) if stage == wanted] for wanted in self.stages]
        self.reduction: Reduction = loss.reduction
        self.of_scales = loss.scale_sparsity
        self.pressure = Pressure(loss.sparsity, len(self.stages), loss.target_rate, pieces)

    def forward(self, backbone: FusedPyramid, scores: Sequence[Tensor], present: Tensor | None) -> dict[str, Tensor]:
        """``{"sparsity": loss, "scale_sparsity": loss}``, without those that press nothing."""
        scales = backbone.scales() if self.of_scales > 0 else []
        losses = {"scale_sparsity": self.of_scales * scale_penalty(scales)} if scales else {}
        if not scores or not self.pressure.is_on:
            return losses
        norms = [sparsity_loss([scores[i] for i in members], self.reduction) for members in self.members]
        exchanged: list[Tensor] = []
        if self.pressure.target is not None:
            rates = list(backbone.rates([s.detach() for s in scores], present).values())
            exchanged = [torch.stack([rates[i].exchanged for i in members]).mean() for members in self.members]
        return losses | {"sparsity": self.pressure(norms, exchanged)}

    def watch(self) -> dict[str, Tensor]:
        """Lambda of every stage, where it is steered."""
        return {f"lambda/{name}": value for name, value in zip(self.stages, self.pressure.levels(), strict=False)}


def _check_steerable(loss: Pressed, backbone: FusedPyramid) -> None:
    if loss.reduction != "mean":
        raise UserError("loss.target_rate steers the factor of a mean; set loss.reduction=mean, or leave it out")
    for fuser in (fuser for fuser in backbone.fusers.modules() if isinstance(fuser, Fuser)):
        if not fuser.can_be_pressed:
            raise UserError(
                f"loss.target_rate lowers and lifts scores, which those of {type(fuser).__name__} do not feel; leave it out"
            )
        check_threshold(fuser.threshold)


def check_threshold(threshold: float | None) -> None:
    """Raise a UserError where a rate is wanted of a threshold that exchanges nothing or everything, whatever the scores are."""
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(
            f"loss.target_rate: at fuser.threshold={threshold:g} scores decide nothing; leave one of the two out"
        )


def watched_rates(backbone: FusedPyramid, scores: Sequence[Tensor], present: Tensor | None) -> dict[str, Tensor]:
    """Exchange rates of a training step, as the log names them."""
    watched = {}
    for block, rate in backbone.rates([s.detach() for s in scores], present).items():
        for index, name in enumerate(backbone.modalities):
            watched[f"exchange/{block}/{name}"] = rate.exchanged[index]
            watched[f"donor_below/{block}/{name}"] = rate.donor_below[index]
    return watched


class MeanRates:
    """Exchange rates of many images: their mean."""

    def __init__(self) -> None:
        self.totals: Rates = {}
        self.images = 0

    def add(self, rates: Rates) -> None:
        """Count one image."""
        self.images += 1
        for block, new in rates.items():
            old = self.totals.get(block)
            self.totals[block] = new if old is None else ExchangeRates(*(a + b for a, b in zip(old, new, strict=True)))

    def means(self) -> Rates:
        """Per block the mean over the images counted, on the CPU."""
        count = max(self.images, 1)
        return {block: ExchangeRates(*(x.cpu() / count for x in rates)) for block, rates in self.totals.items()}


def exchange_figures(rates: Rates, modalities: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Rates as metrics.json holds them: ``exchange`` and ``donor_below``, block -> modality -> share."""
    return {
        key: {
            block: dict(zip(modalities, getattr(found, field).tolist(), strict=True)) for block, found in rates.items()
        }
        for key, field in (("exchange", "exchanged"), ("donor_below", "donor_below"))
    }
