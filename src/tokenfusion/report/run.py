"""A run folder: what it holds, read and checked, and what it says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tokenfusion.errors import UserError
from tokenfusion.report import maps
from tokenfusion.report.rows import ENSEMBLE, Rows, rows_of

Figures = dict[str, dict[str, float | None]]  # stream -> metric -> value, or block -> modality -> rate
View = dict[str, Any]
Level = Annotated[int, Field(ge=0, le=255)]
Model = TypeVar("Model", bound=BaseModel)


class Evaluation(BaseModel):
    """``metrics.json``: what ``eval`` wrote."""

    task: str = ""
    dataset: str = ""
    split: str = ""
    images: int | None = None
    protocol: str = ""
    target: str = ""  # of a translation: the modality that is made
    primary: str = ""  # the metric that ranks; not stated by old runs
    streams: Figures = {}
    collapsed: list[str] = []  # streams whose images are constant or all alike
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

    @model_validator(mode="after")
    def _primary_is_there(self) -> Evaluation:
        if self.primary and self.streams and not any(self.primary in row for row in self.streams.values()):
            raise ValueError(f"primary is {self.primary!r}, which no stream has")
        return self


class ClassEntry(BaseModel):
    """A class of the data set; a missing colour is filled in."""

    name: str
    color: tuple[Level, Level, Level] | None = None


class Samples(BaseModel):
    """``samples/index.json``: which samples there are, and how to read them."""

    ids: list[str] = []
    target: str = ""
    modalities: list[str] = []
    blocks: list[str] = []
    threshold: float | None = None
    classes: list[ClassEntry] = []
    ignore: int | None = 255
    least_objectness: float | None = None  # of the boxes that pictures show

    def palette(self) -> maps.Bytes:
        """The colours of the classes [K, 3]."""
        return maps.palette([entry.color for entry in self.classes])


class Run(NamedTuple):
    """What a run folder holds; ``evaluation`` and ``samples`` are empty where their files are missing."""

    path: Path
    name: str
    recipe: View
    lines: list[View]  # of metrics.jsonl, in the order of their steps
    evaluation: Evaluation
    samples: Samples

    def section(self, name: str) -> View:
        """A part of the recipe; empty where there is none."""
        part = self.recipe.get(name)
        return part if isinstance(part, dict) else {}

    def modalities(self) -> list[str]:
        """As the samples name them, else the recipe, else the streams that have figures."""
        named = self.section("data").get("modalities")
        if self.samples.modalities:
            return self.samples.modalities
        if isinstance(named, str):
            return [named]
        return [str(name) for name in named or [stream for stream in self.figures() if stream != ENSEMBLE]]

    def threshold(self) -> float | None:
        """The threshold of the scores: as the samples state it, else as the recipe does."""
        stated = self.section("fuser").get("threshold")
        if self.samples.threshold is not None:
            return self.samples.threshold
        return stated if isinstance(stated, int | float) else None

    def figures(self) -> Figures:
        """Figures per stream: those of ``eval``, else those of the last evaluation during training."""
        if self.evaluation.streams:
            return self.evaluation.streams
        table: Figures = {}
        for name, value in next((line for line in reversed(self.lines) if line["split"] == "val"), {}).items():
            stream, _, metric = name.rpartition("/")
            if stream and stream != "loss" and isinstance(value, int | float):
                table.setdefault(stream, {})[metric] = float(value)
        return table

    def primary(self) -> str:
        """The metric that ranks: as ``eval`` states it, else mIoU, else the first that there is."""
        found = dict.fromkeys(metric for row in self.figures().values() for metric in row)
        return self.evaluation.primary or ("miou" if "miou" in found else next(iter(found), ""))

    def task(self) -> str:
        """What the run was trained for; empty where nothing states it."""
        return self.evaluation.task or component(self.recipe.get("task", ""))

    def rows(self) -> Rows:
        """What its figures are of."""
        return rows_of(self.task())

    def leader(self) -> str:
        """The row of the figures that ranks: the ensemble of streams, or a detector's last head."""
        return self.rows().leader

    def target(self) -> str:
        """The modality that a translation makes; empty for other tasks."""
        return self.evaluation.target or self.samples.target or str(self.section("data").get("target") or "")

    def facts(self) -> dict[str, str]:
        """What the run is, in words; what it does not state is left out."""
        recipe, evaluation, data = self.recipe, self.evaluation, self.section("data")
        planned = self.section("train").get("steps")
        seconds = [line["time"] for line in self.lines if isinstance(line.get("time"), int | float)]
        step = self.lines[-1]["step"] if evaluation.step is None and self.lines else evaluation.step
        facts = {
            "Data set": evaluation.dataset or str(data.get("root") or ""),
            "Modalities": " + ".join(self.modalities()),
            "Target": self.target(),
            "Fuser": component(recipe["fuser"]) if "fuser" in recipe else "",
            "Step": f"{step:,}" + (f" of {planned:,}" if isinstance(planned, int) else "") if step is not None else "",
            "Checkpoint": evaluation.checkpoint,
            "Evaluated on": " · ".join(
                filter(None, [evaluation.split, counted(evaluation.images, self.rows().judged)])
            ),
            "Protocol": evaluation.protocol,
            "Parameters": f"{evaluation.parameters:,}" if evaluation.parameters else "",
            "Seed": str(recipe.get("seed", "")),
            "Training time": _duration(max(seconds)) if seconds else "",
        }
        return {name: value for name, value in facts.items() if value}


