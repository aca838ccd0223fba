"""A plan: every run that a study asks for, with its folder and its command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from tokenfusion.api import Recipe, prepare_rooms
from tokenfusion.components import explain
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError, nearest
from tokenfusion.recipe import read_recipe
from tokenfusion.study.outline import SCALES, Part, Row, Scale, ScaleName, Study, slug

ROOMS = Path("data/rooms")  # where the recipes of small networks look for them
ANY, SUBSET = "{modality}", "{subset}"
Changes = dict[str, Any]


class Wish(NamedTuple):
    """What a person asks of a study.

    Attributes:
        scale: ``toy``, ``small`` or ``full``.
        seeds: runs per row, seeds 0, 1, ...
        out: the folder of all runs.
        data: one data set for all parts, in place of their own.
        recipe: one's own recipe, in place of the recipe of a study that has one part.
        overrides: of the recipe of every run.
        rows: titles of those that shall be trained; all where it is empty.
    """

    out: Path
    scale: ScaleName = "toy"
    seeds: int = 3
    data: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


class Cell(NamedTuple):
    """One run: a row of a part with a seed."""

    part: str
    row: str
    seed: int
    run: Path
    recipe: str
    overrides: tuple[str, ...]

    def words(self) -> list[str]:
        """The arguments of ``tokenfusion`` that train it."""
        return ["train", self.recipe, *self.overrides, "--out", str(self.run)]

    def command(self) -> str:
        """What to type."""
        return shlex.join(["tokenfusion", *self.words()])


class Planned(NamedTuple):
    """A part of a study at the wanted scale: rows and columns written out, and the runs of every row."""

    name: str
    part: Part
    scale: ScaleName
    cells: dict[str, list[Cell]]  # title of a row -> one run per seed


def plan(study: Study, wish: Wish) -> list[Planned]:
    """All runs of a study, part by part.

    Raises:
        UserError: where no part has that scale, a row is unknown, or an override changes what the study varies.
    """
    chosen = {name: part for name, part in study.parts.items() if wish.scale in part.scales}
    if wish.recipe:
        chosen = {name: _on_recipe(part, wish) for name, part in (chosen or study.parts).items()}
        if len(chosen) > 1:
            raise UserError(f"--recipe: this study has the parts {', '.join(chosen)}; one recipe cannot replace them")
    if not chosen:
        there = [scale for scale in SCALES if any(scale in part.scales for part in study.parts.values())]
        raise UserError(f"--scale is {wish.scale}; this study has {', '.join(there)}")
    planned = [_planned(name, part, wish) for name, part in chosen.items()]
    titles = {title for found in planned for title in found.cells}
    for title in wish.rows:
        if title not in titles:
            raise UserError(f"--rows: there is no row {title!r}; {nearest(title, titles)}")
    return planned


def _on_recipe(part: Part, wish: Wish) -> Part:
    """The part with one's own recipe, and without the paper's numbers, which are of other data."""
    rows = {title: row.model_copy(update={"paper": (), "at": {}}) for title, row in part.rows.items()}
    return part.model_copy(update={"scales": {wish.scale: Scale(recipe=str(wish.recipe))}, "rows": rows})


def _planned(name: str, part: Part, wish: Wish) -> Planned:
    scale = part.scales[wish.scale]
    _refuse_varied(part, wish)
    shared = [*scale.set, *wish.overrides]
    recipe = read_recipe(scale.recipe, shared)
    root = wish.data or _rooms(recipe.data.root, wish.out)
    shared += [_data_at(root)] if root else []
    part = _written_out(part, wish.scale, recipe.data.modalities)
    if wish.recipe:
        part = part.model_copy(update={"conditions": _fitting(part.conditions, recipe.data.modalities)})
    _check_conditions(name, part, scale.recipe, shared)
    cells = {
        title: [
            Cell(
                name, title, seed, wish.out / slug(name) / f"{slug(title)}-seed{seed}", scale.recipe,
                (*shared, *row.set, f"seed={seed}"),
            )
            for seed in range(wish.seeds)
        ]
        for title, row in part.rows.items()
    }  # fmt: skip
    return Planned(name, part, wish.scale, cells)


def _refuse_varied(part: Part, wish: Wish) -> None:
    """Modalities may be overridden where rows stand for one of each: they are written out from what is given."""
    rows = [row for title, row in part.rows.items() if ANY not in title and wish.scale in row.scales]
    of_rows = [override for row in rows for override in (*row.set, *row.at.get(wish.scale, ()))]
    varied = {"seed", *(override.partition("=")[0] for override in of_rows)}
    for override in wish.overrides:
        if override.partition("=")[0] in varied:
            raise UserError(f"{override}: is what this study varies; leave it out")


def _check_conditions(name: str, part: Part, recipe: str, shared: Sequence[str]) -> None:
    """Of every row, now, and not after its first run has been trained."""
    for row, of_row in part.rows.items() if part.conditions else ():
        wanted = read_recipe(recipe, [*shared, *of_row.set])
        schema: Any = type(wanted.evaluation)
        kinds = _kinds(wanted)
        for title, changes in part.conditions.items():
            place = f"{name}.conditions.{title}"
            try:
                schema.model_validate({**wanted.evaluation.model_dump(), **changes}).given(kinds)
            except ValidationError as error:
                raise UserError(f"{place}: {explain(error, schema)}") from None
            except UserError as error:
                raise UserError(f"{place}, of {row!r}: {error}") from None


def _kinds(recipe: Recipe) -> dict[str, str]:
    """Every input with its kind, as far as the data are there to tell it; else its name, which most often says it."""
    names = {name: name for name in recipe.data.modalities}
    try:
        known = Folder(recipe.data.root).modalities
    except UserError:
        return names
    return {name: known[name].kind if name in known else name for name in names}


def _named(changes: Mapping[str, Any]) -> set[str]:
    """The modalities that a condition is about."""
    return {*changes.get("missing", ()), *changes.get("degrade", {})}


def _fitting(conditions: Mapping[str, Changes], modalities: Sequence[str]) -> dict[str, Changes]:
    """Those of inputs that one's own recipe has; a study that names others still serves it."""
    return {title: changes for title, changes in conditions.items() if _named(changes) <= set(modalities)}


