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
    found = _read(condition_file(run, condition) if condition else run / "metrics.json")
    return {**found, **_read(run / TIMES)} if is_timed(run) else found


def condition_file(run: Path, title: str) -> Path:
    """Where the figures of a run under a condition stand."""
    return run / "conditions" / f"{slug(title)}.json"


def is_judged(run: Path, title: str, changes: Mapping[str, Any]) -> bool:
    """Whether a run has been judged under a condition, as it is now and on the same data, and the condition meant this."""
    try:
        found, own = _read(condition_file(run, title)), _read(run / "metrics.json")
        is_meant = found["evaluation"] == json.loads(json.dumps(dict(changes)))
        return bool(is_meant and all(found.get(key) == own.get(key) for key in ("step", "data")))
    except (OSError, ValueError, KeyError):
        return False


def is_timed(run: Path) -> bool:
    """Whether a run has been timed as it is now."""
    try:
        return bool(_read(run / TIMES)["of_step"] == _read(run / "metrics.json")["step"])
    except (OSError, ValueError, KeyError):
        return False


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def primary(metrics: Mapping[str, Any]) -> str:
    """The name of the figure that ranks; old runs do not state it, theirs is mIoU."""
    return str(metrics.get("primary", "miou"))


def check_judged_alike(runs: Sequence[Path]) -> None:
    """``eval`` may have judged a run anew and in another way: such figures do not share a table.

    Raises:
        UserError: names two runs that were judged otherwise.
    """
    told = {run: figures(run) for run in runs}
    for key in ("protocol", "dataset", "data"):
        said = [
            (run, found.get(key)) for run, found in told.items() if key != "data" or key in found
        ]  # old ones do not tell
        for run, value in said[1:]:
            if value != said[0][1]:
                raise UserError(
                    f"{run}: was judged otherwise ({value}) than {said[0][0]} ({said[0][1]}); judge all runs alike with"
                    " `tokenfusion eval`, and call again"
                )
