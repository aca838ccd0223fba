"""The recipe of a detection run: every key, its type and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tokenfusion.backbones.vit import PATCH
from tokenfusion.components import Component, Section
from tokenfusion.data.scenes import IMAGE, POINTS
from tokenfusion.tasks.detection3d.losses import LossSettings as PointLosses
from tokenfusion.tasks.detection3d.losses2d import Loss2dSettings as ImageLosses
from tokenfusion.tasks.detection3d.metrics import Protocol
from tokenfusion.train import TrainSettings

Side = Annotated[int, Field(ge=PATCH, le=4096)]  # of an image, in pixels


class DataSettings(Section):
    """Which scenes, and how they are brought to training."""

    root: str
    modalities: tuple[Literal["points", "rgb"], ...] = ("points", "rgb")
    train: str = "train"  # names of splits
    val: str = "val"
    points: int = Field(20000, gt=0)  # drawn at random from a scene's cloud
    colour: bool = False  # their colours go in too; model.points.channels is 6 then
    image: tuple[Side, Side] = (530, 730)  # (rows, columns) of every image, its camera goes along
    views: int = Field(1, gt=0)  # images of a scene; of more, evenly spread ones are taken
    boxes2d: Literal["annotated", "projected"] = "annotated"  # what the image's network learns
    flip_x: float = Field(0.5, ge=0, le=1)  # the cloud is mirrored, turned and scaled; images never are
    flip_y: float = Field(0.0, ge=0, le=1)
    rotation_deg: float = Field(30.0, ge=0, le=180)
    scale: tuple[float, float] = (0.85, 1.15)
    aligned_boxes: bool = False  # boxes have no yaw (ScanNet): a turned one becomes its hull
    drop_images: float = Field(0.0, ge=0, lt=1)  # rate at which training shows a scene's points no image
    index_points: bool = True  # sampling and neighbours are found by those who load the data, not by the model

    @model_validator(mode="after")
    def _has_points(self) -> DataSettings:
        if POINTS not in self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"data.modalities: {list(self.modalities)}; wanted [points] or [points, rgb]")
        return self


class ModelSettings(Section):
    """The two networks; how they exchange tokens has a key of its own."""

    points: Component
    image: Component | None = None
    point_weights: str | None = None  # a Group-Free checkpoint to start from: file or folder
    image_weights: str | None = None  # YOLOS or DeiT: file, folder or hub id
    exchange: Literal["image-to-point", "both"] = "image-to-point"  # both: as the paper's Fig. 2 draws it
    exchange_queries: bool = False  # queries meet the image too, not through the keys alone (released)
    detach: bool = True  # the loss of the 3D boxes does not reach the other stream through its stand-ins, as released
    alignment: bool = True  # residual positional alignment of the patches, where those are exchanged


class LossSettings(Section):
    """The terms of both networks, and ``sparsity`` (lambda) times the mean score of the tokens that have a stand-in."""

    points: PointLosses = PointLosses()
    image: ImageLosses = ImageLosses()
    image_steps: int | None = Field(None, ge=0)  # the image's own loss ends with this step; None: never
    sparsity: float = Field(0.0, ge=0)
    target_rate: float | None = Field(None, ge=0, le=1)  # share of exchanged tokens that lambda is steered to


class ParameterSettings(Section):
    """Learning rates and decay by the role of a parameter, as factors of train.lr and train.weight_decay."""

    decoder_lr: float = Field(0.05, gt=0)
    image_lr: float = Field(0.0125, gt=0)
    fusion_lr: float = Field(0.05, gt=0)
    image_decay: float = Field(1.0, ge=0)


class DetectionRecipe(Section):
    """Everything a run needs; see ``tokenfusion show RECIPE``."""

    description: str = ""
    task: Literal["detection3d"] = "detection3d"
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings
    model: ModelSettings
    fuser: Component
    loss: LossSettings = LossSettings()
    parameters: ParameterSettings = ParameterSettings()
    evaluation: Protocol = Protocol()
    train: TrainSettings

    @model_validator(mode="after")
    def _consistent(self) -> DetectionRecipe:
        if IMAGE in self.data.modalities and self.model.image is None:
            raise ValueError("model.image is missing, and data.modalities names rgb: give a network, or leave rgb out")
        channels, wanted = self.model.points.get("channels", 3), 6 if self.data.colour else 3
        if channels != wanted:
            raise ValueError(
                f"model.points.channels is {channels}; with data.colour={self.data.colour} points have {wanted}"
            )
        return self
