"""The runs of a study: those that are not done are trained and judged, as many at a time as there are devices."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tokenfusion.api import Recipe, recipe_of
from tokenfusion.components import write_text
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.report import metric
from tokenfusion.report.rows import rows_of
from tokenfusion.study.outline import Part
from tokenfusion.study.plan import Cell
from tokenfusion.study.results import figures, is_judged, is_timed, primary
from tokenfusion.train import WITHOUT_EFFECT_ON_WEIGHTS


def carry_out(cells: Mapping[Cell, Part], jobs: int | None = None) -> None:
    """Train what is not done yet, and judge it as its part wants; each run in processes of its own.

    Args:
        cells: the runs, each with the part of the study that it belongs to.
        jobs: runs at a time; None: one per CUDA device, or two that share the cores.

    Raises:
        UserError: where a run fails; its log is named. The others are finished first.
    """
    devices = _devices()
    jobs = jobs or len(devices) or min(2, os.cpu_count() or 1)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for place in range(jobs):
        free.put(devices[place % len(devices)] if devices else "")
    missing = {cell: part for cell, part in cells.items() if not is_done(cell, part)}
    for root in {_wanted(cell).data.root for cell in missing}:
        Folder(root)  # a mistake there ends everything now, and no run of other data stands in
    taken = _adopt(missing)
    waiting = [cell for cell in missing if cell not in taken]
    for cell in waiting:
        _check_steps(cell)

    def work(cell: Cell) -> bool:
        device = free.get()
        try:
            return _work(cell, cells[cell], _environment(device, jobs))
        finally:
            free.put(device)

    with ThreadPoolExecutor(jobs) as pool:
        ended = dict(zip(waiting, pool.map(work, waiting), strict=True))
    alone = _environment(next(iter(devices), ""), 1)
    for cell in [cell for cell, is_well in ended.items() if is_well and cells[cell].is_timed]:
        ended[cell] = _run(cell, [JUDGING, str(cell.run), "seconds"], alone)
    failed = [cell.run / "train.log" for cell, is_well in ended.items() if not is_well]
    if failed:
        last = failed[0].read_text(errors="replace").strip().splitlines()[-1:]
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}: this run failed{more} ({' '.join(last)}); mend it and call again")


JUDGING = "tokenfusion.study.judging"
PAPERS = ("recipe.yaml", "dataset.yaml", "metrics.json", "seconds.json", "command.txt", "conditions")


def _adopt(cells: Mapping[Cell, Part]) -> set[Cell]:
    """Take over, without its weights, what another study in a folder beside this one's has trained by the same recipe."""
    taken: set[Cell] = set()
    if not cells:
        return taken
    others = next(iter(cells)).run.resolve().parents[2].glob("*/*/*-seed*/command.txt")
    done = {}
    for folder in (file.parent for file in others if (file.parent / "metrics.json").is_file()):
        with suppress(UserError, OSError, ValueError):  # of another version, or damaged: nobody's business here
            done[_key(recipe_of(folder)), _data_of(folder)] = folder
    for cell, part in cells.items():
        wanted = _wanted(cell)
        other = done.get((_key(wanted), Folder(wanted.data.root).fingerprint()))
        if other is None or other == cell.run.resolve() or not is_done(cell._replace(run=other), part):
            continue
        cell.run.mkdir(parents=True, exist_ok=True)
        for name in PAPERS:
            if (other / name).is_dir():
                shutil.copytree(other / name, cell.run / name, dirs_exist_ok=True)
            elif (other / name).is_file():
                shutil.copyfile(other / name, cell.run / name)
        taken.add(cell)
        print(f"adopted:  {cell.run.name} is {other}", flush=True)
    return taken


