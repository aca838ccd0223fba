"""Networks of timm, of Hugging Face and one's own, fused as they are: their forward pass runs, the fusers decide inside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from tokenfusion.backbones.foreign import answer_of, call, example_of, position_of
from tokenfusion.backbones.stems import Stems, adapt_stem
from tokenfusion.backbones.survey import BlockPlan, Survey, first_tensor, is_norm, survey
from tokenfusion.errors import UserError
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.exchange import ExchangeRates
from tokenfusion.fusion.fusers import Context, Entry, Fuser, Grid, NoFusion
from tokenfusion.fusion.modality import PerModality, make_private, merge, split
from tokenfusion.fusion.scores import Reduction, sparsity_loss

FuserFactory = Callable[[int, int, int], Fuser]  # (dim, modalities, stage)


class FusedOutput(NamedTuple):
    """What a fused network says, per modality that is present.

    ``features``: tokens or maps of its last layer, as the network gives them. ``outputs``: the network's own answer (logits,
    pooled features, a model output of Hugging Face). ``ensemble``: the learned mean of the answers' first tensor.
    """

    features: dict[str, Any]
    outputs: dict[str, Any]
    ensemble: Tensor  # [B, ...]
    scores: list[Tensor]  # per fused block [M, B, N]; empty where the fuser does not score
    present: Tensor | None  # bool [M, B], None where every modality is there


class _Step(NamedTuple):
    """A block that is running."""

    fuser: Fuser
    entry: Entry
    ctx: Context


class _Door:
    """What the blocks of one network share while it runs: plain attributes, empty between two forward passes."""

    def __init__(self) -> None:
        self.run: _Run | None = None
        self.step: _Step | None = None


class FusedBlock(nn.Module):
    """A foreign block in its place; outside of a fused forward pass it runs as if it stood there alone.

    Its own forward pass does the work. The fuser decides on its input, on what its norm gives (the paper's rule) and on its
    attention's residual branch, through hooks on the block's children.
    """

    def __init__(self, block: nn.Module, plan: BlockPlan, index: int, modalities: int, door: _Door) -> None:
        super().__init__()
        self.block, self.plan, self.index, self.modalities, self.door = block, plan, index, modalities, door
        attention = block.get_submodule(plan.parts.attention)
        attention.register_forward_pre_hook(self._unite, with_kwargs=True)
        attention.register_forward_hook(self._divide)
        if plan.parts.branch is None:
            attention.register_forward_hook(self._behind_attention)
        else:
            block.get_submodule(plan.parts.branch).register_forward_pre_hook(self._at_branch)
        if plan.parts.norm is not None:
            block.get_submodule(plan.parts.norm).register_forward_hook(self._behind_norm)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self.door.run
        return self.block(x, *args, **kwargs) if run is None else run.block(self, x, args, kwargs)

    def run(self, x: Tensor, fuser: Fuser, ctx: Context, args: Any, kwargs: Any) -> tuple[Any, Tensor | None]:
        """The block on all streams ``x`` ``[M*B, ...]``: its output, and the scores ``[M, B, N]``."""
        layout = self.plan.layout
        entry = fuser.enter(split(layout.tokens(x), self.modalities), ctx)
        self.door.step = _Step(fuser, entry, ctx)
        try:
            return self.block(layout.back(merge(entry.x), x), *args, **kwargs), entry.scores
        finally:
            self.door.step = None

    def _at_branch(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        step = self.door.step
        if step is None:
            return None
        self.door.step = None  # a drop path that serves the MLP too is called once more
        return (self._leave(step, args[0]), *args[1:])

    def _behind_attention(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self.door.step
        if step is None:
            return None
        self.door.step = None
        if isinstance(output, tuple):
            return (self._leave(step, output[0]), *output[1:])
        return self._leave(step, output)

    def _leave(self, step: _Step, x: Tensor) -> Tensor:
        layout = self.plan.branch_layout
        left = step.fuser.leave(split(layout.tokens(x), self.modalities), step.entry.scores, step.ctx)
        return layout.back(merge(left), x)

    def _behind_norm(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        step = self.door.step
        if step is None or step.entry.weight is None or self.plan.norm_layout is None:
            return None
        weighed = self.plan.norm_layout.tokens(output) * merge(step.entry.weight).unsqueeze(-1)
        return self.plan.norm_layout.back(weighed, output)

    def _unite(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention over the union of the streams: every sample's tokens of all streams in one row."""
        step = self.door.step
        if step is None or not step.fuser.attends_to_all:
            return None
        x = split(args[0], self.modalities)  # [M, B, N, C]
        if step.ctx.present is not None:
            there = step.ctx.present.t().repeat_interleave(x.shape[2], 1)[:, None, None]
            mask = torch.zeros_like(there, dtype=x.dtype).masked_fill(~there, float("-inf"))
            kwargs = {**kwargs, _mask_argument(module): mask}
            args = args[:1]
        return (x.transpose(0, 1).flatten(1, 2), *args[1:]), kwargs

    def _divide(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self.door.step
        if step is None or not step.fuser.attends_to_all:
            return None
        x = cast("Tensor", first_tensor(output))
        divided = merge(x.unflatten(1, (self.modalities, -1)).transpose(0, 1))
        return (divided, *output[1:]) if isinstance(output, tuple) else divided


def _mask_argument(attention: nn.Module) -> str:
    """What an attention calls the mask of its keys.

    Raises:
        UserError: where it takes none.
    """
    names = inspect.signature(attention.forward).parameters
    for name in ("attn_mask", "attention_mask"):
        if name in names:
            return name
    raise UserError(
        f"{type(attention).__name__} takes no mask, so a missing modality cannot be left out of a union of keys"
    )


class _Run:
    """One forward pass of a fused network: its blocks call :meth:`block`."""

    def __init__(self, model: FusedNetwork, present: Tensor | None, size: torch.Size, wanted: Sequence[int]) -> None:
        self.model, self.present, self.size, self.wanted = model, present, size, set(wanted)
        self.is_first = True
        self.scores: list[Tensor] = []
        self.maps: list[Tensor] = []  # [M, B, C, h, w]

    def block(self, place: FusedBlock, x: Tensor, args: Any, kwargs: Any) -> Any:
        model, plan = self.model, place.plan
        if self.is_first:
            self.is_first = False
            if self.present is not None:  # a missing stream starts as zeros after the stem
                x = torch.where(merge(self.present).view(-1, *[1] * (x.dim() - 1)), x, 0)
        ctx = Context(
            model.grid_of(plan, x, self.size), plan.prefix, model.position_of(place, x, self.size), self.present
        )
        fuser = model.fuser_of(place.index)
        if model.recomputes and torch.is_grad_enabled():
            output, scores = checkpoint.checkpoint(place.run, x, fuser, ctx, args, kwargs, use_reentrant=False)
        else:
            output, scores = place.run(x, fuser, ctx, args, kwargs)
        if scores is not None:
            self.scores.append(scores)
        if place.index in self.wanted:
            tokens = plan.layout.tokens(cast("Tensor", first_tensor(output)))[:, plan.prefix :]
            self.maps.append(split(tokens.transpose(1, 2).unflatten(2, ctx.grid), len(model.modalities)))
        return output


class FusedNetwork(nn.Module):
    """One network for M aligned modalities: shared weights, private norms, a fuser in every block.

    The network given is the network used: its norms become private copies (they start equal), each of its blocks is held in
    place by a :class:`FusedBlock`, and its own forward pass runs on the stacked streams.

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
    ) -> None:
        super().__init__()
        if score_nets not in ("stage", "block"):
            raise ValueError(f"score_nets must be 'stage' or 'block', not {score_nets!r}")
        if len(set(modalities)) != len(modalities) or not modalities:
            raise ValueError(f"modalities must be different names, at least one; got {list(modalities)}")
        if any(isinstance(module, PerModality | FusedBlock) for module in network.modules()):
            raise ValueError("this network is fused already: a network is fused once; copy.deepcopy it before")
        self.modalities = tuple(modalities)
        self.channels = tuple(modalities.values()) if isinstance(modalities, Mapping) else None
        self.recomputes = False
        example = example_of(network) if example is None else example
        self.survey: Survey = survey(network, example, lambda x: call(network, x))
        self.example_size = example.shape
        self.account: list[str] = []  # what was done to the network, in sentences
        if isinstance(modalities, Mapping):
            self.account += adapt_stem(network, self.survey.stem, modalities)
        kinds = tuple({type(module) for module in network.modules() if is_norm(module)})
        make_private(network, len(modalities), kinds)
        self._door = _Door()
        plans = self.survey.blocks
        places = []
        for index, plan in enumerate(plans):
            parent, _, name = plan.name.rpartition(".")
            place = FusedBlock(network.get_submodule(plan.name), plan, index, len(modalities), self._door)
            setattr(network.get_submodule(parent), name, place)
            places.append(place)
        self.network = network
        fusing = range(len(plans)) if blocks is None else [b % len(plans) for b in blocks]
        self._fuser_at: list[int | None] = [None] * len(plans)  # block -> index into fusers
        self.fusers = nn.ModuleList()
        of_stage: dict[int, int] = {}
        for index in sorted(fusing):
            plan = plans[index]
            if score_nets == "block" or plan.stage not in of_stage:
                of_stage[plan.stage] = len(self.fusers)
                self.fusers.append(fuser(plan.dim, len(modalities), plan.stage))
            self._fuser_at[index] = of_stage[plan.stage]
            _check_fits(cast("Fuser", self.fusers[of_stage[plan.stage]]), plan, places[index])
        self.plain = NoFusion(0, len(modalities))
        self.position = position_of(network, plans) if alignment else None
        self.ensemble = LearnedEnsemble(len(modalities))
        self._scores: list[Tensor] | None = None

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

    def sparsity(self, reduction: Reduction = "mean") -> Tensor:
        """The l1 norm of the last forward pass's scores (Eq. 5), to be added to the loss times lambda; 0 without scores.

        Raises:
            RuntimeError: where there was no forward pass in training mode.
        """
        if self._scores is None:
            raise RuntimeError("sparsity() wants a forward pass in training mode first")
        return sparsity_loss(self._scores, reduction).to(next(self.ensemble.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass, to save memory; the network's own switch cannot see the fusers."""
        self.recomputes = enable

    def freeze(self, private: bool = False) -> None:
        """Keep the network's weights; its private norms and adapted stems go on learning unless ``private`` is true."""
        self.network.requires_grad_(False)
        for module in self.network.modules():
            if not private and isinstance(module, PerModality | Stems):
                module.requires_grad_(True)

    def stack(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``{name: [B, ...]} -> [M*B, ...]``, channels padded to the widest, and which are present, ``[M, B]``."""
        unknown = [name for name in inputs if name not in self.modalities]
        if unknown or not inputs:
            raise ValueError(f"inputs must be some of {', '.join(self.modalities)}; got {', '.join(inputs) or 'none'}")
        widest = max(inputs.values(), key=lambda x: x.shape[1])
        channels = max(self.channels) if self.channels else widest.shape[1]
        shape = (widest.shape[0], channels, *widest.shape[2:])
        padded = {name: self._padded(name, x, shape) for name, x in inputs.items()}
        streams = [padded[name] if name in padded else widest.new_zeros(shape) for name in self.modalities]
        if present is not None and (present.shape != (len(streams), shape[0]) or present.dtype != torch.bool):
            wanted = f"bool [{len(streams)}, {shape[0]}]"
            raise ValueError(
                f"present must be {wanted} (modalities, samples); got {present.dtype} {list(present.shape)}"
            )
        if len(inputs) < len(streams):
            there = torch.tensor([name in inputs for name in self.modalities], device=widest.device).unsqueeze(1)
            present = there.expand(-1, shape[0]) if present is None else present & there
        x = torch.stack(streams)
        if present is not None:  # whatever a broken sensor sent, NaN too, goes no further, and neither do its gradients
            x = torch.where(present.view(*present.shape, *[1] * (x.dim() - 2)), x, 0)
        return merge(x), present

    def _padded(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        own = (shape[0], self.channels[self.modalities.index(name)] if self.channels else shape[1], *shape[2:])
        if x.shape != own:
            raise ValueError(f"{name} must be {list(own)}, as the modalities are aligned; got {list(x.shape)}")
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, shape[1] - own[1])) if own[1] < shape[1] else x

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> FusedOutput:
        run, (features, outputs) = self._run(inputs, present)
        answers = split(answer_of(outputs), len(self.modalities))
        return FusedOutput(
            self._named(features, inputs),
            self._named(outputs, inputs),
            self.ensemble(answers, run.present),
            run.scores,
            run.present,
        )

    def pyramid(
        self, inputs: Mapping[str, Tensor], blocks: Sequence[int], present: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Maps behind some blocks, for dense heads: ``[M, B, C, h, w]`` each, not normed; the scores; who is present."""
        places = [b % len(self.survey.blocks) for b in blocks]
        run, _ = self._run(inputs, present, places)
        return run.maps, run.scores, run.present

    def _run(self, inputs: Mapping[str, Tensor], present: Tensor | None, wanted: Sequence[int] = ()) -> Any:
        x, present = self.stack(inputs, present)
        run = _Run(self, present, x.shape, wanted)
        self._door.run = run
        try:
            called = call(self.network, x)
        finally:
            self._door.run = None
        if self.training:
            self._scores = run.scores
        return run, called

    def _named(self, value: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Every tensor ``[M*B, ...]`` of a structure, per modality that was given."""
        rows = len(self.modalities)
        return {
            name: tree_map(lambda x: split(x, rows)[index] if isinstance(x, Tensor) else x, value)  # noqa: B023
            for index, name in enumerate(self.modalities)
            if name in inputs
        }

    def grid_of(self, plan: BlockPlan, x: Tensor, size: torch.Size) -> Grid:
        """Rows and columns of a block's map, from its input and the size of the network's."""
        told = plan.layout.grid(x.shape)
        if told is not None:
            return told
        tokens = x.shape[1] - plan.prefix
        if plan.grid is not None:
            if size[1:] == self.example_size[1:]:
                return plan.grid
            rows = round(plan.grid[0] * size[-2] / self.example_size[-2])
            if rows and tokens % rows == 0:
                return rows, tokens // rows
        return 1, tokens

    def position_of(self, place: FusedBlock, x: Tensor, size: torch.Size) -> Tensor | None:
        """What alignment re-adds before a block: ``[prefix + N, C]``."""
        plan = place.plan
        if self.position is None or place.index == 0 or plan.dim != self.survey.blocks[0].dim:
            return None
        return self.position.on(self.network, self.grid_of(plan, x, size), plan.prefix)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last scores out: they belong to a graph."""
        return {**self.__dict__, "_scores": None}


def _check_fits(fuser: Fuser, plan: BlockPlan, block: FusedBlock) -> None:
    """Raise a UserError where a fuser asks for what a block does not have."""
    reason = misfit(fuser, plan, block.block)
    if reason is not None:
        raise UserError(
            f"{type(fuser).__name__} does not fit block {plan.name} ({type(block.block).__name__}): it {reason}"
        )


def misfit(fuser: Fuser, plan: BlockPlan, block: nn.Module) -> str | None:
    """What a block lacks for a fuser; None where they fit."""
    if fuser.weighs_input and plan.parts.norm is None:
        return "has no norm before its attention, where the paper's rule weighs the tokens"
    return _not_united(plan, block) if fuser.attends_to_all else None


def _not_united(plan: BlockPlan, block: nn.Module) -> str | None:
    """Why an attention cannot attend over a union of streams: it must treat its tokens as a set."""
    if not plan.parts.is_global:
        return "attends inside windows, to a pooled map, or with positions given to it, which a union of streams does not have"
    attention = block.get_submodule(plan.parts.attention)
    if any(isinstance(module, PerModality) for module in attention.modules()):
        return "norms queries and keys privately inside its attention"
    some = next(attention.parameters())
    x = torch.randn(1, 6, plan.dim, generator=torch.Generator().manual_seed(0)).to(some)
    was_training = attention.training
    attention.eval()
    try:
        with torch.no_grad():
            y, turned = (first_tensor(attention(z)) for z in (x, x.flip(1)))
    except Exception as error:  # whatever a foreign module raises
        return f"attends to a fixed number of tokens only ({str(error).splitlines()[0][:80]})"
    finally:
        attention.train(was_training)
    close = y is not None and turned is not None and torch.allclose(y.flip(1), turned, rtol=1e-3, atol=1e-4)
    return None if close else "tells its attention where a token stands"
