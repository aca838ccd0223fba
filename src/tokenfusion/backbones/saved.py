"""A fused network as a folder, and back: its weights, how to build it, their checksums, a model card.

config.json   model.safetensors   MANIFEST.sha256   README.md

Nothing is pickled, and reading runs no code that the folder brings along. New files lie there whole, as .NAME.partial,
before the manifest names them; where the rest of the renaming was cut off, they are read from there.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenfusion.backbones.blueprint import NetworkSpec, build, first_line, spec_of, undropped
from tokenfusion.backbones.card import card
from tokenfusion.backbones.hub import FusedNetwork, FuserFactory
from tokenfusion.backbones.survey import evaluating
from tokenfusion.backbones.weights import local_folder
from tokenfusion.components import FUSER_GIVEN, TARGET, Section, explain, find, maker
from tokenfusion.errors import UserError

CONFIG, MODEL, MANIFEST, CARD = "config.json", "model.safetensors", "MANIFEST.sha256", "README.md"
FORMAT = 1
PARTIAL = ".partial"

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES = get_args(Dtype)


class SavedConfig(Section):
    """What ``config.json`` holds."""

    library_name: Literal["tokenfusion"]
    format: Literal[1]
    tokenfusion: str  # the version that wrote it
    network: NetworkSpec
    modalities: list[str] | dict[str, int]  # names, with the channels of each where they were given
    example: list[int]  # shape of an input of the network
    dtype: Dtype
    fuser: dict[str, Any]
    seed: int
    score_nets: Literal["stage", "block"]
    blocks: list[int] | None
    alignment: bool
    shared: dict[str, str]  # names of weights that are those of another name


def is_saved(folder: Path) -> bool:
    """Whether a folder looks like one that :func:`save` wrote."""
    return (
        any(path.is_file() for path in (folder / CONFIG, _part(folder, CONFIG)))
        and not (folder / "recipe.yaml").is_file()
    )


def save(model: FusedNetwork, folder: str | Path) -> None:
    """Write a fused network; see :meth:`FusedNetwork.save_pretrained`."""
    folder = Path(folder)
    if type(model) is not FusedNetwork:
        raise UserError(f"{type(model).__name__} is part of a task's model: its run folder is what load() reads")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise UserError(
            "the weights are sharded: load their full state dict into a fused network of one process, save that"
        )
    tensors, shared = _once(model.state_dict())
    config = _config(model, tensors, shared)
    texts = {CONFIG: json.dumps(config.model_dump(mode="json"), indent=1) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        parts = {name: _part(folder, name) for name in (MODEL, CONFIG, CARD, MANIFEST)}
        if (folder / CARD).exists():  # it may have been written on
            del parts[CARD]
        texts[CARD] = card(model, config, folder.resolve().name)
        save_file(tensors, parts[MODEL], metadata={"format": "pt"})
        parts[CONFIG].write_text(texts[CONFIG], encoding="utf-8")
        texts[MANIFEST] = "".join(f"{_sha256(parts[name])}  {name}\n" for name in (CONFIG, MODEL))
        for name in parts.keys() - {MODEL}:
            parts[name].write_text(texts[name], encoding="utf-8")
        _put(parts)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _settle(folder)
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def load(path: str | Path, network: nn.Module | None = None, trust: bool = False) -> FusedNetwork:
    """Read what :func:`save` wrote; see :meth:`FusedNetwork.from_pretrained`."""
    folder = local_folder(str(path))
    config, weights = _read(folder)
    if network is None and config.network.kind == "module":
        raise UserError(
            f"{folder}: {config.network.name} cannot be built from its name ({config.network.reason}); "
            "give network=, a fresh one as it was before fuse()"
        )
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not readable ({str(error).splitlines()[0][:120]})") from None
    try:
        return _filled(_fused(config, network or build(config.network), trust), config, tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _fused(config: SavedConfig, network: nn.Module, trust: bool) -> FusedNetwork:
    """The network fused as it was, with weights of its own."""
    make = cast("FuserFactory", partial(maker(config.fuser, "fuser", FUSER_GIVEN, trust), seed=config.seed))
    some = next(network.parameters())
    try:
        example = torch.zeros(config.example, dtype=some.dtype, device=some.device)
        model = FusedNetwork(
            network, config.modalities, make, example, config.score_nets, config.blocks, config.alignment
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot be fused as config.json says ({first_line(error)})") from None
    model.recipe |= {"fuser": config.fuser, "seed": config.seed}
    return model.to(getattr(torch, config.dtype)).eval()


def _filled(model: FusedNetwork, config: SavedConfig, tensors: Mapping[str, Tensor]) -> FusedNetwork:
    state = {**tensors, **{alias: tensors[name] for alias, name in config.shared.items() if name in tensors}}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"the weights do not fit {config.network.name}: {reason[0].strip()[:160]}") from None
    return model


# What there is to write


def _config(model: FusedNetwork, tensors: Mapping[str, Tensor], shared: dict[str, str]) -> SavedConfig:
    """How to build this model again; tried out, so that what is written can be read.

    Raises:
        UserError: where the fuser has no name, or the weights are of several dtypes.
    """
    dtype = _dtype(model)
    if model.recipe["fuser"] is None:
        raise UserError(
            f"the fuser ({type(model.fusers[0]).__name__}) was made by a function that has no name to write down; "
            "give fuse() a word, a component, or a class that can be imported"
        )
    names, channels = list(model.modalities), model.channels
    config = SavedConfig(
        library_name="tokenfusion",
        format=FORMAT,
        tokenfusion=version("tokenfusion"),
        network=spec_of(model.network, model.example_size),
        modalities=names if channels is None else dict(zip(names, channels, strict=True)),
        example=list(model.example_size),
        dtype=cast("Any", dtype),
        shared=shared,
        **{**model.recipe, "fuser": _resolved(model.recipe["fuser"])},
    )
    if config.network.kind != "module":
        reason = _unlike(model, config, tensors)
        if reason is not None:
            config.network = NetworkSpec(kind="module", name=type(model.network).__name__, reason=reason)
    if config.network.kind == "module":
        warnings.warn(f"loading will need network=: {config.network.reason}", stacklevel=4)
    return config


def _dtype(model: FusedNetwork) -> str:
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


def _unlike(model: FusedNetwork, config: SavedConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a model built again from ``config`` is not this one; None where both answer alike."""
    some = next(model.parameters())
    try:
        with _drawing_nothing(), evaluating(model), torch.no_grad():
            again = _filled(_fused(config, build(config.network), True), config, tensors).to(some.device)
            difference = undropped(model, again)
            if difference is not None:
                return difference
            generator = torch.Generator().manual_seed(0)
            sizes = model.channels or [config.example[1]] * len(model.modalities)
            inputs = {
                name: torch.randn(1, n, *config.example[2:], generator=generator).to(some)
                for name, n in zip(model.modalities, sizes, strict=True)
            }
            tolerance = 1e-3 if config.dtype in ("float32", "float64") else 5e-2
            ours, copied = (m(inputs).ensemble for m in (model, again))
            alike = torch.allclose(ours, copied, rtol=tolerance, atol=tolerance, equal_nan=True)
    except Exception as error:  # whatever foreign libraries raise
        return first_line(error)
    return None if alike else f"{config.network.name}, built anew, answers differently: arguments unknown to its name"


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    """The global generators, those of devices in use too, stand afterwards where they stood."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _resolved(fuser: Mapping[str, Any]) -> dict[str, Any]:
    """A component with its defaults written out.

    Raises:
        UserError: where it names arguments that the program supplies.
    """
    maker(fuser, "fuser", FUSER_GIVEN, trust=True)
    parameters = inspect.signature(find(fuser[TARGET], "fuser", True)).parameters
    usual = {
        name: p.default
        for name, p in parameters.items()
        if name not in FUSER_GIVEN and isinstance(p.default, str | int | float | bool | None)
    }
    return {**fuser, **{name: value for name, value in usual.items() if name not in fuser}}


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
        copy = value.detach().to("cpu", memory_format=torch.contiguous_format)
        tensors[name] = copy.clone() if copy.untyped_storage().nbytes() > copy.nbytes else copy  # a view of more
    return tensors, shared


# Files


def _read(folder: Path) -> tuple[SavedConfig, Path]:
    """Every file against its checksum, then the configuration; and where the weights are.

    Raises:
        UserError: names what is missing, changed, or of another version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted what save_pretrained() wrote")
    files = {name: _file(folder, name, digest) for name, digest in _manifest(folder).items()}
    file = files[CONFIG]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content.get("format")
    except (ValueError, AttributeError):
        raise UserError(f"{file}: damaged (no JSON object)") from None
    if found != FORMAT:
        raise UserError(f"{file}: format is {found!r}, this version reads {FORMAT}; upgrade tokenfusion")
    try:
        return SavedConfig.model_validate(content), files[MODEL]
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, SavedConfig)}") from None


