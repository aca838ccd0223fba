"""Everything about a training run that is not the task: steps, batch, schedule, devices, how often to log and save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenfusion.errors import UserError, nearest

# these change where, how fast or how talkatively a run goes, not what it computes
WITHOUT_EFFECT_ON_WEIGHTS = {
    "devices", "accelerator", "workers", "log_every", "eval_every", "checkpoint_every", "keep"
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Restart(_Strict):
    """One stage of a run that begins with a fresh optimiser: its length and its learning rate."""

    steps: int = Field(gt=0)
    lr: float = Field(gt=0)


class TrainSettings(_Strict):
    """The section ``train`` of a recipe.

    ``batch_size`` is per step over all devices and all pieces (``accumulate``), so that neither changes
    what is computed. Exactly one of ``lr`` (one continuous schedule, the default) and ``restarts`` is given.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)

    lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = Field(None, gt=0)  # of the gradient of all parameters of a phase together

    schedule: Literal["poly", "step", "constant"] = "poly"
    power: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(1e-6, ge=0, le=1)
    milestones: list[int] = []  # step: where the rate falls to a tenth
    schedule_steps: int | None = Field(None, gt=0)  # where poly would reach 0; None: at the end of the run or stage
    restarts: list[float] | list[Restart] | None = None  # learning rates of equal stages, or {steps, lr} of each

    precision: Literal["32", "bf16", "fp16"] = "32"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | Literal["auto"] = 1  # auto: every GPU, or one process on the CPU
    workers: int = Field(0, ge=0)  # processes that load data, per device
    accumulate: int = Field(1, gt=0)  # pieces that a device cuts its share of a batch into, to save memory

    log_every: int = Field(50, gt=0)
    eval_every: int = Field(1000, ge=0)  # 0: at the end only
    checkpoint_every: int = Field(1000, ge=0)
    keep: int = Field(2, gt=0)  # checkpoints besides the best

    @field_validator("precision", mode="before")
    @classmethod
    def _number_as_word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # train.precision=32 on the command line is a number

    @field_validator("devices", mode="before")
    @classmethod
    def _count_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError("wanted a number of devices, or auto")
        return value

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError("wanted two numbers, for example [0.9, 0.999]")
        return tuple(value)  # YAML has lists only

    @field_validator("restarts", mode="before")
    @classmethod
    def _rates_or_stages(cls, value: Any) -> Any:
        if value is None:
            return None
        parts = list(value) if isinstance(value, list | tuple) else []
        rates = [isinstance(part, float | int) for part in parts]
        stages = [
            isinstance(part, Restart) or (isinstance(part, dict) and set(part) == {"steps", "lr"}) for part in parts
        ]
        if not parts or not (all(rates) or all(stages)):
            raise ValueError("wanted a list of learning rates, or of {steps, lr}")
        return parts

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if (self.lr is None) == (self.restarts is None):
            came = "both lr and restarts are given" if self.lr is not None else "neither lr nor restarts is given"
            raise ValueError(f"{came}; exactly one is wanted (set the other to null)")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule: step and milestones belong together; give both or neither")
        lengths = [stage.steps for stage in self.restarts or [] if isinstance(stage, Restart)]
        if lengths and sum(lengths) != self.steps:
            raise ValueError(f"the stages in restarts sum to {sum(lengths)} steps, but steps is {self.steps}")
        if len(self.restarts or []) > self.steps:
            raise ValueError("restarts has more stages than there are steps")
        return self


def train_settings(values: Mapping[str, Any], source: str = "train") -> TrainSettings:
    """Settings out of plain values.

    Raises:
        UserError: one line that names ``source``, the key, what came and the nearest valid key.
    """
    try:
        return TrainSettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown key {key!r}; {nearest(key, TrainSettings.model_fields)}") from None
        if first["type"] == "missing":
            raise UserError(f"{source}: key {key!r} is missing") from None
        message = first["msg"].removeprefix("Value error, ")
        came = f", got {first['input']!r}" if key else ""
        raise UserError(f"{source}{'.' * bool(key)}{key}: {message}{came}") from None
