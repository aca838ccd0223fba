"""A fused model as a folder, and back: its weights, how to build it, their checksums, a model card.

Nothing is pickled, and reading runs no code that the folder brings along.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenfusion.backbones import sealed
from tokenfusion.backbones.blueprint import build, undropped
from tokenfusion.backbones.calls import evaluating
from tokenfusion.backbones.card import card
from tokenfusion.backbones.config import (
    FORMAT,
    INDEX,
    SavedConfig,
    SeparateConfig,
    SharedConfig,
    batch_of,
    config_of,
    index_maps,
)
from tokenfusion.backbones.foreign import answer_of, call, weight_of
from tokenfusion.backbones.fused_model import FusedOutput
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.lockstep import FusedStreams
from tokenfusion.backbones.weights import local_folder
from tokenfusion.components import TARGET, explain
from tokenfusion.errors import UserError, first_line

Fused = FusedNetwork | FusedStreams
Given = nn.Module | Mapping[str, nn.Module] | None  # networks that cannot be built from their names
KINDS: dict[Any, type[SharedConfig | SeparateConfig]] = {"shared": SharedConfig, "separate": SeparateConfig}
DIFFERS = ", built anew, answers differently: arguments unknown to its name"
UNFUSED = {TARGET: "tokenfusion.fusion.crossing.NoExchange"}


def is_saved(folder: Path) -> bool:
    """Whether a folder looks like one that :func:`save` wrote."""
    return sealed.is_sealed(folder) and not (folder / "recipe.yaml").is_file()


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a fused model; see :meth:`~tokenfusion.backbones.fused_model.FusedModel.save_pretrained`."""
    if not isinstance(model, Fused) or type(model) not in (FusedNetwork, FusedStreams):
        raise UserError(f"{type(model).__name__} is part of a task's model: its run folder is what load() reads")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise UserError(
            "the weights are sharded: load their full state dict into a fused network of one process, save that"
        )
    tensors, shared = _once({**model.state_dict(), **index_maps(model)})
    config = config_of(model, shared)
    for name, reason in _unlike(model, config, _whole(tensors, shared)).items():
        spec = config.networks()[name]
        spec.kind, spec.name, spec.arguments, spec.reason = "module", type(_network(model, name)).__name__, {}, reason
    for name, spec in config.networks().items():
        if spec.kind == "module":
            warnings.warn(f"{_of(name)}loading will need network=: {spec.reason}", stacklevel=3)
    sealed.write(Path(folder), tensors, config.model_dump(mode="json"), partial(card, model, config))


def load(path: str | Path, network: Given = None, trust: bool = False) -> Fused:
    """Read what :func:`save` wrote; see :meth:`~tokenfusion.backbones.fused_model.FusedModel.from_pretrained`."""
    folder = local_folder(str(path))
    content, weights = sealed.read(folder)
    config = _config(folder / sealed.CONFIG, content)
    tensors = sealed.read_tensors(weights)
    try:
        given = _given(config, network)
        networks = {name: given[name] if name in given else build(spec) for name, spec in config.networks().items()}
        return _filled(config, networks, _whole(tensors, config.shared), trust)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _config(file: Path, content: Mapping[str, Any]) -> SharedConfig | SeparateConfig:
    """The configuration, of a kind and version that is known."""
    if content.get("format") != FORMAT:
        raise UserError(
            f"{file}: format is {content.get('format')!r}, this version reads {FORMAT}; upgrade tokenfusion"
        )
    kind = content.get("kind", "shared")
    schema = KINDS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise UserError(f"{file}: kind is {kind!r}, this version reads {', '.join(KINDS)}; upgrade tokenfusion")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, schema)}") from None


def _given(config: SavedConfig, network: Given) -> dict[str, nn.Module]:
    """The networks that were given, by modality; the shared one under "".

    Raises:
        UserError: where they are not of this folder, or others are wanted.
    """
    specs = config.networks()
    if isinstance(config, SharedConfig):
        if not isinstance(network, nn.Module | None):
            raise UserError(f"the streams share one network; wanted network= a module, got {type(network).__name__}")
        given, wanted = {} if network is None else {"": network}, ""
    else:
        wanted = ", ".join(f'"{name}": ...' for name, spec in specs.items() if spec.kind == "module")
        wanted = f"{{{wanted}}}"
        if not isinstance(network, Mapping | None):
            raise UserError(f"the networks are separate; wanted network={{name: module}}, got {type(network).__name__}")
        given = dict(network or {})
        for name, module in given.items():
            if name not in specs or not isinstance(module, nn.Module):
                got = type(module).__name__
                raise UserError(f"network= gives {name!r} a {got}; wanted modules for some of {', '.join(specs)}")
    for name, spec in specs.items():
        if spec.kind == "module" and name not in given:
            raise UserError(
                f"{_of(name)}{spec.name} cannot be built from its name ({spec.reason}); "
                f"give network={wanted}, a fresh one as it was before fuse()"
            )
    return given