def _written_out(part: Part, scale: ScaleName, modalities: Sequence[str]) -> Part:
    """The rows of a scale; rows and columns that stand for one of every modality, one by one."""
    columns: dict[str, str] = {}
    for heading, figure in part.columns.items():
        names = modalities if ANY in heading else [""]
        columns |= {heading.replace(ANY, name): figure.replace(ANY, name) for name in names}
    rows: dict[str, Row] = {}
    for title, row in ((title, row) for title, row in part.rows.items() if scale in row.scales):
        for name in modalities if ANY in title else [""]:
            written = tuple(override.replace(ANY, name) for override in (*row.set, *row.at.get(scale, ())))
            rows[title.replace(ANY, name)] = row.model_copy(update={"set": written})
    conditions: dict[str, Changes] = {}
    for title, changes in part.conditions.items():
        if SUBSET not in title:
            conditions[title] = changes
            continue
        for names in (names for count in range(1, len(modalities)) for names in combinations(modalities, count)):
            conditions[title.replace(SUBSET, " + ".join(names))] = {**changes, "missing": list(names)}
    return part.model_copy(update={"columns": columns, "rows": rows, "conditions": conditions})


def _rooms(root: str, out: Path) -> str | None:
    """Where the rooms of a study stand, if its recipe wants them and they are not where it looks."""
    return str(out / "rooms") if Path(root) == ROOMS and not ROOMS.exists() else None


def _data_at(root: str | Path) -> str:
    """As an override, whose value is read as YAML: a path may hold what means something there."""
    plain = str(root)
    is_plain = re.fullmatch(r"[\w./-]+", plain) and yaml.safe_load(plain) == plain
    return f"data.root={plain if is_plain else json.dumps(plain)}"


def draw_rooms(planned: Sequence[Planned], out: Path) -> None:
    """Draw the procedural rooms that the runs want, once."""
    wanted = _data_at(out / "rooms")
    asked = any(wanted in cell.overrides for part in planned for cells in part.cells.values() for cell in cells)
    if asked and not (out / "rooms").exists():
        prepare_rooms(out / "rooms")


def chosen_cells(planned: Sequence[Planned], rows: Sequence[str]) -> list[Cell]:
    """The runs to be trained, seed by seed; of a seed the last row first, which takes longest: no core waits at the end."""
    found = [cell for part in planned for title, row in part.cells.items() if not rows or title in rows for cell in row]
    found.reverse()
    return sorted(found, key=lambda cell: cell.seed)
