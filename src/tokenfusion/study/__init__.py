"""Comparisons at the same budget, as resumable sets of runs that end in a table; a study is a YAML file."""

from __future__ import annotations

import shlex
from pathlib import Path

from tokenfusion.components import write_text
from tokenfusion.errors import UserError
from tokenfusion.report.study import write_study
from tokenfusion.study.outline import SCALES, SHIPPED, Part, Study, read_study, shipped
from tokenfusion.study.plan import Planned, Wish, chosen_cells, draw_rooms, plan
from tokenfusion.study.runs import carry_out, is_done
from tokenfusion.study.table import table_of
from tokenfusion.study.writing import comma_separated, latex, markdown, sheet

__all__ = ["SCALES", "SHIPPED", "Part", "Study", "Wish", "plan", "read_study", "shipped", "study"]


def study(name: str, wish: Wish, jobs: int | None = None, train: bool = True) -> str:
    """Carry out a study, as far as it is not done, and write its tables.

    Args:
        name: of a shipped study, ``tableN``, or a YAML file.
        wish: scale, seeds, folder, and what else is asked for.
        jobs: runs at a time; None: one per CUDA device, or two that share the cores.
        train: False writes the tables of what is done and trains nothing.

    Returns:
        the tables in markdown, and where the page stands. ``table.md``, ``table.csv``, ``table.tex`` and ``study.html`` are
        written to ``wish.out``.

    Raises:
        UserError: where a run fails; its log is named. The others are finished, and the tables written, first.
    """
    title, outline = read_study(name)
    planned = plan(outline, wish)
    failure = None
    if train:
        draw_rooms(planned, wish.out)
        parts = {part.name: part.part for part in planned}
        try:
            carry_out({cell: parts[cell.part] for cell in chosen_cells(planned, wish.rows)}, jobs)
        except UserError as error:
            failure = error
    if not any(is_done(cell) for part in planned for row in part.cells.values() for cell in row):
        others = next(wish.out.glob("*/*-seed*/metrics.json"), None)
        if others is not None:  # whose tables stay
            raise failure or UserError(
                f"{others.parent}: is done, and no run of this study at scale {wish.scale} with these settings is; call with"
                " those that its command.txt has, or choose another --out"
            )
    command = _command(name if name.endswith((".yaml", ".yml")) else title, wish)
    text = write_tables(title, outline, planned, command, wish.out)
    if failure is not None:
        raise failure
    return text


def write_tables(title: str, outline: Study, planned: list[Planned], command: str, out: Path) -> str:
    """Write the tables of what is done, and the page where its libraries are installed."""
    tables = [table_of(part) for part in planned]
    text = markdown(title, tables, command)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", text)
    write_text(out / "table.csv", comma_separated(planned, tables))
    write_text(out / "table.tex", latex(tables))
    sheets = [sheet(part, table, part.scale == "full") for part, table in zip(planned, tables, strict=True)]
    try:
        return f"{text}\npage: {write_study(out / 'study.html', title, outline.description, sheets, command)}"
    except UserError as error:
        return f"{text}\nno page: {error}"


def _command(name: str, wish: Wish) -> str:
    words = ["tokenfusion", "study", name, *wish.overrides, "--scale", wish.scale, "--seeds", str(wish.seeds)]
    words += ["--recipe", wish.recipe] if wish.recipe else []
    words += ["--data", wish.data] if wish.data else []
    return shlex.join([*words, "--out", str(wish.out)])
