"""The page of one run, and how any page is written: charts in both themes, one self-contained file."""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from tokenfusion.errors import UserError, require
from tokenfusion.report import metric, plots
from tokenfusion.report.rows import ENSEMBLE, shown_by_class
from tokenfusion.report.run import Figures, Run, View, collapse, one_line, read_run
from tokenfusion.report.samples import css_colours, sample
from tokenfusion.report.theme import DARK, LIGHT, Theme

Value = TypeVar("Value")


class Chart(NamedTuple):
    """A chart as PNG in both themes, and the width it wants in pixels."""

    light: bytes
    dark: bytes
    width: int
    caption: str


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        UserError: where the folder is no run, or one of its files is damaged or missing.
    """
    return write_page(run / "report.html", "page.html.j2", _report(read_run(run)))


def _report(run: Run) -> View:
    samples = [sample(run, name) for name in run.samples.ids]  # first: damage is found before charts are drawn
    figures = run.figures()
    return {
        "title": run.name,
        "task": run.task(),
        "rows": run.rows(),
        "warning": collapse(run.evaluation.collapsed),
        "facts": run.facts(),
        "metrics": metric.names([figures], run.primary()),
        "streams": figures,
        "source": "eval" if run.evaluation.streams else "training",
        "headline": _headline(run),
        "curves": _curves(run),
        "evaluations": sum(line["split"] == "val" for line in run.lines),
        "has_lines": bool(run.lines),
        "exchange": _exchange(run),
        "threshold": run.threshold(),
        "streams_known": len(run.modalities()),
        "samples": samples,
        "least_objectness": run.samples.least_objectness,
        "classes": _classes(run),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
        "commands": _commands(run),
    }


def _headline(run: Run) -> View | None:
    """The primary figure of the ensemble against the best single stream, or that of the only stream."""
    primary = run.primary()
    values = metric.finite({stream: row.get(primary) for stream, row in run.figures().items()})
    singles = {stream: value for stream, value in values.items() if stream != ENSEMBLE}
    leader = run.leader()
    stream = leader if leader in values or len(singles) != 1 else next(iter(singles))
    name = run.rows().leader_name if stream == leader else stream
    if stream not in values:
        return None
    sound = {name: value for name, value in singles.items() if name not in run.evaluation.collapsed}
    rival = metric.best(sound, primary) if stream == ENSEMBLE else None
    text = "" if rival is None else metric.number(values[stream] - singles[rival], primary)
    return {
        "metric": primary,
        "value": values[stream],
        "stream": name,
        "rival": rival,
        "difference": text if text.startswith("-") else "+" + text,
        "lower": metric.lower_is_better(primary),
    }


def _curves(run: Run) -> list[Chart]:
    train, val = plots.series(run.lines, "train"), plots.series(run.lines, "val")
    rate = plots.select(train, "lr/") or ({"learning rate": train["lr"]} if "lr" in train else {})
    primary = run.primary()
    streams = plots.select(val, last=f"/{primary}") if primary else {}
    streams = {name: found for name, found in streams.items() if len(found[0]) > 1}  # one point is no curve
    lower = "; lower is better" if metric.lower_is_better(primary) else ""
    charts = [
        (streams, f"{metric.label(primary)} by {run.rows().noun}, validation{lower}", metric.unit(primary), False),
        *((terms, caption, "", True) for caption, terms in _losses(plots.select(train, "loss/"))),
        (rate, "Learning rate", "", False),
    ]
    return [
        chart(partial(plots.curves, found, unit=percent, loss=loss), caption)
        for found, caption, percent, loss in charts
        if found
    ]


def _losses(found: Mapping[str, plots.Series]) -> Iterator[tuple[str, dict[str, plots.Series]]]:
    """The terms of each phase with a caption; those of the streams come first and keep their colours across charts."""
    phases: dict[str, dict[str, plots.Series]] = {}
    for name in sorted(found, key=lambda name: "/l1/" not in name):
        phase, _, term = name.rpartition("/") if name.count("/") < 2 else name.partition("/")
        phases.setdefault(phase, {})[term.replace("/", " ")] = found[name]
    for phase in sorted(phases, key=lambda phase: (not phase, phase)):
        thin = "; bold: running mean" if any(len(steps) > 60 for steps, _ in phases[phase].values()) else ""
        rest = "Sparsity, and the whole loss" if len(phases) > 1 else "Loss by term"
        yield (f"{phase.capitalize()} loss by term" if phase else rest) + thin, phases[phase]


def _exchange(run: Run) -> View | None:
    """The exchange rates by block: at the end, and over training for every modality."""
    train = plots.series(run.lines, "train")
    rates, below = run.evaluation.exchange, run.evaluation.donor_below
    if not rates:
        rates, below = _last(plots.select(train, "exchange/")), _last(plots.select(train, "donor_below/"))
    rates = _in_order(rates)
    if not rates:
        return None
    modalities = list(dict.fromkeys(name for row in rates.values() for name in row))
    charts = [chart(partial(plots.exchange_at_end, rates, below, modalities), "At the end, in percent")]
    faint: list[str] = []  # their charts would be blank
    for name in modalities:
        found = _in_order(plots.select(train, "exchange/", f"/{name}"))
        if any(value >= 0.005 for _, values in found.values() for value in values):
            charts.append(chart(partial(plots.exchange_over_training, found), f"{name}, over training"))
        elif found:
            faint.append(name)
    return {
        "charts": charts,
        "source": "eval" if run.evaluation.exchange else "training",
        "below": bool(below),
        "streams": len(modalities),
        "faint": faint,
        "curves": len(charts) > 1 or bool(faint),
    }


def _last(found: Mapping[str, plots.Series]) -> Figures:
    """block/modality series -> their last values as a table."""
    table: Figures = {}
    for name, (_, values) in found.items():
        block, _, modality = name.rpartition("/")
        table.setdefault(block, {})[modality] = values[-1] if math.isfinite(values[-1]) else None
    return table


def _in_order(blocks: Mapping[str, Value]) -> dict[str, Value]:
    """Sorted by name, with stage2.10 after stage2.9, and a decoder after its encoder."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return {name: blocks[name] for name in sorted(blocks, key=lambda name: (name.startswith("dec"), natural(name)))}


