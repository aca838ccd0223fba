"""What all preparations share: the atomic folder writer, its manifest, progress, and reading foreign archives."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import yaml
from PIL import Image

from tokenfusion.errors import UserError, require
from tokenfusion.manifest import MANIFEST, file_sha256, lock_folder, unlock_folder

T = TypeVar("T")


class Staging:
    """Write a data set folder that appears whole or not at all.

    Files go to a hidden sibling ``.<name>.partial-xxxx``; leaving the block writes the manifest and renames. Any
    exception, Ctrl-C included, removes it; what a killed process left is removed by the next call.

    Errors: UserError where ``out`` holds something, is being written by another process, or cannot be written.

        with Staging(Path("my-data")) as staging:
            staging.image("rgb/000001.png", pixels)
            staging.dataset({"name": "mine", ...}, {"train": ["000001"]})
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out).absolute()
        self.path = self.out  # the partial folder, once entered
        self._digests: dict[str, str] = {}
        self._lock = -1

    def __enter__(self) -> Staging:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: exists and is not an empty folder; choose another --out, or remove it first")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
            self._lock = lock_folder(self.path, "writing this data set")
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); choose another --out") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            raise UserError(f"{self.out}: cannot be written ({failure.strerror})") from None
        finally:
            unlock_folder(self._lock)
            shutil.rmtree(self.path, ignore_errors=True)  # after a success this name is gone already

    def write(self, name: str, data: bytes | str) -> None:
        """Write one file, for example "points/000001.txt"; text is UTF-8. Each name may be written once."""
        if name in self._digests or name == MANIFEST or not _is_inside(name):
            raise ValueError(f"{name!r} is written already or is not a plain relative name")
        data = data.encode() if isinstance(data, str) else data
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}) at {name}") from None
        self._digests[name] = hashlib.sha256(data).hexdigest()

    def remove(self, name: str) -> None:
        """Take one written file back; its name may be written again."""
        del self._digests[name]
        (self.path / name).unlink()

    def image(self, name: str, pixels: np.ndarray) -> None:
        """Write uint8 [H, W] or [H, W, 3], or uint16 [H, W] (png only); the name ends in .png or .jpg."""
        self.write(name, encode_image(pixels, PurePosixPath(name).suffix))

    def array(self, name: str, values: np.ndarray) -> None:
        """Write one array as .npy."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.asanyarray(values), allow_pickle=False)
        self.write(name, buffer.getvalue())

    def json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.write(name, json.dumps(value, indent=1) + "\n")

    def dataset(self, description: dict[str, Any], splits: dict[str, list[str]]) -> None:
        """Write dataset.yaml and one ``<split>.txt`` of ids per split; ``splits`` is added to the description."""
        for split, ids in splits.items():
            self.write(f"{split}.txt", "".join(f"{name}\n" for name in ids))
        description = {**description, "splits": {split: f"{split}.txt" for split in splits}}
        self.write("dataset.yaml", yaml.safe_dump(description, sort_keys=False, default_flow_style=None, width=120))

    def _finish(self) -> None:
        for path in sorted(self.path.rglob("*")):  # files that did not come through write()
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in self._digests:
                self._digests[name] = file_sha256(path)
        with (self.path / MANIFEST).open("w", encoding="utf-8") as file:
            file.writelines(f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
            file.flush()
            os.fsync(file.fileno())
        if hasattr(os, "sync"):
            os.sync()  # one call instead of one fsync for each of ten thousands of files
        self.path.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(self.path, self.out)  # an empty folder of that name is replaced

    def _remove_leftovers(self) -> None:
        for leftover in self.out.parent.glob(f".{self.out.name}.partial-*"):
            lock = lock_folder(leftover, "writing this data set")  # a killed process holds no lock any more
            shutil.rmtree(leftover, ignore_errors=True)
            unlock_folder(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\n" not in name


def encode_image(pixels: np.ndarray, suffix: str) -> bytes:
    """PNG or JPEG (quality 95) bytes of uint8 [H, W], uint8 [H, W, 3] or (PNG only) uint16 [H, W]."""
    buffer = io.BytesIO()
    if suffix == ".png":
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    elif suffix == ".jpg" and pixels.dtype == np.uint8:
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95, subsampling=0)
    else:
        raise ValueError(f"cannot write {pixels.dtype} as {suffix!r}")
    return buffer.getvalue()


def verify_manifest(folder: Path, show_progress: bool = False) -> int:
    """Check every file that ``MANIFEST.sha256`` lists and return how many there are.

    Errors: UserError that names the first missing or changed file and says how many there are.
    """
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder / MANIFEST}: cannot be read ({error}); only folders written by 'prepare' can be verified"
        ) from None
    bad = []
    for line in track(lines, "verifying", show_progress):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not _is_inside(name):
            raise UserError(f"{folder / MANIFEST}: {line[:80]!r} is no line of a manifest; prepare the data again")
        path = folder / name
        if not path.is_file():
            bad.append(f"{path} is missing")
        elif file_sha256(path) != digest:
            bad.append(f"{path} has changed")
    if bad:
        raise UserError(f"{bad[0]} ({len(bad)} of {len(lines)} files are damaged); prepare the data again")
    return len(lines)


def track(items: Iterable[T], what: str, show: bool = True) -> Iterator[T]:
    """Yield the items; on a terminal keep one line with count and time left on stderr, else a line every tenth."""
    items = list(items)
    live, total, start, shown = sys.stderr.isatty(), len(items), time.monotonic(), -1
    for done, item in enumerate(items):
        yield item
        tick = (done + 1) * (200 if live else 10) // total
        if show and tick != shown:
            shown, left = tick, (time.monotonic() - start) / (done + 1) * (total - done - 1)
            text = f"{what} {done + 1}/{total}, {left:.0f} s left"
            print(f"\r{text:<60}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
    if show and live and total:
        print(file=sys.stderr)


def find_file(source: Path, name: str, advice: str, depth: int = 4) -> Path:
    """The one file called ``name`` in ``source`` or at most ``depth`` folders below it; ``source`` may be that file.

    Errors: UserError with ``advice`` (where the file comes from) where there is none, or where there are several.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; --source is where the official archive was unpacked")
    if source.is_file():
        source = source.parent
    for level in range(depth + 1):
        found = sorted(path for path in source.glob("*/" * level + name) if path.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{source}: holds {name} {len(found)} times ({found[0]}, {found[1]}); keep one")
    raise UserError(f"{source}: holds no {name} in it or below; {advice}")


def open_hdf5(path: Path) -> Any:
    """Open a MATLAB 7.3 (HDF5) file with h5py; a UserError names a damaged one."""
    h5py = require("h5py", "prepare")
    try:
        return h5py.File(path, "r", rdcc_nbytes=1 << 27)  # MATLAB may put several frames in one chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read as HDF5 ({error}); download it again") from None


def read_mat(path: Path, names: list[str], fields: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read variables of a MATLAB 5 file as plain lists, numbers and strings; of structures only ``fields``.

    scipy runs in a child process: a damaged file can crash or exhaust it, and its memory (gigabytes for SUN RGB-D's
    boxes) is given back.

    Errors: UserError that names the file where it cannot be read or lacks a variable.
    """
    require("scipy.io", "prepare")
    code = f"{inspect.getsource(_dump_mat)}\n_dump_mat({str(path)!r}, {names!r}, {fields!r})"
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, encoding="utf-8")
    try:
        content: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        lines = child.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the reader died with status {child.returncode}"
        raise UserError(f"{path}: cannot be read as a MATLAB 5 file ({reason}); download it again") from None
    for name in names:
        if name not in content["variables"]:
            raise UserError(f"{path}: holds {', '.join(content['names'])}, but not {name}; is it the official file?")
    variables: dict[str, Any] = content["variables"]
    return variables


def as_list(value: Any) -> list[Any]:
    """MATLAB's arrays of one element come as that element."""
    return value if isinstance(value, list) else [value]


def _dump_mat(path: str, names: list[str], fields: tuple[str, ...]) -> None:
    """Print variables of a .mat file as JSON. Runs alone in a child process, hence its own imports."""
    import json

    import numpy
    import scipy.io

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {field: plain(value[field]) for field in fields if field in value}
        if isinstance(value, numpy.ndarray | list):
            return [plain(element) for element in value]
        return value.item() if isinstance(value, numpy.generic) else value

    known = [name for name, _, _ in scipy.io.whosmat(path)]
    content = scipy.io.loadmat(path, simplify_cells=True, variable_names=[name for name in names if name in known])
    variables = {name: plain(content[name]) for name in names if name in known}
    print(json.dumps({"names": known, "variables": variables}))
