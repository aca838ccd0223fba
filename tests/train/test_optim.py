"""Learning rates as functions of the step, and optimisers by role."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train.toy import Adversaries, Regression, settings

from tokenfusion.errors import UserError
from tokenfusion.train.optim import Optimizers, learning_rate, stages

RELEASED = {"lr": None, "restarts": [6e-5, 3e-5, 1.5e-5], "schedule_steps": 40000, "warmup_steps": 1500}


def test_one_continuous_schedule() -> None:
    train = settings(steps=100, lr=1.0, warmup_steps=10, warmup_ratio=0.1)
    assert learning_rate(train, 0) == pytest.approx(0.1)
    assert learning_rate(train, 5) == pytest.approx(0.55 * 0.95)
    assert learning_rate(train, 10) == pytest.approx(0.9)
    assert learning_rate(train, 75) == pytest.approx(0.25)
    assert learning_rate(settings(steps=100, lr=1.0, power=0.9), 75) == pytest.approx(0.25**0.9)
    assert learning_rate(settings(steps=100, lr=1.0, schedule="constant"), 99) == 1.0


def test_steps_to_a_tenth() -> None:
    train = settings(steps=100, lr=2.0, schedule="step", milestones=[60, 80], warmup_steps=2, warmup_ratio=0.0)
    found = [learning_rate(train, step) for step in (0, 1, 2, 59, 60, 79, 80, 99)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 0.2, 0.2, 0.02, 0.02])


def test_released_restarts() -> None:
    train = settings(steps=39600, **RELEASED)
    assert [(s.start, s.steps) for s in stages(train)] == [(0, 13200), (13200, 13200), (26400, 13200)]
    assert learning_rate(train, 13199) == pytest.approx(6e-5 * (1 - 13199 / 40000))  # falls to 0.67 only
    assert learning_rate(train, 13200) == pytest.approx(3e-5 * 1e-6)  # then a new warm-up
    assert learning_rate(train, 26400 + 4000) == pytest.approx(1.5e-5 * 0.9)


def test_stages_of_given_lengths() -> None:
    train = settings(steps=30, lr=None, restarts=[{"steps": 10, "lr": 1.0}, {"steps": 20, "lr": 0.5}])
    assert learning_rate(train, 9) == pytest.approx(0.1)
    assert learning_rate(train, 20) == pytest.approx(0.25)


def test_uneven_thirds_cover_every_step() -> None:
    found = stages(settings(steps=11, lr=None, restarts=[3.0, 2.0, 1.0]))
    assert [(s.start, s.steps) for s in found] == [(0, 3), (3, 4), (7, 4)]


def test_a_new_stage_forgets_the_moments() -> None:
    task = Adversaries()
    optimizers = Optimizers(task, settings(steps=4, lr=None, restarts=[1.0, 0.5]))
    for step in range(4):
        optimizers.begin(step)
        for optimizer in optimizers.optimizers.values():
            for parameter in task.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        counts = {float(value) for key, value in optimizers.tensors().items() if key.endswith("/step")}
        assert counts == {step % 2 + 1.0}


def test_groups_by_role() -> None:
    optimizers = Optimizers(Regression(), settings(steps=10, weight_decay=0.2))
    assert optimizers.begin(5) == pytest.approx(0.005)
    groups = optimizers.optimizers["model"].param_groups
    assert [(g["role"], g["weight_decay"]) for g in groups] == [("model", 0.2), ("extra", 0.0)]
    assert [g["lr"] for g in groups] == pytest.approx([0.005, 0.05])
    assert type(optimizers.optimizers["model"]) is torch.optim.AdamW
    assert type(Optimizers(Regression(), settings(optimizer="adam")).optimizers["model"]) is torch.optim.Adam


def test_state_goes_by_parameter_names() -> None:
    task = Regression()
    optimizers = Optimizers(task, settings())
    for parameter in task.model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizers.begin(0)
    optimizers.optimizers["model"].step()
    tensors = optimizers.tensors()
    assert "model/model.0.weight/exp_avg" in tensors
    assert not any("extra" in name for name in tensors)  # had no gradient yet

    class Reordered(Regression):
        def parameter_groups(self, phase: str) -> list:
            return super().parameter_groups(phase)[::-1]

    other = Optimizers(Reordered(), settings())
    other.load_tensors(tensors, "here")
    assert other.tensors().keys() == tensors.keys()
    assert all(torch.equal(other.tensors()[name], value) for name, value in tensors.items())
    with pytest.raises(UserError, match=r"here: it optimises 'model.0.bias'"):
        Optimizers(Adversaries(), settings()).load_tensors(tensors, "here")


def test_empty_phase() -> None:
    class Empty(Adversaries):
        def parameter_groups(self, phase: str) -> list:
            return []

    with pytest.raises(ValueError, match="no parameter to train"):
        Optimizers(Empty(), settings())


def test_parameter_of_another_module() -> None:
    class Stray(Adversaries):
        def parameter_groups(self, phase: str) -> list:
            groups = super().parameter_groups(phase)
            return [groups[0]._replace(params=[*groups[0].params, nn.Parameter(torch.ones(1))])]

    with pytest.raises(ValueError, match="no part of Stray"):
        Optimizers(Stray(), settings())