def read_run(path: Path) -> Run:
    """Read a run folder; only ``recipe.yaml`` must be there.

    Raises:
        UserError: where it is no run folder, or a file in it is damaged.
    """
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it holds no recipe.yaml; give a folder that `train --out` wrote")
    run = Run(
        path=path,
        name=path.resolve().name,
        recipe=_mapping(path / "recipe.yaml", yaml.safe_load),
        lines=_lines(path / "metrics.jsonl"),
        evaluation=_checked(path / "metrics.json", Evaluation),
        samples=_checked(path / "samples" / "index.json", Samples),
    )
    return _without_ensemble(run) if len(run.modalities()) == 1 else run


def _without_ensemble(run: Run) -> Run:
    """A run of one stream, whose ensemble would show that stream a second time."""
    for table in (run.evaluation.streams, run.evaluation.per_class):
        table.pop(ENSEMBLE, None)
    evaluation = run.evaluation.model_copy(
        update={"collapsed": [name for name in run.evaluation.collapsed if name != ENSEMBLE]}
    )
    lines = [{name: value for name, value in line.items() if ENSEMBLE not in name.split("/")} for line in run.lines]
    return run._replace(lines=lines, evaluation=evaluation)


def _mapping(path: Path, parse: Callable[[str], Any]) -> View:
    try:
        value = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the file or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, a mapping is wanted; write it again")
    return value


def _checked(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(_mapping(path, json.loads))
    except ValidationError as error:
        first = error.errors()[0]
        key = f"key {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise UserError(f"{path}: {key}{one_line(first['msg'])}; write it again with `tokenfusion eval`") from None


def _lines(path: Path) -> list[View]:
    lines: list[View] = []
    try:
        texts = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the file") from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({one_line(error)}); delete that line") from None
        if not (isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("split"), str)):
            raise UserError(f'{path}, line {number}: wanted an object with "step" and "split"; delete that line')
        lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def collapse(streams: Sequence[str]) -> str:
    """What it means that the images of these streams have collapsed, and what to do; empty where none has."""
    if not streams:
        return ""
    shown = " and ".join(filter(None, (", ".join(streams[:-1]), streams[-1])))
    return (
        f"The images made by {shown} have collapsed: they are constant, or the same whatever comes in. Figures such as"
        " MAE can look fair nevertheless, so see the samples. Train again with a lower train.lr or a larger loss.l1."
    )


def component(value: Any) -> str:
    """A component of a recipe in a few words: its name and plain arguments."""
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    name = str(value.get("_target_", value.get("name", ""))).rpartition(".")[2]
    arguments = [(key, item) for key, item in value.items() if key not in ("_target_", "name")]
    settings = [f"{key} {item}" for key, item in arguments if isinstance(item, str | int | float)]
    return f"{name} ({', '.join(settings)})" if settings else name


def counted(number: int | None, noun: str) -> str:
    """``1 run``, ``654 images``; nothing where the number is not known."""
    return "" if number is None else f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: object) -> str:
    """What an error says, for the middle of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