def _filled(config: SavedConfig, networks: Mapping[str, nn.Module], state: Mapping[str, Tensor], trust: bool) -> Fused:
    """The networks fused as they were, with the saved weights."""
    model = config.fused(networks, state, trust)
    try:
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith(f"{INDEX}.")})
    except RuntimeError as error:
        raise UserError(f"the weights do not fit {_named(config)}: {first_line(error)}") from None
    return model


# What there is to write


def _network(model: Fused, name: str) -> nn.Module:
    return model.network if isinstance(model, FusedNetwork) else model.networks[name]


def _of(name: str) -> str:
    return f"{name}: " if name else ""


def _unlike(model: Fused, config: SharedConfig | SeparateConfig, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Why networks cannot be built from their names, by name: a model built anew is tried out.

    Raises:
        UserError: where every network can, and the model differs.
    """
    named = [name for name, spec in config.networks().items() if spec.kind != "module"]
    with _drawing_nothing(), evaluating(model), torch.no_grad():
        reason = _model_unlike(model, config, state) if len(named) == len(config.networks()) else ""
        if reason is None:
            return {}
        if isinstance(config, SharedConfig):
            return dict.fromkeys(named, reason)
        found = {name: _network_unlike(_network(model, name), config, name, state) for name in named}
    reasons = {name: why for name, why in found.items() if why is not None}
    if reason and not reasons:
        raise UserError(f"cannot be saved: built anew, it differs ({reason})")
    return reasons


def _model_unlike(model: Fused, config: SharedConfig | SeparateConfig, state: Mapping[str, Tensor]) -> str | None:
    """Why a model built again is not this one; None where both answer alike."""
    some = next(model.parameters())
    try:
        networks = {name: build(spec) for name, spec in config.networks().items()}
        again = _filled(config, networks, state, True).to(some.device)
        inputs = {name: _like(x, some) for name, x in config.inputs(batch_of(index_maps(model))).items()}
        alike = _alike(*(_answers(m(inputs)) for m in (model, again)))
        return undropped(model, again) or (None if alike else f"{_named(config)}{DIFFERS}")
    except Exception as error:  # whatever foreign libraries raise
        return first_line(error)


def _network_unlike(network: nn.Module, config: SeparateConfig, name: str, state: Mapping[str, Tensor]) -> str | None:
    """Why one of several networks, built again, is not the one that the model has."""
    stream, place = config.streams[name], f"networks.{name}."
    alone = config.model_copy(update={"streams": {name: stream}, "projection": {}, "fuser": UNFUSED})
    try:
        again = _network(alone.fused({name: build(stream.network)}, {}, True), name)
        again.load_state_dict({key.removeprefix(place): t for key, t in state.items() if key.startswith(place)})
        some = weight_of(network)
        x = _like(alone.inputs()[name], some)
        alike = _alike(*([answer_of(call(n, x)[1])] for n in (network, again.to(some.device))))
        return undropped(network, again) or (None if alike else f"{stream.network.name}{DIFFERS}")
    except Exception as error:  # whatever foreign libraries raise
        return first_line(error)


def _named(config: SavedConfig) -> str:
    return ", ".join(spec.name for spec in config.networks().values())


def _like(x: Tensor, some: Tensor) -> Tensor:
    """An input where the weights are, of their precision."""
    return x.to(some) if x.is_floating_point() else x.to(some.device)


def _answers(output: FusedOutput) -> list[Tensor]:
    return [answer_of(a) for a in output.outputs.values()] if output.ensemble is None else [output.ensemble]


def _alike(ours: list[Tensor], copied: list[Tensor]) -> bool:
    tolerance = 1e-3 if ours[0].dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        for one, other in zip(ours, copied, strict=True)
    )


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    """The global generators, those of devices in use too, stand afterwards where they stood."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every weight once, on the CPU; and the names that are other names of one."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in names:
            shared[name] = names[place]
            continue
        names[place] = name
        copy = value.detach().cpu().contiguous()
        tensors[name] = copy.clone() if copy.untyped_storage().nbytes() > copy.nbytes else copy  # a view of more
    return tensors, shared


def _whole(tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """Every name again."""
    return {**tensors, **{alias: tensors[name] for alias, name in shared.items() if name in tensors}}
