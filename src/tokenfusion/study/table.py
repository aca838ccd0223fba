"""The table of a part: what its finished runs reached, beside the paper's numbers; nothing stands in it without a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenfusion.api import recipe_of
from tokenfusion.report import metric
from tokenfusion.report.dots import Point
from tokenfusion.report.rows import rows_of
from tokenfusion.study.plan import Planned
from tokenfusion.study.results import check_judged_alike, figures, is_judged, primary
from tokenfusion.study.runs import is_done
from tokenfusion.study.spread import Difference, deviation, paired

OTHER_DATA = "The paper's numbers are of its own data and networks, and of far longer training."


class Entry(NamedTuple):
    """A place of the table: a figure of some runs, by seed, where it is finite."""

    figure: str
    values: Mapping[int, float]
    runs: int
    paper: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        return deviation(list(self.values.values()))

    def text(self) -> str:
        """Mean ± standard deviation; of how many runs, where others have no finite figure."""
        spread = "" if self.deviation is None else f" ± {metric.number(self.deviation, self.figure)}"
        lost = f" ({len(self.values)} of {self.runs})" if 0 < len(self.values) < self.runs else ""
        return metric.number(self.mean, self.figure) + spread + lost


class Line(NamedTuple):
    """A row of the table; ``ranked`` is what the difference and the chart are of."""

    title: str
    entries: dict[str, Entry]  # heading -> what stands there
    ranked: Entry
    difference: Difference | None
    done: int

    def difference_text(self) -> str:
        """``+1.2 (0.3 to 2.1)``: the mean difference and its 95 % interval."""
        if self.difference is None:
            return ""
        mean, half, figure = self.difference.mean, self.difference.half, self.ranked.figure
        shown = _signed(mean, figure)
        return shown if half is None else f"{shown} ({_signed(mean - half, figure)} to {_signed(mean + half, figure)})"


class Table(NamedTuple):
    """A part as a table; ``paper`` names the columns for which the paper has numbers."""

    name: str
    caption: str
    note: str
    head: str
    columns: list[str]
    paper: list[str]
    lines: list[Line]
    reference: str | None
    ranks: str  # the figure that ranks
    points: list[Point]

    def paper_text(self, line: Line, heading: str) -> str:
        """The paper's number, with as many digits as the longest of its column."""
        found = [entry.paper for row in self.lines if (entry := row.entries[heading]).paper is not None]
        value, digits = line.entries[heading].paper, max((len(str(v).partition(".")[2]) for v in found), default=0)
        return "" if value is None else f"{value:.{digits}f}"


def table_of(planned: Planned) -> Table:
    """The table of a part, from the runs that are done.

    Raises:
        UserError: where runs were judged in different ways.
    """
    done = {title: {cell.seed: cell.run for cell in cells if is_done(cell)} for title, cells in planned.cells.items()}
    runs = [run for found in done.values() for run in found.values()]
    check_judged_alike(runs)
    first = figures(runs[0]) if runs else {}
    lines = _conditions(planned, done) if planned.part.conditions else _rows(planned, done, first)
    columns = list(dict.fromkeys(heading for line in lines for heading in line.entries))
    paper = [h for h in columns if any(line.entries[h].paper is not None for line in lines)]
    ours = [h for h in columns if not runs or h not in paper or any(line.entries[h].values for line in lines)]
    part = planned.part
    head = "condition" if part.conditions else part.head
    reference = None if part.conditions else part.reference
    ranks = primary(first) if first else ""
    points = _points(done, ranks) if part.plot == "exchange" else []
    caption = _caption(planned, first, {len(found) for found in done.values() if found})
    note = f"{part.note} {OTHER_DATA}".strip() if paper and planned.scale != "full" else part.note
    return Table(planned.name, caption, note, head, ours, paper, lines, reference, ranks, points)


def _rows(planned: Planned, done: Mapping[str, Mapping[int, Path]], first: Mapping[str, Any]) -> list[Line]:
    """One line per row of the study."""
    part, ranks = planned.part, primary(first)
    ranked = {title: _entry(runs, ranks) for title, runs in done.items()}
    lines = []
    for title, row in part.rows.items():
        paper = row.paper or (None,) * len(part.columns)
        entries = {
            heading: _entry(done[title], figure, number)
            for (heading, figure), number in zip(part.columns.items(), paper, strict=True)
        }
        reference = ranked[part.reference] if part.reference and title != part.reference else None
        difference = paired(ranked[title].values, reference.values) if reference else None
        lines.append(Line(title, entries, ranked[title], difference, len(done[title])))
    return lines


