"""One self-contained page for a run folder, and one that puts several runs side by side."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, model_validator

from tokenfusion.errors import UserError, require
from tokenfusion.report import maps, plots

SIDE, MAP_SIDE = 384, 264  # pixels of the longer side: inputs and predictions, exchange maps
METRICS = {"miou": "mIoU", "pixel_accuracy": "Pixel accuracy", "mean_accuracy": "Mean accuracy"}
LOWER_IS_BETTER = re.compile(r"mae|mse|l1|l2|fid|kid|loss|error", re.IGNORECASE)
ENSEMBLE = "ensemble"

Arrays = dict[str, NDArray[Any]]
Figures = dict[str, dict[str, float | None]]
View = dict[str, Any]
Level = Annotated[int, Field(ge=0, le=255)]


class Evaluation(BaseModel):
    """``metrics.json``: what ``eval`` wrote."""

    task: str = ""
    split: str = ""
    images: int | None = None
    protocol: str = ""
    streams: Figures = {}
    classes: list[str] = []
    per_class: dict[str, dict[str, list[float | None]]] = {}
    exchange: Figures = {}
    donor_below: Figures = {}
    checkpoint: str = ""
    step: int | None = None
    parameters: int | None = None

    @model_validator(mode="after")
    def _one_value_per_class(self) -> Evaluation:
        for stream, table in self.per_class.items():
            for metric, column in table.items():
                if len(column) != len(self.classes):
                    raise ValueError(f"per_class.{stream}.{metric} holds {len(column)} values, not {len(self.classes)}")
        return self


class ClassEntry(BaseModel):
    """A class of the data set; a missing colour is filled in."""

    name: str
    color: tuple[Level, Level, Level] | None = None


class Samples(BaseModel):
    """``samples/index.json``: which samples there are, and how to read them."""

    ids: list[str] = []
    modalities: list[str] = []
    blocks: list[str] = []
    threshold: float | None = None
    classes: list[ClassEntry] = []
    ignore: int | None = 255


class Run(NamedTuple):
    """What a run folder holds; ``evaluation`` and ``samples`` are empty where their files are missing."""

    path: Path
    name: str
    recipe: View
    lines: list[View]
    evaluation: Evaluation
    samples: Samples


class Picture(NamedTuple):
    """An image of the page, with its place in the grid (from 1)."""

    source: str
    caption: str
    note: str
    column: int
    row: int


class Chart(NamedTuple):
    """A chart in both themes, and the width it wants in pixels."""

    light: str
    dark: str
    width: int
    caption: str


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        UserError: where the folder is no run, or one of its files is damaged or missing.
    """
    return _write(run / "report.html", "page.html.j2", _report(read_run(run)))


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write one page that compares runs; ``out`` is an HTML file, or a folder that gets ``compare.html``.

    Raises:
        UserError: where a folder is no run, or one of its files is damaged.
    """
    if not runs:
        raise UserError("nothing to compare: no run folder came, at least one is wanted")
    found = [read_run(run) for run in runs]
    named = [run._replace(name=name) for run, name in zip(found, _distinct(found), strict=True)]
    return _write(out / "compare.html" if out.is_dir() else out, "compare.html.j2", _comparison(named))


# Reading a run folder


def read_run(path: Path) -> Run:
    """Read a run folder; only ``recipe.yaml`` must be there.

    Raises:
        UserError: where it is no run folder, or a file in it is damaged.
    """
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it holds no recipe.yaml; give a folder that `train --out` wrote")
    return Run(
        path=path,
        name=path.resolve().name,
        recipe=_mapping(path / "recipe.yaml", yaml.safe_load),
        lines=_lines(path / "metrics.jsonl"),
        evaluation=_checked(path / "metrics.json", Evaluation),
        samples=_checked(path / "samples" / "index.json", Samples),
    )


def _mapping(path: Path, parse: Callable[[str], Any]) -> View:
    try:
        value = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); restore the file or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, a mapping is wanted; write it again")
    return value


Model = TypeVar("Model", bound=BaseModel)


def _checked(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(_mapping(path, json.loads))
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"key {'.'.join(map(str, place))}: " for place in [first["loc"]] if place)
        raise UserError(f"{path}: {key}{_one_line(first['msg'])}; write it again with `tokenfusion eval`") from None


def _lines(path: Path) -> list[View]:
    """The lines of ``metrics.jsonl`` in the order of their steps."""
    lines: list[View] = []
    try:
        texts = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); restore the file") from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({_one_line(error)}); delete that line") from None
        if not (isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("split"), str)):
            raise UserError(f'{path}, line {number}: wanted an object with "step" and "split"; delete that line')
        lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def _arrays(path: Path) -> Arrays:
    if not path.is_file():
        raise UserError(f"{path}: index.json names this sample, but the file is missing; run `tokenfusion eval` again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({_one_line(error)}); run `tokenfusion eval` again") from None


# What a run says about itself


def _modalities(run: Run) -> list[str]:
    named = (run.recipe.get("data") or {}).get("modalities") if isinstance(run.recipe.get("data"), dict) else None
    if run.samples.modalities:
        return run.samples.modalities
    if isinstance(named, str):
        return [named]
    return [str(name) for name in named or [stream for stream in _figures(run) if stream != ENSEMBLE]]


def _component(value: Any) -> str:
    """A component of a recipe in a few words: its name and plain arguments."""
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    name = str(value.get("_target_", value.get("name", ""))).rpartition(".")[2]
    settings = [f"{key} {item}" for key, item in value.items() if key not in ("_target_", "name") and _plain(item)]
    return f"{name} ({', '.join(settings)})" if settings else name


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _threshold(run: Run) -> float | None:
    """The threshold of the scores: as the samples state it, else as the recipe does."""
    fuser = run.recipe.get("fuser")
    stated = fuser.get("threshold") if isinstance(fuser, dict) else None
    return run.samples.threshold if run.samples.threshold is not None or not isinstance(stated, int | float) else stated


def _figures(run: Run) -> Figures:
    """Figures per stream: those of ``eval``, else those of the last evaluation during training."""
    if run.evaluation.streams:
        return run.evaluation.streams
    table: Figures = {}
    for line in reversed(run.lines):
        if line["split"] == "val":
            for name, value in line.items():
                stream, _, metric = name.rpartition("/")
                if stream and stream != "loss" and isinstance(value, int | float):
                    table.setdefault(stream, {})[metric] = float(value)
            break
    return table


def _metrics(tables: Sequence[Figures]) -> list[str]:
    """The names of the metrics, the primary one first."""
    names = dict.fromkeys(metric for table in tables for row in table.values() for metric in row)
    return sorted(names, key=lambda name: name != "miou")


def _steps(run: Run) -> int | None:
    last: int | None = run.lines[-1]["step"] if run.lines else None
    return run.evaluation.step if run.evaluation.step is not None else last


def _facts(run: Run) -> list[tuple[str, str]]:
    recipe, evaluation = run.recipe, run.evaluation
    data = recipe.get("data") if isinstance(recipe.get("data"), dict) else {}
    planned = recipe["train"].get("steps") if isinstance(recipe.get("train"), dict) else None
    seconds = [line["time"] for line in run.lines if isinstance(line.get("time"), int | float)]
    steps = _steps(run)
    facts = [
        ("Data set", str(data.get("name") or data.get("root") or "") if data else ""),
        ("Modalities", " + ".join(_modalities(run))),
        ("Fuser", _component(recipe["fuser"]) if "fuser" in recipe else ""),
        ("Step", f"{steps:,}" + (f" of {planned:,}" if isinstance(planned, int) else "") if steps is not None else ""),
        ("Checkpoint", evaluation.checkpoint),
        ("Evaluated on", " · ".join(filter(None, [evaluation.split, _count(evaluation.images, "image")]))),
        ("Protocol", evaluation.protocol),
        ("Parameters", f"{evaluation.parameters:,}" if evaluation.parameters else ""),
        ("Seed", str(recipe.get("seed", ""))),
        ("Training time", _duration(max(seconds)) if seconds else ""),
    ]
    return [(name, value) for name, value in facts if value]


# The page of one run


def _report(run: Run) -> View:
    samples = [_sample(run, name) for name in run.samples.ids]  # first: damage is found before charts are drawn
    figures = _figures(run)
    metrics = _metrics([figures])
    task = run.evaluation.task or _component(run.recipe.get("task", ""))
    return {
        "title": run.name,
        "task": task,
        "facts": _facts(run),
        "metrics": metrics,
        "streams": figures,
        "ensemble": ENSEMBLE,
        "source": "eval" if run.evaluation.streams else "training",
        "headline": _headline(figures, metrics),
        "curves": _curves(run),
        "has_val": any(line["split"] == "val" for line in run.lines),
        "has_lines": bool(run.lines),
        "exchange": _exchange(run),
        "threshold": _threshold(run),
        "streams_known": len(_modalities(run)),
        "samples": samples,
        "classes": _classes(run),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
        "commands": _commands(run),
        "versions": _versions(),
    }


def _headline(figures: Figures, metrics: Sequence[str]) -> View | None:
    """The primary figure of the ensemble against the best single stream, or that of the only stream."""
    metric = metrics[0] if metrics else ""
    values = {stream: row[metric] for stream, row in figures.items() if _finite(row.get(metric))}
    singles = {stream: value for stream, value in values.items() if stream != ENSEMBLE}
    stream = ENSEMBLE if ENSEMBLE in values or len(singles) != 1 else next(iter(singles))
    value = values.get(stream)
    if value is None:
        return None
    rival = _best(singles, metric) if stream == ENSEMBLE and singles else None
    text = "" if rival is None else _number(value - (singles[rival] or 0.0), metric)
    difference = text if text.startswith("-") else "+" + text
    lower = LOWER_IS_BETTER.search(metric) is not None
    return {
        "metric": metric,
        "value": value,
        "stream": stream,
        "rival": rival,
        "difference": difference,
        "lower": lower,
    }


def _curves(run: Run) -> list[Chart]:
    train, val = plots.series(run.lines, "train"), plots.series(run.lines, "val")
    rate = plots.select(train, "lr/") or ({"learning rate": train["lr"]} if "lr" in train else {})
    primary = _metrics([_figures(run)])[:1]
    streams = plots.select(val, last=f"/{primary[0]}") if primary else {}
    losses = plots.select(train, "loss/")
    label = METRICS.get(primary[0], primary[0]) if primary else ""
    thin = "; bold: running mean" if any(len(steps) > 60 for steps, _ in losses.values()) else ""
    charts = [
        (streams, f"{label} by stream, validation", _unit(primary[0]) if primary else "", False),
        (losses, f"Loss by term{thin}", "", True),
        (rate, "Learning rate", "", False),
    ]
    return [
        _chart(partial(plots.curves, found, unit=unit, smooth=smooth), caption)
        for found, caption, unit, smooth in charts
        if found
    ]


def _exchange(run: Run) -> View | None:
    """The exchange rates by block: at the end, and over training for every modality."""
    train = plots.series(run.lines, "train")
    rates, below = run.evaluation.exchange, run.evaluation.donor_below
    if not rates:
        rates, below = _last(plots.select(train, "exchange/")), _last(plots.select(train, "donor_below/"))
    rates = {block: rates[block] for block in sorted(rates, key=_natural)}
    if not rates:
        return None
    modalities = list(dict.fromkeys(name for row in rates.values() for name in row))
    charts = [_chart(partial(plots.exchange_at_end, rates, below, modalities), "At the end, in percent")]
    for name in modalities:
        found = plots.select(train, "exchange/", f"/{name}")
        if found:
            found = {block: found[block] for block in sorted(found, key=_natural)}
            charts.append(_chart(partial(plots.exchange_over_training, found), f"{name}, over training"))
    source = "eval" if run.evaluation.exchange else "training"
    return {"charts": charts, "source": source, "below": bool(below), "curves": len(charts) > 1}


def _last(found: Mapping[str, plots.Series]) -> Figures:
    """block/modality series -> their last values as a table."""
    table: Figures = {}
    for name, (_, values) in found.items():
        block, _, modality = name.rpartition("/")
        table.setdefault(block, {})[modality] = values[-1] if math.isfinite(values[-1]) else None
    return table


def _classes(run: Run) -> View | None:
    """The table by class, best ensemble IoU first, and its chart."""
    names, streams = run.evaluation.classes, run.evaluation.per_class
    if not names or not streams:
        return None
    metrics = list(dict.fromkeys(metric for table in streams.values() for metric in table))
    iou = {stream: table["iou"] for stream, table in streams.items() if "iou" in table}
    leader = iou.get(ENSEMBLE) or next(reversed(iou.values()), [None] * len(names))
    order = sorted(range(len(names)), key=lambda place: -(leader[place] or 0.0) if _finite(leader[place]) else math.inf)
    chart = None
    if iou:
        bars = {stream: [column[place] for place in order] for stream, column in iou.items()}
        chart = _chart(partial(plots.class_bars, [names[place] for place in order], bars, "IoU, %"), "IoU by class")
    columns = [(metric, stream) for metric in metrics for stream in streams if metric in streams[stream]]
    colours = {entry.name: colour for entry, colour in zip(run.samples.classes, _css(_palette(run)), strict=True)}
    rows = [
        (names[place], colours.get(names[place]), [streams[stream][metric][place] for metric, stream in columns])
        for place in order
    ]
    heads = [(metric, sum(name == metric for name, _ in columns)) for metric in metrics]
    return {"chart": chart, "heads": heads, "columns": columns, "rows": rows}


# The samples


def _sample(run: Run, name: str) -> View:
    """Everything to show of one sample; an error names its file."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise UserError(f"{run.path / 'samples' / 'index.json'}: id {name!r} leads out of the folder; take it out")
    path = run.path / "samples" / f"{name}.npz"
    arrays = _arrays(path)
    try:
        return {"id": name, **_results(run, arrays), **_exchanged(run, arrays)}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}; run `tokenfusion eval` again") from None


