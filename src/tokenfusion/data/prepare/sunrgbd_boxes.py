"""SUN RGB-D for detection: point clouds, oriented boxes of 10 classes and cameras -> the on-disk format."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tokenfusion.data.boxes import from_votenet_label
from tokenfusion.data.prepare.archive import Staging, as_list, find_file, read_mat, track
from tokenfusion.data.prepare.photo import Photo, read_photo
from tokenfusion.data.prepare.sunrgbd import (
    FRAMES,
    META,
    OFFICIAL,
    SPLITS,
    TOOLBOX,
    Entry,
    Expected,
    entries_of,
    find_frames,
    read_depth,
    read_rows,
    read_splits,
)
from tokenfusion.errors import UserError
from tokenfusion.manifest import file_sha256

TABLES = {"v1": (META,), "v2": ("SUNRGBDMeta3DBB_v2.mat", "SUNRGBDMeta2DBB_v2.mat")}
ADVICE = {"v1": TOOLBOX, "v2": "it is a download of its own at https://rgbd.cs.princeton.edu"}
CLASSES = ["bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub"]
POINTS = 50_000  # kept of a frame
TURN = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # x right, y down, z ahead -> y ahead, z up
OBJECT = ("classname", "centroid", "coeffs", "orientation")
OBJECT_2D = ("classname", "gtBb2D")
FIELDS = ("K", "Rtilt", "groundtruth3DBB", "groundtruth2DBB", *OBJECT, "gtBb2D")


class Camera(NamedTuple):
    """K [3, 3] with pixels that count from 0, and pose [4, 4] from the camera's to upright axes; float64."""

    K: np.ndarray
    pose: np.ndarray


def prepare(
    source: Path,
    out: Path,
    boxes: Literal["v1", "v2"] = "v1",
    depth: Literal["filled", "raw"] = "filled",
    on_bad: Literal["stop", "skip"] = "stop",
    seed: int = 0,
    progress: bool = True,
    expected: Expected = OFFICIAL,
) -> dict[str, int | str]:
    """Write SUN RGB-D's scenes to ``out``; return counts and the SHA-256 of the source tables.

    Ids are the 1-based order of SUNRGBDMeta.mat (000001), splits the official ones. rgb: the jpg's own bytes; points: at
    most 50,000 of the pixels with depth, drawn at random, float32 [P, 6]; boxes: the objects of 10 classes, frames without
    any are kept; box2d: where the 2D list names the same class in the same place; camera: K counts pixels from 0.

    Args:
        source: a folder that holds the unpacked archives (and for v2 its two tables), at any depth.
        out: the new folder; it appears only when everything is written.
        boxes: "v1" (SUNRGBDMeta.mat, what Group-Free and TokenFusion use) or "v2".
        depth: "filled" (depth_bfx) or "raw" (depth, with holes).
        on_bad: "stop" at a frame that cannot be used, or "skip": leave it out and count it.
        seed: of the points that are kept.

    Errors: UserError that names the file where one is missing, damaged or not what it should be.
    """
    for name, value, known in (
        ("boxes", boxes, TABLES),
        ("depth", depth, ("filled", "raw")),
        ("on-bad", on_bad, ("stop", "skip")),
    ):
        if value not in known:
            raise UserError(f"--{name} is {value!r}; choose {' or '.join(known)}")
    tables = [find_file(source, name, ADVICE[boxes]) for name in TABLES[boxes]]
    splits_path = find_file(source, SPLITS, TOOLBOX)
    rows = read_rows(tables[0], FIELDS, expected)
    lists_2d = _lists_2d(rows if boxes == "v1" else _read_2d(tables[1], expected))
    entries = entries_of(rows, tables[0])
    splits = read_splits(splits_path, entries, expected)
    folders = find_frames(source, entries)
    counts, left_out = Counter[str](), dict[str, str]()
    with Staging(out) as staging:
        for index in track(range(expected.frames), "sunrgbd", progress):
            name, number = f"{index + 1:06d}", f"{tables[0]}: frame {index + 1}"
            try:
                camera = _camera_of(rows[index], number)
                photo, depth_m = _read_frame(folders[index], entries[index], depth)
                objects = _boxes_of(as_list(rows[index].get("groundtruth3DBB", [])), lists_2d[index], number, counts)
            except UserError as error:
                if on_bad == "stop":
                    raise
                left_out[name] = str(error)
                continue
            rng = np.random.default_rng([seed, index])
            _write_frame(staging, name, photo, unproject(depth_m, photo.pixels, camera), objects, camera, rng)
            counts["frames without boxes"] += not objects
        if len(left_out) == expected.frames:
            raise UserError(f"{next(iter(left_out.values()))}; so it is with all {expected.frames} frames")
        digests = {f"sha256 {path.name}": file_sha256(path) for path in (*tables, splits_path)}
        about = {"dataset": "sunrgbd", "task": "detection3d", "boxes": boxes, "depth": depth, "seed": seed}
        staging.json("source.json", {**about, **digests, "counts": dict(counts), "left out": left_out})
        staging.write("frames.txt", "".join(f"{i + 1:06d} {entry.folder}\n" for i, entry in enumerate(entries)))
        kept = {split: [id for id in ids if id not in left_out] for split, ids in splits.items()}
        staging.dataset(_description(), kept)
    frames = {"frames": expected.frames - len(left_out), **{split: len(ids) for split, ids in kept.items()}}
    return {**frames, "classes": len(CLASSES), **counts, "left out": len(left_out), **digests}


def _read_2d(path: Path, expected: Expected) -> list[Any]:
    rows = as_list(read_mat(path, ["SUNRGBDMeta2DBB"], ("groundtruth2DBB", *OBJECT_2D))["SUNRGBDMeta2DBB"])
    if len(rows) != expected.frames:
        raise UserError(f"{path}: describes {len(rows)} frames, wanted {expected.frames}; {ADVICE['v2']}")
    return rows