def _check_steps(cell: Cell) -> None:
    """Refuse a folder that holds a run of another number of steps: training would go on at the end of the wrong schedule.

    Raises:
        UserError: names both numbers.
    """
    wanted = old = _wanted(cell).train.steps
    with suppress(UserError):  # nothing there, or damaged: for `train` to say
        old = recipe_of(cell.run).train.steps
    if old != wanted:
        raise UserError(f"{cell.run}: is a run of {old} steps, and {wanted} are asked for; choose another --out")


def _wanted(cell: Cell) -> Recipe:
    return read_recipe(cell.recipe, cell.overrides)


def _data_of(run: Path) -> str:
    """The fingerprint of the data that a run was judged on; old figures do not tell: then of what now stands there."""
    found = figures(run)
    return str(found.get("data") or Folder(recipe_of(run).data.root).fingerprint())


def _key(recipe: Recipe) -> str:
    return json.dumps(_essence(recipe), sort_keys=True)


def _devices() -> list[str]:
    """The CUDA devices of this machine, as CUDA_VISIBLE_DEVICES names them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def _environment(device: str, jobs: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    return {**environment, "CUDA_VISIBLE_DEVICES": device} if device else environment


def _work(cell: Cell, part: Part, environment: Mapping[str, str]) -> bool:
    """Train and judge one run; whether that went well. What it says goes to its ``train.log``."""
    cell.run.mkdir(parents=True, exist_ok=True)
    write_text(cell.run / "command.txt", cell.command() + "\n")
    print(f"started:  {cell.command()}", flush=True)
    began = time.monotonic()
    is_well = _run(cell, ["tokenfusion.cli", *cell.words()], environment)
    if is_well and part.conditions:
        is_well = _run(cell, [JUDGING, str(cell.run), json.dumps(part.conditions)], environment)
    outcome = _outcome(figures(cell.run)) if is_well else "failed"
    print(f"finished: {cell.run.name} after {time.monotonic() - began:.0f} s, {outcome}", flush=True)
    return is_well


def _run(cell: Cell, words: Sequence[str], environment: Mapping[str, str]) -> bool:
    with (cell.run / "train.log").open("ab") as log:
        return subprocess.run([sys.executable, "-m", *words], stdout=log, stderr=log, env=environment).returncode == 0


def is_done(cell: Cell, part: Part | None = None) -> bool:
    """Whether a run has ended with this very recipe; with a part, also whether it is judged and timed as that wants.

    Its weights need not be there any more. Where the data stand, and what has no effect on the weights, may differ. A run of
    another recipe is left to ``train``, which refuses it.
    """
    try:
        found, wanted = figures(cell.run), _wanted(cell)
        judged = (found["split"], found["checkpoint"], found["step"])
        is_same = _essence(recipe_of(cell.run)) == _essence(wanted)
    except (OSError, ValueError, KeyError):
        return False
    if judged != (wanted.data.val, "last", wanted.train.steps) or not is_same or not _is_of(found, wanted.data.root):
        return False
    if part is None:
        return True
    is_all = all(is_judged(cell.run, title, changes) for title, changes in part.conditions.items())
    return is_all and (is_timed(cell.run) or not part.is_timed)


def _is_of(found: Mapping[str, Any], root: str) -> bool:
    """Whether figures are of the data at ``root``, as far as these are there; old figures tell their name only."""
    try:
        folder = Folder(root)
        return bool(found["data"] == folder.fingerprint() if "data" in found else found["dataset"] == folder.name)
    except UserError:
        return True


def _essence(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides about its weights and figures."""
    content = recipe.model_dump(mode="json")
    content.pop("description")
    content["data"].pop("root")
    content["train"] = {key: value for key, value in content["train"].items() if key not in WITHOUT_EFFECT_ON_WEIGHTS}
    return content


def _outcome(metrics: Mapping[str, Any]) -> str:
    ranks, leader = primary(metrics), rows_of(metrics.get("task", "")).leader
    return f"{leader} {metric.label(ranks)} {metric.number(metrics['streams'][leader][ranks], ranks)}"
