"""Comparisons at the same budget, as resumable sets of runs: of fusers, and of one, two, ... modalities."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tokenfusion.api import Recipe, recipe_of
from tokenfusion.errors import UserError
from tokenfusion.recipe import fusers, read_recipe
from tokenfusion.report import metric, write_comparison, write_report
from tokenfusion.report.rows import ENSEMBLE, rows_of

DETECTION = "detection3d"  # its streams do not work alone: points find boxes, and images help them


class Shared(NamedTuple):
    """What all runs of a study share: a recipe and overrides of it, the number of seeds, the folder of the runs."""

    study: str
    recipe: str
    overrides: Sequence[str]
    seeds: int
    out: Path


class Cell(NamedTuple):
    """A place of the table: a figure of one stream (or head) of the runs of one variant."""

    variant: str
    stream: str
    figure: str = ""  # the one that ranks


Variants = dict[str, tuple[str, ...]]  # title -> overrides of the shared recipe
Rows = Mapping[str, Mapping[str, Cell]]  # title of a row -> title of a column -> what stands there
Runs = Mapping[str, list[Path]]  # title of a variant -> its run folders, one per seed


def methods(recipe: str, overrides: Sequence[str], seeds: int, out: Path, jobs: int = 1) -> str:
    """Every modality alone, late ensemble, concat and TokenFusion, with the same data, steps and seeds.

    3D detection: points alone, both networks without exchange, concat, random exchange and TokenFusion.

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
    shared = Shared("methods", recipe, overrides, seeds, out)
    common = _shared_recipe(shared, ("fuser", "seed"))
    if common.task == DETECTION:
        return _carry_out(shared, "method", DETECTORS, _detection_rows(common), jobs)
    names = common.data.modalities
    variants = _alone(names) | {"late ensemble": ("fuser=none",), "concat": ("fuser=concat",), "TokenFusion": ()}
    streams = (*names, ENSEMBLE)
    rows = {title: {stream: Cell(title, stream) for stream in streams} for title in variants}
    return _carry_out(shared, "method", variants, rows, jobs)


def modalities(recipe: str, overrides: Sequence[str], seeds: int, out: Path, jobs: int = 1) -> str:
    """Every modality alone, then the first two, three, ... together: the recipe's fuser beside late ensembles (Table 7).

    Arguments, result and errors are those of :func:`methods`; the sets follow the order of ``data.modalities``.
    """
    shared = Shared("modalities", recipe, overrides, seeds, out)
    common = _shared_recipe(shared, ("seed",))
    if common.task == DETECTION:
        raise UserError(
            f"{recipe}: images alone find no 3D boxes, so there is nothing to line up; study methods instead"
        )
    names = common.data.modalities
    if common.fuser == fusers(common.task)["none"]:
        raise UserError(
            f"{recipe}: fuser is none, which this study sets beside the recipe's; choose another, fuser=..."
        )
    fuser = str(common.fuser["_target_"]).rpartition(".")[2]
    variants: dict[str, tuple[str, ...]] = dict(_alone(names))
    rows = {name: {"alone": Cell(f"{name} only", ENSEMBLE)} for name in names}
    for count in range(2, len(names) + 1):
        chosen, title = f"data.modalities=[{', '.join(names[:count])}]", " + ".join(names[:count])
        variants |= {f"{title} late ensemble": (chosen, "fuser=none"), title: (chosen,)}
        rows[title] = {"late ensemble": Cell(f"{title} late ensemble", ENSEMBLE), fuser: Cell(title, ENSEMBLE)}
    return _carry_out(shared, "inputs", variants, rows, jobs)


def _shared_recipe(shared: Shared, varied: tuple[str, ...]) -> Recipe:
    """The recipe that all runs share; refuses overrides of what the study varies, and a modality alone."""
    for override in shared.overrides:
        if override.partition("=")[0] in varied:
            raise UserError(f"{override}: is what this study varies; leave it out")
    recipe = read_recipe(shared.recipe, shared.overrides)
    names = recipe.data.modalities
    if len(names) < 2:
        raise UserError(f"data.modalities: has {names[0]} alone; a study of fusion wants two at least")
    return recipe


