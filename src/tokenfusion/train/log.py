"""What a run says: metrics.jsonl, the progress bar, and the means between two lines of the log."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tokenfusion.errors import UserError
from tokenfusion.train.engine import Engine

NEVER = 2**53  # above every step, and exact as a float64


def warn(message: str) -> None:
    """A warning that the user should see, on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, appended and flushed. Figures that are not finite are null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines after ``step``, and a last one that was cut off: a run that goes on writes them anew."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            temporary.write_bytes(b"".join(line + b"\n" for line in lines if _step(line) <= step))
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): choose another --out") from None

    def write(self, step: int, split: str, seconds: float, values: Mapping[str, float]) -> None:
        """Append one line."""
        line = {"step": step, "split": split, "time": round(seconds, 3), **jsonable(values)}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): free space and start again") from None


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return NEVER


def jsonable(values: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as strict JSON holds them: null where a number is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


class Window:
    """Means of named scalars since the last line of the log, kept on the device: adding never waits for it.

    Sums are float64, so that a checkpoint's JSON holds them exactly and the log of a resumed run has no seam.
    """

    def __init__(self, engine: Engine, state: Mapping[str, tuple[float, int]] | None = None) -> None:
        self.engine = engine
        self.clear()
        for name, (total, count) in (state or {}).items():
            self._begin(name)
            self.sums[-1] += total
            self.counts[name] = count

    def clear(self) -> None:
        """Begin anew."""
        self.counts: dict[str, int] = {}
        self.sums = torch.zeros(0, dtype=torch.float64, device=self.engine.device)
        self.bad_since = self.sums.clone()  # per name, the first step whose value was not finite

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Count one step's scalars."""
        for name in values:
            if name not in self.counts:
                self._begin(name)
            self.counts[name] += 1
        nothing = self.sums.new_zeros(())
        row = torch.stack([values[name].detach().double() if name in values else nothing for name in self.counts])
        self.sums = self.sums + row
        self.bad_since = torch.where(torch.isfinite(row), self.bad_since, self.bad_since.clamp(max=step))

    def means(self) -> dict[str, float]:
        """Means over steps and processes; here the host waits for the device.

        Raises:
            UserError: where a loss was NaN or infinite; names the step and the terms.
        """
        if not self.counts:
            return {}
        self.sums = self.engine.mean(self.sums)
        bad_since = -self.engine.max(-self.bad_since)
        sums, steps = torch.stack([self.sums, bad_since]).tolist()
        first = min(steps)
        if first < NEVER:
            terms = ", ".join(name for name, step in zip(self.counts, steps, strict=True) if step == first)
            raise UserError(
                f"step {int(first)}: the loss is not finite ({terms}): lower train.lr, raise train.warmup_steps,"
                " set train.clip_norm or train.precision=32; earlier checkpoints are intact"
            )
        return {name: total / count for total, (name, count) in zip(sums, self.counts.items(), strict=True)}

    def state(self) -> dict[str, tuple[float, int]]:
        """What a checkpoint keeps; the same in all processes after :meth:`means`."""
        return {name: (total, self.counts[name]) for name, total in zip(self.counts, self.sums.tolist(), strict=True)}

    def _begin(self, name: str) -> None:
        self.counts[name] = 0
        self.sums = torch.cat([self.sums, self.sums.new_zeros(1)])
        self.bad_since = torch.cat([self.bad_since, self.bad_since.new_full((1,), NEVER)])


class Display:
    """Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing where ``mode`` is silent."""

    def __init__(self, steps: int, start: int, mode: str = "auto") -> None:
        self.steps, self.start, self.began = steps, start, time.monotonic()
        self.silent = mode == "silent"
        self.validation = ""
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if mode == "auto" and console.is_terminal and not console.is_dumb_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=console, transient=False)
            self.task = self.bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def losses(self, step: int, values: Mapping[str, float]) -> None:
        """Show the totals and the learning rate."""
        shown = [name for name in values if name == "lr" or (name.startswith("loss/") and name.endswith("/total"))]
        text = "  ".join(f"{name} {values[name]:.4g}" for name in shown)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"{text}  {self.validation}")
        elif not self.silent:
            remaining = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.steps - step)
            print(f"step {step}/{self.steps}  {text}  left {_clock(remaining)}", file=sys.stderr, flush=True)

    def figures(self, step: int, values: Mapping[str, float], first: Sequence[str]) -> None:
        """Show validation figures, those named in ``first`` at least."""
        chosen = [name for name in first if name in values] or list(values)[:3]
        self.validation = "  ".join(f"{name} {values[name]:.4g}" for name in chosen)
        if self.bar is None and not self.silent:
            print(f"step {step}/{self.steps}  validation  {self.validation}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
