"""Recipes: read a shipped one or a file, apply overrides, validate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tokenfusion.api import TASKS, Recipe, task_package
from tokenfusion.components import FUSERS, TARGET, explain, maker
from tokenfusion.errors import UserError, nearest

SHIPPED = Path(__file__).parent / "recipes"
DEFAULT_TASK = "segmentation"  # of a recipe that names none


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def shipped() -> dict[str, str]:
    """Names of the shipped recipes and their one-line descriptions."""
    return {path.stem: str(_load(path).get("description", "")) for path in sorted(SHIPPED.glob("*.yaml"))}


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe.

    Args:
        name: of a shipped recipe, or the path of a YAML file. A file may say ``base: NAME`` and only what differs.
        overrides: ``key.path=value``, the value in YAML.

    Raises:
        UserError: names the file or the override, the key and the nearest valid one.
    """
    path = find(name)
    content = _with_base(path)
    try:
        return validate(_overridden(content, overrides), str(path))
    except UserError as error:
        said = str(error).removeprefix(f"{path}: ")
        to_blame = next(
            (override for override in overrides if override.partition("=")[0] in said.split(", got")[0]), None
        )
        if to_blame is None or to_blame in said:
            raise
        raise UserError(f"{to_blame}: {said}") from None


def evaluation_changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides of ``evaluation`` alone, as :func:`tokenfusion.api.evaluate` takes them.

    Raises:
        UserError: where one names another section: a trained run's recipe does not change any more.
    """
    changes = _overridden({}, overrides)
    if set(changes) - {"evaluation"} or not isinstance(changes.get("evaluation", {}), dict):
        raise UserError(f"{overrides[0]!r}: eval changes keys below evaluation only, e.g. evaluation.features=pixels")
    return dict(changes.get("evaluation", {}))


def _overridden(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r} is no override; wanted key.path=value, for example train.lr=1e-4")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise UserError(f"{override!r}: {value!r} is not YAML") from None
        content = _merge(content, _nested(key.split("."), parsed), _task(content))
    return content


def find(name: str) -> Path:
    """The file of a recipe name or path."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such recipe file")
        return Path(name)
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no recipe named {name!r}; {nearest(name, shipped())} (a file must end in .yaml)")
    return path


def validate(content: Mapping[str, Any], source: str) -> Recipe:
    """Check every key and value; short fuser names are spelt out."""
    content = dict(content)
    task = content.setdefault("task", DEFAULT_TASK)
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{source}: task is {task!r}; {nearest(str(task), TASKS)}")
    package = task_package(task)
    content["fuser"] = _fuser(content.get("fuser"), task, source)
    schema: type[BaseModel] = package.Recipe
    try:
        recipe = schema.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, schema)}") from None
    for key, given in package.COMPONENTS.items():
        spec: Any = recipe
        for part in key.split("."):
            spec = getattr(spec, part)
        if spec is None:  # a part that this recipe goes without
            continue
        if str(spec.get(TARGET, "tokenfusion.")).startswith(
            "tokenfusion."
        ):  # others are checked where --trust is known
            maker(spec, f"{source}: {key}", given)
    return recipe  # type: ignore[return-value]


def fusers(task: str) -> dict[str, dict[str, Any]]:
    """The words for fusers in recipes of a task; streams of different kinds have their own."""
    return getattr(task_package(task), "FUSERS", FUSERS)


def _fuser(value: Any, task: str, source: str) -> Any:
    if not isinstance(value, str):
        return value
    known = fusers(task)
    if value not in known:
        raise UserError(f"{source}: fuser is {value!r}; {nearest(value, known)}")
    return known[value]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: wanted keys and values, as in a shipped recipe")
    return content


def _with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    content = _load(path)
    base = content.pop("base", None)
    if base is None:
        return content
    if path in seen:
        raise UserError(f"{path}: base leads back to itself")
    beside = path.parent / str(base)
    below = _with_base(beside if beside.is_file() else find(str(base)), (*seen, path))
    return _merge(below, content, _task(below))


def _task(content: Mapping[str, Any]) -> str:
    task = content.get("task")
    return task if isinstance(task, str) and task in TASKS else DEFAULT_TASK


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(old: Any, new: Any, task: str, key: str = "") -> Any:
    """``new`` over ``old``: sections merge key by key; another component or fuser name replaces the old one whole."""
    if key == "fuser" and isinstance(old, str) and isinstance(new, Mapping) and TARGET not in new:
        old = fusers(task).get(old, old)  # fuser.threshold=0.1 on a recipe that names its fuser by one word
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if TARGET in new and new[TARGET] != old.get(TARGET):
        return dict(new)
    return {**old, **{k: _merge(old[k], v, task, k) if k in old else v for k, v in new.items()}}
