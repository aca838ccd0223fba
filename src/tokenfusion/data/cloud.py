"""Point clouds on disk -> rows x y z in metres and, where the file has colours, r g b in 0..1."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenfusion.data.boxes import FAR_M
from tokenfusion.data.pcd import parse_pcd
from tokenfusion.data.ply import parse_ply
from tokenfusion.errors import UserError, first_line

COLOURS = (("red", "green", "blue"), ("r", "g", "b"))
BIN_COLUMNS = (3, 4, 6)


class Cloud(NamedTuple):
    """Points float32 [P, 3] or [P, 6]; box int64 [P] = row of the scene's boxes, -1 = none, or None where nothing says it."""

    points: Tensor
    box: Tensor | None = None


def read_cloud(path: Path | str, instance: Path | str | None = None, columns: int | None = None) -> Cloud:
    """Read one cloud; points that are not finite are dropped.

    .npy holds [P, 3] or [P, 6]; .ply and .pcd (text or binary) hold x, y, z and may hold red, green, blue or r, g, b
    (or pcd's packed rgb). .bin holds rows of ``columns`` little-endian float32: 6 = x y z r g b, 3 = x y z, 4 = x y z
    and one number that is left out. Where ``columns`` is None they are 6 if the last three can be colours, else 3; a cloud
    x y z without a negative coordinate can be mistaken, so store it in another format. Colours that are whole
    numbers by type are divided by that type's largest; those above 1 are taken as 0..255.

    Args:
        path: the cloud.
        instance: .npy of whole numbers [P], one per point of the file: the row of its box, -1 = none.
        columns: of a .bin file.

    Errors: UserError that names the file where it is missing, damaged, empty, has other columns, or places points out of
    all reach.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path}: {path.suffix or 'no suffix'} is no kind of point cloud; known: {' '.join(READERS)}")
    if columns not in (None, *BIN_COLUMNS):
        raise UserError(f"columns is {columns}; rows of a .bin file have 3, 4 or 6 numbers")
    try:
        data = path.read_bytes()
        rows = _rows(suffix, data, columns)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError as error:  # read, but not what is wanted
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # damage shows in many ways
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read as a point cloud ({reason}); the file may be damaged") from None
    kept = np.isfinite(rows).all(1)
    if not kept.any():
        what = f"its {len(rows)} points are NaN or infinite" if len(rows) else "holds no points"
        raise UserError(f"{path}: {what}; leave this scene out")
    far = float(np.abs(rows[kept, :3]).max())
    if far > FAR_M:
        raise UserError(f"{path}: a coordinate is {far:g}; wanted metres, none beyond {FAR_M:g}: scale or shift it")
    box = None if instance is None else torch.from_numpy(_read_instance(Path(instance), path, len(rows))[kept])
    return Cloud(torch.from_numpy(rows if kept.all() else rows[kept]), box)


def _rows(suffix: str, data: bytes, columns: int | None) -> np.ndarray:
    """float32 [P, 3] or [P, 6]; a .bin file without a given width is tried at both."""
    try:
        return _join(*READERS[suffix](data, columns or 6))
    except UserError as error:
        if suffix != ".bin" or columns is not None:
            raise
        rows = np.zeros((0, 3)) if len(data) % 12 else _join(*_read_bin(data, 3))
        if rows[1::2].min(initial=0) >= 0:  # colours at every second place: rows of six, the last one cut
            hint = "rows x y z are told by a negative coordinate: save others as .npy"
            raise UserError(f"{error} (x y z r g b); {hint}") from None
        return rows


def _read_npy(data: bytes, _: int) -> tuple[np.ndarray, np.ndarray | None]:
    values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if values.dtype.kind not in "uif" or values.ndim != 2 or values.shape[1] not in (3, 6):
        came = f"holds {values.dtype} {list(values.shape)}"
        raise UserError(f"{came}, wanted [points, 3] or [points, 6]: real numbers x y z, or x y z r g b")
    return values[:, :3], values[:, 3:] if values.shape[1] == 6 else None


def _read_bin(data: bytes, columns: int) -> tuple[np.ndarray, np.ndarray | None]:
    if len(data) % (4 * columns):
        raise UserError(f"{len(data)} bytes are no rows of {columns} float32")
    values = np.frombuffer(data, "<f4").reshape(-1, columns)
    return values[:, :3], values[:, 3:] if columns == 6 else None


def _read_fields(
    parse: Callable[[bytes], dict[str, np.ndarray]],
) -> Callable[..., tuple[np.ndarray, np.ndarray | None]]:
    def read(data: bytes, _: int) -> tuple[np.ndarray, np.ndarray | None]:
        fields = parse(data)
        lacking = [name for name in "xyz" if name not in fields or fields[name].ndim != 1]
        if lacking:
            raise UserError(f"has no {lacking[0]}, its fields are {', '.join(fields)}; wanted x, y and z")
        colours = next((names for names in COLOURS if all(name in fields for name in names)), None)
        return _columns(fields, "xyz"), None if colours is None else _columns(fields, colours)

    return read


def _columns(fields: dict[str, np.ndarray], names: tuple[str, ...] | str) -> np.ndarray:
    return np.stack([fields[name] for name in names], axis=1)


READERS: dict[str, Callable[[bytes, int], tuple[np.ndarray, np.ndarray | None]]] = {
    ".npy": _read_npy,
    ".ply": _read_fields(parse_ply),
    ".pcd": _read_fields(parse_pcd),
    ".bin": _read_bin,
}


def _join(xyz: np.ndarray, rgb: np.ndarray | None) -> np.ndarray:
    """float32 [P, 3] or [P, 6], colours in 0..1."""
    with np.errstate(over="ignore"):  # beyond float32: infinite, and dropped
        rows = xyz.astype(np.float32)
        if rgb is None:
            return np.ascontiguousarray(rows)
        colours = rgb.astype(np.float32)
    colours = np.where(np.isfinite(colours), colours, np.float32(np.nan))  # which clipping would keep
    known = colours[~np.isnan(colours)]
    top = 255.0 if known.size and known.max() > 1.001 else 1.0
    if rgb.dtype.kind == "u":
        top = float(np.iinfo(rgb.dtype).max)
    if known.size and not (known.min() >= -0.001 and known.max() <= top * 1.001):
        raise UserError(f"holds colours in {known.min():g}..{known.max():g}, wanted 0..1 or 0..255")
    return np.concatenate([rows, (colours / np.float32(top)).clip(0, 1)], axis=1)


def _read_instance(path: Path, cloud: Path, count: int) -> np.ndarray:
    try:
        values = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a NumPy array ({error}); the file may be damaged") from None
    if values.dtype.kind not in "ui" or values.shape != (count,):
        came = f"{values.dtype} {list(values.shape)}"
        raise UserError(f"{path}: holds {came}, wanted whole numbers [{count}], one for each point of {cloud}")
    return values.astype(np.int64)


def with_channels(points: Tensor, colour: bool, path: Path) -> Tensor:
    """Coordinates, and where asked for colours, of a cloud's rows ``[P, 3]`` or ``[P, 6]``.

    Raises:
        UserError: where colours are asked for and there are none; ``path`` is named.
    """
    if colour and points.shape[1] < 6:
        raise UserError(f"{path}: has no colours, and they are asked for; add r g b, or leave data.colour out")
    return points if colour else points[:, :3]