def _results(run: Run, arrays: Arrays) -> View:
    """Rows of pictures whose columns are the streams: inputs and target, predictions, errors."""
    colours, ignore = _palette(run), run.samples.ignore
    inputs, predictions = _under(arrays, "input/"), _under(arrays, "prediction/")
    target = arrays.get("target")
    first = len(inputs) + (target is not None)
    columns = max(first, len(predictions), 1)
    show = partial(_shown, colours=colours, ignore=ignore)
    pictures = [
        _picture(maps.shrink(_input(arrays, name), SIDE), name, column, 1) for column, name in enumerate(inputs, 1)
    ]
    if target is not None:
        pictures.append(_picture(show(target), "target", columns, 1, flat=target.ndim == 2))
    alone = len(predictions) == 1  # everything goes into one row
    for place, (name, prediction) in enumerate(predictions.items(), 1):
        flat = prediction.ndim == 2
        column, row = (first + 1, 1) if alone else (place, 2)
        pictures.append(_picture(show(prediction), f"{name}: prediction", column, row, flat=flat))
        if target is not None:
            share = maps.error_share(prediction, target, ignore)
            errors = maps.error_map(maps.shrink(prediction, SIDE), maps.shrink(target, SIDE), ignore)
            note = "" if share is None else f"{100 * share:.1f} % " + ("wrong" if flat else "of the range off")
            column, row = (first + 2, 1) if alone else (place, 3)
            pictures.append(_picture(errors, f"{name}: errors", column, row, note, flat=flat))
    columns = max(picture.column for picture in pictures) if pictures else 1
    legend = _legend(run, [array for array in (target, *predictions.values()) if array is not None])
    return {"columns": columns, "pictures": pictures, "legend": legend, "has_target": target is not None}


