"""Every block of docs/fuse.md runs as it is printed, and prints what its comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "fuse.md"


def test_the_page_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("peft")  # "With peft"
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).splitlines()
    told = [line.split("  # ", 1)[1] for line in lines if line.startswith("print(") and "  # " in line]
    listed = [line.removeprefix("# ") for line in lines if line.startswith("# ")]  # below a loop that prints
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.splitlines()
    assert [line for line in printed if line not in listed] == told
    assert [line for line in printed if line in listed] == listed
    assert len(told) > 10
    assert len(listed) == 4
