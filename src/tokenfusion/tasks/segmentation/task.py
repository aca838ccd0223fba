"""What the training loop knows of segmentation: forward, losses, parameter roles, what to watch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mit import MiT
from tokenfusion.backbones.weights import fetch, from_mit, load_into
from tokenfusion.components import build, maker
from tokenfusion.data.augment import Augment, Batch, Frames
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Fuser
from tokenfusion.fusion.scores import sparsity_loss
from tokenfusion.tasks.segmentation.losses import upsampled_cross_entropy
from tokenfusion.tasks.segmentation.metrics import IGNORE
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe
from tokenfusion.train import ParameterGroup, Task

COMPONENTS = {  # keys of a recipe that name parts, and the arguments that the program supplies
    "model.backbone": (),
    "model.head": ("dims", "classes"),
    "fuser": ("dim", "modalities", "stage", "seed"),
}
NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def build_model(recipe: SegmentationRecipe, classes: int, trust: bool = False) -> FusedSegmenter:
    """The segmenter of a recipe, freshly initialised from ``recipe.seed``.

    Raises:
        UserError: where a component refuses its arguments; the key is named.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(recipe.model.backbone, "model.backbone", trust)
        if not isinstance(network, MiT):
            raise UserError(f"model.backbone: wanted a MiT, got {type(network).__name__}")
        fuser = maker(recipe.fuser, "fuser", COMPONENTS["fuser"], trust)

        def make_fuser(dim: int, modalities: int, stage: int) -> Fuser:
            return fuser(dim, modalities, stage, seed=recipe.seed)

        settings = recipe.model
        try:
            backbone = FusedBackbone(
                network, recipe.data.modalities, make_fuser, settings.score_nets, settings.placement, settings.alignment
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"fuser: {error}") from error
        head = build(recipe.model.head, "model.head", trust, dims=backbone.dims, classes=classes)
    return FusedSegmenter(backbone, head)


def load_pretrained(model: FusedSegmenter, source: str) -> str:
    """Fill the backbone from single-modal weights; returns the account of what was loaded, copied and left random."""
    return load_into(model.backbone.backbone, from_mit(fetch(source))).summary(source)


def frames(recipe: SegmentationRecipe, folder: Folder, split: str, training: bool = False) -> Frames:
    """A split as training or evaluation sees it."""
    data = recipe.data
    if not training:
        return Frames(folder, split, data.modalities, resize=data.resize)
    augment = Augment(data.crop or data.resize, data.scale, data.flip, data.jitter, data.resize, data.shorter)
    return Frames(folder, split, data.modalities, augment, recipe.seed)


class SegmentationTask(Task):
    """One phase: the model."""

    phases = ("model",)
    monitor = "ensemble/miou"

    def __init__(self, model: FusedSegmenter, recipe: SegmentationRecipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        model.ensemble.alpha.requires_grad_(recipe.parameters.train_ensemble)

    def train(self, mode: bool = True) -> SegmentationTask:
        super().train(mode)
        if self.recipe.model.freeze_head_norm:
            for module in self.model.head.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, batch: Batch) -> SegmentationOutput:
        return self.model(batch.inputs, self._drawn_presence(batch))

    def _drawn_presence(self, batch: Batch) -> Tensor | None:
        """Which modalities each sample keeps; one at least."""
        rate = self.recipe.data.drop_modality
        if rate == 0 or not self.training:
            return None
        some = next(iter(batch.inputs.values()))
        draw = torch.rand(len(self.model.modalities), some.shape[0], device=some.device)
        return (draw >= rate) | (draw == draw.max(0, keepdim=True).values)

    def losses(self, batch: Batch, outputs: SegmentationOutput, phase: str) -> dict[str, Tensor]:
        assert batch.target is not None, "training needs labels"
        losses = {}
        for index, (name, logits) in enumerate(outputs.logits.items()):
            target = batch.target
            if outputs.present is not None:  # a stream without its input is not asked for its own answer
                target = torch.where(outputs.present[index, :, None, None], target, IGNORE)
            losses[name] = upsampled_cross_entropy(logits, target)
        if self.model.ensemble.alpha.requires_grad:  # it trains nothing else: the streams come in detached
            losses["ensemble"] = upsampled_cross_entropy(outputs.ensemble, batch.target)
        if outputs.scores and self.recipe.loss.sparsity > 0:
            losses["sparsity"] = self.recipe.loss.sparsity * sparsity_loss(outputs.scores, self.recipe.loss.reduction)
        return losses

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        settings, model = self.recipe.parameters, self.model
        return [
            *_by_decay("backbone", model.backbone.backbone, 1.0),
            *_by_decay("fusion", model.backbone.fusers, settings.fusion_lr, decay_norms=settings.decay_score_norms),
            *_by_decay("head", model.head, settings.head_lr),
            *_without_decay("position", model.backbone.position, settings.head_lr),
            *_without_decay("ensemble", model.ensemble, settings.head_lr),
        ]

    def watch(self, outputs: SegmentationOutput) -> dict[str, Tensor]:
        watched = {}
        rates = self.model.backbone.rates([s.detach() for s in outputs.scores], outputs.present)
        for block, rate in rates.items():
            for index, name in enumerate(self.model.modalities):
                watched[f"exchange/{block}/{name}"] = rate.exchanged[index]
                watched[f"donor_below/{block}/{name}"] = rate.donor_below[index]
        return watched


def _by_decay(role: str, module: nn.Module, lr_scale: float, decay_norms: bool = False) -> list[ParameterGroup]:
    """The parameters of a part: those of norm layers do not decay."""
    norms = [p for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)]
    known = {id(p) for p in norms}
    rest = [p for p in module.parameters() if id(p) not in known]
    groups = [ParameterGroup(role, rest, lr_scale, True), ParameterGroup(f"{role} norms", norms, lr_scale, decay_norms)]
    return [group for group in groups if group.params]


def _without_decay(role: str, module: nn.Module | None, lr_scale: float) -> list[ParameterGroup]:
    params = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    return [ParameterGroup(role, params, lr_scale, False)] if params else []
