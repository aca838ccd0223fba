"""Networks of timm, of Hugging Face and one's own, fused as they are: their forward pass runs, the fusers decide inside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from tokenfusion.backbones.calls import first_tensor
from tokenfusion.backbones.foreign import answer_of, call, example_of, position_of, weight_of
from tokenfusion.backbones.fused_model import FusedModel, FusedOutput, keep_weights
from tokenfusion.backbones.grids import grid_at
from tokenfusion.backbones.held import Door, FusedBlock, check_unfused, hold_blocks
from tokenfusion.backbones.misfit import misfit
from tokenfusion.backbones.plan import BlockPlan, Survey
from tokenfusion.backbones.sharing import OwnLayer, Sharing, check_divisible, divide
from tokenfusion.backbones.stems import Stems, adapt_stem
from tokenfusion.backbones.survey import is_norm, survey
from tokenfusion.components import component_of
from tokenfusion.errors import UserError
from tokenfusion.fusion.batch_norms import TOLD
from tokenfusion.fusion.channels import scales_of
from tokenfusion.fusion.exchange import ExchangeRates
from tokenfusion.fusion.fusers import Context, Fuser, FuserFactory, Grid, NoFusion
from tokenfusion.fusion.modality import PerModality, check_names, check_tensors, merge, presence, silenced, split


class _Run:
    """One forward pass of a fused network: its blocks call :meth:`block`."""

    def __init__(self, model: FusedNetwork, present: Tensor | None, size: torch.Size, wanted: Sequence[int]) -> None:
        self.model, self.present, self.size, self.wanted = model, present, size, set(wanted)
        self.is_first = True
        self.carried: Tensor | None = None
        self.scores: list[Tensor] = []
        self.maps: list[Tensor] = []  # [M, B, C, h, w]

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        model, plan = self.model, place.plan
        if self.is_first:
            self.is_first = False
            x = merge(silenced(split(x, len(model.modalities)), self.present))  # a missing stream starts as zeros
        grid, position = model.grid_of(plan, x, self.size), model.position_of(place, x, self.size)
        carried = self.carried if self.carried is not None and self.carried.shape[-1] == plan.dim else None
        ctx = Context(grid, plan.prefix, position, self.present, carried, place.index)
        fuser = model.fuser_of(place.index)
        if model.recomputes and torch.is_grad_enabled():
            ran = checkpoint.checkpoint(place.run, x, fuser, ctx, args, kwargs, use_reentrant=False)
        else:
            ran = place.run(x, fuser, ctx, args, kwargs)
        output, scores, self.carried = ran
        if scores is not None:
            self.scores.append(scores)
        if place.index in self.wanted:
            tokens = plan.layout.tokens(cast("Tensor", first_tensor(output)))[:, plan.prefix :]
            self.maps.append(split(tokens.transpose(1, 2).unflatten(2, ctx.grid), len(model.modalities)))
        return output


class FusedNetwork(FusedModel):
    """One network for M aligned modalities: shared weights, private norms, a fuser in every block.

    The network given is the network used: its norms become private copies (they start equal), each of its blocks is held in
    place by a :class:`~tokenfusion.backbones.held.FusedBlock`, and its own forward pass runs on the stacked streams.

    Args:
        network: of timm, of Hugging Face, or any module whose blocks have an attention and an MLP.
        modalities: names of the streams, with the channels of each where they differ: ``{"rgb": 3, "depth": 1}``.
        fuser: makes one fuser from (dim, modalities, stage).
        example: an input ``[B, C, H, W]`` (or what the network takes); found by itself for timm and Hugging Face.
        score_nets: ``"block"``: one each (the paper's ``s^l``); ``"stage"``: blocks of a stage share a fuser (released).
        blocks: which blocks fuse, counted from 0 in the order in which they run; None = all.
        alignment: residual positional alignment: the network's own position embedding is re-added before every block but the
            first, its gradient stopped. Networks whose attention is told positions in every layer (relative, rotary,
            windows) and those that have none are left as they are.
        sharing: all layers but the norms (``"default"``), the norms too (``"shared"``), or none (``"unshared"``; Table 8).

    Shape: ``{name: [B, C, H, W]} -> FusedOutput``; names that are left out are missing modalities; ``present`` bool ``[M, B]``
    says the same per sample.

    Raises:
        UserError: where no block can be fused, or the fuser does not fit the blocks; the block is named.
    """

    def __init__(
        self,
        network: nn.Module,
        modalities: Sequence[str] | Mapping[str, int],
        fuser: FuserFactory,
        example: Tensor | None = None,
        score_nets: str = "block",
        blocks: Sequence[int] | None = None,
        alignment: bool = False,
        sharing: Sharing = "default",
    ) -> None:
        super().__init__(tuple(modalities))
        if score_nets not in ("stage", "block"):
            raise ValueError(f"score_nets must be 'stage' or 'block', not {score_nets!r}")
        _check_names(modalities)
        check_unfused(network)
        self.plain = NoFusion(0, len(modalities))
        self.channels = tuple(modalities.values()) if isinstance(modalities, Mapping) else None
        example = example_of(network) if example is None else example
        self.survey: Survey = survey(network, example, lambda x: answer_of(call(network, x)[1], len(x)))
        self.example_size, self.example_dtype = example.shape, example.dtype
        plans = self.survey.blocks
        fusing = _chosen(blocks, len(plans))
        self._fuser_at: list[int | None] = [None] * len(plans)  # block -> index into fusers
        self.fusers = nn.ModuleList()
        of_stage: dict[int, int] = {}
        for index in fusing:
            plan = plans[index]
            if score_nets == "block" or plan.stage not in of_stage:
                of_stage[plan.stage] = len(self.fusers)
                self.fusers.append(_made(fuser, plan, len(modalities)))
            self._fuser_at[index] = of_stage[plan.stage]
            _check_fits(self.fuser_of(index), plan, network.get_submodule(plan.name))
        if sharing == "unshared":
            if any(fuser.attends_to_all for fuser in self.fusers):
                raise UserError(
                    "sharing is 'unshared', but the fuser unites the streams in a shared attention; choose another"
                )
            check_divisible(network, len(modalities), example)
        # all is well: only now the network is touched
        if self.survey.skipped:
            name, reason = next(iter(self.survey.skipped.items()))
            count, total = len(self.survey.skipped), len(plans) + len(self.survey.skipped)
            self.account.append(f"{count} of {total} blocks are not fused: {name}, the first, {reason}")
        if isinstance(modalities, Mapping):
            self.account += adapt_stem(network, self.survey.stem, modalities)
        divide(network, len(modalities), sharing, is_norm)
        self.take_over_checkpointing(network)
        self._door = Door()
        hold_blocks(network, plans, len(modalities), self._door)
        self.network = network
        self.position = position_of(network, plans) if alignment else None
        if alignment and self.position is None:
            kind = type(network).__name__
            self.account.append(f"alignment changes nothing: {kind} has no position embedding that can be re-added")
        for ours in (self.fusers, self.ensemble):
            ours.to(weight_of(network))
        component = component_of(fuser)
        self.recipe = {
            "seed": (component or {}).pop("seed", 0),
            "fuser": component,
            "score_nets": score_nets,
            "blocks": None if blocks is None else fusing,
            "alignment": alignment,
            "sharing": sharing,
        }

    def fuser_of(self, index: int) -> Fuser:
        """The fuser that runs a block."""
        at = self._fuser_at[index]
        return cast("Fuser", self.plain if at is None else self.fusers[at])

    @property
    def threshold(self) -> float | None:
        """The fuser's, None where it does not score."""
        return next((cast("Fuser", fuser).threshold for fuser in self.fusers), None)

    def fused_blocks(self) -> list[int]:
        """Blocks that score, in the order of ``FusedOutput.scores``."""
        return [index for index in range(len(self.survey.blocks)) if self.fuser_of(index).threshold is not None]

    def block_names(self) -> list[str]:
        """Their names in the network."""
        return [self.survey.blocks[index].name for index in self.fused_blocks()]

    def rates(self, scores: Sequence[Tensor], present: Tensor | None = None) -> dict[str, ExchangeRates]:
        """Exchange rates per fused block."""
        fused = zip(self.fused_blocks(), scores, strict=True)
        return {self.survey.blocks[b].name: self.fuser_of(b).rates(score, present) for b, score in fused}

    def scales(self) -> list[Tensor]:
        """Of the norms before attention, per block whose fuser goes by them: ``[M, C]`` (Eq. 10)."""
        using = [plan for index, plan in enumerate(self.survey.blocks) if self.fuser_of(index).uses_scales]
        blocks = [cast("FusedBlock", self.network.get_submodule(plan.name)).block for plan in using]
        norms = [block.get_submodule(cast("str", plan.parts.norm)) for plan, block in zip(using, blocks, strict=True)]
        return [scales_of(_in_use(norm), len(self.modalities)) for norm in norms]

    def freeze(self, private: bool = False) -> None:
        """Keep the network's weights, its own first convolution too.

        Its private norms and the stems that were adapted go on learning unless ``private`` is true, peft's LoRA always.
        """
        keep_weights(self.network)
        for module in () if private else self.network.modules():
            if isinstance(module, Stems):
                for stem in module.adapted():
                    stem.requires_grad_(True)
            elif isinstance(module, PerModality) and (not isinstance(module, OwnLayer) or is_norm(module[0])):
                module.requires_grad_(True)

    def stack(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``{name: [B, ...]} -> [M*B, ...]``, channels padded to the widest, and which are present, ``[M, B]``."""
        check_names(self.modalities, inputs)
        check_tensors(inputs, 2)
        some = next(iter(inputs.values()))
        if self.channels is None:
            self._check_undeclared(inputs)
        channels = max(self.channels) if self.channels else some.shape[1]
        shape = (some.shape[0], channels, *some.shape[2:])
        padded = {name: self._padded(name, x, shape) for name, x in inputs.items()}
        streams = [padded[name] if name in padded else some.new_zeros(shape) for name in self.modalities]
        present = presence(self.modalities, inputs, present, shape[0], some.device)
        return merge(silenced(torch.stack(streams), present)), present

    def _check_undeclared(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a ValueError where images have other channels than the network takes, and how many was not declared."""
        own = self.example_size[1]
        others = [name for name, x in inputs.items() if len(self.example_size) == x.dim() == 4 and x.shape[1] != own]
        if others:
            counts = {name: inputs[name].shape[1] if name in inputs else own for name in self.modalities}
            told = ", ".join(f'"{name}": {n}' for name, n in counts.items())
            raise ValueError(
                f"{others[0]} is {list(inputs[others[0]].shape)}, the network takes {own} channels; "
                f"for others: fuse(network, {{{told}}})"
            )

    def _padded(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        own = (shape[0], self.channels[self.modalities.index(name)] if self.channels else shape[1], *shape[2:])
        if x.shape != own:
            raise ValueError(f"{name} must be {list(own)}, as the modalities are aligned; got {list(x.shape)}")
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, shape[1] - own[1])) if own[1] < shape[1] else x

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> FusedOutput:
        run, (features, outputs) = self._run(inputs, present)
        answers = split(answer_of(outputs, run.size[0]), len(self.modalities))
        return FusedOutput(
            self._named(features, inputs, run.size[0]),
            self._named(outputs, inputs, run.size[0]),
            self.ensemble(answers, run.present),
            run.scores,
            run.present,
        )

    def pyramid(
        self, inputs: Mapping[str, Tensor], blocks: Sequence[int], present: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Maps behind some blocks, for dense heads: ``[M, B, C, h, w]`` each, not normed; the scores; who is present."""
        run, _ = self._run(inputs, present, _chosen(blocks, len(self.survey.blocks)))
        return run.maps, run.scores, run.present

    def _run(self, inputs: Mapping[str, Tensor], present: Tensor | None, wanted: Sequence[int] = ()) -> Any:
        self.check_checkpointing()
        x, present = self.stack(inputs, present)
        run = _Run(self, present, x.shape, wanted)
        before, self._door.run = self._door.run, run
        told, TOLD.present = TOLD.present, present
        try:
            called = call(self.network, x)
        finally:
            self._door.run, TOLD.present = before, told
        self._scores = run.scores if self.training else None
        return run, called

    def _named(self, value: Any, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        """Every tensor ``[M*B, ...]`` of a structure, per modality that was given; other tensors as they are."""

        def own(x: Any, m: int) -> Any:
            is_stack = isinstance(x, Tensor) and x.shape[:1] == (rows,)
            return split(x, len(self.modalities))[m] if is_stack else x

        return {name: tree_map(partial(own, m=m), value) for m, name in enumerate(self.modalities) if name in inputs}

    def grid_of(self, plan: BlockPlan, x: Tensor, size: torch.Size) -> Grid:
        """Rows and columns of a block's map, from its input and the size of the network's."""
        return grid_at(plan, x, size, self.example_size)

    def position_of(self, place: FusedBlock, x: Tensor, size: torch.Size) -> Tensor | None:
        """What alignment re-adds before a block: ``[prefix + N, C]``."""
        plan = place.plan
        if self.position is None or place.index == 0 or plan.dim != self.survey.blocks[0].dim:
            return None
        return self.position.on(self.network, self.grid_of(plan, x, size), plan.prefix)


def _in_use(layer: nn.Module) -> nn.Module:
    """The copy of a layer that peft trains in its place, where it was told to (``modules_to_save``)."""
    copies: Any = getattr(layer, "modules_to_save", None)
    return layer if copies is None else cast("nn.Module", copies[layer.active_adapter])


def _check_names(modalities: Sequence[str] | Mapping[str, int]) -> None:
    """Raise a UserError where these are no names of streams, or no channels."""
    is_many = isinstance(modalities, Sequence | Mapping) and not isinstance(modalities, str)
    names = list(modalities) if is_many else []
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise UserError(f'modalities must be different names, at least one, as ["rgb", "depth"]; got {modalities!r}')
    wrong = next((n for n in modalities.values() if type(n) is not int), 0) if isinstance(modalities, Mapping) else 0
    if wrong != 0:
        raise UserError(f"modalities: channels must be whole numbers; got {wrong!r}")


def _made(make: FuserFactory, plan: BlockPlan, modalities: int) -> Fuser:
    """A fuser for a block.

    Raises:
        UserError: where what shall make it cannot be called so, or makes something else.
    """
    wanted = "wanted a word, a component, or what makes a Fuser from (dim, modalities, stage)"
    try:
        inspect.signature(make).bind(plan.dim, modalities, plan.stage)
    except (TypeError, ValueError) as error:
        raise UserError(f"fuser: {wanted}; got {make!r} ({error})") from None
    made = make(plan.dim, modalities, plan.stage)
    if not isinstance(made, Fuser):
        raise UserError(f"fuser: {wanted}; got {make!r}, which makes {type(made).__name__}")
    return made


def _chosen(blocks: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of the blocks that fuse, in order; negative ones count from the last."""
    is_many = blocks is None or (isinstance(blocks, Iterable) and not isinstance(blocks, str | Mapping))
    if not is_many or not all(isinstance(b, int) for b in blocks or ()):
        raise UserError(f"blocks: wanted numbers of blocks, as [0, 3]; got {blocks!r}")
    wrong = [b for b in blocks or () if not -count <= b < count]
    if wrong:
        raise UserError(f"blocks: {wrong[0]} is none of the network's {count} blocks, 0..{count - 1}")
    return list(range(count)) if blocks is None else sorted({b % count for b in blocks})


def _check_fits(fuser: Fuser, plan: BlockPlan, block: nn.Module) -> None:
    """Raise a UserError where a fuser asks for what a block does not have."""
    reason = misfit(fuser, plan, block)
    if reason is not None:
        raise UserError(f"{type(fuser).__name__} does not fit block {plan.name} ({type(block).__name__}): it {reason}")
