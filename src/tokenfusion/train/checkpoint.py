"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors and JSON under a SHA-256 manifest.

checkpoints/step-00001000/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.sha256
checkpoints/best/            model.safetensors  state.json  MANIFEST.sha256

Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from tokenfusion.errors import UserError
from tokenfusion.manifest import MANIFEST, flush, read_manifest
from tokenfusion.train.log import warn

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
BEST = "best"
STEP = re.compile(r"step-(\d{8,})")
UNFINISHED, REPLACED = ".tmp-", ".old-"  # beginnings of names that a kill may leave behind


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


class Checkpoint(NamedTuple):
    """A verified checkpoint: names as in ``task.state_dict()``; ``optimizer`` is empty for the best one."""

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: the last ``keep`` and the best.

    A checkpoint is written under another name in the same folder, brought to the disk, then renamed: whatever happens,
    a folder named ``step-...`` is whole.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def save(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Write ``step-...`` and drop the oldest beyond ``keep``.

        Raises:
            UserError: where the disk is full or the folder cannot be written; earlier checkpoints are as they were.
        """
        path = self._write(
            f"step-{step:08d}", {MODEL: _packed(model), OPTIMIZER: _packed(optimizer), STATE: _json(state)}
        )
        for old in _steps(self.folder)[self.keep :]:
            _remove(old)
        return path

    def save_best(self, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Replace ``best``."""
        return self._write(BEST, {MODEL: _packed(model), STATE: _json(state)})

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are named in a warning and put aside.

        Raises:
            UserError: where there are checkpoints, but none is whole.
        """
        self._tidy()
        damaged = []
        for folder in _steps(self.folder):
            try:
                checkpoint = read(folder)
            except DamagedError as error:
                warn(f"{error}; going on from the one before")
                damaged.append(folder)
                continue
            for bad in damaged:  # else it would count among those to keep
                os.replace(bad, self._free_name(f"damaged-{bad.name}"))
            return checkpoint
        if damaged:
            raise UserError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged: remove the folder to start anew"
            )
        return None

    def _write(self, name: str, files: Mapping[str, bytes]) -> Path:
        final, temporary = self.folder / name, self.folder / f"{UNFINISHED}{name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            lines = [f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in files.items()]
            for file, content in {**files, MANIFEST: "".join(lines).encode()}.items():
                _write_through(temporary / file, content)
            flush(temporary)
            self._rename(temporary, final)
        except OSError as error:
            with suppress(OSError):
                self._tidy()
            raise UserError(
                f"{final}: the checkpoint cannot be written ({error.strerror}): free space or choose another --out, and"
                " start again; earlier checkpoints are intact"
            ) from None
        return final

    def _rename(self, temporary: Path, final: Path) -> None:
        """A folder that is there already steps aside for the moment in which neither has the name."""
        aside = self.folder / f"{REPLACED}{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        flush(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _tidy(self) -> None:
        """What a kill left behind: unfinished folders go, one that had stepped aside comes back."""
        for folder in sorted(self.folder.glob(f"{REPLACED}*")):
            final = self.folder / folder.name.removeprefix(REPLACED)
            if final.exists():
                shutil.rmtree(folder)
            else:
                os.rename(folder, final)
        for folder in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(folder)

    def _free_name(self, name: str) -> Path:
        return next(p for p in _numbered(self.folder / name) if not p.exists())


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare every byte with its manifest.

    Raises:
        DamagedError: names the file that is missing or changed.
    """
    content = {}
    for name, digest in _manifest(folder).items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{folder / name}: cannot be read ({error.strerror})") from None
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise DamagedError(f"{folder / name}: damaged (SHA-256 differs from {MANIFEST})")
    optimizer = from_bytes(content[OPTIMIZER]) if OPTIMIZER in content else {}
    return Checkpoint(folder, from_bytes(content[MODEL]), optimizer, json.loads(content[STATE]))


def load_model(path: str | Path, which: Literal["last", "best"] = "last") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state (step, metrics, ...) of a run or of one checkpoint.

    Args:
        path: a run folder, or a checkpoint folder itself.
        which: of a run, the newest whole checkpoint or the one with the best validation figure.

    Returns:
        Tensors by the names of ``task.state_dict()``, on the CPU, and the content of ``state.json``.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    path = Path(path)
    folder = path / "checkpoints"
    if (path / MODEL).exists() or (path / MANIFEST).exists():
        return _weights(read(path))
    if which == BEST:
        best = next((f for f in (folder / BEST, folder / f"{REPLACED}{BEST}") if f.exists()), None)
        if best is None:
            raise UserError(f"{folder / BEST}: no such checkpoint; a run has it after its first validation")
        return _weights(read(best))
    candidates = _steps(folder)
    for candidate in candidates:
        try:
            return _weights(read(candidate))
        except DamagedError as error:
            warn(str(error))
    if candidates:
        raise UserError(f"{folder}: all {len(candidates)} checkpoints are damaged")
    raise UserError(f"{path}: no checkpoint there; wanted the --out of a training run, or a folder with {MODEL}")


def _weights(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return checkpoint.model, checkpoint.state


def _steps(folder: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = {int(match[1]): p for p in folder.glob("step-*") if (match := STEP.fullmatch(p.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        digests = read_manifest(folder)
    except (OSError, ValueError):
        raise DamagedError(f"{path}: missing or damaged") from None
    if not {MODEL, STATE} <= set(digests) <= {MODEL, STATE, OPTIMIZER}:
        raise DamagedError(f"{path}: damaged (it names {', '.join(sorted(digests)) or 'no file'})")
    return digests


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors that share memory are written each in full: loading needs to know nothing about it."""
    copies = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    return to_bytes(copies, metadata={"format": "pt"})


def _json(state: Mapping[str, Any]) -> bytes:
    return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """By way of another name, so that a kill in between leaves no half checkpoint."""
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1
