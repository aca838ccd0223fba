"""Runs in processes of their own: killed at random moments, or several of them at one run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenfusion.train.checkpoint import Checkpoints, read

TOY = Path(__file__).with_name("toy.py")
LAUNCHER_WORDS = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")
PATIENCE = 120.0


def start(run: Path, what: dict[str, Any], *launcher: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_WORDS}
    import tokenfusion

    source = str(Path(tokenfusion.__file__).parents[1])
    environment |= {"PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(TOY), str(run), json.dumps(what)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    return errors


def step_of(run: Path) -> int:
    """The last step in the log; 0 before there is one."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def last(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(run).newest()
    assert found is not None
    return {**found.model, **found.optimizer}


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize("task", ["regression", "adversaries"])
def test_killed_again_and_again_ends_at_the_same_bits(tmp_path: Path, task: str) -> None:
    steps = 400
    train = {"steps": steps, "log_every": 5, "eval_every": 20, "checkpoint_every": 7, "warmup_steps": 20}
    what = {"task": task, "settings": train}
    finish(start(tmp_path / "whole", what))
    draw = random.Random(task)
    for kill in range(3):
        goal = draw.randrange(kill * 100 + 20, kill * 100 + 90)
        process = start(tmp_path / "cut", what)
        deadline = time.monotonic() + PATIENCE
        while step_of(tmp_path / "cut") < goal and process.poll() is None:
            assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert goal <= step_of(tmp_path / "cut") < steps
    finish(start(tmp_path / "cut", what))
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        read(folder)  # whole, and nothing unfinished is left


@pytest.mark.parametrize("task", ["regression", "adversaries"])
@pytest.mark.parametrize("launcher", ["fabric", "torchrun"])
def test_two_processes_equal_one(tmp_path: Path, task: str, launcher: str) -> None:
    if launcher == "torchrun" and task == "adversaries":
        pytest.skip("the other launcher shows it")
    train = {"steps": 12, "batch_size": 2, "clip_norm": 0.5, "log_every": 4, "eval_every": 6}
    arguments = {"dropout": 0.0, **({"norm": False} if task == "regression" else {})}
    what = {"task": task, "double": True, "size": 7, "arguments": arguments, "settings": train}
    finish(start(tmp_path / "one", what))
    several = {**what, "settings": {**train, "devices": "auto" if launcher == "torchrun" else 2}}
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2") if launcher == "torchrun" else ()
    finish(start(tmp_path / "two", several, *words))
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-12
    for left, right in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, abs=1e-12)


def test_two_processes_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Batch norm and dropout differ per process; the run does not depend on where it was cut."""
    train = {"steps": 10, "devices": 2, "log_every": 3, "eval_every": 4, "checkpoint_every": 5}
    finish(start(tmp_path / "whole", {"task": "regression", "settings": train}))
    finish(start(tmp_path / "cut", {"task": "regression", "settings": train}))
    for path in (tmp_path / "cut" / "checkpoints").glob("step-00000010/*"):
        path.unlink()
    printed = finish(start(tmp_path / "cut", {"task": "regression", "settings": train}))
    assert "going on from the one before" in printed
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_torchrun_with_another_number_of_devices(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(tmp_path, {"task": "regression", "settings": {"devices": 1}}, *launcher)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode != 0
    assert "torchrun started 2 processes, but train.devices is 1" in errors
    assert not (tmp_path / "metrics.jsonl").exists()
