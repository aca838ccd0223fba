"""metrics.jsonl and the means between two lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tokenfusion.errors import UserError
from tokenfusion.train import Engine
from tokenfusion.train.log import MetricsLog, Window


def test_lines_are_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, "train", 1.23456, {"loss/total": 0.5, "donor_below/stage1.0/rgb": math.nan})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 3, "split": "train", "time": 1.235, "loss/total": 0.5, "donor_below/stage1.0/rgb": None
    }  # fmt: skip


def test_keep_until_drops_later_and_broken_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.keep_until(0)
    assert log.path.read_bytes() == b""
    for step in (1, 2, 3, 4):
        log.write(step, "train", 0.0, {})
    whole = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(whole) + b'{"step": 2, "spl')
    log.keep_until(2)
    assert log.path.read_bytes() == b"".join(whole[:2])


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Not a directory\)"):
        MetricsLog(tmp_path / "file" / "run" / "metrics.jsonl").keep_until(0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
        MetricsLog(tmp_path / "metrics.jsonl").write(1, "val", 0.0, {})


def test_window_goes_on_from_its_state() -> None:
    engine = Engine(accelerator="cpu")
    values = [torch.rand(3) for _ in range(7)]
    whole, part = Window(engine), Window(engine)
    for step, value in enumerate(values):
        if step == 4:
            part.means()
            part = Window(engine, json.loads(json.dumps(part.state())))
        for window in (whole, part):
            window.add(step, {"a": value[0], "b": value[1], **({"late": value[2]} if step > 2 else {})})
    assert part.means() == whole.means()
    assert whole.means()["late"] == pytest.approx(float(torch.stack(values[3:])[:, 2].mean()))


def test_window_names_the_first_bad_step_and_its_terms() -> None:
    window = Window(Engine(accelerator="cpu"))
    for step, (a, b) in enumerate([(1.0, 1.0), (1.0, math.inf), (math.nan, math.inf)], 1):
        window.add(step, {"a": torch.tensor(a), "b": torch.tensor(b)})
    with pytest.raises(UserError, match=r"step 2: the loss is not finite \(b\)"):
        window.means()
