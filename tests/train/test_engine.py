"""One process of the engine: precision, clipping, what the machine must have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from train.toy import Regression, Samples, settings

from tokenfusion.errors import UserError
from tokenfusion.train import Engine, fit, load_model


@pytest.mark.parametrize("precision", ["32", "bf16", "fp16"])
def test_step_clips_the_true_gradient(precision: str) -> None:
    engine = Engine(precision=precision, accelerator="cpu")
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for clip, expected in ((None, 6.0), (0.5, 0.5), (100.0, 6.0)):
        before = weight.detach().clone()
        engine.backward((weight * 3).sum())  # the gradient's norm is 6
        engine.step(optimizer, [weight], clip)
        assert float((weight.detach() - before).norm()) == pytest.approx(expected, rel=1e-5)
        assert weight.grad is None


def test_autocast_and_alone() -> None:
    engine = Engine(precision="bf16", accelerator="cpu")
    with engine.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with Engine(accelerator="cpu").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert (engine.rank, engine.world, engine.is_first, engine.device.type) == (0, 1, True, "cpu")
    counts = torch.arange(3)
    assert engine.sum(counts) is counts
    assert engine.from_first("it") == "it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["32", "bf16", "fp16"])
def test_gpu_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    train = settings(accelerator="cuda", precision=precision, workers=1)
    fit(Regression(), Samples(), tmp_path, train, progress="silent")
    result = fit(Regression(), Samples(), tmp_path, settings(**{**train.model_dump(), "steps": 20}), progress="silent")
    assert result.steps == 20
    assert load_model(tmp_path)[0]["model.0.weight"].device.type == "cpu"


def test_torchrun_with_another_number_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torchrun started 2 processes, but train.devices is 1"):
        Engine(devices=1, accelerator="cpu")


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"train.devices is 2, but PyTorch sees 1 GPU\(s\)"):
        Engine(devices=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"train.accelerator is cuda, but PyTorch sees no GPU"):
        Engine(accelerator="cuda")
