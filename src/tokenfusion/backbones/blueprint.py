"""How to build a network anew: an architecture of timm and its arguments, a class of Hugging Face and its configuration."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from tokenfusion.backbones.foreign import example_of, kind_of, library
from tokenfusion.components import Section
from tokenfusion.errors import UserError, first_line

TIMM_ARGUMENTS = (
    "num_classes",
    "in_chans",
    "global_pool",
    "img_size",
    "dynamic_img_size",
    "drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)
DROPOUTS = {  # of timm: the argument, and the modules that it reaches
    "drop_rate": re.compile(r"(^|\.)head_drop$|(^|\.)head\.drop$"),
    "pos_drop_rate": re.compile(r"(^|\.)pos_drop$"),
    "proj_drop_rate": re.compile(r"(^|\.)proj_drop$"),
    "attn_drop_rate": re.compile(r"(^|\.)attn_drop$"),
}
# what a configuration of Hugging Face may say beside the architecture: code or kernels to fetch, places, versions
HF_LEFT_OUT = re.compile(r"^_|(attn|experts)_implementation|^auto_map$|^quantization_config$|_version$")


class NetworkSpec(Section):
    """How to build the single-modal network; ``module``: not from its name, for that reason."""

    kind: Literal["timm", "hf", "module"]
    name: str  # of the architecture (timm) or of the class
    arguments: dict[str, Any] = Field(default_factory=dict)  # of timm.create_model; the configuration of Hugging Face
    reason: str = ""


def spec_of(network: nn.Module, example: torch.Size) -> NetworkSpec:
    """How to build a network, told from itself and the shape of its input."""
    name = type(network).__name__
    try:
        found = {"timm": _timm_spec, "hf": _hf_spec}.get(kind_of(network), lambda *_: None)(network, example)
    except Exception as error:  # whatever foreign libraries raise
        return NetworkSpec(kind="module", name=name, reason=f"its arguments cannot be told: {first_line(error)}")
    reason = "it is neither an architecture of timm nor a class of transformers"
    return found or NetworkSpec(kind="module", name=name, reason=reason)


def _timm_spec(network: nn.Module, example: torch.Size) -> NetworkSpec | None:
    """The arguments that differ from those of the plain architecture."""
    timm, name = library("timm"), getattr(network, "pretrained_cfg", {}).get("architecture")
    if name is None or not timm.is_model(name):
        return None
    with torch.device("meta"):
        plain = timm.create_model(name)
    usual, ours = _timm_facts(plain, example_of(plain).shape), _timm_facts(network, example)
    arguments = {key: value for key, value in ours.items() if value != usual[key] and value is not None}
    return NetworkSpec(kind="timm", name=name, arguments=arguments)


def _timm_facts(network: Any, example: torch.Size) -> dict[str, Any]:
    pool, size = getattr(network, "global_pool", None), getattr(getattr(network, "patch_embed", None), "img_size", None)
    makers = [kind.__init__ for kind in type(network).__mro__ if issubclass(kind, nn.Module)]  # they hand arguments on
    takes = {name for make in makers for name in inspect.signature(make).parameters}
    paths = [getattr(m, "drop_prob", 0) for m in network.modules() if type(m).__name__ == "DropPath"]
    facts = {
        "num_classes": getattr(network, "num_classes", None),
        "in_chans": example[1],
        "global_pool": pool if isinstance(pool, str) else None,
        "img_size": None if size is None else list(size),
        "dynamic_img_size": getattr(network, "dynamic_img_size", None),
        **{key: _rate(network, key) if key in takes else None for key in DROPOUTS},
        "drop_path_rate": round(float(max(paths, default=0)), 6),
    }
    assert tuple(facts) == TIMM_ARGUMENTS
    return facts


def _rate(network: nn.Module, argument: str) -> float | None:
    """The highest probability among the modules that an argument of timm reaches; None where there are none."""
    reached = [module for name, module in network.named_modules() if DROPOUTS[argument].search(name)]
    if not reached:
        return getattr(network, argument, None)
    return round(max((float(rate) for module in reached for rate in _rates(module).values()), default=0.0), 6)


def _rates(module: nn.Module) -> dict[str, float]:
    """With which probabilities a module itself drops, by the names that it has for them; those of 0 are left out."""
    drops = "drop" in type(module).__name__.lower()
    return {
        key: value
        for key, value in vars(module).items()
        if ("drop" in key or (drops and key in ("p", "prob"))) and isinstance(value, float | int) and float(value)
    }


def undropped(model: nn.Module, again: nn.Module) -> str | None:
    """The first module that drops with another probability than its copy."""
    ours, copied = (
        {f"{name}.{key}": rate for name, m in x.named_modules() for key, rate in _rates(m).items()}
        for x in (model, again)
    )
    for name in sorted(ours.keys() | copied.keys()):
        one, other = ours.get(name, 0.0), copied.get(name, 0.0)
        if not math.isclose(one, other, abs_tol=1e-5):
            return f"{name} is {one:g} here and {other:g} in a network built anew"
    return None


def _hf_spec(network: Any, example: torch.Size) -> NetworkSpec | None:
    name, transformers = type(network).__name__, library("hf")
    if getattr(transformers, name, None) is not type(network):
        return None
    return NetworkSpec(kind="hf", name=name, arguments=_plain(json.loads(network.config.to_json_string(False))))


def _plain(config: Any) -> Any:
    """A configuration without what says more than the architecture."""
    if isinstance(config, dict):
        return {key: _plain(value) for key, value in config.items() if not HF_LEFT_OUT.search(key)}
    return [_plain(value) for value in config] if isinstance(config, list) else config


def build(spec: NetworkSpec) -> nn.Module:
    """A network of timm or of Hugging Face with random weights.

    Raises:
        UserError: where this version of the library does not know it, or the name is none of that library's.
    """
    try:
        network = _timm_network(spec) if spec.kind == "timm" else _hf_network(spec)
    except UserError:
        raise
    except Exception as error:  # whatever foreign libraries raise
        raise UserError(f"{spec.name} cannot be built by this version of its library ({first_line(error)})") from None
    return network


def _timm_network(spec: NetworkSpec) -> nn.Module:
    timm, unknown = library("timm"), spec.arguments.keys() - set(TIMM_ARGUMENTS)
    if not timm.is_model(spec.name) or unknown:  # a name with a scheme would be fetched
        raise UserError(f"{spec.name}: this version of timm has no such architecture, or not these arguments")
    return cast("nn.Module", timm.create_model(spec.name, pretrained=False, **spec.arguments))


def _hf_network(spec: NetworkSpec) -> nn.Module:
    transformers = library("hf")
    found = getattr(transformers, spec.name, None)
    if not (inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)):
        raise UserError(f"{spec.name}: this version of transformers has no such network")
    make = cast("Any", found)
    return cast("nn.Module", make(make.config_class.from_dict(_plain(spec.arguments))))
