"""Parts of a recipe: ``_target_: dotted.name`` plus its arguments, checked against the signature; and text files."""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from tokenfusion.errors import UserError, first_line, nearest

M = TypeVar("M", bound=BaseModel)
Component = dict[str, Any]  # ``_target_`` and arguments
TARGET = "_target_"
PARTS = ("tokenfusion.fusion.", "tokenfusion.backbones.", "tokenfusion.tasks.")  # where parts of networks live


# one word on the command line: fuser=concat
FUSERS: dict[str, dict[str, Any]] = {
    "none": {TARGET: "tokenfusion.fusion.NoFusion"},
    "concat": {TARGET: "tokenfusion.fusion.Concat"},
    "average": {TARGET: "tokenfusion.fusion.Average"},
    "random": {TARGET: "tokenfusion.fusion.Random"},
    "gating": {TARGET: "tokenfusion.fusion.Gating"},
    "bottleneck": {TARGET: "tokenfusion.fusion.Bottleneck"},
    "cross-attention": {TARGET: "tokenfusion.fusion.CrossAttention"},
    "channel": {TARGET: "tokenfusion.fusion.ChannelExchange"},
    "tokenfusion": {TARGET: "tokenfusion.fusion.TokenFusion"},
    "tokenfusion-paper": {TARGET: "tokenfusion.fusion.TokenFusion", "rule": "paper"},
    "token+channel": {TARGET: "tokenfusion.fusion.TokenChannel"},
    "mended": {TARGET: "tokenfusion.fusion.MendedFusion"},
}

# of streams that share no blocks: separate networks, points and images
EXCHANGES: dict[str, dict[str, Any]] = {
    "none": {TARGET: "tokenfusion.fusion.crossing.NoExchange"},
    "concat": {TARGET: "tokenfusion.fusion.crossing.ConcatExchange"},
    "average": {TARGET: "tokenfusion.fusion.crossing.AverageExchange"},
    "random": {TARGET: "tokenfusion.fusion.crossing.RandomExchange"},
    "tokenfusion": {TARGET: "tokenfusion.fusion.crossing.TokenExchange"},
}

FUSER_GIVEN = ("dim", "modalities", "stage", "seed")  # arguments that the program supplies, not the recipe


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def read_yaml(file: Path, schema: type[M]) -> M:
    """A YAML file, validated.

    Raises:
        UserError: where it is missing, damaged, or not what the schema wants.
    """
    try:
        return schema.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{file}: not readable as this program wrote it ({' '.join(str(error).split())[:160]})"
        ) from None


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first thing that a schema refused, in one line; for an unknown key the nearest valid one."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # those name a member of a union
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(str(first['loc'][-1]), _fields(schema, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    is_list = first["type"] in ("tuple_type", "list_type")
    said = "wanted a list, as [a, b]" if is_list else first["msg"].removeprefix("Value error, ")
    return f"{key}: {said}, got {first['input']!r}" if key else said  # what concerns several keys names them itself


def _fields(schema: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    for part in place:
        annotation = schema.model_fields[str(part)].annotation if str(part) in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    part = file.with_name(f".{file.name}.{os.getpid()}.partial")  # of several processes none is in another's way
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def find(name: str, key: str, trust: bool) -> Callable[..., Any]:
    """The class or function of a dotted name.

    Args:
        name: e.g. ``tokenfusion.backbones.mit.mit``.
        key: where it stands in the recipe, for the message.
        trust: without it only parts of networks that this package defines itself are found, since a recipe may come with a
            downloaded checkpoint. What this package merely imports, or what does something else than make a part, is not.

    Raises:
        UserError: where there is no such name, or it is not trusted.
    """
    module, _, attribute = name.rpartition(".")
    refusal = (
        f"{key}: {name} is no part of a network of tokenfusion; add --trust if you know where this recipe comes from"
    )
    if not trust and not name.startswith(PARTS):
        raise UserError(refusal)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}: there is no {name!r}; wanted a dotted name that can be imported") from None
    if not callable(found):
        raise UserError(f"{key}: {name} is not a class or function")
    if not trust and not _makes_a_part(found):
        raise UserError(refusal)
    return found


def _makes_a_part(found: Callable[..., Any]) -> bool:
    """Whether this package defines it, as a torch module or as a function that says that it returns one."""
    made = found if inspect.isclass(found) else typing.get_type_hints(found).get("return")
    ours = str(getattr(found, "__module__", "")).startswith(PARTS)
    return ours and inspect.isclass(made) and issubclass(made, nn.Module)


def maker(spec: Mapping[str, Any], key: str, given: tuple[str, ...] = (), trust: bool = False) -> Callable[..., Any]:
    """A component as a function of the arguments that the program supplies; nothing is called before that.

    Args:
        spec: ``{"_target_": name, argument: value, ...}``; nested specs are built with it.
        key: where it stands in the recipe, e.g. ``fuser``.
        given: names of the arguments that are supplied later, by position or by name.

    Raises:
        UserError: unknown, missing or doubly given arguments, named with the nearest valid one.
    """
    if not isinstance(spec, Mapping) or TARGET not in spec:
        raise UserError(f"{key}: wanted {TARGET}: dotted.name and its arguments, got {spec!r}")
    target = find(str(spec[TARGET]), f"{key}.{TARGET}", trust)
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some that are written in C
        raise UserError(f"{key}: {spec[TARGET]} does not say which arguments it takes; wrap it in a function") from None
    open_names = [name for name in parameters if name not in given]
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {name: value for name, value in spec.items() if name != TARGET}
    for name in arguments:
        if name not in open_names and not takes_any:
            raise UserError(f"{key}.{name}: {spec[TARGET]} takes no such argument; {nearest(name, open_names)}")
    for name in open_names:
        parameter = parameters[name]
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not several and name not in arguments:
            raise UserError(f"{key}.{name}: {spec[TARGET]} needs this argument")
    nested = {
        name: maker(value, f"{key}.{name}", trust=trust)
        for name, value in arguments.items()
        if isinstance(value, Mapping) and TARGET in value
    }

    def make(*positional: Any, **named: Any) -> Any:
        built = {name: part() for name, part in nested.items()}
        try:
            return target(*positional, **named, **{**arguments, **built})
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{key}: {spec[TARGET]}: {first_line(error)}") from error

    return make


def build(spec: Mapping[str, Any], key: str, trust: bool = False, **given: Any) -> Any:
    """Build a component; ``given`` are the arguments that the program supplies.

    Raises:
        UserError: as :func:`maker`, and where the component itself refuses an argument's value.
    """
    return maker(spec, key, tuple(given), trust)(**given)


def component_of(made_by: Any) -> Component | None:
    """The component that :func:`maker` would build alike: of a class, or of functools.partial with named arguments.

    Returns:
        None for what has no name that can be imported, or arguments that cannot be written down.
    """
    arguments = made_by.keywords if isinstance(made_by, partial) else {}
    target = made_by.func if isinstance(made_by, partial) else made_by
    named = inspect.isclass(target) and "<locals>" not in target.__qualname__ and target.__module__ != "__main__"
    plain = all(isinstance(value, str | int | float | bool | None) for value in arguments.values())
    if not named or not plain or (isinstance(made_by, partial) and made_by.args):
        return None
    return {TARGET: f"{target.__module__}.{target.__qualname__}", **arguments}
