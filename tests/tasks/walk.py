"""What the tests that walk the whole chain share: the command line in this process, and image files made on the spot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenfusion.cli import main


def command(*arguments: object, code: int = 0, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """Run the command line in this process; returns what went to standard error."""
    old, sys.argv = sys.argv, ["tokenfusion", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = old
    captured = capsys.readouterr() if capsys else None
    assert (ended.value.code or 0) == code, captured
    return captured.err if captured else ""


def plain_image(path: Path, shape: tuple[int, ...], dtype: type = np.uint8, value: int = 100) -> Path:
    """A file of one colour."""
    Image.fromarray(np.full(shape, value, dtype)).save(path)
    return path
