"""The composer: a single-modal network, its blocks run on all streams by fusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenfusion.backbones.block import PreNormBlock
from tokenfusion.backbones.keys import from_mit
from tokenfusion.backbones.mit import Pyramid, to_map
from tokenfusion.backbones.sharing import Sharing, divide
from tokenfusion.backbones.weights import fetch, load_into
from tokenfusion.errors import UserError
from tokenfusion.fusion.alignment import LearnedPosition
from tokenfusion.fusion.channels import scales_of
from tokenfusion.fusion.exchange import ExchangeRates
from tokenfusion.fusion.fusers import Context, Fuser, FuserFactory, NoFusion
from tokenfusion.fusion.modality import check_names, merge, presence, silenced, split


class FusedFeatures(NamedTuple):
    """Feature maps and decisions of a fused backbone."""

    maps: list[Tensor]  # per stage [M, B, C, H, W]
    scores: list[Tensor]  # per fused block [M, B, N]; empty where the fuser does not score
    present: Tensor | None  # bool [M, B], None where every modality is there


class FusedBackbone(nn.Module):
    """A pyramid backbone shared by M aligned modalities, with private norms and a fuser in every block.

    Args:
        backbone: the single-modal network; its weights are kept, its LayerNorms copied per modality.
        modalities: names of the streams, in order.
        fuser: makes one fuser from (dim, modalities, stage), e.g. ``functools.partial(TokenFusion, threshold=0.02)``.
        score_nets: ``"stage"``: the blocks of a stage share a fuser, and so its score networks (released);
            ``"block"``: one each (the paper's ``s^l``).
        placement: ``"every"`` block fuses, or only the ``"last"`` one of each stage, and none of a decoder (released).
        alignment: residual positional alignment (Sec. 3.3).
        sharing: all but the norms (``"default"``), the norms too (``"shared"``), or nothing (``"unshared"``).

    Shape: ``{name: [B, C, H, W]} -> FusedFeatures``. Names that are left out are missing modalities; ``present`` says the same
    per sample; every sample needs one at least. A missing stream starts as zeros after the stem.
    """

    def __init__(
        self,
        backbone: Pyramid,
        modalities: Sequence[str],
        fuser: FuserFactory,
        score_nets: Literal["stage", "block"] = "stage",
        placement: Literal["every", "last"] = "every",
        alignment: bool = False,
        sharing: Sharing = "default",
    ) -> None:
        super().__init__()
        if score_nets not in ("stage", "block"):
            raise ValueError(f"score_nets must be 'stage' or 'block', not {score_nets!r}")
        if placement not in ("every", "last"):
            raise ValueError(f"placement must be 'every' or 'last', not {placement!r}")
        if len(set(modalities)) != len(modalities) or not modalities:
            raise ValueError(f"modalities must be different names, at least one; got {list(modalities)}")
        self.modalities = tuple(modalities)
        self.placement = placement
        divide(backbone, len(modalities), sharing, (nn.LayerNorm,))
        self.backbone = backbone
        self.fusers = nn.ModuleList()
        for index, stage in enumerate(backbone.parts()):
            count = len(stage.blocks) if score_nets == "block" and placement == "every" else 1
            count = 0 if placement == "last" and stage.is_decoder else count
            self.fusers.append(nn.ModuleList(fuser(stage.dim, len(modalities), index) for _ in range(count)))
        if placement == "last" and any(
            cast("Fuser", f).adds_tokens for part in self.fusers for f in cast("nn.ModuleList", part)
        ):
            raise ValueError(
                "this fuser's own tokens go from block to block, and placement 'last' fuses one block of a stage; set 'every'"
            )
        self.plain = NoFusion(0, len(modalities))
        self.position = LearnedPosition(backbone.dims[0]) if alignment else None

    @property
    def dims(self) -> list[int]:
        return self.backbone.dims

    @property
    def smallest(self) -> int:
        """Pixels that an image must have along each axis."""
        return self.backbone.smallest

    @property
    def trunk(self) -> nn.Module:
        """The single-modal part."""
        return self.backbone

    @property
    def learned_position(self) -> nn.Module | None:
        """What residual positional alignment learns."""
        return self.position

    def load(self, source: str) -> str:
        """Fill the network from single-modal weights; returns the account of what was loaded, copied and left random."""
        return load_into(self.backbone, from_mit(fetch(source))).summary(source)

    @property
    def threshold(self) -> float | None:
        """The fuser's, None where it does not score."""
        return self.fuser_of(0, len(self.backbone.parts()[0].blocks) - 1).threshold

    def fuser_of(self, stage: int, block: int) -> Fuser:
        """The fuser that runs a block."""
        part = self.backbone.parts()[stage]
        if self.placement == "last" and (part.is_decoder or block < len(part.blocks) - 1):
            return self.plain
        fusers = cast("nn.ModuleList", self.fusers[stage])
        return cast("Fuser", fusers[block if len(fusers) > 1 else 0])

    def fused_blocks(self) -> list[tuple[int, int]]:
        """(stage, block) of every block that scores, in the order of ``FusedFeatures.scores``."""
        every = [(s, b) for s, stage in enumerate(self.backbone.parts()) for b in range(len(stage.blocks))]
        return [(s, b) for s, b in every if self.fuser_of(s, b).threshold is not None]

    def block_names(self) -> list[str]:
        """Readable names of the fused blocks: ``stage1.0`` is the first block of the first stage."""
        return [f"{self.backbone.parts()[s].name}.{b}" for s, b in self.fused_blocks()]

    def rates(self, features_scores: Sequence[Tensor], present: Tensor | None = None) -> dict[str, ExchangeRates]:
        """Exchange rates per fused block."""
        return {
            name: self.fuser_of(s, b).rates(scores, present)
            for name, (s, b), scores in zip(self.block_names(), self.fused_blocks(), features_scores, strict=True)
        }

    def scales(self) -> list[Tensor]:
        """Of the norms before attention, per block whose fuser goes by them: ``[M, C]`` (Eq. 10)."""
        return [
            scales_of(cast("PreNormBlock", block).norm1, len(self.modalities))
            for s, stage in enumerate(self.backbone.parts())
            for b, block in enumerate(stage.blocks)
            if self.fuser_of(s, b).uses_scales
        ]

    def score_maps(self, scores: Sequence[Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        """Scores per fused block ``[M, B, N]`` as maps ``{block name: [M, B, h, w]}``; ``size``: rows, columns of the image."""
        maps = {}
        for name, (stage, _), score in zip(self.block_names(), self.fused_blocks(), scores, strict=True):
            stride, multiple = self.backbone.parts()[stage].stride, self.backbone.multiple
            rows, columns = (-(-n // stride) for n in size)
            grid = [-(-(-(-n // multiple) * multiple) // stride) for n in size]  # of the padded image
            maps[name] = score.unflatten(-1, grid)[..., :rows, :columns]
        return maps

    def check_size(self, shape: Sequence[int]) -> None:
        """Raise a UserError where images ``[..., H, W]`` are too small for the pyramid."""
        if min(shape[-2:]) < self.smallest:
            size = f"{shape[-2]}x{shape[-1]}"
            raise UserError(
                f"an image of {size} pixels is too small: at least {self.smallest}x{self.smallest} is wanted"
            )

    def stack(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``{name: [B, C, H, W]} -> [M, B, C, H, W]``, zeros where a name is missing."""
        check_names(self.modalities, inputs)
        some = next(iter(inputs.values()))
        if any(x.shape != some.shape for x in inputs.values()):
            shapes = {name: tuple(x.shape) for name, x in inputs.items()}
            raise ValueError(f"aligned modalities must have one shape; got {shapes}")
        self.check_size(some.shape)
        return torch.stack([inputs[name] if name in inputs else torch.zeros_like(some) for name in self.modalities])

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> FusedFeatures:
        images = self.stack(inputs)
        present = presence(self.modalities, inputs, present, images.shape[1], images.device)
        x = merge(silenced(images, present))
        merged: list[Tensor] = []
        scores: list[Tensor] = []
        for index, stage in enumerate(self.backbone.parts()):
            tokens, grid = stage.enter(x, merged)
            tokens = split(tokens, len(self.modalities))
            if index == 0:
                tokens = silenced(tokens, present)
            tokens = self._blocks(index, tokens, grid, present, scores)
            x = to_map(stage.norm(merge(tokens)), grid)
            merged.append(x)
        return FusedFeatures([split(x, len(self.modalities)) for x in merged], scores, present)

    def _blocks(
        self, index: int, tokens: Tensor, grid: tuple[int, int], present: Tensor | None, scores: list[Tensor]
    ) -> Tensor:
        stage = self.backbone.parts()[index]
        ctx = Context(grid, present=present)
        position = None if self.position is None else self.position(grid, stage.dim)
        for b, block in enumerate(stage.blocks):
            if position is not None and index == 0 and b == 0:
                tokens = tokens + position  # the first layer learns the embedding ...
            else:
                ctx.position = None if position is None else position.detach()  # ... later ones only repeat it
            ctx.block = b
            tokens, decided = self.fuser_of(index, b)(cast("PreNormBlock", block), tokens, ctx)
            if decided is not None:
                scores.append(decided)
        return tokens
