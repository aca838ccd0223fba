"""A fused foreign network as a pyramid of maps, for dense heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.calls import evaluating
from tokenfusion.backbones.foreign import call, kind_of, position_parameter, resampled_table
from tokenfusion.backbones.fused import FusedBackbone, FusedFeatures
from tokenfusion.backbones.grids import grid_of_tokens
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.keys import from_hf_dinov2
from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.backbones.sharing import Sharing
from tokenfusion.backbones.weights import StateDict, fetch, load_into
from tokenfusion.errors import UserError, first_line
from tokenfusion.fusion.fusers import FuserFactory, Grid
from tokenfusion.fusion.modality import PerModality, merge, split

CHANNELS = 3  # of every modality, as the data brings it
LEVELS = 4  # of a column of equal blocks


class DenseBackbone(FusedNetwork):
    """What :class:`~tokenfusion.backbones.fused.FusedBackbone` is to MiT, for networks of timm and Hugging Face.

    The maps are those behind the last block of each stage, of a column of equal blocks (ViT) behind four of them, evenly
    spread; each is normed per modality. Images whose sides are no multiples of the coarsest map's stride are resized to the
    next ones, so that the maps cover the whole image.

    Args:
        network, modalities, fuser, score_nets, blocks, alignment, sharing: as of
            :class:`~tokenfusion.backbones.hub.FusedNetwork`.
        frozen: number of blocks, counted from the input, that keep their weights, and the stem with them.

    Shape: ``{name: [B, C, H, W]} -> FusedFeatures``.
    """

    def __init__(
        self,
        network: nn.Module,
        modalities: Sequence[str],
        fuser: FuserFactory,
        score_nets: str = "block",
        blocks: Sequence[int] | None = None,
        alignment: bool = False,
        frozen: int = 0,
        sharing: Sharing = "default",
    ) -> None:
        super().__init__(network, modalities, fuser, None, score_nets, blocks, alignment, sharing)
        del self.ensemble  # a task has its own, of its predictions
        plans = self.survey.blocks
        if any(plan.grid is None for plan in plans):
            raise UserError(
                f"{type(network).__name__}: the order of its tokens in the image is unknown; no map can be made"
            )
        self.levels = _levels(plans)
        self.dims = [plans[b].dim for b in self.levels]
        norms: list[nn.Module] = [nn.LayerNorm(dim) for dim in self.dims]
        own = norms if sharing == "shared" else [PerModality(norm, len(self.modalities)) for norm in norms]
        self.norms = nn.ModuleList(own)
        if self.example_size[1] != CHANNELS:
            raise UserError(
                f"model.backbone: takes {self.example_size[1]} channels; every modality comes with {CHANNELS}"
            )
        if frozen and (plans[-1].stage or not 0 < frozen <= len(plans)):
            raise UserError(f"model.frozen={frozen}: wanted 0, or for a column of equal blocks up to {len(plans)}")
        self.frozen = frozen
        self.multiple = _stride(self.example_size[-2], min(grid[0] for plan in plans if (grid := plan.grid)))

    def rest(self) -> None:
        """Before training: what the maps do not depend on (a final norm, a pooler) asks for no gradient, nor what is frozen."""
        plans, frozen = self.survey.blocks, self.frozen
        example = torch.zeros(1, *self.example_size[1:], device=next(self.parameters()).device)
        with evaluating(self), torch.enable_grad():
            maps = self(dict.fromkeys(self.modalities, example)).maps
            named = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
            gradients = torch.autograd.grad(sum(m.sum() for m in maps), [p for _, p in named], allow_unused=True)
        learning = tuple(f"{plan.name}." for plan in plans[frozen:])
        for (name, parameter), gradient in zip(named, gradients, strict=True):
            if gradient is None or (frozen and not name.startswith(learning)):
                parameter.requires_grad_(False)

    @property
    def smallest(self) -> int:
        """Pixels that an image must have along each axis."""
        return self.multiple

    @property
    def trunk(self) -> nn.Module:
        """The single-modal part: the network, and the norms of its maps."""
        return nn.ModuleList([self.network, self.norms])

    @property
    def learned_position(self) -> None:
        """Residual positional alignment re-adds the network's own embedding."""

    def check_size(self, shape: Sequence[int]) -> None:
        """Raise a UserError where the network does not take images ``[..., H, W]``."""
        x = torch.zeros(
            len(self.modalities), self.example_size[1], *self._size(shape), device=next(self.parameters()).device
        )
        try:
            with evaluating(self), torch.no_grad():
                call(self.network, x)
        except (AssertionError, RuntimeError, ValueError) as error:
            rows, columns = x.shape[-2:]
            raise UserError(
                f"model.backbone: {type(self.network).__name__} takes no images of {rows}x{columns} pixels "
                f"({first_line(error, 120)}); {self._remedy(rows, columns)}"
            ) from None

    def _remedy(self, rows: int, columns: int) -> str:
        """What to do where a network takes images of one size only, of that one for example."""
        kind, own = kind_of(self.network), "x".join(map(str, self.example_size[-2:]))
        if kind == "timm":
            name = getattr(self.network, "default_cfg", {}).get("architecture", "NAME")
            made = (
                f"{{_target_: tokenfusion.backbones.foreign.timm_network, name: {name}, img_size: [{rows}, {columns}]}}"
            )
            return f"it is made for {own}; for this size: model.backbone='{made}'"
        return f"wanted {own}, {'the image_size of its config.json' if kind == 'hf' else 'as its example has'}"

    def _size(self, shape: Sequence[int]) -> Grid:
        """The next multiples of the coarsest map's stride."""
        rows, columns = (-(-n // self.multiple) * self.multiple for n in shape[-2:])
        return rows, columns

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> FusedFeatures:  # type: ignore[override]
        size = self._size(next(iter(inputs.values())).shape)
        sized = {name: _resized(x, size) for name, x in inputs.items()}
        maps, scores, present = self.pyramid(sized, self.levels, present)
        self._scores = None  # a task reads them from the output
        normed = [
            split(norm(merge(x.movedim(2, -1))), len(x)).movedim(-1, 2)
            for x, norm in zip(maps, self.norms, strict=True)
        ]
        return FusedFeatures(normed, scores, present)

    def score_maps(self, scores: Sequence[Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        """Scores per fused block ``[M, B, N]`` as maps ``{block name: [M, B, h, w]}``; ``size``: rows, columns of the image."""
        maps = {}
        for name, index, score in zip(self.block_names(), self.fused_blocks(), scores, strict=True):
            plan = self.survey.blocks[index]
            grid = grid_of_tokens(plan, score.shape[-1], self._size(size), self.example_size)
            maps[name] = score.unflatten(-1, grid)
        return maps

    def load(self, source: str) -> str:
        """Fill the network from single-modal weights; returns the account of what was loaded, copied and left random.

        Args:
            source: file, folder or hub id, in the network's own names or in those of Hugging Face's Dinov2Model.
        """
        tensors = fetch(source)
        if any("attention.attention.query" in key for key in tensors) and hasattr(self.network, "blocks"):
            tensors = from_hf_dinov2(tensors)
        return load_into(self.network, self._in_place(tensors)).summary(source)

    def _in_place(self, tensors: StateDict) -> StateDict:
        """The network's own names as they are with its blocks held in place; positions at its own grid."""
        places = {f"{plan.name}.": f"{plan.name}.block." for plan in self.survey.blocks}
        renamed = {}
        for name, value in tensors.items():
            place = next((old for old in places if name.startswith(old)), "")
            renamed[places.get(place, "") + name.removeprefix(place)] = value
        first = self.survey.blocks[0]
        position = position_parameter(self.network, first.dim)
        if position in renamed and first.grid is not None:
            own = self.network.get_parameter(position)
            renamed[position] = resampled_table(renamed[position], own.shape[1], first.grid)
        return renamed


def _levels(plans: Sequence[BlockPlan]) -> list[int]:
    """The last block of each width; of a column of equal blocks four, evenly spread."""
    last = [i for i, plan in enumerate(plans) if i + 1 == len(plans) or plans[i + 1].dim != plan.dim]
    if len(last) > 1:
        return last
    levels = min(LEVELS, len(plans))
    return [len(plans) * (level + 1) // levels - 1 for level in range(levels)]


def _stride(size: int, rows: int) -> int:
    """Pixels per row of the coarsest map; where convolutions padded the example, the power of two that they make."""
    return size // rows if size % rows == 0 else 2 ** math.ceil(math.log2(size / rows))


def _resized(x: Tensor, size: Grid) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


FusedPyramid = FusedBackbone | DenseBackbone  # what tasks with dense outputs work with
