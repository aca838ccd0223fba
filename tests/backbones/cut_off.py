"""Saving that is cut off in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest


def cut_off_renaming(monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException) -> None:
    """The renaming of that number, counted from 0, raises the error, and every one after it."""
    done: list[Path] = []
    rename = Path.replace

    def replace(path: Path, name: Path) -> Path:
        if len(done) == failing:
            raise error
        done.append(path)
        return rename(path, name)

    monkeypatch.setattr(Path, "replace", replace)
