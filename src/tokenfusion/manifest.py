"""Files under checksums: a manifest as ``sha256sum`` writes it, bringing things to the disk, one writer per folder."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from tokenfusion.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes that write to one folder are not told apart there
    fcntl = None  # type: ignore[assignment]

MANIFEST = "MANIFEST.sha256"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """The names in a folder's manifest and their checksums.

    Raises:
        OSError: where there is none.
        ValueError: where a line has another form, or bytes are no text.
    """
    lines = (folder / MANIFEST).read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def lock_folder(path: Path, doing: str, patience_s: float = 0.0) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process dies; -1 without locks.

    Where a process was killed, those that it had forked hold its lock until they notice: that is what patience is for.

    Raises:
        UserError: where another process holds it, and what it is ``doing``.
    """
    if fcntl is None:
        return -1
    descriptor, end = os.open(path, os.O_RDONLY), time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= end:
                os.close(descriptor)
                raise UserError(f"{path}: another process is {doing} right now; wait for it to end") from None
            time.sleep(0.1)


def unlock_folder(descriptor: int) -> None:
    """Give a lock back, and those that were forked meanwhile with it."""
    if descriptor >= 0:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
