"""A fused network as a folder, and back: its weights, how to build it, their checksums, a model card.

config.json   model.safetensors   MANIFEST.sha256   README.md

Nothing is pickled, and reading runs no code that the folder brings along. New files lie there whole, as .NAME.partial,
before the manifest names them; where the rest of the renaming was cut off, they are read from there.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenfusion.backbones.foreign import example_of, kind_of, library
from tokenfusion.backbones.hub import FusedNetwork, FuserFactory
from tokenfusion.backbones.survey import evaluating
from tokenfusion.backbones.weights import local_folder
from tokenfusion.components import FUSER_GIVEN, TARGET, Section, explain, find, maker
from tokenfusion.errors import UserError

CONFIG, MODEL, MANIFEST, CARD = "config.json", "model.safetensors", "MANIFEST.sha256", "README.md"
FORMAT = 1
PARTIAL = ".partial"
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


Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES = get_args(Dtype)


class NetworkSpec(Section):
    """How to build the single-modal network; ``module``: not from its name, for that reason."""

    kind: Literal["timm", "hf", "module"]
    name: str  # of the architecture (timm) or of the class
    arguments: dict[str, Any] = Field(
        default_factory=dict
    )  # of timm.create_model, or the configuration of Hugging Face
    reason: str = ""


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
        return _filled(_fused(config, network or _network(config.network), trust), config, tensors)
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
        raise UserError(f"cannot be fused as config.json says ({_first_line(error)})") from None
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
        network=_network_spec(model),
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


def _network_spec(model: FusedNetwork) -> NetworkSpec:
    network, name = model.network, type(model.network).__name__
    try:
        found = {"timm": _timm_spec, "hf": _hf_spec}.get(kind_of(network), lambda *_: None)(network, model.example_size)
    except Exception as error:  # whatever foreign libraries raise
        return NetworkSpec(kind="module", name=name, reason=f"its arguments cannot be told: {_first_line(error)}")
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


def _undropped(model: nn.Module, again: nn.Module) -> str | None:
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


def _network(spec: NetworkSpec) -> nn.Module:
    """A network of timm or of Hugging Face with random weights.

    Raises:
        UserError: where this version of the library does not know it, or the name is none of that library's.
    """
    try:
        network = _timm_network(spec) if spec.kind == "timm" else _hf_network(spec)
    except UserError:
        raise
    except Exception as error:  # whatever foreign libraries raise
        raise UserError(f"{spec.name} cannot be built by this version of its library ({_first_line(error)})") from None
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


def _unlike(model: FusedNetwork, config: SavedConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a model built again from ``config`` is not this one; None where both answer alike."""
    some = next(model.parameters())
    try:
        with _drawing_nothing(), evaluating(model), torch.no_grad():
            again = _filled(_fused(config, _network(config.network), True), config, tensors).to(some.device)
            difference = _undropped(model, again)
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
        return _first_line(error)
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


def card(model: FusedNetwork, config: SavedConfig, name: str) -> str:
    """The model card: facts that the model itself tells; the licence is the author's to choose."""
    network, fuser = config.network, model.fusers[0] if len(model.fusers) else model.plain
    channels = model.channels or [config.example[1]] * len(model.modalities)
    sizes = dict(zip(model.modalities, channels, strict=True))
    library = {"timm": ["timm"], "hf": ["transformers"], "module": []}[network.kind]
    tags = ["tokenfusion", "multimodal", "vision-transformer", *library, *model.modalities]
    arguments = ", ".join(f"{k} {v}" for k, v in config.fuser.items() if k != TARGET and v is not None)
    says = " ".join(inspect.cleandoc(type(fuser).__doc__ or "").split("\n\n")[0].split())
    shape = ", ".join(map(str, config.example[2:]))
    inputs = ", ".join(f'"{key}": torch.randn(1, {n}, {shape})' for key, n in sizes.items())
    given = f", network={network.name}(...)" if network.kind == "module" else ""
    what = ", ".join(f"{key} ({n} channel{'s' * (n > 1)})" for key, n in sizes.items())
    done = "".join(f"- {line}\n" for line in model.account)
    lines = [
        "---",
        "library_name: tokenfusion",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)),
        "# license: yours to choose; mind that of the weights you started from",
        "---",
        "",
        f"# {name}: {network.name} over {' + '.join(model.modalities)}",
        "",
        f"One network for {len(sizes)} aligned modalities: {what}.",
        f"The base network is {_base(model, network)}; all streams share its weights and each has its own norms.",
        f"{len(model.survey.blocks)} blocks, {sum(p.numel() for p in model.parameters()):,} parameters.",
        *(["", done.rstrip()] if done else []),
        "",
        f"**Exchange.** {type(fuser).__name__}: {says}" + (f" Here: {arguments}." if arguments else ""),
        "",
        "```python",
        "import tokenfusion",
        "import torch",
        "",
        f'model = tokenfusion.load("{name}"{given})  # this folder, or its hub id',
        f"out = model({{{inputs}}})  # a modality may be left out",
        "out.ensemble, out.outputs, out.scores",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _base(model: FusedNetwork, network: NetworkSpec) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in network.arguments.items()) if network.kind == "timm" else ""
    library = {"timm": "timm's ", "hf": "Hugging Face's ", "module": ""}[network.kind]
    return f"{library}{network.name}" + (f" ({arguments})" if arguments else "")


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
