"""One trained run judged under other conditions than its own, or timed; ``python -m tokenfusion.study.judging RUN seconds``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenfusion import api
from tokenfusion.components import write_text
from tokenfusion.data.folder import Folder
from tokenfusion.data.scenes import collate_scenes
from tokenfusion.errors import UserError
from tokenfusion.study.results import TIMES, condition_file, figures, is_judged
from tokenfusion.tasks.detection3d.inference import infer
from tokenfusion.tasks.detection3d.task import scenes
from tokenfusion.tasks.runs import device_of

MOST = 100  # scenes that are timed


def judge(run: Path, conditions: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what a run reaches under every condition that has not been judged yet; its own ``metrics.json`` stays."""
    for title, changes in conditions.items():
        if is_judged(run, title, changes):
            continue
        api.evaluate(run, evaluation=changes, to=condition_file(run, title))


def measure(run: Path) -> None:
    """Write the seconds that a trained detector takes for 100 scenes: reading, searching in the cloud, forward pass, boxes.

    The median over up to 100 scenes of the validation split, one at a time, after one that is not counted (Table 10).

    Raises:
        UserError: where the run is of another task.
    """
    recipe: Any = api.recipe_of(run)
    if recipe.task != "detection3d":
        raise UserError(f"{run}: is a run of {recipe.task}; seconds per 100 scenes are measured of detection3d")
    model: Any = api.load(run)
    device = device_of(recipe.train)
    model.to(device)
    folder = Folder(recipe.data.root)
    assert folder.spec.scene is not None, "a detector's data has scenes"
    judged = scenes(recipe, folder, model, recipe.data.val, folder.spec.scene.classes)
    taken = []
    for index in range(min(len(judged), MOST)):
        began = time.perf_counter()
        infer(model, collate_scenes([judged[index]]))  # its boxes come back to the CPU: nothing is left to wait for
        taken.append(time.perf_counter() - began)
    timed = taken[1:] or taken
    named = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    content = {"seconds": 100 * statistics.median(timed), "timed": len(timed), "device": named}
    content["of_step"] = figures(run)["step"]
    write_text(run / TIMES, json.dumps(content))


if __name__ == "__main__":
    place, what = Path(sys.argv[1]), sys.argv[2]
    if what == "seconds":
        measure(place)
    else:
        judge(place, json.loads(what))