def _alone(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {f"{name} only": (f"data.modalities=[{name}]", "fuser=none") for name in names}


DETECTORS: Variants = {
    "points only": ("data.modalities=[points]", "fuser=none"),
    "no exchange": ("fuser=none",),
    "concat": ("fuser=concat",),
    "random": ("fuser=random",),
    "TokenFusion": (),
}


def _detection_rows(recipe: Any) -> Rows:
    """The last head's mean AP at every threshold."""
    found = [f"map{100 * threshold:g}" for threshold in recipe.evaluation.thresholds]
    leader = rows_of(DETECTION).leader
    return {title: {metric.heading(name): Cell(title, leader, name) for name in found} for title in DETECTORS}


def _carry_out(shared: Shared, head: str, variants: Variants, rows: Rows, jobs: int) -> str:
    """Train what is missing, write the table and the pages; the last variant's run gets a page of its own."""
    folders = {title: title.lower().replace(" + ", "+").replace(" ", "-") for title in variants}
    runs = {
        title: [shared.out / f"{folder}-seed{seed}" for seed in range(shared.seeds)]
        for title, folder in folders.items()
    }
    arguments = {
        runs[title][seed]: [shared.recipe, *shared.overrides, *variants[title], f"seed={seed}"]
        for seed in range(shared.seeds)
        for title in reversed(variants)  # the long ones first: no core waits for them at the end
    }
    _run_all(arguments, jobs)
    table = _table(shared, head, rows, runs)
    (shared.out / "table.md").write_text(table, encoding="utf-8")
    in_order = [runs[title][seed] for seed in range(shared.seeds) for title in variants]
    return table + _pages(in_order, runs[list(variants)[-1]][0], shared.out)


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
        outcome = "failed" if code else _outcome(_figures(run))
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
        judged = (found["split"], found["checkpoint"], found["step"])
    except (OSError, ValueError, KeyError):
        return False
    wanted = (recipe.data.val, "last", recipe.train.steps)
    return judged == wanted and recipe_of(run).model_dump(mode="json") == recipe.model_dump(mode="json")


def _figures(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text(encoding="utf-8")))


def _primary(metrics: Mapping[str, Any]) -> str:
    """The metric that ranks; runs of old state none."""
    return str(metrics.get("primary", "miou"))


def _outcome(metrics: Mapping[str, Any]) -> str:
    primary, leader = _primary(metrics), rows_of(metrics.get("task", "")).leader
    return f"{leader} {metric.label(primary)} {metric.number(metrics['streams'][leader][primary], primary)}"


def _pages(runs: list[Path], fused: Path, out: Path) -> str:
    """HTML pages, where the extra for them is installed."""
    try:
        return f"\npages: {write_comparison(runs, out / 'compare.html')} and {write_report(fused)}"
    except UserError as error:
        return f"\nno pages: {error}"


def _table(shared: Shared, head: str, rows: Rows, runs: Runs) -> str:
    """The figures of the cells, mean and standard deviation over the seeds."""
    _check_judged_alike([run for found in runs.values() for run in found])
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    metrics = _figures(next(iter(runs.values()))[0])
    primary, judged = _primary(metrics), rows_of(metrics.get("task", "")).judged
    of_target = f" of {metrics['target']}" if metrics.get("target") else ""
    lower = " (lower is better)" if metric.lower_is_better(primary) else ""
    what = "Mean AP" if any(cell.figure for row in rows.values() for cell in row.values()) else metric.label(primary)
    lines = [
        f"{what}{of_target}{lower} on {metrics['dataset']} {metrics['split']} ({metrics['images']} "
        f"{judged}s), {metrics['step']} steps, {shared.seeds} "
        f"seed{'s: mean ± standard deviation' if shared.seeds > 1 else ''}; {metrics['protocol']}",
        "",
        f"| {head} | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for title, row in rows.items():
        cells = [_cell(row[column], runs, primary) if column in row else "" for column in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    command = ["tokenfusion", "study", shared.study, "--recipe", shared.recipe, *shared.overrides]
    return "\n".join([*lines, "", f"`{shlex.join([*command, '--seeds', str(shared.seeds)])}`", ""])


def _check_judged_alike(runs: Sequence[Path]) -> None:
    """``eval`` may have judged a run anew and in another way: such figures do not share a table."""
    protocols = {run: _figures(run)["protocol"] for run in runs}
    for run, protocol in protocols.items():
        if protocol != protocols[runs[0]]:
            raise UserError(
                f"{run}: was judged otherwise ({protocol}) than {runs[0]} ({protocols[runs[0]]}); judge all runs alike"
                " with `tokenfusion eval`, and call again"
            )


def _cell(cell: Cell, runs: Runs, primary: str) -> str:
    """Mean and standard deviation of one stream's figure over the seeds; empty where the runs lack the stream."""
    figure = cell.figure or primary
    found = [_figures(run)["streams"].get(cell.stream, {}).get(figure) for run in runs[cell.variant]]
    values = list(metric.finite(dict(enumerate(found))).values())
    if not values:
        return ""
    spread = f" ± {metric.number(statistics.stdev(values), figure)}" if len(values) > 1 else ""
    return metric.number(statistics.mean(values), figure) + spread


STUDIES: dict[str, Callable[[str, Sequence[str], int, Path, int], str]] = {"methods": methods, "modalities": modalities}
