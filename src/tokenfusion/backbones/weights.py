"""Published checkpoints: safe reading, and a printed account of what was loaded, adapted and left random."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenfusion.errors import UserError, first_line

StateDict = dict[str, Tensor]
# what the readers raise over a damaged file
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)
# What some files hold beside their weights: options, and metrics that numpy computed. Plain values, nothing that runs.
PLAIN: list[Any] = [
    argparse.Namespace,  # the options of a Group-Free run
    np.float64(0).__reduce__()[0],
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")


class LoadReport(NamedTuple):
    """What happened to a network's parameters; each a sorted list of names."""

    loaded: list[str]
    copied: list[str]  # one single-modal tensor given to every modality
    random: list[str]  # not in the checkpoint: as initialised
    unused: list[str]  # in the checkpoint, not in the network

    def summary(self, source: str) -> str:
        """A few printable lines: counts, then the modules that stayed random and the entries nobody asked for."""
        lines = [
            f"weights from {source}: {len(self.loaded)} tensors loaded as they are, "
            f"{len(self.copied)} private copies, {len(self.random)} left random, {len(self.unused)} unused"
        ]
        for title, names in (("left random", self.random), ("unused", self.unused)):
            if names:
                lines.append(f"  {title}: {', '.join(_modules(names))}")
        return "\n".join(lines)


def _modules(names: list[str], most: int = 8) -> list[str]:
    """Distinct leading two parts of dotted names, shortened to a printable number."""
    heads = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    return heads[:most] + ([f"and {len(heads) - most} more"] if len(heads) > most else [])


def _read_torch(path: Path) -> Any:
    return torch.load(path, "cpu", weights_only=True)


def _read_npz(path: Path) -> StateDict:
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


READERS: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".npz": _read_npz}


def read_checkpoint(path: str | Path) -> StateDict:
    """Tensors of a ``.safetensors``, ``.pth``, ``.pth.tar``, ``.pt``, ``.bin`` or ``.npz`` file; nothing in it is run.

    Wrappers (``segmenter``, ``state_dict``, ``model``) and the prefix ``module.`` are taken off.

    Raises:
        UserError: where the file is missing, damaged, or holds something else than tensors.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no weights in this folder; wanted one of {', '.join(WEIGHT_FILES)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals(PLAIN):
            content = READERS.get(path.suffix, _read_torch)(path)
    except UNREADABLE:
        raise UserError(f"{path}: damaged, or no checkpoint, or one that holds more than tensors and numbers") from None
    for key in ("segmenter", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: no tensors found in this file; wanted a state dict")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def fetch(name: str) -> StateDict:
    """A checkpoint by local path (file or folder) or by hub id, e.g. ``nvidia/mit-b2``."""
    if Path(name).exists():
        return read_checkpoint(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(
        (".safetensors", ".pth", ".pt", ".tar", ".bin", ".npz")
    ):
        raise UserError(f"{name}: neither a file or folder here nor a hub id such as nvidia/mit-b2")
    try:
        found = next((path for path in (hub_file(name, file) for file in WEIGHT_FILES) if path is not None), None)
    except Exception as error:  # the hub's client raises many kinds; each means "not from there"
        reason = first_line(error, 120)
        raise UserError(
            f"{name}: could not be fetched from the hub ({reason}); download it and give the local path"
        ) from None
    if found is None:
        raise UserError(f"{name}: the hub holds none of {', '.join(WEIGHT_FILES)} there; give the local path of a file")
    return read_checkpoint(found)


def hub_file(name: str, file: str) -> Path | None:
    """A file of what the hub holds under an id, None where it has no such file; without a network from the local cache.

    ``hf_hub_download`` would go on trying a hub that is out of reach for half a minute, and so for every file.
    """
    from huggingface_hub import snapshot_download  # heavy import, and only needed here

    path = Path(snapshot_download(name, allow_patterns=file)) / file
    return path if path.is_file() else None


def local_folder(name: str) -> Path:
    """A folder here, or what the hub holds under this id.

    Raises:
        UserError: where the hub does not give it.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download  # heavy import, and only needed here

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the hub's client raises many kinds; each means "not from there"
        reason = first_line(error, 120)
        raise UserError(f"{name}: no such folder, and not to be had from the hub ({reason})") from None


def load_into(network: nn.Module, source: StateDict) -> LoadReport:
    """Load by name and shape; a single-modal tensor fills every private copy; tell what was done.

    Args:
        network: single-modal, or one whose private layers are :class:`~tokenfusion.fusion.modality.PerModality`.
        source: in the names of the single-modal network or of this very network.

    Raises:
        UserError: where a tensor has another shape than the network's, or nothing fits at all.
    """
    state = network.state_dict()
    origins: dict[str, str] = {}
    for name, target in state.items():
        origin = name if name in source else re.sub(r"\.\d+\.(\w+)$", r".\1", name)
        if origin in source:
            if source[origin].shape != target.shape:
                shapes = f"{tuple(source[origin].shape)}, the network {tuple(target.shape)}"
                raise UserError(f"{origin}: the checkpoint has shape {shapes}")
            origins[name] = origin
    if not origins:
        raise UserError(f"nothing in this checkpoint fits the network (its first key is {next(iter(source))!r})")
    with torch.no_grad():
        for name, origin in origins.items():
            state[name].copy_(source[origin])
    return LoadReport(
        loaded=sorted(name for name, origin in origins.items() if name == origin),
        copied=sorted(name for name, origin in origins.items() if name != origin),
        random=sorted(state.keys() - origins.keys()),
        unused=sorted(source.keys() - set(origins.values())),
    )
