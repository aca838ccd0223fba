"""The recipe of a translation run: every key, its type and its default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenfusion.backbones.sharing import Sharing
from tokenfusion.components import Component, Section
from tokenfusion.tasks.translation.inference import Evaluation
from tokenfusion.train import TrainSettings


class DataSettings(Section):
    """Which images become which, and how they are brought to training."""

    root: str
    modalities: tuple[str, ...] = Field(min_length=1)  # inputs
    target: str  # the modality that is generated
    train: str = "train"  # names of splits
    val: str = "val"
    resize: tuple[int, int] | None = None  # (height, width) in evaluation and prediction; None: as the files are
    enlarge: tuple[int, int] | None = None  # (height, width) in training, before the crop; None: as resize
    crop: tuple[int, int] | None = None  # training crop
    flip: float = Field(0.5, ge=0, le=1)
    drop_modality: float = Field(0.0, ge=0, lt=1)  # rate at which training leaves a modality of a sample out


class ModelSettings(Section):
    """Generator and discriminator; the fuser has a key of its own."""

    generator: Component
    discriminator: Component
    weights: str | None = None  # a generator to start from: a released checkpoint, or a run's
    score_nets: Literal["stage", "block"] = "stage"
    placement: Literal["every", "last"] = "last"  # every block of encoder and decoder (paper); last of encoder stages
    alignment: bool = False  # residual positional alignment
    sharing: Sharing = "default"  # of layers by the streams: all but norms; shared: norms too; unshared: none


class LossSettings(Section):
    """adversarial x BCE + l1 x L1 + sparsity (lambda) x the l1 norm of the scores; the discriminator's BCE stands alone."""

    adversarial: float = Field(1.0, ge=0)
    l1: float = Field(100.0, ge=0)
    sparsity: float = Field(0.0, ge=0)
    target_rate: float | None = Field(None, ge=0, le=1)  # share of exchanged tokens that lambda is steered to
    scale_sparsity: float = Field(0.0, ge=0)  # lambda_2 of channel exchange: times the sum of the norms' |scales|
    reduction: Literal["sum", "mean"] = "mean"


class ParameterSettings(Section):
    """Learning rates by the role of a parameter."""

    discriminator_lr: float = Field(1.0, gt=0)  # factor of train.lr


class TranslationRecipe(Section):
    """Everything a run needs; see ``tokenfusion show RECIPE``."""

    description: str = ""
    task: Literal["translation"] = "translation"
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings
    model: ModelSettings
    fuser: Component
    loss: LossSettings = LossSettings()
    parameters: ParameterSettings = ParameterSettings()
    evaluation: Evaluation = Evaluation()
    train: TrainSettings

    @model_validator(mode="after")
    def _consistent(self) -> TranslationRecipe:
        if self.data.target in self.data.modalities:
            raise ValueError(f"data.target {self.data.target!r} is one of data.modalities; take it out of one of them")
        return self
