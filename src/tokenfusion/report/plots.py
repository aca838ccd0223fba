"""Charts of a run as PNG bytes: curves over the steps, exchange rates by block, IoU by class.

Every chart is drawn once per theme, since a picture cannot follow the reader's light or dark page by itself.
One inch is shown as 100 pixels of the page. Charts that stand side by side share their margins.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenfusion.errors import require
from tokenfusion.report.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, FONT = 200, 8.5
CHART = (3.55, 2.75)  # inches; three of them stand side by side on a wide page
CELL = (0.62, 0.27)  # inches of one heatmap cell
DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)))
STRONG = ("ensemble", "l1 ensemble", "last")  # what ranks a run

Series = tuple[list[int], list[float]]
Rates = Mapping[str, Mapping[str, float | None]]


def series(lines: Sequence[Mapping[str, Any]], split: str) -> dict[str, Series]:
    """Every flat name of the lines of one split -> (steps, values), in the order in which the names appear."""
    found: dict[str, Series] = {}
    for line in lines:
        if line["split"] != split:
            continue
        for name, value in line.items():
            if name not in ("step", "split", "time") and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(float(value))
    return found


def select(found: Mapping[str, Series], first: str = "", last: str = "") -> dict[str, Series]:
    """The series whose name starts and ends so, under the rest of their name."""
    return {
        name[len(first) : len(name) - len(last)]: value
        for name, value in found.items()
        if name.startswith(first) and name.endswith(last)
    }


def percent(share: float) -> str:
    """A share in whole percent; a little is not nothing."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def curves(
    found: Mapping[str, Series], theme: Theme, unit: str = "", loss: bool = False, width: float = CHART[0]
) -> bytes:
    """Lines over the steps.

    Args:
        found: name -> (steps, values); the ensemble is drawn strong, ``total`` muted, the others in the cycle.
        loss: values that are noisy and may span decades: more than 60 points are drawn thin with their running mean
            on top, and the scale is logarithmic where positive values span more than a factor of 30.
        width: inches.
    """
    columns = max(int((width - 0.55) / (0.45 + 0.065 * max(map(len, found)))), 1)
    rows = -(-len(found) // columns)
    columns = -(-len(found) // rows)  # filled evenly
    figure, axes = frame(width, CHART[1] + 0.17 * max(rows - 2, 0), 0.12 + 0.17 * max(rows, 2), theme)
    index = 0
    for name, (steps, values) in found.items():
        strong, named = name in STRONG, name in (*STRONG, "total")
        colour = theme.ink if strong else theme.muted if named else theme.cycle[index % len(theme.cycle)]
        dash = "-" if named else DASHES[index % len(DASHES)]
        index += not named
        if loss and len(values) > 60:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            values = _running_mean(values, len(values) // 30)
        axes.plot(
            steps, values, color=colour, linestyle=dash, linewidth=2.3 if strong else 1.5,
            marker="o" if len(values) <= 30 else "", markersize=3.5, label=short(name, 40),
        )  # fmt: skip
    shown = [value for _, column in found.values() for value in column if np.isfinite(value)]
    if loss and shown and min(shown) > 0 and max(shown) > 30 * min(shown):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-4, 6))  # longer numbers would leave the picture
    _step_ticks(axes, [step for steps, _ in found.values() for step in steps], 5)
    axes.set_xlabel("step", fontsize=FONT, color=theme.muted)
    axes.set_ylabel(unit, fontsize=FONT, color=theme.muted)
    if len(found) > 1:
        legend_above(figure, axes, theme, columns)
    return png(figure)


def exchange_at_end(rates: Rates, below: Rates, modalities: Sequence[str], theme: Theme) -> bytes:
    """Percent per block: what was substituted, and which part of that had a stand-in below the threshold too.

    A share of nothing stays empty.
    """
    blocks = list(rates)
    shares = np.array([[_number(rates[block].get(name)) for name in modalities] for block in blocks])
    groups = [("substituted", shares, theme.orange)]
    if below:
        part = np.array([[_number(below.get(block, {}).get(name)) for name in modalities] for block in blocks])
        groups.append(("… stand-in below too", np.where(shares > 0, part, np.nan), theme.blue))
    wide = max(CELL[0] * len(modalities), 1.32)
    figure = _figure(0.85 + (wide + 0.15) * len(groups), 1.08 + CELL[1] * len(blocks), theme)
    for place, (title, values, colour) in enumerate(groups):
        axes = _rows(figure, 0.8 + place * (wide + 0.15), wide, blocks if place == 0 else [], len(blocks), theme)
        _cells(axes, values, colour, theme)
        axes.set_xlim(-0.5, len(modalities) - 0.5)
        axes.set_xticks(range(len(modalities)), [_column(name) for name in modalities])
        axes.xaxis.tick_top()
        axes.set_title(title, fontsize=FONT, color=theme.ink, loc="left", pad=7)
    return png(figure)


def exchange_over_training(found: Mapping[str, Series], theme: Theme) -> bytes:
    """One stream's substituted share as shade: blocks downwards, steps to the right."""
    blocks = list(found)
    steps = sorted({step for places, _ in found.values() for step in places})
    column = {step: place for place, step in enumerate(steps)}
    grid = np.full((len(blocks), len(steps)), np.nan)
    for row, (places, values) in enumerate(found.values()):
        grid[row, [column[step] for step in places]] = values
    figure = _figure(3.35, 1.08 + CELL[1] * len(blocks), theme)
    axes = _rows(figure, 0.8, 2.4, blocks, len(blocks), theme)
    edges = [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]
    axes.pcolormesh(edges, np.arange(len(blocks) + 1) - 0.5, grid, cmap=_shades(theme.orange, theme), vmin=0, vmax=1)
    _step_ticks(axes, steps, 4)
    axes.set_xlabel("step", fontsize=FONT, color=theme.muted)
    axes.set_title("substituted", fontsize=FONT, color=theme.ink, loc="left", pad=7)
    return png(figure)


def class_bars(names: Sequence[str], scores: Mapping[str, Sequence[float | None]], unit: str, theme: Theme) -> bytes:
    """One row per class: a bar for the last stream (the ensemble), a mark for each other one."""
    *others, main = scores
    left = 0.2 + 0.066 * max(len(short(name, 20)) for name in names)
    figure, axes = frame(4.6, 0.85 + 0.25 * len(names), 0.35, theme, left=left)
    rows = np.arange(len(names))
    axes.barh(rows, [_number(value) for value in scores[main]], 0.62, color=theme.accent, alpha=0.45, label=short(main))
    for index, stream in enumerate(others):
        colour, marker = theme.cycle[index % len(theme.cycle)], "oDs^v"[index % 5]
        values = [_number(value) for value in scores[stream]]
        axes.scatter(
            values, rows, s=18, zorder=3, linewidths=0, clip_on=False, color=colour, marker=marker, label=short(stream),
        )  # fmt: skip
    axes.set_yticks(rows, [short(name, 20) for name in names], color=theme.ink)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=FONT, color=theme.muted)
    axes.grid(axis="y", visible=False)
    legend_above(figure, axes, theme, 5)
    return png(figure)