def _classes(run: Run) -> View | None:
    """The table by class of a segmentation, best ensemble IoU first, and its chart."""
    names, streams = run.evaluation.classes, shown_by_class(run.task(), run.evaluation.per_class)
    if not names or not streams:
        return None
    first = next((kind for table in streams.values() for kind in table), "iou")  # IoU, or AP at the lowest threshold
    iou = {stream: table[first] for stream, table in streams.items() if first in table}
    leader = metric.finite(dict(enumerate(iou.get(run.leader()) or next(reversed(iou.values()), []))))
    order = sorted(range(len(names)), key=lambda at: -leader.get(at, -math.inf))
    bars = {stream: [column[at] for at in order] for stream, column in iou.items()}
    draw = partial(plots.class_bars, [names[at] for at in order], bars, metric.heading(first))
    shown = css_colours(run.samples.palette())
    colours = {entry.name: colour for entry, colour in zip(run.samples.classes, shown, strict=True)}
    kinds = list(dict.fromkeys(kind for table in streams.values() for kind in table))
    columns = [(kind, stream) for kind in kinds for stream in streams if kind in streams[stream]]
    return {
        "chart": chart(draw, f"{metric.label(first)} by class") if iou else None,
        "heads": Counter(kind for kind, _ in columns),
        "columns": columns,
        "single": len(streams) == 1,
        "rows": [
            (names[at], colours.get(names[at]), [streams[stream][kind][at] for kind, stream in columns]) for at in order
        ],
    }


def _commands(run: Run) -> list[str]:
    name = shlex.quote(run.name)
    split = f" --split {shlex.quote(run.evaluation.split)}" if run.evaluation.split else ""
    return [
        f"tokenfusion train {shlex.quote(run.name + '/recipe.yaml')} --out {name}",
        f"tokenfusion eval {name}{split}",
        f"tokenfusion report {name}",
    ]


# What every page needs


def chart(draw: Callable[[Theme], bytes], caption: str) -> Chart:
    """Draw a chart for the light and for the dark page."""
    light, dark = draw(LIGHT), draw(DARK)
    return Chart(light, dark, Image.open(io.BytesIO(light)).width * 100 // plots.DPI, caption)


def _uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _versions() -> list[tuple[str, str]]:
    """What wrote this page."""
    found = [("python", platform.python_version())]
    for package in ("tokenfusion", "torch", "numpy", "matplotlib"):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def write_page(path: Path, template: str, view: View) -> Path:
    """Fill a template, everything escaped, and put the page in place at once.

    Raises:
        UserError: where the file cannot be written.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=metric.number, label=metric.label, heading=metric.heading, quantity=metric.quantity,
        notes=metric.notes, uri=_uri,
    )  # fmt: skip
    environment.globals.update(light=LIGHT, dark=DARK, ensemble=ENSEMBLE, versions=_versions())
    text = environment.get_template(template).render(view)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({one_line(error)}); free the place or choose another") from None
    return path
