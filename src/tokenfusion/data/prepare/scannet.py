"""ScanNet v2 for detection: point clouds, axis-aligned boxes of 18 classes and views with cameras -> the on-disk format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tokenfusion.data.prepare.archive import Staging, find_file, track
from tokenfusion.data.prepare.scannet_scan import CLASSES, SCANS, Scan, read_labels, read_scan
from tokenfusion.data.prepare.scannet_views import FRAMES, Shot, read_shots
from tokenfusion.errors import UserError
from tokenfusion.manifest import file_sha256

LISTS = {"train": "scannetv2_train.txt", "val": "scannetv2_val.txt"}
LABELS = "scannetv2-labels.combined.tsv"
ADVICE_LISTS = "it is in Tasks/Benchmark of https://github.com/ScanNet/ScanNet"
POINTS = 50_000  # kept of a scan


class Expected(NamedTuple):
    """How many scans the official lists name."""

    train: int = 1201
    val: int = 312


OFFICIAL = Expected()


class Place(NamedTuple):
    """Where a scene lies in the source; None: nowhere."""

    scan: Path | None
    frames: Path | None


def prepare(
    source: Path,
    out: Path,
    views: int = 10,
    on_bad: Literal["stop", "skip"] = "stop",
    seed: int = 0,
    progress: bool = True,
    expected: Expected = OFFICIAL,
) -> dict[str, int | str]:
    """Write ScanNet's training and validation scans to ``out``; return counts and the SHA-256 of lists and label table.

    Ids are the scans' names (scene0000_00). points: at most 50,000 vertices, drawn at random, axis-aligned; boxes: the
    axis-aligned hulls of all vertices of an object of the 18 classes; instance: each point's box; rgb and camera: evenly
    spread frames of scannet_frames_25k with a usable pose. Without those frames the data set has points only.

    Args:
        source: a folder that holds scans/, the two lists, the label table and, where wanted, scannet_frames_25k/, at
            any depth.
        out: the new folder; it appears only when everything is written.
        views: frames of a scene; 0: none.
        on_bad: "stop" at a scan that cannot be used, or "skip": leave it out and count it.
        seed: of the points that are kept.

    Errors: UserError that names the file where one is missing, damaged or not what it should be.
    """
    if on_bad not in ("stop", "skip"):
        raise UserError(f"--on-bad is {on_bad!r}; choose stop or skip")
    if views < 0:
        raise UserError(f"--views is {views}; wanted 0 or more frames of a scene")
    labels_path = find_file(source, LABELS, "it comes with the ScanNet scans (http://www.scan-net.org)")
    labels = read_labels(labels_path)
    lists = {split: find_file(source, name, ADVICE_LISTS) for split, name in LISTS.items()}
    splits = {split: _read_list(path, getattr(expected, split)) for split, path in lists.items()}
    places = _find_scenes(source, [id for ids in splits.values() for id in ids])
    with_views = views > 0 and any(place.frames for place in places.values())
    counts, left_out = Counter[str](), dict[str, str]()
    with Staging(out) as staging:
        for number, (id, place) in enumerate(track(places.items(), "scannet", progress)):
            try:
                scan = _scan_of(source, id, place, labels, list(places.values()))
                shots = read_shots(place.frames, views, scan.align) if with_views and place.frames else []
            except UserError as error:
                if on_bad == "stop":
                    raise
                left_out[id] = str(error)
                continue
            _write_scan(staging, id, scan, np.random.default_rng([seed, number]))
            counts["boxes"] += len(scan.boxes)
            if with_views:
                _write_shots(staging, id, shots)
                counts.update({"images": len(shots), "scans without images": not shots})
        if len(left_out) == len(places):
            raise UserError(f"{next(iter(left_out.values()))}; so it is with all {len(places)} scans")
        digests = {f"sha256 {path.name}": file_sha256(path) for path in (labels_path, *lists.values())}
        about = {"dataset": "scannet", "views": views if with_views else 0, "seed": seed}
        staging.json("source.json", {**about, **digests, "counts": dict(counts), "left out": left_out})
        kept = {split: [id for id in ids if id not in left_out] for split, ids in splits.items()}
        staging.dataset(_description(with_views), {split: ids for split, ids in kept.items() if ids})
    reason = "--views is 0" if views == 0 else f"no {FRAMES} in the source"
    images = {} if with_views else {"images": f"none, points only: {reason}"}
    sizes = {split: len(ids) for split, ids in kept.items()}
    figures: dict[str, Any] = {"scans": sum(sizes.values()), **sizes, "classes": len(CLASSES), **counts, **images}
    return {**figures, "left out": len(left_out), **digests}


def _read_list(path: Path, wanted: int) -> list[str]:
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {ADVICE_LISTS}") from None
    if len(ids) != wanted or len(set(ids)) != wanted:
        raise UserError(f"{path}: lists {len(set(ids))} scans, wanted {wanted}; {ADVICE_LISTS}")
    return ids


def _find_scenes(source: Path, ids: list[str]) -> dict[str, Place]:
    """Folders named as scans, however deep: with a mesh in them, or with poses."""
    roots = sorted({path.parent for depth in range(4) for path in source.glob("*/" * depth + "scene????_??")})

    def find(id: str, inside: str) -> Path | None:
        return next((root / id for root in roots if (root / id / inside).exists()), None)

    return {id: Place(find(id, f"{id}_vh_clean_2.ply"), find(id, "pose")) for id in ids}


def _scan_of(source: Path, id: str, place: Place, labels: dict[str, int], places: list[Place]) -> Scan:
    if place.scan is None:
        lacking = sum(place.scan is None for place in places)
        raise UserError(
            f"{source}: holds no {id}/{id}_vh_clean_2.ply, at most 4 folders down; {lacking} of {len(places)} scans are "
            f"missing: {SCANS}, or leave them out with --on-bad skip"
        )
    return read_scan(place.scan, id, labels)


def _write_scan(staging: Staging, id: str, scan: Scan, rng: np.random.Generator) -> None:
    rows = rng.permutation(len(scan.points))[:POINTS]
    staging.array(f"points/{id}.npy", scan.points[rows])
    staging.array(f"instance/{id}.npy", scan.owner[rows])
    staging.json(f"boxes/{id}.json", {"boxes": scan.boxes})


def _write_shots(staging: Staging, id: str, shots: list[Shot]) -> None:
    names = [f"rgb/{id}/{row:03d}.jpg" for row in range(len(shots))]
    for name, shot in zip(names, shots, strict=True):
        staging.write(name, shot.photo.data)
    views = [
        {"image": name, "K": shot.K.tolist(), "pose": shot.pose.tolist()}
        for name, shot in zip(names, shots, strict=True)
    ]
    staging.json(f"camera/{id}.json", {"views": views})


def _description(with_views: bool) -> dict[str, Any]:
    scene = {"points": "points/{id}.npy", "boxes": "boxes/{id}.json", "instance": "instance/{id}.npy"}
    images = {"modalities": {"rgb": {"kind": "rgb", "files": "rgb/{id}/000.jpg"}}} if with_views else {}
    camera = {"camera": "camera/{id}.json"} if with_views else {}
    return {"name": "scannet", **images, "scene": {**scene, **camera, "classes": list(CLASSES)}}
