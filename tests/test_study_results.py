"""The tables under benchmarks/results follow from the runs beside them, and stand in the documentation as they are."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tokenfusion.study import Wish, plan, read_study, write_tables

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from tables import RESULTS, page

PAGE = Path(__file__).parents[1] / "docs" / "tables.md"
FOLDERS = sorted(file.parent for file in RESULTS.glob("*/table.md"))


def test_the_page_is_written_from_them() -> None:
    assert len(FOLDERS) >= 2
    assert PAGE.read_text(encoding="utf-8") == page(), "written by: python benchmarks/tables.py > docs/tables.md"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_table_follows_from_its_runs(folder: Path, tmp_path: Path) -> None:
    table = (folder / "table.md").read_text(encoding="utf-8")
    command = table.strip().splitlines()[-1].strip("`")
    words = shlex.split(command)
    name, options = words[2], dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--out"] == f"benchmarks/results/{folder.name}"
    title, outline = read_study(name)
    planned = plan(outline, Wish(folder, options["--scale"], int(options["--seeds"])))  # type: ignore[arg-type]
    write_tables(title, outline, planned, command, tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_run_has_its_papers(folder: Path) -> None:
    for run in folder.glob("*/*-seed*"):
        assert {"command.txt", "recipe.yaml", "metrics.json"} <= {file.name for file in run.iterdir()}, run
