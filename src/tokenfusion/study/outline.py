"""A study: which recipes, which overrides, which figures; a YAML file that is read and checked here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tokenfusion.components import Section, explain
from tokenfusion.errors import UserError, nearest

SHIPPED = Path(__file__).parents[1] / "studies"
ScaleName = Literal["toy", "small", "full"]
SCALES: tuple[ScaleName, ...] = ("toy", "small", "full")


class Scale(Section):
    """What all runs of a part share at one scale: a recipe, and overrides of it."""

    recipe: str
    set: tuple[str, ...] = ()


class Row(Section):
    """A row of the table: the overrides of its runs, and what the paper has for it, in the order of the columns."""

    set: tuple[str, ...] = ()
    at: dict[ScaleName, tuple[str, ...]] = Field({})  # further ones at a scale
    paper: tuple[float | None, ...] = ()
    reference: bool = False  # the other rows are set beside this one, seed by seed
    scales: tuple[ScaleName, ...] = SCALES  # at which it is run


class Part(Section):
    """One table: one task on one data set.

    Attributes:
        scales: at which scales it can be run.
        columns: heading -> a figure: its name in metrics.json, taken of what ranks a run (the ensemble, or a detector's last
            head); ``STREAM/FIGURE`` is another stream's, ``primary`` the figure that ranks, ``exchange`` the mean share of
            exchanged tokens in percent, ``seconds`` those per 100 scenes (the run is timed).
        rows: title -> what is run. A row, and a column, with ``{modality}`` in it stands for one of every modality.
        conditions: title -> changes of the recipe's ``evaluation``. Every run is judged under each of them; the table then has
            the conditions in its rows, and the rows in its columns, by the first figure. One with ``{subset}`` in it stands for
            every set of modalities that leaves one at least.
        head: what the rows are.
        plot: ``exchange`` draws the figure that ranks over the share of exchanged tokens.
        note: what a reader of the table must know.
    """

    scales: dict[ScaleName, Scale] = Field(min_length=1)
    columns: dict[str, str] = Field(min_length=1)
    rows: dict[str, Row] = Field(min_length=1)
    conditions: dict[str, dict[str, Any]] = Field({})
    head: str = "method"
    plot: Literal["exchange"] | None = None
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Part:
        for title, row in self.rows.items():
            if row.paper and any("{modality}" in name for name in (title, *self.columns)):
                raise ValueError(
                    f"rows.{title}.paper: a {{modality}} stands for several; write those rows or columns out"
                )
            if row.paper and len(row.paper) != len(self.columns):
                raise ValueError(
                    f"rows.{title}.paper has {len(row.paper)} numbers; wanted one per column, {len(self.columns)}"
                )
        if sum(row.reference for row in self.rows.values()) > 1:
            raise ValueError("rows: several are the reference; one at most is wanted")
        for title, row in self.rows.items():
            overrides = (*row.set, *(override for those in row.at.values() for override in those))
            if any(re.match(r"evaluation\b", override) for override in overrides):
                raise ValueError(
                    f"rows.{title} changes evaluation, and a table's runs are judged alike; use conditions"
                )
        if any("," in title for title in self.rows):
            raise ValueError("rows: a title has a comma, which parts titles in --rows; take another sign")
        for titles in (self.rows, self.conditions):
            if len({slug(title) for title in titles}) < len(titles):
                raise ValueError(f"the titles {', '.join(titles)} give equal names of files; choose others")
        return self

    @property
    def is_timed(self) -> bool:
        """Whether the trained models are timed."""
        return "seconds" in self.columns.values()

    @property
    def reference(self) -> str | None:
        """The title of the row that the others are set beside."""
        return next((title for title, row in self.rows.items() if row.reference), None)


class Study(Section):
    """The whole file."""

    description: str
    tables: tuple[int, ...] = ()  # of the paper
    parts: dict[str, Part] = Field(min_length=1)

    @model_validator(mode="after")
    def _told_apart(self) -> Study:
        if len({slug(title) for title in self.parts}) < len(self.parts):
            raise ValueError(f"the parts {', '.join(self.parts)} give equal names of folders; choose others")
        return self


def slug(title: str) -> str:
    """A title as the name of a file: ``rgb + depth`` -> ``rgb+depth``."""
    words = re.sub(r"[^a-z0-9.+{}]+", "-", title.lower().replace(" + ", "+"))
    return words.strip("-")


def shipped() -> dict[str, str]:
    """Names of the shipped studies and their descriptions."""
    return {path.stem: read_study(path.stem)[1].description for path in sorted(SHIPPED.glob("*.yaml"))}


def read_study(name: str) -> tuple[str, Study]:
    """A study and its name.

    Args:
        name: of a shipped study, ``table3`` for the one that has Table 3 of the paper, or the path of a YAML file.

    Raises:
        UserError: where there is none, or its file is wrong; the key is named.
    """
    path = _file(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return path.stem, Study.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_explained(error)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:160]})") from None


def _file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such study file")
        return Path(name)
    path = SHIPPED / f"{name}.yaml"
    number = re.fullmatch(r"table(\d+)", name)
    if number:
        found = [study for study in SHIPPED.glob("*.yaml") if int(number[1]) in _tables(study)]
        path = found[0] if found else path
    if not path.is_file():
        raise UserError(f"no study named {name!r}; {nearest(name, [p.stem for p in SHIPPED.glob('*.yaml')])}")
    return path


def _tables(path: Path) -> tuple[int, ...]:
    return tuple(yaml.safe_load(path.read_text(encoding="utf-8")).get("tables", ()))


def _explained(error: ValidationError) -> str:
    """The first thing that is wrong; an unknown key before a missing one, since it is often that one misspelt."""
    unknown = next((found["loc"] for found in error.errors() if found["type"] == "extra_forbidden"), None)
    if unknown is None:
        return explain(error, Study)
    schema: type[BaseModel] = Study  # below parts the keys are the author's, which a schema does not list
    if len(unknown) > 1:
        schema = Part if len(unknown) == 3 else Scale if unknown[2] == "scales" else Row
    return f"unknown key {'.'.join(map(str, unknown))!r}; {nearest(str(unknown[-1]), schema.model_fields)}"
