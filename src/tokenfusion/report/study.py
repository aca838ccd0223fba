"""The page of a study: tables with the paper's numbers beside ours, charts with the spread, and every run's command."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenfusion.report import metric
from tokenfusion.report.dots import Dots, Point, exchange_and_quality, rows_of_dots
from tokenfusion.report.page import Chart, chart, write_page
from tokenfusion.report.run import View


class Sheet(NamedTuple):
    """What the page shows of one part of a study.

    Attributes:
        name, caption, note: in words.
        grid: the table as texts, the head first; ``reference`` is the title of the row that others are set beside.
        dots: what the rows reached by the figure ``ranks``; empty where the table has other rows than the runs.
        points: runs in the plane of exchange and quality; empty without such a chart.
        commands: title of a row -> what to type for its runs.
    """

    name: str
    caption: str
    note: str
    grid: Sequence[Sequence[str]]
    reference: str | None
    ranks: str
    dots: Sequence[Dots]
    points: Sequence[Point]
    commands: Mapping[str, Sequence[str]]


def write_study(out: Path, title: str, description: str, sheets: Sequence[Sheet], command: str) -> Path:
    """Write the page of a study; ``command`` is what carries out all of it.

    Raises:
        UserError: where the page's libraries are not installed, or the file cannot be written.
    """
    view: View = {
        "title": title,
        "description": description,
        "command": command,
        "sheets": [(sheet, _charts(sheet)) for sheet in sheets],
    }
    return write_page(out, "study.html.j2", view)


def _charts(sheet: Sheet) -> list[Chart]:
    label = metric.heading(sheet.ranks)
    lower = ", lower is better" if metric.lower_is_better(sheet.ranks) else ""
    charts = []
    if any(row.values for row in sheet.dots):
        charts.append(chart(partial(rows_of_dots, sheet.dots, label), f"{metric.label(sheet.ranks)} by row{lower}"))
    if sheet.points:
        caption = f"{metric.label(sheet.ranks)} and exchange, one mark per run{lower}"
        found = [
            (row.title, statistics.mean(row.values))
            for row in sheet.dots
            if row.title == sheet.reference and row.values
        ]
        level = found[0] if found else None
        charts.append(chart(partial(exchange_and_quality, sheet.points, label, level), caption))
    return charts
