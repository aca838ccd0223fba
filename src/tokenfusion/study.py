"""Comparisons of fusers at the same budget, as resumable sets of runs."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenfusion import api
from tokenfusion.recipe import read_recipe


class Method(NamedTuple):
    """One row of the table: overrides of the shared recipe."""

    title: str
    overrides: tuple[str, ...]


def methods(recipe: str, overrides: Sequence[str], seeds: int, out: Path) -> str:
    """Every modality alone, late ensemble, concat and TokenFusion, with the same data, steps and seeds.

    Args:
        recipe, overrides: what all runs share.
        seeds: runs per method, seeds 0, 1, ...
        out: every run becomes a folder in it; runs that are done are skipped, half-done ones go on.

    Returns:
        the table in markdown; it is also written to ``out/table.md``, and the page to ``out/compare.html``.
    """
    names = read_recipe(recipe, overrides).data.modalities
    rows = [Method(f"{name} only", (f"data.modalities=[{name}]", "fuser=none")) for name in names]
    rows += [Method("late ensemble", ("fuser=none",)), Method("concat", ("fuser=concat",)), Method("TokenFusion", ())]
    results: dict[str, list[Path]] = {}
    for seed in range(seeds):
        for row in rows:
            run = out / f"{row.title.lower().replace(' ', '-')}-seed{seed}"
            if not (run / "metrics.json").is_file():
                print(f"\n{row.title}, seed {seed}: {_command(recipe, overrides, row, seed, run)}", flush=True)
                api.train(read_recipe(recipe, [*overrides, *row.overrides, f"seed={seed}"]), run)
            results.setdefault(row.title, []).append(run)
    table = _table(recipe, overrides, rows, results, list(names))
    (out / "table.md").write_text(table, encoding="utf-8")
    runs = [run for row in results.values() for run in row]
    return table + _pages(runs, results["TokenFusion"][0], out)


def _pages(runs: list[Path], fused: Path, out: Path) -> str:
    """HTML pages, where the extra for them is installed."""
    from tokenfusion.errors import UserError
    from tokenfusion.report import write_comparison, write_report

    try:
        return f"\npages: {write_comparison(runs, out / 'compare.html')} and {write_report(fused)}"
    except UserError as error:
        return f"\nno pages: {error}"


def _command(recipe: str, overrides: Sequence[str], row: Method, seed: int, run: Path) -> str:
    parts = ["tokenfusion", "train", recipe, *overrides, *row.overrides, f"seed={seed}", "--out", str(run)]
    return shlex.join(parts)


def _table(
    recipe: str, overrides: Sequence[str], rows: list[Method], results: dict[str, list[Path]], names: list[str]
) -> str:
    """mIoU in percent, mean and standard deviation over the seeds."""
    columns = [*names, "ensemble"]
    first = results[rows[0].title][0]
    metrics = json.loads((first / "metrics.json").read_text())
    seeds = len(results[rows[0].title])
    lines = [
        f"mIoU on {metrics['dataset']} {metrics['split']} ({metrics['images']} images), {metrics['step']} steps, "
        f"{seeds} seed{'s: mean ± standard deviation' if seeds > 1 else ''}; {metrics['protocol']}",
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        found = [json.loads((run / "metrics.json").read_text())["streams"] for run in results[row.title]]
        cells = []
        for column in columns:
            values = [streams[column]["miou"] for streams in found if column in streams]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    command = ["tokenfusion", "study", "methods", "--recipe", recipe, *overrides, "--seeds", str(seeds)]
    return "\n".join([*lines, "", f"`{shlex.join(command)}`", ""])


STUDIES: dict[str, Callable[[str, Sequence[str], int, Path], str]] = {"methods": methods}