def _figure(width: float, height: float, theme: Theme) -> Figure:
    """A figure of its own (no pyplot, no global settings); sizes in inches."""
    figure: Figure = require("matplotlib.figure", "report").Figure((width, height), dpi=DPI, facecolor=theme.surface)
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, theme: Theme) -> Axes:
    """Plain axes at a place in inches."""
    whole_width, whole_height = figure.get_size_inches()
    place = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(place, facecolor=theme.surface)
    axes.tick_params(which="both", length=0, labelsize=FONT, labelcolor=theme.muted)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.yaxis.get_offset_text().set(color=theme.muted, fontsize=FONT)
    return axes


def frame(width: float, height: float, top: float, theme: Theme, left: float = 0.55) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and room for a legend on top."""
    figure = _figure(width, height, theme)
    axes = _axes(figure, left, 0.45, width - left - 0.15, height - top - 0.45, theme)
    axes.grid(color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _rows(figure: Figure, left: float, width: float, labels: Sequence[str], rows: int, theme: Theme) -> Axes:
    """Axes with one row per block, of the same height and place in every exchange chart."""
    axes = _axes(figure, left, 0.46, width, CELL[1] * rows, theme)
    axes.spines[:].set_visible(False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows) if labels else [], [short(label, 12) for label in labels])
    return axes


def _cells(axes: Axes, values: NDArray[np.float64], colour: str, theme: Theme) -> None:
    """A heatmap with its percentages written in."""
    edges = [np.arange(size + 1) - 0.5 for size in values.shape]
    shades = _shades(colour, theme)
    axes.pcolormesh(edges[1], edges[0], values, cmap=shades, vmin=0, vmax=1, edgecolors=theme.surface, linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = shades(value)
            ink = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
            axes.text(column, row, percent(value), ha="center", va="center", fontsize=FONT, color=ink)


def _shades(colour: str, theme: Theme) -> Any:
    """From nearly the surface (nothing) to the full colour (everything); undefined cells stay surface."""
    make = require("matplotlib.colors", "report").LinearSegmentedColormap.from_list
    return make("shades", [theme.line, colour]).with_extremes(bad=theme.surface)


def _step_ticks(axes: Axes, steps: Sequence[int], count: int) -> None:
    """Round steps, or the only one that there is."""
    ticker = require("matplotlib.ticker", "report")
    alone = len(set(steps)) == 1
    axes.xaxis.set_major_locator(
        ticker.FixedLocator(steps[:1]) if alone else ticker.MaxNLocator(count, integer=True, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}")
    )


def legend_above(figure: Figure, axes: Axes, theme: Theme, columns: int) -> None:
    left = axes.get_position().x0
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(left, 1.0), ncols=columns, fontsize=FONT,
        frameon=False, borderaxespad=0.1, borderpad=0, handlelength=2.0, columnspacing=1.2, labelcolor=theme.ink,
    )  # fmt: skip
    legend.set_in_layout(False)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window, shorter at the ends; what is not finite is left out."""
    column = np.asarray(values, np.float64)
    finite = np.isfinite(column)
    window = np.ones(2 * (width // 2) + 1)
    counts = np.convolve(finite, window, "same")
    means = np.convolve(np.where(finite, column, 0), window, "same") / np.maximum(counts, 1)
    return [float(mean) for mean in np.where(counts > 0, means, np.nan)]


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def short(name: str, most: int = 24) -> str:
    """A name as matplotlib may draw it: shortened, and a dollar is a dollar."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def _column(name: str) -> str:
    """A name over a narrow column, in two lines where it is long and has two words."""
    first, mark, rest = name.partition("_")
    if len(name) <= 10 or not rest:
        return short(name, 10)
    return f"{short(first, 9)}{mark}\n{short(rest, 10)}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 128 colours: a third of the size, and no difference to be seen."""
    canvas = require("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    data = io.BytesIO()
    pixels.quantize(128, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return data.getvalue()
