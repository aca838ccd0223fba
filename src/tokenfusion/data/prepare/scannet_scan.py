"""One scan of ScanNet: its vertices, axis-aligned, and the objects that stand in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenfusion.data.cloud import read_cloud
from tokenfusion.data.scene import is_rigid
from tokenfusion.data.truth import kept_rows
from tokenfusion.errors import UserError

SCANS = "get the scans with the script that http://www.scan-net.org sends"
CLASSES = {  # name: id among the 40 of NYUDv2
    "cabinet": 3,
    "bed": 4,
    "chair": 5,
    "sofa": 6,
    "table": 7,
    "door": 8,
    "window": 9,
    "bookshelf": 10,
    "picture": 11,
    "counter": 12,
    "desk": 14,
    "curtain": 16,
    "refrigerator": 24,
    "showercurtrain": 28,
    "toilet": 33,
    "sink": 34,
    "bathtub": 36,
    "garbagebin": 39,
}


class Scan(NamedTuple):
    """All vertices of a mesh."""

    points: np.ndarray  # float32 [P, 6], axis-aligned metres and colours 0..1
    owner: np.ndarray  # int64 [P], row in boxes, -1 = none
    boxes: list[dict[str, Any]]  # entries of boxes/ID.json
    align: np.ndarray  # float64 [4, 4], from the scanner's axes to these


def read_labels(path: Path) -> dict[str, int]:
    """The label table: raw category -> id among the 40 classes of NYUDv2 (0 = none)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {row["raw_category"]: int(row["nyu40id"] or 0) for row in rows}
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: is no table with raw_category and nyu40id ({error}); {SCANS}") from None


def read_scan(folder: Path, id: str, labels: dict[str, int]) -> Scan:
    """Read ``<id>_vh_clean_2.ply``, its segments, their aggregation and ``<id>.txt``.

    Errors: UserError that names the file where one is missing, damaged or does not fit the others.
    """
    mesh = folder / f"{id}_vh_clean_2.ply"
    points = read_cloud(mesh).points.numpy()
    align = read_alignment(folder / f"{id}.txt")
    points[:, :3] = points[:, :3].astype(np.float64) @ align[:3, :3].T + align[:3, 3]
    segments_path = folder / f"{id}_vh_clean_2.0.010000.segs.json"
    segments = np.asarray(_field(_read_json(segments_path), "segIndices", segments_path))
    if segments.shape != (len(points),) or segments.dtype.kind not in "iu":
        raise UserError(f"{segments_path}: holds {segments.size} segments, {mesh.name} {len(points)} vertices; {SCANS}")
    groups_path, groups = _aggregation(folder, id)
    owner, names = _objects(groups, groups_path, segments, labels)
    return Scan(points, owner, [_box(name, points[owner == row]) for row, name in enumerate(names)], align)


def read_alignment(path: Path) -> np.ndarray:
    """float64 [4, 4] of the line ``axisAlignment = ...``; the unit matrix where there is none."""
    try:
        lines = [line.partition("=") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {SCANS}") from None
    for key, _, value in lines:
        if key.strip() == "axisAlignment":
            try:
                align = np.array([float(word) for word in value.split()]).reshape(4, 4)
            except ValueError:
                align = np.zeros((4, 4))
            if not is_rigid(torch.from_numpy(align)):
                raise UserError(f"{path}: axisAlignment is {value.strip()[:60]!r}, no rotation and shift; {SCANS}")
            return align
    return np.eye(4)


def _aggregation(folder: Path, id: str) -> tuple[Path, list[Any]]:
    """Of the files *.aggregation.json the one that groups the segments of _vh_clean_2."""
    paths = sorted(folder.glob("*.aggregation.json"))
    contents = {path: _read_json(path) for path in paths}
    fitting = [path for path in paths if "_vh_clean_2." in str(contents[path].get("segmentsFile", ""))]
    chosen = fitting or [path for path in paths if path.name == f"{id}.aggregation.json"]
    if not chosen:
        raise UserError(f"{folder}: holds no {id}.aggregation.json for the segments of {id}_vh_clean_2; {SCANS}")
    groups = _field(contents[chosen[0]], "segGroups", chosen[0])
    if not isinstance(groups, list):
        raise UserError(f"{chosen[0]}: segGroups is no list; {SCANS}")
    return chosen[0], groups


def _objects(
    groups: list[Any], path: Path, segments: np.ndarray, labels: dict[str, int]
) -> tuple[np.ndarray, list[str]]:
    """Row of each vertex's object int64 [P] and the class of each object of the 18 classes."""
    class_of = {label: name for name, label in CLASSES.items()}
    known, place = np.unique(segments, return_inverse=True)
    group_of = np.full(len(known), -1)
    found = list[str | None]()
    for row, group in enumerate(groups):
        try:
            label, parts = str(group["label"]), np.asarray(group["segments"], dtype=np.int64)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: a group of segments lacks label or segments; {SCANS}") from None
        group_of[np.isin(known, parts)] = row
        found.append(class_of.get(labels.get(label, 0)))
    kept = [row for row, name in enumerate(found) if name is not None and (group_of == row).any()]
    owner = kept_rows(torch.from_numpy(group_of[place]), kept, len(groups)).numpy()
    return owner, [str(found[row]) for row in kept]


def _box(name: str, points: np.ndarray) -> dict[str, Any]:
    low, high = points[:, :3].min(0).astype(np.float64), points[:, :3].max(0).astype(np.float64)
    size = np.maximum(high - low, 1e-3)  # a picture may be as flat as its wall
    return {"class": name, "center": ((low + high) / 2).tolist(), "size": size.tolist(), "yaw_rad": 0.0}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {SCANS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {SCANS}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; {SCANS}")
    return content


def _field(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise UserError(f"{path}: has no {key}; {SCANS}")
    return content[key]
