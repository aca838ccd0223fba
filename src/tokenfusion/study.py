"""Comparisons of fusers at the same budget, as resumable sets of runs."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tokenfusion.api import recipe_of
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.report import write_comparison, write_report


class Method(NamedTuple):
    """One row of the table: overrides of the shared recipe."""

    title: str
    overrides: tuple[str, ...]


def methods(recipe: str, overrides: Sequence[str], seeds: int, out: Path, jobs: int = 1) -> str:
    """Every modality alone, late ensemble, concat and TokenFusion, with the same data, steps and seeds.

    Args:
        recipe, overrides: what all runs share.
        seeds: runs per method, seeds 0, 1, ...
        out: every run becomes a folder in it; runs that are done are skipped, half-done ones go on.
        jobs: runs at a time; they share the processor's cores.

    Returns:
        the table in markdown; it is also written to ``out/table.md``, and a page to ``out/compare.html``.

    Raises:
        UserError: where a run fails; its log is named. The others are finished first.
    """
    for override in overrides:
        if override.partition("=")[0] in ("fuser", "seed"):
            raise UserError(f"{override}: is what this study varies; leave it out")
    names = read_recipe(recipe, overrides).data.modalities
    if len(names) < 2:
        raise UserError(f"data.modalities: has {names[0]} alone; a study of fusion wants two at least")
    rows = [Method(f"{name} only", (f"data.modalities=[{name}]", "fuser=none")) for name in names]
    rows += [Method("late ensemble", ("fuser=none",)), Method("concat", ("fuser=concat",)), Method("TokenFusion", ())]
    runs = {
        (row.title, seed): out / f"{row.title.lower().replace(' ', '-')}-seed{seed}"
        for seed in range(seeds)
        for row in rows
    }
    arguments = {
        runs[row.title, seed]: [recipe, *overrides, *row.overrides, f"seed={seed}"]
        for seed in range(seeds)
        for row in reversed(rows)  # the long ones first: no core waits for them at the end
    }
    _run_all(arguments, jobs)
    results = {row.title: [runs[row.title, seed] for seed in range(seeds)] for row in rows}
    table = _table(recipe, overrides, rows, results, list(names))
    (out / "table.md").write_text(table, encoding="utf-8")
    return table + _pages(list(runs.values()), runs["TokenFusion", 0], out)


def _run_all(arguments: dict[Path, list[str]], jobs: int) -> None:
    """Train what is not done yet, ``jobs`` at a time, each in a process of its own."""
    waiting = {run: words for run, words in arguments.items() if not _is_done(run, words)}
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}

    def train(run: Path) -> int:
        run.mkdir(parents=True, exist_ok=True)
        words = ["train", *waiting[run], "--out", str(run)]
        print(f"started:  tokenfusion {shlex.join(words)}", flush=True)
        began = time.monotonic()
        with (run / "train.log").open("ab") as log:
            command = [sys.executable, "-m", "tokenfusion.cli", *words]
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        outcome = "failed" if code else f"ensemble mIoU {_figures(run)['streams']['ensemble']['miou']:.1f}"
        print(f"finished: {run.name} after {time.monotonic() - began:.0f} s, {outcome}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        codes = dict(zip(waiting, pool.map(train, waiting), strict=True))
    failed = [run for run, code in codes.items() if code]
    if failed:
        last = (failed[0] / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{failed[0] / 'train.log'}: this run failed ({' '.join(last)}); mend it and call again")


def _is_done(run: Path, words: list[str]) -> bool:
    """Whether a run has ended, and with this very recipe; another one is left to ``train`` to refuse."""
    try:
        found, recipe = _figures(run), read_recipe(words[0], words[1:])
        judged = (found["split"], found["checkpoint"], found["step"], found["protocol"])
    except (OSError, ValueError, KeyError):
        return False
    wanted = (recipe.data.val, "last", recipe.train.steps, str(recipe.evaluation))
    return judged == wanted and recipe_of(run).model_dump(mode="json") == recipe.model_dump(mode="json")


def _figures(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text(encoding="utf-8")))


def _pages(runs: list[Path], fused: Path, out: Path) -> str:
    """HTML pages, where the extra for them is installed."""
    try:
        return f"\npages: {write_comparison(runs, out / 'compare.html')} and {write_report(fused)}"
    except UserError as error:
        return f"\nno pages: {error}"


def _table(
    recipe: str, overrides: Sequence[str], rows: list[Method], results: dict[str, list[Path]], names: list[str]
) -> str:
    """mIoU in percent, mean and standard deviation over the seeds."""
    columns = [*names, "ensemble"]
    first = results[rows[0].title][0]
    metrics = _figures(first)
    seeds = len(results[rows[0].title])
    lines = [
        f"mIoU on {metrics['dataset']} {metrics['split']} ({metrics['images']} images), {metrics['step']} steps, "
        f"{seeds} seed{'s: mean ± standard deviation' if seeds > 1 else ''}; {metrics['protocol']}",
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        found = [_figures(run)["streams"] for run in results[row.title]]
        cells = []
        for column in columns:
            values = [streams[column]["miou"] for streams in found if column in streams]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    command = ["tokenfusion", "study", "methods", "--recipe", recipe, *overrides, "--seeds", str(seeds)]
    return "\n".join([*lines, "", f"`{shlex.join(command)}`", ""])


STUDIES: dict[str, Callable[[str, Sequence[str], int, Path, int], str]] = {"methods": methods}
