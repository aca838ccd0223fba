"""What a run has reached: by its own ``metrics.json``, under other conditions, and how long a sample takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenfusion.errors import UserError
from tokenfusion.study.outline import slug

TIMES = "seconds.json"


def figures(run: Path, condition: str = "") -> dict[str, Any]:
    """What a run's ``metrics.json`` holds, or what it reached under a condition; ``seconds`` too where it was timed."""
    file = condition_file(run, condition) if condition else run / "metrics.json"
    found = dict(json.loads(file.read_text(encoding="utf-8")))
    times = run / TIMES
    return {**found, **json.loads(times.read_text(encoding="utf-8"))} if times.is_file() else found


def condition_file(run: Path, title: str) -> Path:
    """Where the figures of a run under a condition stand."""
    return run / "conditions" / f"{slug(title)}.json"


def is_judged(run: Path, title: str, changes: Mapping[str, Any]) -> bool:
    """Whether a run has been judged under a condition, as it is now, and the condition meant this."""
    try:
        found = figures(run, title)
        return bool(found["evaluation"] == json.loads(json.dumps(dict(changes))) and found["step"] == _step(run))
    except (OSError, ValueError, KeyError):
        return False


def is_timed(run: Path) -> bool:
    """Whether a run has been timed as it is now."""
    try:
        return bool(json.loads((run / TIMES).read_text(encoding="utf-8"))["of_step"] == _step(run))
    except (OSError, ValueError, KeyError):
        return False


def _step(run: Path) -> int:
    return int(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["step"])


def primary(metrics: Mapping[str, Any]) -> str:
    """The figure that ranks; runs of old state none."""
    return str(metrics.get("primary", "miou"))


def check_judged_alike(runs: Sequence[Path]) -> None:
    """``eval`` may have judged a run anew and in another way: such figures do not share a table.

    Raises:
        UserError: names two runs that were judged otherwise.
    """
    told = {run: figures(run) for run in runs}
    for run, found in told.items():
        for key in ("protocol", "dataset", "data"):
            here, there = found.get(key), told[runs[0]].get(key)
            if here != there and not (key == "data" and None in (here, there)):  # old figures do not tell
                raise UserError(
                    f"{run}: was judged otherwise ({here}) than {runs[0]} ({there}); judge all runs alike with"
                    " `tokenfusion eval`, and call again"
                )
