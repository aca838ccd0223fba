"""The recipe of a segmentation run: every key, its type and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tokenfusion.backbones.sharing import Sharing
from tokenfusion.components import TARGET, Component, Section
from tokenfusion.tasks.segmentation.inference import Evaluation
from tokenfusion.train import TrainSettings


class DataSettings(Section):
    """Which images, and how they are brought to training."""

    root: str
    modalities: tuple[str, ...] = Field(("rgb", "depth"), min_length=1)
    train: str = "train"  # names of splits
    val: str = "val"
    resize: tuple[int, int] | None = None  # (height, width) of the inputs; labels keep their size in evaluation
    crop: tuple[int, int] | None = None  # training crop, padded where the image is smaller
    scale: tuple[float, float] = (0.5, 2.0)  # random scale
    shorter: int = 1  # the random scale never makes the shorter side smaller than this
    flip: float = Field(0.5, ge=0, le=1)
    jitter: float = Field(0.0, ge=0, lt=1)
    drop_modality: float = Field(0.0, ge=0, lt=1)  # rate at which training leaves a modality of a sample out


def _named(value: Any) -> Any:
    """``timm/vit_small_patch14_dinov2`` is short for the component that makes it."""
    if not isinstance(value, str):
        return value
    kind, _, name = value.partition("/")
    made = {"timm": "timm_network", "hf": "hf_network"}
    if kind not in made or not name:
        raise ValueError("wanted a component, timm/NAME or hf/NAME")
    return {TARGET: f"tokenfusion.backbones.foreign.{made[kind]}", "name": name}


class ModelSettings(Section):
    """Backbone and head; the fuser has a key of its own."""

    backbone: Annotated[Component, BeforeValidator(_named)]  # or timm/NAME, hf/NAME
    head: Component
    weights: str | None = None  # single-modal weights to start from: file, folder or hub id
    score_nets: Literal["stage", "block"] = "stage"
    placement: Literal["every", "last"] = "every"
    alignment: bool = False  # residual positional alignment
    sharing: Sharing = "default"  # of layers by the streams: all but norms; shared: norms too; unshared: none
    blocks: tuple[int, ...] | None = None  # of a network of timm or Hugging Face: which blocks fuse; null = all
    frozen: int = Field(0, ge=0)  # of such a network: its stem and so many first blocks keep their weights
    freeze_head_norm: bool = False  # batch norm of the head stays at its initial statistics, as released


class LossSettings(Section):
    """Cross-entropy per stream and ensemble, plus ``sparsity`` (lambda) times the l1 norm of the scores."""

    sparsity: float = Field(0.0, ge=0)
    target_rate: float | None = Field(None, ge=0, le=1)  # share of exchanged tokens that lambda is steered to
    scale_sparsity: float = Field(0.0, ge=0)  # lambda_2 of channel exchange: times the sum of the norms' |scales|
    reduction: Literal["sum", "mean"] = "mean"


class ParameterSettings(Section):
    """Learning rates and decay by the role of a parameter."""

    head_lr: float = Field(10.0, gt=0)  # factors of train.lr
    fusion_lr: float = Field(1.0, gt=0)
    train_ensemble: bool = True  # false: the ensemble's weights stay equal, as released
    decay_score_norms: bool = False  # true: the score networks' LayerNorms decay, as released


class SegmentationRecipe(Section):
    """Everything a run needs; see ``tokenfusion show RECIPE``."""

    description: str = ""
    task: Literal["segmentation"] = "segmentation"
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings
    model: ModelSettings
    fuser: Component
    loss: LossSettings = LossSettings()
    parameters: ParameterSettings = ParameterSettings()
    evaluation: Evaluation = Evaluation()
    train: TrainSettings