def _file(folder: Path, name: str, digest: str) -> Path:
    """The file with that checksum; it has its partial name still where :func:`save` was cut off while renaming.

    Raises:
        UserError: where there is none.
    """
    try:
        if _sha256(folder / name) == digest:
            return folder / name
        problem = f"damaged (SHA-256 differs from {MANIFEST}); fetch or write it again"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    with suppress(OSError):
        if _sha256(_part(folder, name)) == digest:
            return _part(folder, name)
    raise UserError(f"{folder / name}: {problem}")


def _part(folder: Path, name: str) -> Path:
    return folder / f".{name}{PARTIAL}"


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        pairs = [line.split("  ") for line in path.read_text(encoding="ascii").splitlines()]
        digests = {name: digest for digest, name in pairs}
    except (OSError, ValueError):  # a line of another form, or bytes that are no text
        raise UserError(f"{path}: missing or damaged; wanted a folder that save_pretrained() wrote") from None
    if set(digests) != {CONFIG, MODEL}:
        raise UserError(f"{path}: damaged (it names {', '.join(sorted(digests)) or 'no file'})")
    return digests


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(parts: Mapping[str, Path]) -> None:
    """Bring finished files to the disk, then give them their names, the manifest's first: from there on they count."""
    for path in parts.values():
        _flush(path)
    for name in sorted(parts, key=MANIFEST.__ne__):
        parts[name].replace(parts[name].with_name(name))
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _flush(parts[name].parent)


def _settle(folder: Path) -> None:
    """Finish the renaming that an earlier save was cut off in, and remove what it had not finished writing."""
    wanted: dict[str, str] = {}
    with suppress(UserError):
        wanted = _manifest(folder)
    for name in (MODEL, CONFIG, CARD, MANIFEST):
        part = _part(folder, name)
        if part.is_file() and name in wanted and _sha256(part) == wanted[name]:
            part.replace(folder / name)
        else:
            part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
