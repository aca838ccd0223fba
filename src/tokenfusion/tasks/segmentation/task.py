"""What the training loop knows of segmentation: forward, losses, parameter roles, what to watch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.backbones.dense import DenseBackbone, FusedPyramid
from tokenfusion.backbones.mit import MiT
from tokenfusion.components import FUSER_GIVEN, build
from tokenfusion.data.augment import Augment
from tokenfusion.data.degrade import PLAIN, Conditions
from tokenfusion.data.folder import Folder
from tokenfusion.data.frames import Batch, Frames
from tokenfusion.errors import UserError
from tokenfusion.tasks.fusing import Sparsity, drawn_presence, fused_backbone, fuser_factory, watched_rates
from tokenfusion.tasks.segmentation.losses import upsampled_cross_entropy
from tokenfusion.tasks.segmentation.metrics import IGNORE
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe
from tokenfusion.train import ParameterGroup, Task, by_decay, without_decay

COMPONENTS = {  # keys of a recipe that name parts, and the arguments that the program supplies
    "model.backbone": (),
    "model.head": ("dims", "classes"),
    "fuser": FUSER_GIVEN,
}


def build_model(recipe: SegmentationRecipe, classes: int, trust: bool = False) -> FusedSegmenter:
    """The segmenter of a recipe, freshly initialised from ``recipe.seed``.

    Raises:
        UserError: where a component refuses its arguments; the key is named.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(recipe.model.backbone, "model.backbone", trust)
        with torch.random.fork_rng(devices=[]):  # whatever a fuser draws, the head starts alike
            backbone = _fused(network, recipe, trust)
        head = build(recipe.model.head, "model.head", trust, dims=backbone.dims, classes=classes)
    return FusedSegmenter(backbone, head)


def _fused(network: nn.Module, recipe: SegmentationRecipe, trust: bool) -> FusedPyramid:
    model = recipe.model
    if isinstance(network, MiT):
        if model.blocks is not None or model.frozen:
            raise UserError("model.blocks and model.frozen are of networks of timm or Hugging Face; MiT has neither")
        return fused_backbone(network, recipe, model, trust)
    if model.placement != "every":
        raise UserError("model.placement is MiT's; of a network of timm or Hugging Face model.blocks names blocks")
    make, names = fuser_factory(recipe, trust), recipe.data.modalities
    how = model.score_nets, model.blocks, model.alignment, model.frozen, model.sharing
    return DenseBackbone(network, names, make, *how)


def load_pretrained(model: FusedSegmenter, source: str) -> str:
    """Fill the backbone from single-modal weights; returns the account of what was loaded, copied and left random."""
    return model.backbone.load(source)


def frames(
    recipe: SegmentationRecipe, folder: Folder, split: str, training: bool = False, conditions: Conditions = PLAIN
) -> Frames:
    """A split as training or evaluation sees it."""
    data = recipe.data
    if not training:
        return Frames(folder, split, data.modalities, resize=data.resize, conditions=conditions)
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
        if isinstance(model.backbone, DenseBackbone):
            model.backbone.rest()
        model.ensemble.alpha.requires_grad_(recipe.parameters.train_ensemble)
        self.sparsity = Sparsity(recipe.loss, model.backbone, recipe.train.accumulate)

    def train(self, mode: bool = True) -> SegmentationTask:
        super().train(mode)
        if self.recipe.model.freeze_head_norm:
            for module in self.model.head.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, batch: Batch) -> SegmentationOutput:
        rate = self.recipe.data.drop_modality if self.training else 0.0
        return self.model(batch.inputs, drawn_presence(rate, batch.inputs))

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
        return losses | self.sparsity(self.model.backbone, outputs.scores, outputs.present)

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        settings, model = self.recipe.parameters, self.model
        return [
            *by_decay("backbone", model.backbone.trunk, 1.0),
            *by_decay("fusion", model.backbone.fusers, settings.fusion_lr, decay_norms=settings.decay_score_norms),
            *by_decay("head", model.head, settings.head_lr),
            *without_decay("position", model.backbone.learned_position, settings.head_lr),
            *without_decay("ensemble", model.ensemble, settings.head_lr),
        ]

    def watch(self, outputs: SegmentationOutput) -> dict[str, Tensor]:
        return watched_rates(self.model.backbone, outputs.scores, outputs.present) | self.sparsity.watch()
