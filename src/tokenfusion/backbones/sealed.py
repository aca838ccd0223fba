"""A folder that is whole or not there: weights and a configuration under checksums, new files renamed at the end.

config.json   model.safetensors   MANIFEST.sha256   README.md

New files lie there whole, as .NAME.partial, before the manifest names them; where the rest of the renaming was cut off,
they are read from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenfusion.errors import UserError, first_line
from tokenfusion.manifest import MANIFEST, file_sha256, flush, read_manifest

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
PARTIAL = ".partial"


def is_sealed(folder: Path) -> bool:
    """Whether a folder looks like one that :func:`write` wrote."""
    return any(path.is_file() for path in (folder / CONFIG, _part(folder, CONFIG)))


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: Callable[[str], str]) -> None:
    """Write the four files; what was there before stays until all of the new lie on the disk.

    Args:
        folder: new or old. A card that is there stays as it is: it may have been written on.
        tensors: on the CPU, contiguous, none a view of another.
        config: to be written as JSON.
        card: the text of a new model card, from the folder's name.

    Raises:
        UserError: where the folder cannot be written.
    """
    texts = {CONFIG: json.dumps(config, indent=1) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        parts = {name: _part(folder, name) for name in (MODEL, CONFIG, CARD, MANIFEST)}
        if (folder / CARD).exists():
            del parts[CARD]
        texts[CARD] = card(folder.resolve().name)
        save_file(dict(tensors), parts[MODEL], metadata={"format": "pt"})
        parts[CONFIG].write_text(texts[CONFIG], encoding="utf-8")
        texts[MANIFEST] = "".join(f"{file_sha256(parts[name])}  {name}\n" for name in (CONFIG, MODEL))
        for name in parts.keys() - {MODEL}:
            parts[name].write_text(texts[name], encoding="utf-8")
        _put(parts)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _settle(folder)
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def read(folder: Path) -> tuple[dict[str, Any], Path]:
    """Every file against its checksum; what the configuration says, and where the weights are.

    Raises:
        UserError: names what is missing or changed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted what save_pretrained() wrote")
    files = {name: _file(folder, name, digest) for name, digest in _manifest(folder).items()}
    try:
        content = json.loads(files[CONFIG].read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{files[CONFIG]}: damaged (no JSON object)")
    return content, files[MODEL]


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of the file that :func:`read` told.

    Raises:
        UserError: where they cannot be read.
    """
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not readable ({first_line(error, 120)})") from None


def _file(folder: Path, name: str, digest: str) -> Path:
    """The file with that checksum; it has its partial name still where :func:`write` was cut off while renaming.

    Raises:
        UserError: where there is none.
    """
    try:
        if file_sha256(folder / name) == digest:
            return folder / name
        problem = f"damaged (SHA-256 differs from {MANIFEST}); fetch or write it again"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    with suppress(OSError):
        if file_sha256(_part(folder, name)) == digest:
            return _part(folder, name)
    raise UserError(f"{folder / name}: {problem}")


def _part(folder: Path, name: str) -> Path:
    return folder / f".{name}{PARTIAL}"


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        digests = read_manifest(folder)
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged; wanted a folder that save_pretrained() wrote") from None
    if set(digests) != {CONFIG, MODEL}:
        raise UserError(f"{path}: damaged (it names {', '.join(sorted(digests)) or 'no file'})")
    return digests


def _put(parts: Mapping[str, Path]) -> None:
    """Bring finished files to the disk, then give them their names, the manifest's first: from there on they count."""
    for path in parts.values():
        flush(path)
    for name in sorted(parts, key=MANIFEST.__ne__):
        parts[name].replace(parts[name].with_name(name))
        flush(parts[name].parent)


def _settle(folder: Path) -> None:
    """Finish the renaming that an earlier save was cut off in, and remove what it had not finished writing."""
    wanted: dict[str, str] = {}
    with suppress(UserError):
        wanted = _manifest(folder)
    for name in (MODEL, CONFIG, CARD, MANIFEST):
        part = _part(folder, name)
        if part.is_file() and name in wanted and file_sha256(part) == wanted[name]:
            part.replace(folder / name)
        else:
            part.unlink(missing_ok=True)
