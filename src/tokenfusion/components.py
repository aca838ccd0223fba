"""Parts of a recipe: ``_target_: dotted.name`` plus its arguments, checked against the signature."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tokenfusion.errors import UserError, nearest

TARGET = "_target_"


def find(name: str, key: str, trust: bool) -> Callable[..., Any]:
    """The function or class of a dotted name.

    Args:
        name: e.g. ``tokenfusion.backbones.mit.mit``.
        key: where it stands in the recipe, for the message.
        trust: without it only names of this package are built, since a recipe may come with a downloaded checkpoint.

    Raises:
        UserError: where there is no such name, or it is foreign and not trusted.
    """
    module, _, attribute = name.rpartition(".")
    if not trust and not name.startswith("tokenfusion."):
        raise UserError(
            f"{key}: {name} is not part of tokenfusion; add --trust if you know where this recipe comes from"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}: there is no {name!r}; wanted a dotted name that can be imported") from None
    if not callable(found):
        raise UserError(f"{key}: {name} is not a class or function")
    return found


def maker(spec: Mapping[str, Any], key: str, given: tuple[str, ...] = (), trust: bool = False) -> Callable[..., Any]:
    """A component as a function of the arguments that the program supplies.

    Args:
        spec: ``{"_target_": name, argument: value, ...}``; nested specs are built.
        key: where it stands in the recipe, e.g. ``fuser``.
        given: names of the arguments that are supplied later, by position or by name.

    Raises:
        UserError: unknown, missing or doubly given arguments, named with the nearest valid one.
    """
    if TARGET not in spec:
        raise UserError(f"{key}: wanted {TARGET}: dotted.name and its arguments, got {dict(spec)}")
    target = find(str(spec[TARGET]), f"{key}.{TARGET}", trust)
    arguments = {
        k: build(v, f"{key}.{k}", trust=trust) if isinstance(v, Mapping) and TARGET in v else v
        for k, v in spec.items()
        if k != TARGET
    }
    parameters = inspect.signature(target).parameters
    open_names = [name for name in parameters if name not in given]
    for name in arguments:
        if name not in open_names:
            raise UserError(f"{key}.{name}: {spec[TARGET]} takes no such argument; {nearest(name, open_names)}")
    for name in open_names:
        parameter = parameters[name]
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and name not in arguments:
            raise UserError(f"{key}.{name}: {spec[TARGET]} needs this argument")
    return functools.partial(target, **arguments)


def build(spec: Mapping[str, Any], key: str, trust: bool = False, **given: Any) -> Any:
    """Build a component; ``given`` are the arguments that the program supplies.

    Raises:
        UserError: as :func:`maker`, and where the component itself refuses an argument's value.
    """
    make = maker(spec, key, tuple(given), trust)
    try:
        return make(**given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error