def _lists_2d(rows: list[Any]) -> list[list[Any]]:
    return [as_list(row.get("groundtruth2DBB", [])) if isinstance(row, dict) else [] for row in rows]


def _boxes_of(objects: list[Any], objects_2d: list[Any], number: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """The entries of boxes/ID.json: one of MATLAB's structures each, none, or several."""
    found, is_cut, tally = [], False, Counter[str]()
    for thing, twin in zip_longest(objects, objects_2d[: len(objects)]):
        same = isinstance(twin, dict) and thing.get("classname") == twin.get("classname")
        is_cut = is_cut or not same
        if thing.get("classname") not in CLASSES:
            continue
        values = _numbers(thing, ("centroid", "coeffs", "orientation"), (3, 3, 2), number)
        box = from_votenet_label(torch.from_numpy(values)).tolist()
        if not np.isfinite(box).all() or min(box[3:6]) <= 0:
            tally["boxes without extent, left out"] += 1
            continue
        entry = {"class": thing["classname"], "center": box[:3], "size": box[3:6], "yaw_rad": box[6]}
        box2d = _box2d(twin, number) if same else None
        found.append(entry if box2d is None else {**entry, "box2d": box2d})
        tally["boxes without box2d"] += box2d is None
        tally["boxes that the official export to text drops"] += is_cut  # it stops where the lists disagree
    counts.update({"boxes": len(found), **tally})
    return found


def _numbers(thing: dict[str, Any], fields: tuple[str, ...], sizes: tuple[int, ...], number: str) -> np.ndarray:
    """The first so many numbers of each field, in one row."""
    try:
        parts = [np.asarray(thing[field], dtype=np.float64).ravel() for field in fields]
    except (KeyError, ValueError, TypeError):
        parts = []
    if not parts or any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        raise UserError(f"{number} has no {', '.join(fields)} of {sizes} numbers; {TOOLBOX}")
    return np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _box2d(thing: dict[str, Any], number: str) -> list[float] | None:
    """x y width height as stored -> x1 y1 x2 y2; None where there is no rectangle."""
    if not as_list(thing.get("gtBb2D", [])):
        return None
    x, y, width, height = _numbers(thing, ("gtBb2D",), (4,), number).tolist()
    return [x, y, x + width, y + height] if width > 0 and height > 0 else None


def _camera_of(row: dict[str, Any], number: str) -> Camera:
    K = _numbers(row, ("K",), (9,), number).reshape(3, 3)
    tilt = _numbers(row, ("Rtilt",), (9,), number).reshape(3, 3)
    is_camera = np.isfinite(K).all() and min(K[0, 0], K[1, 1]) > 0 and K[2].tolist() == [0, 0, 1]
    is_turn = np.allclose(tilt @ tilt.T, np.eye(3), atol=1e-3) and np.linalg.det(tilt) > 0
    if not (is_camera and is_turn):
        raise UserError(f"{number}: K is no camera matrix, or Rtilt no rotation; {TOOLBOX}")
    return camera_of(K, tilt)


def camera_of(K: np.ndarray, tilt: np.ndarray) -> Camera:
    """The archive's K, whose pixels count from 1, and its Rtilt: upright = Rtilt (x, z, -y) of the camera's axes."""
    pose = np.eye(4)
    pose[:3, :3] = tilt @ TURN
    return Camera(K - np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]]), pose)


def unproject(depth_m: np.ndarray, pixels: np.ndarray, camera: Camera) -> np.ndarray:
    """Every pixel whose depth [H, W] is known -> float32 [P, 6]: upright x y z in metres, r g b in 0..1."""
    rows, columns = np.nonzero(depth_m)
    depth = depth_m[rows, columns].astype(np.float64)
    rays = np.linalg.inv(camera.K) @ np.stack([columns, rows, np.ones_like(rows)])
    xyz = camera.pose[:3, :3] @ (rays * depth) + camera.pose[:3, 3:]
    return np.concatenate([xyz.T, pixels[rows, columns] / 255.0], axis=1).astype(np.float32)


def _read_frame(folder: Path, entry: Entry, depth: str) -> tuple[Photo, np.ndarray]:
    """The image, and depth in metres [H, W]."""
    photo = read_photo(folder / "image" / entry.rgb, FRAMES)
    depth_mm = read_depth(folder, "depth_bfx" if depth == "filled" else "depth", entry.depth)
    size = photo.pixels.shape[:2]
    if depth_mm.shape != size:
        raise UserError(f"{folder}: image is {size} but depth {depth_mm.shape} (height, width); {FRAMES}")
    if not depth_mm.any():
        raise UserError(f"{folder}: holds no depth at all, so there are no points")
    return photo, depth_mm / 1000.0


def _write_frame(
    staging: Staging,
    name: str,
    photo: Photo,
    points: np.ndarray,
    objects: list[dict[str, Any]],
    camera: Camera,
    rng: np.random.Generator,
) -> None:
    staging.write(f"rgb/{name}.jpg", photo.data)
    staging.array(f"points/{name}.npy", points[rng.permutation(len(points))[:POINTS]])
    staging.json(f"boxes/{name}.json", {"boxes": objects})
    staging.json(f"camera/{name}.json", {"K": camera.K.tolist(), "pose": camera.pose.tolist()})


def _description() -> dict[str, Any]:
    return {
        "name": "sunrgbd",
        "modalities": {"rgb": {"kind": "rgb", "files": "rgb/{id}.jpg"}},
        "scene": {
            "points": "points/{id}.npy",
            "boxes": "boxes/{id}.json",
            "camera": "camera/{id}.json",
            "classes": CLASSES,
        },
    }
