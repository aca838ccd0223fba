"""What fusing costs beside the same streams unfused, as benchmarks/fuse.py measures it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuse as benchmark


@pytest.fixture(scope="module", params=["vit_small_patch16_224", benchmark.PAIR], ids=["one network", "two networks"])
def models(request: pytest.FixtureRequest) -> dict:
    return benchmark.contestants(request.param)


@pytest.fixture(scope="module")
def images() -> dict:
    return {name: torch.randn(2, 3, 224, 224) for name in benchmark.MODALITIES}


def test_training_memory_is_within_the_goal(models: dict, images: dict) -> None:
    held = {name: benchmark.training_bytes(model, images) for name, model in models.items()}
    for name in models:
        assert held[name] / held["unfused"] <= benchmark.GOAL, name


@pytest.mark.slow
@pytest.mark.parametrize("run", [benchmark.forward, benchmark.step])
def test_time_is_within_the_goal(models: dict, images: dict, run) -> None:
    """Processor time of the median of nine rounds, which other programs on the machine hardly move."""
    seconds = benchmark.race(run, models, images, 9)
    for name in models:
        assert benchmark.ratio(seconds, name) <= benchmark.GOAL, name
