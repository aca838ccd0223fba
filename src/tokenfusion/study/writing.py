"""The tables of a study as files: markdown, CSV with a line per figure and seed, LaTeX, and what its page shows."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenfusion.report import metric
from tokenfusion.report.dots import Dots
from tokenfusion.report.study import Sheet
from tokenfusion.study.plan import Cell, Planned
from tokenfusion.study.results import condition_file
from tokenfusion.study.table import Entry, Table


def grid(table: Table) -> list[list[str]]:
    """A table as texts: a column per figure, the paper's number behind it, differences, and how many runs a row has."""
    headings = list(dict.fromkeys([*table.columns, *table.paper]))
    head = [table.head]
    for heading in headings:
        head += [_with_unit(table, heading)] if heading in table.columns else []
        head += [f"paper {heading}"] if heading in table.paper else []
    head += [f"difference to {table.reference} (95 %)"] if table.reference else []
    rows = [[*head, "runs"]]
    for line in table.lines:
        row = [line.title]
        for heading in headings:
            row += [line.entries[heading].text()] if heading in table.columns else []
            row += [table.paper_text(line, heading)] if heading in table.paper else []
        row += [line.difference_text()] if table.reference else []
        rows.append([*row, str(line.done)])
    return rows


def _with_unit(table: Table, heading: str) -> str:
    entries = [line.entries[heading] for line in table.lines]
    unit = metric.unit(next((entry.figure for entry in entries if entry.values), entries[0].figure))
    return f"{heading}, {unit}" if unit else heading


def markdown(title: str, tables: Sequence[Table], command: str) -> str:
    """All tables of a study, and the command that makes them."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.name}", "", f"{table.caption}."] if len(tables) > 1 else [f"{table.caption}."]
        lines += [table.note] if table.note else []
        head, *rows = grid(table)
        lines += ["", "| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [""]
    return "\n".join([*lines, f"`{command}`", ""])


def sheet(planned: Planned, table: Table, same_data: bool) -> Sheet:
    """What the page shows of a part; the paper's numbers stand in a chart only where they are of the same data."""
    dots = []
    for line in table.lines if not planned.part.conditions else []:
        paper = [entry.paper for entry in line.entries.values() if entry.figure == table.ranks and same_data]
        dots.append(Dots(line.title, list(line.ranked.values.values()), paper[0] if paper else None))
    commands = {title: [_shown(planned, cell) for cell in cells] for title, cells in planned.cells.items()}
    return Sheet(
        table.name, table.caption, table.note, grid(table), table.reference, table.ranks, dots, table.points, commands
    )


def comma_separated(planned: Sequence[Planned], tables: Sequence[Table]) -> str:
    """One line per figure and seed, then mean, standard deviation and the paper's number; the command of a run beside it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["part", "row", "column", "figure", "seed", "value", "command"])
    for part, table in zip(planned, tables, strict=True):
        for line in table.lines:
            for heading, entry in line.entries.items():
                cells = part.cells[heading if part.part.conditions else line.title]
                changes = part.part.conditions.get(line.title)
                commands = {cell.seed: _behind(cell, line.title, changes, entry.figure) for cell in cells}
                for seed, value in _values(entry):
                    command = commands.get(seed, "") if isinstance(seed, int) else ""
                    writer.writerow([table.name, line.title, heading, entry.figure, seed, f"{value:.6g}", command])
    return out.getvalue()


def _shown(planned: Planned, cell: Cell) -> str:
    """All that is typed for a run: what trains it, judges it under conditions, and times it."""
    judged = [_judging(cell, title, changes) for title, changes in planned.part.conditions.items()]
    return "\n".join([cell.command(), *judged, *([_timing(cell)] if planned.part.is_timed else [])])


def _behind(cell: Cell, title: str, changes: Mapping[str, Any] | None, figure: str) -> str:
    """What is typed for one figure."""
    if changes is not None:
        return _judging(cell, title, changes)
    return _timing(cell) if figure == "seconds" else cell.command()


def _timing(cell: Cell) -> str:
    return shlex.join(["python", "-m", "tokenfusion.study.judging", str(cell.run), "seconds"])


def _judging(cell: Cell, title: str, changes: Mapping[str, Any]) -> str:
    how = [f"evaluation.{key}={json.dumps(value)}" for key, value in changes.items()]
    return shlex.join(["tokenfusion", "eval", str(cell.run), *how, "--to", str(condition_file(cell.run, title))])


def _values(entry: Entry) -> Iterator[tuple[int | str, float]]:
    yield from entry.values.items()
    for name, value in (("mean", entry.mean), ("deviation", entry.deviation), ("paper", entry.paper)):
        if value is not None:
            yield name, value


def latex(tables: Sequence[Table]) -> str:
    """One ``table`` with booktabs' rules per part."""
    blocks = []
    for table in tables:
        head, *rows = [[_escaped(text) for text in row] for row in grid(table)]
        body = [" & ".join(row) + r" \\" for row in rows]
        note = f" {table.note}" if table.note else ""
        blocks += [
            r"\begin{table}", r"\centering", rf"\caption{{{_escaped(f'{table.name}: {table.caption}.{note}')}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body,
            r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(["% needs \\usepackage{booktabs}", *blocks])


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "×": r"$\times$", "°": r"$^\circ$",
    "<": "$<$", ">": "$>$",
})  # fmt: skip


def _escaped(text: str) -> str:
    return text.translate(LATEX)
