"""Charts of a study as PNG bytes: what every row reached over its seeds, and quality over the share of exchanged tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenfusion.report.plots import FONT, frame, legend_above, png, short
from tokenfusion.report.theme import Theme

if TYPE_CHECKING:
    from tokenfusion.report.plots import Axes

MARKERS = "oDs^vP*X"
WIDEST = 34  # letters of a title beside a chart


class Dots(NamedTuple):
    """A row of a chart: its runs, and the paper's number where it is of the same data."""

    title: str
    values: Sequence[float]
    paper: float | None = None


class Point(NamedTuple):
    """A run in the plane of exchange and quality."""

    exchange: float  # percent of the tokens
    value: float
    theta: float | None  # None where the method has none
    sparsity: float | None  # lambda


def rows_of_dots(rows: Sequence[Dots], label: str, theme: Theme) -> bytes:
    """One row per method: a faint dot per seed, the mean as a strong one, a line of one standard deviation to both sides."""
    left = 0.25 + 0.068 * max(len(short(row.title, WIDEST)) for row in rows)
    figure, axes = frame(left + 4.4, 1.05 + 0.3 * len(rows), 0.35, theme, left=left)
    is_named = False
    for place, row in enumerate(rows):
        if row.values:
            _spread(axes, place, row.values, theme, not is_named)
            is_named = True
    papers = {place: row.paper for place, row in enumerate(rows) if row.paper is not None}
    if papers:
        axes.scatter(
            list(papers.values()), list(papers), 34, marker="D", facecolors="none", edgecolors=theme.orange, zorder=5,
            label="the paper's",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(row.title, WIDEST) for row in rows], color=theme.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=FONT, color=theme.muted)
    legend_above(figure, axes, theme, 3)
    return png(figure)


def _spread(axes: Axes, place: int, values: Sequence[float], theme: Theme, is_named: bool) -> None:
    """One row's seeds, mean and standard deviation."""
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    axes.errorbar(mean, place, xerr=spread, color=theme.accent, linewidth=1.8, zorder=2)
    axes.scatter(
        values, [place] * len(values), 16, color=theme.muted, alpha=0.55, linewidths=0, zorder=3,
        label="one seed" if is_named else None,
    )  # fmt: skip
    axes.scatter(
        [mean], [place], 46, color=theme.accent, linewidths=0, zorder=4, label="mean ± sd" if is_named else None
    )


def exchange_and_quality(points: Sequence[Point], label: str, level: tuple[str, float] | None, theme: Theme) -> bytes:
    """One mark per run: the share of exchanged tokens to the right, quality upwards; theta is the colour, lambda the shape.

    Args:
        level: a title and what it reached, drawn as a line across.
    """
    thetas = sorted({point.theta for point in points if point.theta is not None})
    sparsities = sorted({point.sparsity for point in points if point.sparsity is not None})
    colour: dict[float | None, str] = {None: theme.muted}
    colour |= {value: theme.cycle[place % len(theme.cycle)] for place, value in enumerate(thetas)}
    shape: dict[float | None, str] = {None: "X"}
    shape |= {value: MARKERS[place % len(MARKERS)] for place, value in enumerate(sparsities)}
    columns = 4
    rows = -(-(len(thetas) + len(sparsities) + (level is not None)) // columns)
    figure, axes = frame(6.4, 3.4 + 0.19 * rows, 0.15 + 0.19 * rows, theme)
    for point in points:
        axes.scatter(
            [point.exchange], [point.value], 34, color=colour[point.theta], marker=shape[point.sparsity], linewidths=0.5,
            edgecolors=theme.surface, zorder=3,
        )  # fmt: skip
    for theta in thetas:
        axes.scatter([], [], 34, color=colour[theta], marker="o", linewidths=0, label=f"theta {theta:g}")
    for sparsity in sparsities:
        axes.scatter([], [], 30, color=theme.ink, marker=shape[sparsity], linewidths=0, label=f"lambda {sparsity:g}")
    if level is not None:
        axes.axhline(level[1], color=theme.muted, linewidth=1.2, linestyle=(0, (4, 2)), label=level[0])
    axes.set_xlim(-3, 103)
    axes.set_xlabel("exchanged tokens, mean over blocks and modalities, %", fontsize=FONT, color=theme.muted)
    axes.set_ylabel(label, fontsize=FONT, color=theme.muted)
    legend_above(figure, axes, theme, columns)
    return png(figure)