def _exchanged(run: Run, arrays: Arrays) -> View:
    """For every stream the chosen blocks' maps of exchanged tokens, on its own input."""
    index = run.samples
    blocks = [block for block in index.blocks if f"scores/{block}" in arrays]
    if index.threshold is None or not blocks:
        return {"streams": [], "below": False}
    chosen = maps.chosen_blocks(blocks)
    streams: list[tuple[str, list[Picture]]] = [(name, []) for name in index.modalities]
    known = False
    for block, column, row in chosen:
        exchanged = maps.exchange_map(arrays[f"scores/{block}"], index.threshold)
        if len(exchanged) != len(index.modalities):
            raise ValueError(f"scores/{block} has {len(exchanged)} streams, index.json {len(index.modalities)}")
        below = maps.donor_below(exchanged)
        known = below is not None
        for place, (name, pictures) in enumerate(streams):
            base = maps.shrink(_input(arrays, name), MAP_SIDE)
            part = None if below is None else below[place]
            painted = maps.overlay(base, exchanged[place], part)
            pictures.append(_picture(painted, block, column, row, _rate(exchanged[place], part)))
    return {
        "streams": streams,
        "stages": max(column for _, column, _ in chosen),
        "single": all(row == 1 for _, _, row in chosen),
        "below": known,
    }


