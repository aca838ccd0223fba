"""Settings: mistakes end in one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest
from train.toy import settings

from tokenfusion.errors import UserError
from tokenfusion.train import TrainSettings, train_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, r"train: unknown key 'batchsize'; did you mean 'batch_size'\?"),
        ({"steps": "many"}, r"train.steps: .* integer, got 'many'"),
        ({"steps": 0}, r"train.steps: .* greater than 0, got 0"),
        ({"precision": "64"}, r"train.precision: .*'32', 'bf16' or 'fp16', got '64'"),
        ({"devices": 0}, r"train.devices: wanted a number of devices, or auto, got 0"),
        ({"lr": None}, "neither lr nor restarts is given"),
        ({"restarts": [0.1]}, "both lr and restarts are given"),
        ({"lr": None, "restarts": []}, r"train.restarts: wanted a list of learning rates, or of {steps, lr}, got \[\]"),
        ({"lr": None, "restarts": ["a"]}, r"train.restarts: wanted a list of learning rates"),
        ({"lr": None, "restarts": [0.1, {"steps": 3, "lr": 0.1}]}, r"train.restarts: wanted a list of learning rates"),
        ({"lr": None, "restarts": [{"steps": 3, "rate": 0.1}]}, r"train.restarts: wanted a list of learning rates"),
        ({"lr": None, "restarts": [{"steps": 3, "lr": 0.1}]}, "the stages in restarts sum to 3 steps, but steps is 12"),
        ({"lr": None, "restarts": [0.1] * 13}, "more stages than there are steps"),
        ({"betas": [0.9]}, r"train.betas: wanted two numbers, for example \[0.9, 0.999\], got \[0.9\]"),
        ({"schedule": "step"}, "step and milestones belong together"),
        ({"milestones": [3]}, "step and milestones belong together"),
        ({"devices": "al"}, r"train.devices: wanted a number of devices, or auto, got 'al'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        settings(**changes)
    assert "\n" not in str(raised.value)


def test_missing_key() -> None:
    with pytest.raises(UserError, match="section: key 'batch_size' is missing"):
        train_settings({"steps": 3, "lr": 0.1}, "section")


def test_what_yaml_and_the_command_line_bring() -> None:
    train = settings(betas=[0.5, 0.999], precision=32, devices="auto", lr=1)
    assert (train.betas, train.precision, train.lr) == ((0.5, 0.999), "32", 1.0)
    again = TrainSettings.model_validate(settings(lr=None, restarts=[0.2, 0.1]).model_dump(mode="json"))
    assert again.restarts == [0.2, 0.1]
