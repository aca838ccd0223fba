"""Writes docs/tables.md: the tables of all studies under benchmarks/results, and where their runs were made.

python benchmarks/tables.py > docs/tables.md
"""

from __future__ import annotations

import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEAD = """# Tables of the studies

Every table that stands under `benchmarks/results`, as `tokenfusion study` wrote it from the runs there; each run's recipe,
command and figures lie beside it. The last line of each table is the command that goes on from there. What was learnt from
them is in [findings](findings.md), what a study is in [studies](studies.md). This page is written by
`python benchmarks/tables.py > docs/tables.md`.

*toy*: procedural rooms, networks from scratch. *small*: real images of NYUDv2 at 126 x 168, a pretrained ViT-S, 240 steps.
No table repeats one of the paper's at its own scale."""


def page() -> str:
    """The whole page; a study's README.md says on what machine its runs were made."""
    parts = [HEAD]
    for table in sorted(RESULTS.glob("*/table.md")):
        name, _, scale = table.parent.name.rpartition("-")
        _, _, content = table.read_text(encoding="utf-8").partition("\n")
        parts += [f"## {name}: {scale}", content.strip().replace("\n## ", "\n### ")]
        machine = table.parent / "README.md"
        parts += [machine.read_text(encoding="utf-8").strip()] if machine.exists() else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
