"""One page that puts several runs side by side: their figures, their curves, and what differs in their recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenfusion.errors import UserError
from tokenfusion.report import metric, plots
from tokenfusion.report.page import Chart, chart, write_page
from tokenfusion.report.rows import ENSEMBLE, HEADS, STREAMS
from tokenfusion.report.run import Run, View, collapse, counted, read_run


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write one page that compares runs; ``out`` is an HTML file, or a folder that gets ``compare.html``.

    Raises:
        UserError: where a folder is no run, or one of its files is damaged.
    """
    if not runs:
        raise UserError("nothing to compare: no run folder came, at least one is wanted")
    found = _told_apart([read_run(run) for run in runs])
    return write_page(out / "compare.html" if out.is_dir() else out, "compare.html.j2", _comparison(found))


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs under names that differ."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    names = [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def _comparison(runs: Sequence[Run]) -> View:
    figures = [run.figures() for run in runs]
    judged = [run for run in runs if run.figures()]
    primary = judged[0].primary() if judged else ""
    streams = dict.fromkeys(stream for table in figures for stream in table)
    ensembles = metric.finite({at: table.get(runs[at].leader(), {}).get(primary) for at, table in enumerate(figures)})
    sound = {at: value for at, value in ensembles.items() if ENSEMBLE not in runs[at].evaluation.collapsed}
    made = {_made(run) for run in judged}
    ranked = judged[0].rows() if judged else STREAMS
    curves = {run.name: found for run in runs if (found := _curve(run, primary))}
    return {
        "title": "Comparison of " + counted(len(runs), "run"),
        "runs": runs,
        "facts": [run.facts() for run in runs],
        "figures": figures,
        "metrics": metric.names(figures, primary),
        "metric": primary,
        "lower": metric.lower_is_better(primary),
        "streams": [ranked.leader] if ranked is HEADS else sorted(streams, key=lambda stream: stream == ENSEMBLE),
        "rows": ranked,
        "best": metric.best(sound, primary) if len(ensembles) > 1 and len(made) == 1 else None,
        "chart_of_runs": _chart(curves, primary, ranked.leader_name) if curves else None,
        "without_curve": [run.name for run in runs if run.name not in curves],
        "target": judged[0].target() if len(made) == 1 else "",
        "targets_differ": len(made) > 1,
        "parameters_known": any(run.evaluation.parameters for run in runs),
        "differences": _differences(runs),
        "warnings": list(_warnings(runs)),
    }


def _made(run: Run) -> str:
    """What a run makes: the target of a translation, else its task."""
    return run.target() or run.task() or "not stated"


def _curve(run: Run, primary: str) -> plots.Series | None:
    """The primary figure of what ranks the run over training, or of the only stream."""
    table = run.figures()
    stream = run.leader() if run.leader() in table else next(iter(table), "")
    found = plots.series(run.lines, "val").get(f"{stream}/{primary}")
    return found if found and len(found[0]) > 1 else None  # one point is no curve


def _chart(curves: dict[str, plots.Series], primary: str, leader: str) -> Chart:
    alone = " (of the only stream where there is one)" if leader == ENSEMBLE else ""
    caption = f"{metric.label(primary)} of the {leader}{alone} on the validation split"
    return chart(partial(plots.curves, curves, unit=metric.unit(primary), width=6.4), caption)


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """What keeps the figures from being comparable, one sentence each."""
    for run in runs:
        if run.evaluation.collapsed:
            yield f"{run.name}: {collapse(run.evaluation.collapsed)}"
    judged = [run for run in runs if run.figures()]
    for what, told in (
        ("make different things", [_made(run) for run in judged]),
        ("are ranked by different figures", [metric.heading(run.primary()) for run in judged]),
    ):
        if len(set(told)) > 1:
            yield f"The runs {what} ({'; '.join(dict.fromkeys(told))})."
    for key, what in (("protocol", "protocols"), ("split", "splits"), ("images", "numbers of images")):
        values = [str(getattr(run.evaluation, key)) for run in runs if run.evaluation.streams]
        if len(set(values)) > 1:
            yield f"The runs were evaluated with different {what} ({'; '.join(dict.fromkeys(values))})."
    training = [run.name for run in runs if run.figures() and not run.evaluation.streams]
    if training:
        yield f"Figures of the last evaluation during training, not of eval: {', '.join(training)}."
    nothing = [run.name for run in runs if not run.figures()]
    if nothing:
        yield f"Not evaluated yet: {', '.join(nothing)}."


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """The recipe keys whose values differ, one value per run; None where a recipe lacks the key."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    rows = [(key, [recipe.get(key) for recipe in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
