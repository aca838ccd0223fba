"""Small tasks for the tests of the loop. As a script: trains one of them in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.train import Engine, ParameterGroup, Task, fit, train_settings


class Samples:
    """Noisy regression samples; an item is a function of (seed, epoch, index)."""

    def __init__(self, size: int = 20, seed: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.seed, self.dtype, self.epoch = size, seed, dtype, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        x = torch.randn(4, generator=generator, dtype=self.dtype)
        noise = torch.Generator().manual_seed(100_000 * (self.epoch + 1) + index)
        return {"x": x + 0.1 * torch.randn(4, generator=noise, dtype=self.dtype), "y": x.sum(0, keepdim=True)}


class Regression(Task):
    """One phase, with dropout, a buffer, two tensors that share memory and a part that some batches leave unused."""

    monitor = "val/error"
    higher_is_better = False

    def __init__(self, dropout: float = 0.3, norm: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = [nn.BatchNorm1d(8)] if norm else []
            self.model = nn.Sequential(nn.Linear(4, 8), *hidden, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
            self.extra = nn.Linear(1, 1)
        self.twin = nn.Module()
        self.twin.weight = self.model[0].weight
        self.to(dtype)
        self.watched = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        y = self.model(batch["x"])
        chosen = batch["x"][:, :1] > 0.5
        return y + chosen * self.extra(y) if bool(chosen.any()) else y

    def losses(self, batch: dict[str, Tensor], outputs: Tensor, phase: str) -> dict[str, Tensor]:
        return {"square": F.mse_loss(outputs, batch["y"]), "size": 0.01 * outputs.square().mean()}

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        return [
            ParameterGroup("model", self.model.parameters(), 1.0, True),
            ParameterGroup("extra", self.extra.parameters(), 10.0, False),
        ]

    def watch(self, outputs: Tensor) -> dict[str, Tensor]:
        self.watched += 1
        return {"exchange/stage1.0/rgb": outputs.mean()}

    def evaluate(self, engine: Engine) -> dict[str, float]:
        assert not self.training
        assert not torch.is_grad_enabled()
        x = torch.linspace(-1, 1, 12, device=engine.device, dtype=self.model[0].weight.dtype).view(3, 4)
        return {"val/error": (self.model(x) - x.sum(1, keepdim=True)).square().mean().item()}


class Adversaries(Task):
    """Two phases: a discriminator and a generator; one forward per step."""

    phases = ("discriminator", "generator")

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
            self.discriminator = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.forwards = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.forwards += 1
        return self.generator(batch["x"])

    def losses(self, batch: dict[str, Tensor], outputs: Tensor, phase: str) -> dict[str, Tensor]:
        if phase == "discriminator":
            real, fake = self.discriminator(batch["y"]), self.discriminator(outputs.detach())
            return {"real": F.softplus(-real).mean(), "fake": F.softplus(fake).mean()}
        return {"gan": F.softplus(-self.discriminator(outputs)).mean(), "l1": F.l1_loss(outputs, batch["y"])}

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        return [ParameterGroup(phase, getattr(self, phase).parameters())]


TASKS = {"regression": Regression, "adversaries": Adversaries}


def settings(**changes: Any) -> Any:
    """Settings of a short run on the CPU."""
    common = {"steps": 12, "batch_size": 4, "lr": 0.01, "accelerator": "cpu", "log_every": 3, "eval_every": 4}
    return train_settings({**common, "checkpoint_every": 5, **changes})


def main(run_dir: str, what: str) -> None:
    """Train in this process: ``what`` is JSON with task, its arguments, the data's arguments and the settings."""
    torch.set_num_threads(1)
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # Fabric would spend seconds to learn its version
    content = json.loads(what)
    dtype = torch.float64 if content.get("double") else torch.float32
    task = TASKS[content["task"]](**content.get("arguments", {}))
    fit(task.to(dtype), Samples(content.get("size", 20), dtype=dtype), Path(run_dir), settings(**content["settings"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
