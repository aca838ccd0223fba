"""What the training loop knows of translation: two phases, their losses, what to watch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenfusion.backbones.keys import from_released_translation
from tokenfusion.backbones.mirror import MirroredMiT
from tokenfusion.backbones.mit import MiT, Pyramid
from tokenfusion.backbones.weights import fetch, load_into
from tokenfusion.components import FUSER_GIVEN, build
from tokenfusion.data.augment import Augment
from tokenfusion.data.degrade import PLAIN, Conditions
from tokenfusion.data.folder import Folder
from tokenfusion.data.frames import Batch, Frames
from tokenfusion.errors import UserError
from tokenfusion.tasks.fusing import Sparsity, drawn_presence, fused_backbone, watched_rates
from tokenfusion.tasks.translation.losses import masked_l1, patch_bce
from tokenfusion.tasks.translation.model import Discriminator, FusedTranslator, TranslationOutput, discriminator
from tokenfusion.tasks.translation.settings import TranslationRecipe
from tokenfusion.train import ParameterGroup, Task, by_decay

COMPONENTS = {  # keys of a recipe that name parts, and the arguments that the program supplies
    "model.generator": (),
    "model.discriminator": (),
    "fuser": FUSER_GIVEN,
}


def build_model(recipe: TranslationRecipe, trust: bool = False) -> FusedTranslator:
    """The generator of a recipe, freshly initialised from ``recipe.seed``.

    Raises:
        UserError: where a component refuses its arguments; the key is named.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(recipe.model.generator, "model.generator", trust)
        if not isinstance(network, MirroredMiT):
            raise UserError(f"model.generator: wanted a MirroredMiT, got {type(network).__name__}")
        _check_channels(network, 3, "model.generator")
        return FusedTranslator(fused_backbone(network, recipe, recipe.model, trust))


def build_discriminator(recipe: TranslationRecipe, trust: bool = False) -> Discriminator:
    """The discriminator of a recipe, freshly initialised from ``recipe.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(recipe.model.discriminator, "model.discriminator", trust)
        if not isinstance(network, MiT):
            raise UserError(f"model.discriminator: wanted a MiT, got {type(network).__name__}")
        _check_channels(network, 6, "model.discriminator")
        return discriminator(network, recipe.data.modalities)


def _check_channels(network: Pyramid, wanted: int, key: str) -> None:
    if network.channels != wanted:
        raise UserError(f"{key}: takes images of {network.channels} channels; wanted {wanted}: give channels={wanted}")


def load_pretrained(model: FusedTranslator, source: str) -> str:
    """Fill the generator from a released checkpoint or from our own weights; returns the account of what was loaded."""
    tensors = fetch(source)
    if any(key.startswith("patch_embed_enc.") for key in tensors):
        tensors = from_released_translation(tensors)
    own = {key.removeprefix("model."): value for key, value in tensors.items() if not key.startswith("discriminator.")}
    return load_into(model, own).summary(source)


def frames(
    recipe: TranslationRecipe, folder: Folder, split: str, training: bool = False, conditions: Conditions = PLAIN
) -> Frames:
    """A split as training or evaluation sees it."""
    data = recipe.data
    if not training:
        return Frames(folder, split, data.modalities, resize=data.resize, target=data.target, conditions=conditions)
    size = data.enlarge or data.resize
    augment = Augment(data.crop or size, (1.0, 1.0), data.flip, resize=size)
    return Frames(folder, split, data.modalities, augment, recipe.seed, target=data.target)


class TranslationTask(Task):
    """The generator runs once per step; the discriminator's phase sees its images detached."""

    phases = ("discriminator", "generator")

    def __init__(self, model: FusedTranslator, critic: Discriminator, recipe: TranslationRecipe) -> None:
        super().__init__()
        self.model = model
        self.discriminator = critic
        self.recipe = recipe
        self.sparsity = Sparsity(recipe.loss, model.backbone, recipe.train.accumulate)
        self.monitor = f"ensemble/{recipe.evaluation.primary}"
        self.higher_is_better = False

    def forward(self, batch: Batch) -> TranslationOutput:
        rate = self.recipe.data.drop_modality if self.training else 0.0
        return self.model(batch.inputs, drawn_presence(rate, batch.inputs))

    def losses(self, batch: Batch, outputs: TranslationOutput, phase: str) -> dict[str, Tensor]:
        target = batch.target
        assert target is not None, "training needs a target"
        # where the target was not measured, truth and generated image show the same: no branch is told apart by its holes
        shown = {
            n: x if batch.valid is None else torch.where(batch.valid, x, target) for n, x in outputs.images.items()
        }
        if phase == "discriminator":
            return self._discriminator_losses(batch, target, shown, outputs.present)
        loss, present = self.recipe.loss, outputs.present
        judged = patch_bce(self.discriminator(batch.inputs, shown), True, present)
        l1 = masked_l1(torch.stack(list(outputs.images.values())), target, batch.valid, present)
        losses = {"adversarial": loss.adversarial * judged.sum()}
        losses |= {f"l1/{name}": loss.l1 * value for name, value in zip(outputs.images, l1, strict=True)}
        losses["l1/ensemble"] = loss.l1 * masked_l1(outputs.ensemble[None], target, batch.valid)[0]
        return losses | self.sparsity(self.model.backbone, outputs.scores, present)

    def _discriminator_losses(
        self, batch: Batch, target: Tensor, shown: dict[str, Tensor], present: Tensor | None
    ) -> dict[str, Tensor]:
        """Truth and detached generated images in one pass."""
        inputs = {name: x.repeat(2, 1, 1, 1) for name, x in batch.inputs.items()}
        pairs = {name: torch.cat([target, x.detach().to(target.dtype)]) for name, x in shown.items()}
        real, generated = self.discriminator(inputs, pairs).chunk(2, dim=1)
        losses = (patch_bce(real, True, present) + patch_bce(generated, False, present)) / 2
        return dict(zip(shown, losses, strict=True))

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        if phase == "generator":
            return by_decay(phase, self.model)
        return by_decay(phase, self.discriminator, self.recipe.parameters.discriminator_lr)

    def watch(self, outputs: TranslationOutput) -> dict[str, Tensor]:
        return watched_rates(self.model.backbone, outputs.scores, outputs.present) | self.sparsity.watch()
