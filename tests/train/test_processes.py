"""Runs in processes of their own: killed at random moments, or several of them at one run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from train.toy import TASKS, Samples, settings

from tokenfusion.train import fit, load_model
from tokenfusion.train.checkpoint import Checkpoints, read

TOY = Path(__file__).with_name("toy.py")
LAUNCHER_WORDS = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")
LINE = re.compile(r"step (\d+)/")
PATIENCE = 300.0  # seconds; a machine may be busy
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(run: Path, what: dict[str, Any], *launcher: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_WORDS}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(TOY), str(run), json.dumps(what)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def here(run: Path, what: dict[str, Any]) -> None:
    """The same in this process."""
    dtype = torch.float64 if what.get("double") else torch.float32
    task = TASKS[what["task"]](**what.get("arguments", {})).to(dtype)
    fit(task, Samples(what.get("size", 20), dtype=dtype), run, settings(**what["settings"]), progress="silent")


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    return errors


def wait_for(process: subprocess.Popen[str], step: int) -> None:
    """Read its progress lines until ``step`` is passed."""
    assert process.stderr is not None
    guard = threading.Timer(PATIENCE, process.kill)
    guard.start()
    reached = next((line for line in process.stderr if (m := LINE.match(line)) and int(m[1]) >= step), None)
    guard.cancel()
    assert reached is not None, "it ended before its step"


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "kills"),
    [("regression", 2), pytest.param("regression", 8, marks=SLOW), pytest.param("adversaries", 8, marks=SLOW)],
)
def test_killed_again_and_again_ends_at_the_same_bits(tmp_path: Path, task: str, kills: int) -> None:
    train = {"steps": 80 * kills, "log_every": 5, "eval_every": 20, "checkpoint_every": 7, "warmup_steps": 20}
    what = {"task": task, "settings": train}
    here(tmp_path / "whole", what)
    draw = random.Random(task)
    for kill in range(kills):
        goal = draw.randrange(80 * kill + 10, 80 * kill + 60)
        process = start(tmp_path / "cut", what)
        wait_for(process, goal)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert goal <= step_of(tmp_path / "cut") < 80 * kills
    finish(start(tmp_path / "cut", what))
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        read(folder)  # whole, and nothing unfinished is left


@pytest.mark.parametrize(
    ("task", "launcher"),
    [
        ("regression", "fabric"),
        pytest.param("adversaries", "fabric", marks=SLOW),
        pytest.param("regression", "torchrun", marks=SLOW),
    ],
)
def test_two_processes_equal_one(tmp_path: Path, task: str, launcher: str) -> None:
    train = {"steps": 12, "batch_size": 2, "clip_norm": 0.5, "log_every": 4, "eval_every": 6}
    arguments = {"dropout": 0.0, **({"norm": False} if task == "regression" else {})}
    what = {"task": task, "double": True, "size": 7, "arguments": arguments, "settings": train}
    here(tmp_path / "one", what)
    several = {**what, "settings": {**train, "devices": "auto" if launcher == "torchrun" else 2}}
    finish(start(tmp_path / "two", several, *(TORCHRUN if launcher == "torchrun" else ())))
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-12
    assert load_model(tmp_path / "two")[1]["devices"] == 2
    for left, right in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, abs=1e-12)


@SLOW
def test_two_processes_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Batch norm and dropout differ per process; the run does not depend on where it was cut."""
    train = {"steps": 10, "devices": 2, "log_every": 3, "eval_every": 4, "checkpoint_every": 5}
    what = {"task": "regression", "settings": train}
    finish(start(tmp_path / "whole", what))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000010" / "state.json").unlink()
    assert "going on from the one before" in finish(start(tmp_path / "cut", what))
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@SLOW
def test_a_failure_of_the_first_process_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    process = start(tmp_path, {"task": "regression", "settings": {"devices": 2}})
    errors = process.communicate(timeout=PATIENCE)[1]  # returns once all that hold the pipe have ended
    assert process.returncode == 1
    assert "the checkpoint cannot be written" in errors
