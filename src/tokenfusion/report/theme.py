"""The colours of the pages and their charts, light and dark."""

from __future__ import annotations

from typing import NamedTuple


class Theme(NamedTuple):
    """The colours of a page: ``surface`` behind everything, ``cycle`` for streams or runs."""

    surface: str
    ink: str
    muted: str
    line: str
    accent: str
    orange: str
    blue: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#59626d", "#e1e4e8", "#0f766e", "#e08600", "#0054a6",
    ("#8e4fa8", "#1b8a5a", "#a0522d", "#4b7bb5", "#8a7a00", "#c2416c"),
)  # fmt: skip
DARK = Theme(
    "#14171a", "#e9ecef", "#9aa4af", "#2d333a", "#4fd1c0", "#ffac33", "#4d9fec",
    ("#c58fe0", "#5fd3a0", "#e0a070", "#8fb8e8", "#d6c64a", "#f08fb0"),
)  # fmt: skip
