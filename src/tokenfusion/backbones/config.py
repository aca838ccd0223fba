"""What ``config.json`` says of a fused model, and the model that it describes: one shared network, or separate ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, cast, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenfusion.backbones.blueprint import NetworkSpec, spec_of
from tokenfusion.backbones.foreign import weight_of
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.lockstep import EXCHANGE_GIVEN, FusedStreams
from tokenfusion.backbones.sharing import Sharing
from tokenfusion.components import FUSER_GIVEN, TARGET, Section, find, maker
from tokenfusion.errors import UserError, first_line
from tokenfusion.fusion.crossing import Exchange
from tokenfusion.fusion.fusers import Fuser, FuserFactory

FORMAT = 1
INDEX = "projection"  # index maps lie beside the weights, as projection.RECEIVER.GIVER

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES = get_args(Dtype)
Words = Literal["int64", "int32"]  # of inputs that are numbers of words; None: that of the weights
Networks = Mapping[str, nn.Module]  # single-modal, by modality; the shared one under ""


class SavedConfig(Section):
    """What is said of both kinds."""

    library_name: Literal["tokenfusion"]
    format: Literal[1]
    tokenfusion: str  # the version that wrote it
    dtype: Dtype
    fuser: dict[str, Any]
    seed: int
    alignment: bool
    shared: dict[str, str]  # names of weights that are those of another name

    def networks(self) -> dict[str, NetworkSpec]:
        """How to build the single-modal networks, by modality; the shared one under ""."""
        raise NotImplementedError

    def fused(self, networks: Networks, tensors: Mapping[str, Tensor], trust: bool) -> FusedNetwork | FusedStreams:
        """The networks fused as they were, in eval mode, with weights of their own.

        Args:
            networks: single-modal.
            tensors: what was saved; index maps are among them.
            trust: build fusers outside of tokenfusion.

        Raises:
            UserError: where that fails.
        """
        try:
            model = self._fused(networks, tensors, trust)
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            raise UserError(f"cannot be fused as config.json says ({first_line(error)})") from None
        model.recipe |= {"fuser": self.fuser, "seed": self.seed}
        return model.to(getattr(torch, self.dtype)).eval()

    def _fused(self, networks: Networks, tensors: Mapping[str, Tensor], trust: bool) -> FusedNetwork | FusedStreams:
        raise NotImplementedError

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """An input of noise by modality, the same ones every time; zeros where they are numbers of words."""
        raise NotImplementedError


class SharedConfig(SavedConfig):
    """One network whose weights the streams share."""

    kind: Literal["shared"] = "shared"
    network: NetworkSpec
    modalities: list[str] | dict[str, int]  # names, with the channels of each where they were given
    example: list[int]  # shape of an input of the network
    words: Words | None = None
    score_nets: Literal["stage", "block"]
    blocks: list[int] | None
    sharing: Sharing = "default"

    def networks(self) -> dict[str, NetworkSpec]:
        return {"": self.network}

    def _fused(self, networks: Networks, tensors: Mapping[str, Tensor], trust: bool) -> FusedNetwork:
        make = cast("FuserFactory", partial(maker(self.fuser, "fuser", FUSER_GIVEN, trust), seed=self.seed))
        example = zeros(self.example, networks[""], self.words)
        how = (self.score_nets, self.blocks, self.alignment, self.sharing)
        return FusedNetwork(networks[""], self.modalities, make, example, *how)

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        channels = (
            self.modalities if isinstance(self.modalities, dict) else dict.fromkeys(self.modalities, self.example[1])
        )
        size = self.example[2:]
        drawn = {name: torch.randn(batch, n, *size, generator=generator) for name, n in channels.items()}
        return drawn if self.words is None else {name: x.zero_().long() for name, x in drawn.items()}


class StreamSpec(Section):
    """One of several networks: how to build it, and the shape of its input."""

    network: NetworkSpec
    example: list[int]
    dtype: Words | None = None


class SeparateConfig(SavedConfig):
    """Separate networks in lockstep."""

    kind: Literal["separate"] = "separate"
    streams: dict[str, StreamSpec] = Field(min_length=1)
    projection: dict[
        str, dict[str, Literal["grid", "index"]]
    ]  # by receiver and giver: patch over patch, or an index map
    mlp: bool

    def networks(self) -> dict[str, NetworkSpec]:
        return {name: stream.network for name, stream in self.streams.items()}

    def _fused(self, networks: Networks, tensors: Mapping[str, Tensor], trust: bool) -> FusedStreams:
        make = maker(self.fuser, "fuser", EXCHANGE_GIVEN, trust)
        in_order = {name: networks[name] for name in self.streams}
        examples = {name: zeros(s.example, networks[name], s.dtype) for name, s in self.streams.items()}
        projection = {
            (receiver, giver): tensors[f"{INDEX}.{receiver}.{giver}"] if way == "index" else None
            for receiver, ways in self.projection.items()
            for giver, way in ways.items()
        }
        return FusedStreams(in_order, make, projection, examples, self.alignment, self.mlp, self.seed)

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(batch, *s.example[1:], generator=generator) for name, s in self.streams.items()}
        return {name: x if self.streams[name].dtype is None else x.zero_().long() for name, x in drawn.items()}


def zeros(shape: list[int], network: nn.Module, dtype: str | None = None) -> Tensor:
    """An input for a network, where and of what its weights are."""
    some = weight_of(network)
    return torch.zeros(shape, dtype=getattr(torch, dtype) if dtype else some.dtype, device=some.device)


def index_maps(model: FusedNetwork | FusedStreams) -> dict[str, Tensor]:
    """The index maps of separate networks, by the names under which they are saved.

    Raises:
        UserError: where one is made by a function.
    """
    maps = {}
    for bridge in model.ways() if isinstance(model, FusedStreams) else ():
        if bridge.find is not None:
            raise UserError(
                f"projection {bridge.pair} is a function of the inputs, which cannot be saved; "
                "give fuse() an index tensor, or keep model.state_dict() and fuse() anew"
            )
        if bridge.index is not None:
            maps[".".join((INDEX, *bridge.pair))] = bridge.index
    return maps


def batch_of(maps: Mapping[str, Tensor]) -> int:
    """How many samples index maps are made for; 1 where they serve any number."""
    return max((len(index) for index in maps.values() if index.dim() == 2), default=1)


def config_of(model: FusedNetwork | FusedStreams, shared: dict[str, str]) -> SharedConfig | SeparateConfig:
    """How to build a model again.

    Args:
        model: the fused one.
        shared: names of weights that are those of another name.

    Raises:
        UserError: where the fuser has no name, or the weights are of several dtypes.
    """
    dtype, fuser = _dtype(model), _resolved(model)
    facts: dict[str, Any] = {
        **model.recipe,
        "library_name": "tokenfusion",
        "format": FORMAT,
        "tokenfusion": version("tokenfusion"),
        "dtype": dtype,
        "fuser": fuser,
        "shared": shared,
    }
    if isinstance(model, FusedNetwork):
        names, channels = list(model.modalities), model.channels
        return SharedConfig(
            network=spec_of(model.network, model.example_size),
            modalities=names if channels is None else dict(zip(names, channels, strict=True)),
            example=list(model.example_size),
            words=_words(model.example_dtype),
            **facts,
        )
    projection: dict[str, dict[str, Literal["grid", "index"]]] = {}
    for bridge in model.ways():
        receiver, giver = bridge.pair
        projection.setdefault(receiver, {})[giver] = "grid" if bridge.index is None else "index"
    return SeparateConfig(streams=_streams(model), projection=projection, **facts)


def _streams(model: FusedStreams) -> dict[str, StreamSpec]:
    streams = {}
    for column in model.columns:
        size, words = column.example_size, _words(column.example.dtype)
        spec = spec_of(model.networks[column.name], size)
        streams[column.name] = StreamSpec(network=spec, example=list(size), dtype=words)
    return streams


def _words(dtype: torch.dtype) -> Any:
    return None if dtype.is_floating_point else str(dtype).removeprefix("torch.")


def _dtype(model: nn.Module) -> Any:
    """The one dtype of the weights.

    Raises:
        UserError: where there are several, or one that a network does not run in.
    """
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if len(found) == 1 and found[0] in DTYPES:
        return found[0]
    raise UserError(
        f"the weights are of {', '.join(found)}; wanted one of {', '.join(DTYPES)} for all: model.to(dtype)"
    )


def _resolved(model: FusedNetwork | FusedStreams) -> dict[str, Any]:
    """The fuser's component with its defaults written out.

    Raises:
        UserError: where it has no name, or names arguments that the program supplies.
    """
    fuser, given = model.recipe["fuser"], FUSER_GIVEN if isinstance(model, FusedNetwork) else EXCHANGE_GIVEN
    if fuser is None:
        deciding = model.fusers if isinstance(model, FusedNetwork) else model.exchanges
        made = next((type(m).__name__ for m in deciding.modules() if isinstance(m, Fuser | Exchange)), "none")
        raise UserError(
            f"the fuser ({made}) was made by a function that has no name to write down; "
            "give fuse() a word, a component, or a class that can be imported"
        )
    maker(fuser, "fuser", given, trust=True)
    parameters = inspect.signature(find(fuser[TARGET], "fuser", True)).parameters
    usual = {
        name: p.default
        for name, p in parameters.items()
        if name not in given and isinstance(p.default, str | int | float | bool | None)
    }
    return {**fuser, **{name: value for name, value in usual.items() if name not in fuser}}
