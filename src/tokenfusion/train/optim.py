"""Optimisers out of a task's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.errors import UserError
from tokenfusion.train.settings import Restart, TrainSettings
from tokenfusion.train.task import Task


class Stage(NamedTuple):
    """A stretch of steps with one optimiser: its first step, its length and its base learning rate."""

    start: int
    steps: int
    lr: float


def stages(settings: TrainSettings) -> list[Stage]:
    """One stage for the whole run, or the stages that ``restarts`` names."""
    if settings.restarts is None:
        assert settings.lr is not None
        return [Stage(0, settings.steps, settings.lr)]
    result: list[Stage] = []
    restarts: Sequence[float | Restart] = settings.restarts
    for number, restart in enumerate(restarts, 1):
        start = result[-1].start + result[-1].steps if result else 0
        equal = settings.steps * number // len(restarts) - start
        stage = restart if isinstance(restart, Restart) else Restart(steps=equal, lr=restart)
        result.append(Stage(start, stage.steps, stage.lr))
    return result


def stage_at(settings: TrainSettings, step: int) -> Stage:
    """The stage that step ``step`` (from 0) belongs to."""
    return next(stage for stage in reversed(stages(settings)) if stage.start <= step)


def schedule_factor(settings: TrainSettings, step: int, length: int) -> float:
    """Factor of the base learning rate ``step`` steps into a stage: poly decay times a linear warm-up.

    poly is ``(1 - step / length) ** power``; step falls to a tenth at every milestone; the
    warm-up climbs from ``warmup_ratio`` to 1 over ``warmup_steps``.
    """
    factor = 1.0
    if settings.schedule == "poly":
        factor = max(0.0, 1 - step / length) ** settings.power
    elif settings.schedule == "step":
        factor = 0.1 ** sum(milestone <= step for milestone in settings.milestones)
    if step < settings.warmup_steps:
        factor *= settings.warmup_ratio + (1 - settings.warmup_ratio) * step / settings.warmup_steps
    return factor


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The base learning rate at step ``step`` (from 0)."""
    stage = stage_at(settings, step)
    return stage.lr * schedule_factor(settings, step - stage.start, settings.schedule_steps or stage.steps)


class Optimizers:
    """One optimiser per phase of a task.

    Raises:
        ValueError: where a parameter that asks for a gradient is in no group, or in two.
    """

    def __init__(self, task: Task, settings: TrainSettings) -> None:
        self.settings = settings
        self.names = {id(p): name for name, p in task.named_parameters()}
        self.groups = {phase: _torch_groups(task, phase, settings.weight_decay) for phase in task.phases}
        self.params = {phase: [p for g in groups for p in g["params"]] for phase, groups in self.groups.items()}
        _check_complete(task, self.params)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            phase: kind(groups, lr=0.0, betas=settings.betas, fused=True) for phase, groups in self.groups.items()
        }

    def begin(self, step: int) -> float:
        """Set the learning rates of a step; a new stage forgets the moments of the last one. Returns the base rate."""
        if step > 0 and step == stage_at(self.settings, step).start:
            for optimizer in self.optimizers.values():
                optimizer.state.clear()
        lr = learning_rate(self.settings, step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        return lr

    @contextmanager
    def only(self, phase: str) -> Iterator[None]:
        """Meanwhile the parameters of the other phases take no gradient."""
        others = [p for name, params in self.params.items() if name != phase for p in params]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """The state of all optimisers as ``{"<phase>/<parameter name>/<slot>": tensor}``."""
        return {
            f"{phase}/{self.names[id(parameter)]}/{slot}": value
            for phase, optimizer in self.optimizers.items()
            for parameter, slots in optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """The inverse of :meth:`tensors`.

        Raises:
            UserError: where ``tensors`` belong to other parameters; ``source`` is named.
        """
        states: dict[str, dict[str, dict[str, Tensor]]] = {phase: {} for phase in self.optimizers}
        for key, value in tensors.items():
            phase, rest = key.split("/", 1)
            name, slot = rest.rsplit("/", 1)
            states.setdefault(phase, {}).setdefault(name, {})[slot] = value
        for phase, state in states.items():
            names = [self.names[id(p)] for p in self.params.get(phase, [])]
            foreign = sorted(set(state) - set(names))
            if foreign:
                raise UserError(f"{source}: it optimises {foreign[0]!r} (phase {phase!r}), this task does not")
            optimizer = self.optimizers[phase]
            content = {i: state[name] for i, name in enumerate(names) if name in state}
            optimizer.load_state_dict({"state": content, "param_groups": optimizer.state_dict()["param_groups"]})


def _torch_groups(task: Task, phase: str, weight_decay: float) -> list[dict[str, Any]]:
    groups = []
    for group in task.parameter_groups(phase):
        params = [p for p in group.params if p.requires_grad]
        decay = weight_decay * float(group.weight_decay)
        if params:
            groups.append({"role": group.role, "params": params, "lr_scale": group.lr_scale, "weight_decay": decay})
    if not groups:
        raise ValueError(f"{type(task).__name__}.parameter_groups({phase!r}) has no parameter to train")
    return groups


def _check_complete(task: Task, params: Mapping[str, list[nn.Parameter]]) -> None:
    """A weight that never reaches an optimiser is a silent mistake."""
    seen: dict[int, str] = {}
    names = {id(p): name for name, p in task.named_parameters() if p.requires_grad}
    for phase, members in params.items():
        for parameter in members:
            if id(parameter) not in names:
                raise ValueError(f"phase {phase!r} trains a parameter that is no part of {type(task).__name__}")
            if id(parameter) in seen:
                raise ValueError(f"{names[id(parameter)]} is in two parameter groups ({seen[id(parameter)]}, {phase})")
            seen[id(parameter)] = phase
    missing = [name for key, name in names.items() if key not in seen]
    if missing:
        raise ValueError(f"{missing[0]} (and {len(missing) - 1} more) asks for a gradient but is in no parameter group")
