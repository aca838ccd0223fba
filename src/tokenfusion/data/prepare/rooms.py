"""Procedural rooms -> the on-disk format: every modality, points, boxes and camera, from a seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenfusion.data.furniture import (
    BOX,
    CLASSES,
    CUPBOARD,
    CUSHION,
    DRESSER,
    LOCKER,
    PANEL,
    PICTURE,
    SOFA,
    TABLE,
)
from tokenfusion.data.prepare.archive import Staging, track
from tokenfusion.data.rooms import Room, render
from tokenfusion.errors import UserError

FRAMES_PER_SEED = 1_000_000  # frame i of data set s is room s * FRAMES_PER_SEED + i: no two data sets share a room
DEPTH = {"mean": 3.5, "std": 0.85, "range": [1.0, 8.0]}  # metres
SOLIDS = (PICTURE, CUPBOARD, PANEL, CUSHION, BOX, SOFA, TABLE, DRESSER, LOCKER)  # classes of things that have a box
SMALLEST = 32  # pixels; below, furniture is smaller than the pixels


def prepare(
    out: Path,
    train: int = 400,
    val: int = 100,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """Draw ``train + val`` rooms of ``height x width`` pixels into ``out`` and return counts.

    The same arguments give the same files. Beside the images: points/ID.npy float32 [P, 6] (upright x y z in metres,
    red green blue in 0..1), boxes/ID.json (centre, full sizes, yaw counter-clockwise in radians, same axes; box2d around
    the pixels that are seen), camera/ID.json (K; pose = camera to upright axes).

    Errors: UserError where a number makes no data set, or ``out`` holds something.
    """
    for name, number, least in (("train", train, 1), ("val", val, 1), ("seed", seed, 0)):
        if number < least:
            raise UserError(f"{name} is {number}; rooms need {name} of at least {least}")
    if min(height, width) < SMALLEST:
        raise UserError(f"height x width is {height}x{width}; rooms need at least {SMALLEST}x{SMALLEST} pixels")
    if train + val > FRAMES_PER_SEED:
        raise UserError(f"train + val is {train + val}; one seed has {FRAMES_PER_SEED} rooms, use several seeds")
    ids = [f"{index:06d}" for index in range(train + val)]
    boxes = points = 0
    with Staging(out) as staging:
        for index in track(range(train + val), "rooms", progress):
            room = render(seed * FRAMES_PER_SEED + index, height, width)
            _write_room(staging, ids[index], room)
            boxes, points = boxes + len(room.boxes), points + len(room.points_xyzrgb)
        staging.dataset(_description(), {"train": ids[:train], "val": ids[train:]})
    return {"train": train, "val": val, "classes": len(CLASSES), "boxes": boxes, "points": points}


def _write_room(staging: Staging, name: str, room: Room) -> None:
    staging.image(f"rgb/{name}.png", room.rgb)
    staging.image(f"depth/{name}.png", np.rint(room.depth_m * 1000).astype(np.uint16))
    staging.image(f"label/{name}.png", room.label)
    staging.image(f"normal/{name}.png", _to_bytes((room.normal + 1) / 2))
    staging.image(f"shade/{name}.png", _to_bytes(room.shade))
    staging.image(f"edge_texture/{name}.png", _to_bytes(room.texture_edge))
    staging.image(f"edge_occlusion/{name}.png", _to_bytes(room.occlusion_edge))
    staging.array(f"points/{name}.npy", room.points_xyzrgb)
    names = list(CLASSES)
    boxes = [
        {"class": names[label], "center": box[:3], "size": box[3:6], "yaw_rad": box[6], "box2d": _around(mine)}
        for box, label, mine in zip(
            room.boxes.tolist(),
            room.box_class,
            (room.instance == row + 1 for row in range(len(room.boxes))),
            strict=True,
        )
    ]
    staging.json(f"boxes/{name}.json", {"boxes": boxes})
    staging.json(f"camera/{name}.json", {"K": room.K.tolist(), "pose": room.pose.tolist()})


def _around(mask: NDArray[np.bool_]) -> list[float]:
    """The rectangle around the pixels of a mask, x1 y1 x2 y2; pixel 0 spans -0.5 to 0.5."""
    rows, columns = np.nonzero(mask)
    low, high = (columns.min(), rows.min()), (columns.max(), rows.max())
    return [float(edge) - 0.5 for edge in low] + [float(edge) + 0.5 for edge in high]


def _to_bytes(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """0..1 -> 0..255."""
    return np.rint(values * 255).astype(np.uint8)


def _description() -> dict[str, Any]:
    kinds = {"normal": "normal", "shade": "gray", "edge_texture": "gray", "edge_occlusion": "gray"}
    return {
        "name": "rooms",
        "modalities": {
            "rgb": {"kind": "rgb", "files": "rgb/{id}.png"},
            "depth": {"kind": "depth", "files": "depth/{id}.png", "scale": 0.001, **DEPTH},
            **{name: {"kind": kind, "files": f"{name}/{{id}}.png"} for name, kind in kinds.items()},
        },
        "target": {"kind": "label", "files": "label/{id}.png", "ignore": 255, "offset": 0},
        "classes": [{"name": name, "color": list(colour)} for name, colour in CLASSES.items()],
        "scene": {
            "points": "points/{id}.npy",
            "boxes": "boxes/{id}.json",
            "camera": "camera/{id}.json",
            "classes": [list(CLASSES)[label] for label in SOLIDS],
        },
    }