def _conditions(planned: Planned, done: Mapping[str, Mapping[int, Path]]) -> list[Line]:
    """One line per condition under which all runs were judged, the runs' rows in its columns."""
    figure = next(iter(planned.part.columns.values()))
    lines = []
    for title, changes in {"as they are": None, **planned.part.conditions}.items():
        entries = {}
        for row, runs in done.items():
            judged = {s: run for s, run in runs.items() if changes is None or is_judged(run, title, changes)}
            entries[row] = _entry(judged, figure, None, title if changes is not None else "")
        count = sum(len(entry.values) for entry in entries.values())
        lines.append(Line(title, entries, next(iter(entries.values())), None, count))
    return lines


def _entry(runs: Mapping[int, Path], figure: str, paper: float | None = None, condition: str = "") -> Entry:
    found = {seed: figures(run, condition) for seed, run in runs.items()}
    named = next((primary(metrics) for metrics in found.values()), figure) if "primary" in figure else figure
    values = {seed: value_of(metrics, figure) for seed, metrics in found.items()}
    return Entry(named.rpartition("/")[2], metric.finite(values), len(values), paper)


def value_of(metrics: Mapping[str, Any], figure: str) -> float | None:
    """A figure of a run: of what ranks it, or of the stream that it names; None where the run has none.

    Args:
        figure: see :class:`~tokenfusion.study.outline.Part`.
    """
    if figure == "exchange":
        rates = [rate for block in metrics.get("exchange", {}).values() for rate in block.values()]
        return 100 * statistics.mean(rates) if rates else None
    if figure == "seconds":
        return metrics.get("seconds")
    stream, _, name = figure.rpartition("/")
    name = primary(metrics) if name == "primary" else name
    row = metrics["streams"].get(stream or rows_of(metrics.get("task", "")).leader, {})
    value = row.get(name)
    return None if value is None else float(value)


def _points(done: Mapping[str, Mapping[int, Path]], ranks: str) -> list[Point]:
    """Every finished run that exchanges, with its theta and lambda."""
    points = []
    for runs in done.values():
        for run in runs.values():
            metrics, recipe = figures(run), recipe_of(run).model_dump(mode="json")
            exchange, value = value_of(metrics, "exchange"), value_of(metrics, ranks)
            if exchange is not None and value is not None:
                theta, is_steered = recipe["fuser"].get("threshold"), recipe["loss"].get("target_rate") is not None
                sparsity = None if is_steered else recipe["loss"].get("sparsity")
                points.append(Point(exchange, value, theta, sparsity))
    return points


def _caption(planned: Planned, first: Mapping[str, Any], counts: set[int]) -> str:
    """What the figures are of, in one line."""
    cell = next(iter(planned.cells.values()))[0]
    if not first:
        return f"{cell.recipe}: no run is done yet"
    target = f", to {first['target']}" if first.get("target") else ""
    most, few = max(counts), "up to " if len(counts) > 1 else ""
    spread = f"{few}{most} seeds: mean ± standard deviation" if most > 1 else "one seed"
    if few and planned.part.reference and not planned.part.conditions:
        spread += "; differences over the seeds that both rows have"
    judged = rows_of(first.get("task", "")).judged
    part = planned.part  # headings that are no figures' names leave open what stands below them
    is_open = bool(part.conditions) or any("primary" in figure for figure in part.columns.values())
    what = f"{metric.label(primary(first))}, " if is_open else ""
    return (
        f"{what}{cell.recipe}{target}, judged on {first['dataset']} {first['split']} ({first['images']} {judged}s) after"
        f" {first['step']} steps; {spread}; {first['protocol']}"
    )


def _signed(value: float, figure: str) -> str:
    """A number with its sign; what rounds to nothing has a plus."""
    text = metric.number(abs(value), figure)
    return f"-{text}" if value < 0 and float(text) else f"+{text}"
