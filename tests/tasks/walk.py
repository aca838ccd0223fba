"""What the tests that walk the whole chain share: the command line, runs that are killed, and what a run left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from tokenfusion.cli import main
from tokenfusion.train.checkpoint import Checkpoint, Checkpoints

PATIENCE = 300.0  # seconds; a machine may be busy
LAUNCHER_WORDS = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")


def command(*arguments: object, code: int = 0, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """Run the command line in this process; returns what went to standard error."""
    old, sys.argv = sys.argv, ["tokenfusion", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = old
    captured = capsys.readouterr() if capsys else None
    assert (ended.value.code or 0) == code, captured
    return captured.err if captured else ""


def plain_image(path: Path, shape: tuple[int, ...], dtype: type = np.uint8, value: int = 100) -> Path:
    """A file of one colour."""
    Image.fromarray(np.full(shape, value, dtype)).save(path)
    return path


def start(recipe: str, arguments: list[str], out: Path) -> subprocess.Popen[str]:
    """``tokenfusion train`` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_WORDS}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "tokenfusion.cli", "train", recipe, *arguments, "--out", str(out)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen[str], run: Path, step: int, end: int) -> None:
    """kill -9 when the checkpoint of a step is there, which must be before the run's end."""
    checkpoint, deadline = run / "checkpoints" / f"step-{step:08d}", time.monotonic() + PATIENCE
    while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert any((run / "checkpoints").glob("step-*")), errors
    assert step <= newest(run).state["step"] < end, f"it was to die in the middle\n{errors}"


def newest(run: Path) -> Checkpoint:
    found = Checkpoints(run).newest()
    assert found is not None
    return found


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for name, x in tensors.items()}


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    """The log of one split, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "split")} for line in found if line["split"] == split]


def check_same_bits(one: Path, other: Path) -> None:
    """Two runs ended alike: weights, optimisers, logs, figures."""
    first, second = newest(one), newest(other)
    assert digests(first.model) == digests(second.model)
    assert digests(first.optimizer) == digests(second.optimizer)
    for split in ("train", "val"):
        assert lines(one, split) == lines(other, split)
    assert (one / "metrics.json").read_text() == (other / "metrics.json").read_text()


def check_cut_checkpoints(run: Path, argument: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged newest checkpoint is a warning; all of them damaged is one line. ``run`` ends with steps 2 and 4."""
    last, before = (run / "checkpoints" / f"step-0000000{n}" / "model.safetensors" for n in (4, 2))
    last.write_bytes(last.read_bytes()[:1000])
    assert str(last) in command("eval", run, capsys=capsys), "a warning; the one before serves"
    before.write_bytes(b"")
    message = command("predict", run, argument, "--out", out, code=2, capsys=capsys)
    assert "all 2 checkpoints are damaged" in message.splitlines()[-1]
    assert "Traceback" not in message
