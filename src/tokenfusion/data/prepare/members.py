"""Files in folders and in archives alike: found once, read in the order in which they lie, never unpacked to disk."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from tokenfusion.errors import UserError, first_line

TARS = (".tar", ".tar.gz", ".tgz")
SUFFIXES = (*TARS, ".zip")
DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class Member(NamedTuple):
    """One file: ``name`` is its path on disk, or its name within ``archive``."""

    archive: Path | None
    name: str
    folders: tuple[str, ...]  # from the source down; an archive counts as a folder, without its suffix

    @property
    def file(self) -> str:
        return PurePath(self.name).name

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}" if self.archive else self.name


def find_members(source: Path, keep: Callable[[str], object]) -> list[Member]:
    """The files below a folder (or in one archive) whose plain file name ``keep`` finds true, archives looked into.

    Errors: UserError where ``source`` is not there or an archive cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; --source is where the official files are")
    found = []
    for path in [source] if source.is_file() else _walk(source):
        inside = path.relative_to(source.parent if source.is_file() else source)
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is not None:
            folders = (*inside.parts[:-1], path.name.removesuffix(suffix))
            for name in _names(path, suffix):
                place = PurePosixPath(name)
                if keep(place.name):
                    plain = [part for part in place.parts[:-1] if part not in ("/", "..")]
                    found.append(Member(path, name, (*folders, *plain)))
        elif keep(path.name):
            found.append(Member(None, str(path), inside.parts[:-1]))
    return found


def read_members(members: Sequence[Member]) -> Iterator[bytes]:
    """The contents in the order of ``members``, which is that of ``find_members``; b"" for one that is damaged."""
    for archive, group in groupby(members, key=lambda member: member.archive):
        names = [member.name for member in group]
        if archive is None:
            yield from (_try(Path(name).read_bytes) for name in names)
        elif archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                yield from (_try(partial(file.read, name)) for name in names)
        else:
            yield from _read_tar(archive, set(names))


def _read_tar(archive: Path, names: set[str]) -> Iterator[bytes]:
    """Forward only: a compressed archive has no way back."""
    with tarfile.open(archive) as file:
        for info in file:
            content = file.extractfile(info) if info.name in names else None
            if content is not None:
                yield _try(content.read)


def _try(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except DAMAGE:
        return b""


def _walk(source: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(source, followlinks=True):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(files))


def _names(archive: Path, suffix: str) -> list[str]:
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                return [info.filename for info in file.infolist() if not info.is_dir()]
        with tarfile.open(archive) as file:
            return [info.name for info in file if info.isfile()]
    except DAMAGE as error:
        reason = first_line(error).rstrip(":")
        raise UserError(f"{archive}: cannot be read as an archive ({reason}); download it again") from None