def _rate(exchanged: maps.Mask, below: maps.Mask | None) -> str:
    text = _percent(exchanged.mean())
    if below is None or not exchanged.any():
        return text
    return f"{text}, {_percent(below.sum() / exchanged.sum())} of them blue"


def _percent(share: float) -> str:
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def _input(arrays: Arrays, name: str) -> maps.Bytes:
    if f"input/{name}" not in arrays:
        raise ValueError(f"holds no input/{name}")
    return maps.checked_image(arrays[f"input/{name}"])


def _under(arrays: Arrays, prefix: str) -> Arrays:
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return {name: found[name] for name in sorted(found, key=lambda name: name == ENSEMBLE)}


def _shown(array: NDArray[Any], colours: maps.Bytes, ignore: int | None) -> maps.Bytes:
    """Class ids or an image as a picture of the page's size."""
    if array.ndim == 2:
        return maps.colour_labels(maps.shrink(array, SIDE), colours, ignore)
    return maps.shrink(maps.checked_image(array), SIDE)


def _picture(image: maps.Bytes, caption: str, column: int, row: int, note: str = "", flat: bool = False) -> Picture:
    """Encode an image: flat colours as PNG, everything else as JPEG."""
    data = io.BytesIO()
    if flat:
        Image.fromarray(image).save(data, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(data, "JPEG", quality=80, optimize=True)
    return Picture(_uri(data.getvalue(), "png" if flat else "jpeg"), caption, note, column, row)


def _chart(draw: Callable[[plots.Theme], bytes], caption: str) -> Chart:
    light, dark = draw(plots.LIGHT), draw(plots.DARK)
    width = Image.open(io.BytesIO(light)).width * 100 // plots.DPI
    return Chart(_uri(light, "png"), _uri(dark, "png"), width, caption)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _palette(run: Run) -> maps.Bytes:
    return maps.palette([entry.color for entry in run.samples.classes])


def _css(colours: maps.Bytes) -> list[str]:
    return ["#" + bytes(colour).hex() for colour in colours]


def _legend(run: Run, arrays: Iterable[NDArray[Any]]) -> list[tuple[str, str]]:
    """Name and colour of the classes that occur; empty where the arrays are images."""
    present = {int(label) for array in arrays if array.ndim == 2 for label in np.unique(array)}
    colours = _css(_palette(run))
    legend = [(entry.name, colours[at]) for at, entry in enumerate(run.samples.classes) if at in present]
    ignored = run.samples.ignore is not None and run.samples.ignore in present
    return [*legend, ("not counted", "#" + bytes(maps.IGNORED).hex())] if ignored else legend


# The page of several runs


def _comparison(runs: Sequence[Run]) -> View:
    figures = [_figures(run) for run in runs]
    metrics = _metrics(figures)
    metric = metrics[0] if metrics else ""
    streams = list(dict.fromkeys(stream for table in figures for stream in table if stream != ENSEMBLE))
    streams += [ENSEMBLE] if any(ENSEMBLE in table for table in figures) else []
    ensembles = {at: table.get(ENSEMBLE, {}).get(metric) for at, table in enumerate(figures)}
    known = {at: value for at, value in ensembles.items() if _finite(value)}
    curves = {
        run.name: found for run, table in zip(runs, figures, strict=True) if (found := _curve(run, table, metric))
    }
    return {
        "title": "Comparison of " + _count(len(runs), "run"),
        "runs": runs,
        "facts": [dict(_facts(run)) for run in runs],
        "figures": figures,
        "metrics": metrics,
        "metric": metric,
        "streams": streams,
        "ensemble": ENSEMBLE,
        "best": _best(known, metric) if len(known) > 1 else None,
        "chart_of_runs": _curves_of_runs(curves, metric) if curves else None,
        "without_curve": [run.name for run in runs if run.name not in curves],
        "parameters_known": any(run.evaluation.parameters for run in runs),
        "differences": _differences(runs),
        "warnings": list(_warnings(runs, figures)),
        "versions": _versions(),
    }


def _curves_of_runs(curves: Mapping[str, plots.Series], metric: str) -> Chart:
    caption = f"{_label(metric)} of the ensemble (of the only stream where there is one) on the validation split"
    return _chart(partial(plots.curves, curves, unit=_unit(metric), width=6.4), caption)


def _curve(run: Run, table: Figures, metric: str) -> plots.Series | None:
    """The primary figure of the ensemble over training, or of the only stream."""
    stream = ENSEMBLE if ENSEMBLE in table else next(iter(table), "")
    return plots.series(run.lines, "val").get(f"{stream}/{metric}")


def _warnings(runs: Sequence[Run], figures: Sequence[Figures]) -> Iterator[str]:
    """What keeps the figures from being comparable, one sentence each."""
    for key, what in (("protocol", "protocols"), ("split", "splits"), ("images", "numbers of images")):
        values = [str(getattr(run.evaluation, key)) for run in runs if run.evaluation.streams]
        if len(set(values)) > 1:
            yield f"The runs were evaluated with different {what} ({'; '.join(dict.fromkeys(values))})."
    training = [run.name for run, table in zip(runs, figures, strict=True) if table and not run.evaluation.streams]
    if training:
        yield f"Figures of the last evaluation during training, not of eval: {', '.join(training)}."
    nothing = [run.name for run, table in zip(runs, figures, strict=True) if not table]
    if nothing:
        yield f"Not evaluated yet: {', '.join(nothing)}."


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """The recipe keys whose values differ, one value per run; None where a recipe lacks the key."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    rows = [(key, [recipe.get(key) for recipe in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _distinct(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    counted = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counted, strict=True)]


# Words, numbers and the file


def _commands(run: Run) -> list[str]:
    name = shlex.quote(run.name)
    split = f" --split {shlex.quote(run.evaluation.split)}" if run.evaluation.split else ""
    return [
        f"tokenfusion train {shlex.quote(run.name + '/recipe.yaml')} --out {name}",
        f"tokenfusion eval {name}{split}",
        f"tokenfusion report {name}",
    ]


def _versions() -> list[tuple[str, str]]:
    """What wrote this page."""
    found = [("python", platform.python_version())]
    for package in ("tokenfusion", "torch", "numpy", "matplotlib"):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _best(values: Mapping[Any, float | None], metric: str) -> Any:
    sign = -1 if LOWER_IS_BETTER.search(metric) else 1
    return max(values, key=lambda name: sign * (values[name] or 0.0))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _unit(metric: str) -> str:
    return "%" if metric in (*METRICS, "iou", "accuracy") else ""


def _number(value: float | None, metric: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if _unit(metric) else f"{value:.4g}"


def _label(metric: str) -> str:
    return METRICS.get(metric, {"iou": "IoU", "accuracy": "Accuracy"}.get(metric, metric))


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with stage2.10 after stage2.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _write(path: Path, template: str, view: View) -> Path:
    """Fill a template, everything escaped, and put the page in place at once."""
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=_number, label=_label, unit=_unit)
    text = environment.get_template(template).render({**view, "light": plots.LIGHT, "dark": plots.DARK})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({_one_line(error)}); free the place or choose another") from None
    return path
