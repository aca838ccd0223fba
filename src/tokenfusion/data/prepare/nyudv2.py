"""NYUDv2: nyu_depth_v2_labeled.mat, splits.mat and classMapping40.mat -> the on-disk format with 40 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tokenfusion.data.prepare.archive import Staging, as_list, find_file, open_hdf5, read_mat, track
from tokenfusion.errors import UserError
from tokenfusion.manifest import file_sha256

ARCHIVE = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
MAPPING = "classMapping40.mat"
ADVICE = {
    ARCHIVE: "it is the labeled dataset (2.8 GB) of https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html",
    SPLITS: "it is http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat",
    MAPPING: "it is in https://github.com/ankurhanda/nyuv2-meta-data (the 40 classes of Gupta et al., CVPR 2013)",
}
HEIGHT, WIDTH = 480, 640
CROP = [6, 474, 7, 632]  # rows, columns: without the white frame around the recordings
MAX_DEPTH_M = 65.535  # what 16 bits of millimetres hold


class Expected(NamedTuple):
    """How many of each the official files hold."""

    frames: int = 1449
    train: int = 795
    val: int = 654


class Classes(NamedTuple):
    """The 40 names, and the table uint8 [1 + 894] from raw label to 1..40 (0 = unlabelled stays 0)."""

    names: list[str]
    table: np.ndarray


OFFICIAL = Expected()


def prepare(
    source: Path,
    out: Path,
    depth: Literal["filled", "raw"] = "filled",
    progress: bool = True,
    expected: Expected = OFFICIAL,
) -> dict[str, int | str]:
    """Write NYUDv2 to ``out``; return counts and the SHA-256 of the three source files.

    Ids are the official 1-based indices (000001). rgb: png; depth: 16-bit png in millimetres, 0 = missing; label: png,
    0 = unlabelled and 1..40. One frame is in memory at a time.

    Args:
        source: a folder with the three official files in it or below, or nyu_depth_v2_labeled.mat itself.
        out: the new folder; it appears only when everything is written.
        depth: "filled" (in-filled depth, which most papers use) or "raw" (the sensor's, with holes).

    Errors: UserError that names the file where one is missing, damaged or not what it should be.
    """
    if depth not in ("filled", "raw"):
        raise UserError(f"depth is {depth!r}; choose 'filled' or 'raw'")
    archive_path = source if source.is_file() else find_file(source, ARCHIVE, ADVICE[ARCHIVE])
    splits_path, mapping_path = (find_file(source, name, ADVICE[name]) for name in (SPLITS, MAPPING))
    splits = read_splits(splits_path, expected)
    classes = read_classes(mapping_path)
    missing = unlabelled = 0
    with open_hdf5(archive_path) as archive:
        _check(archive, archive_path, expected, raw_classes=len(classes.table) - 1)
        with Staging(out) as staging:
            for index in track(range(expected.frames), "nyudv2", progress):
                frame = _read_frame(archive, archive_path, index, classes.table, depth)
                missing += _write_frame(staging, f"{index + 1:06d}", *frame)
                unlabelled += int((frame[2] == 0).sum())
            digests = {f"sha256 {path.name}": file_sha256(path) for path in (archive_path, splits_path, mapping_path)}
            staging.json("source.json", {"dataset": "nyudv2", "depth": depth, **digests})
            staging.dataset(_description(classes.names), splits)
    counts = {"frames": expected.frames, "train": expected.train, "val": expected.val, "classes": len(classes.names)}
    return {**counts, "missing depth pixels": missing, "unlabelled pixels": unlabelled, **digests}


def read_splits(path: Path, expected: Expected = OFFICIAL) -> dict[str, list[str]]:
    """The ids of the official split: {"train": ..., "val": ...} (the official test set is what is validated on)."""
    content = read_mat(path, ["trainNdxs", "testNdxs"])
    train, val = sorted(as_list(content["trainNdxs"])), sorted(as_list(content["testNdxs"]))
    if (len(train), len(val)) != (expected.train, expected.val):
        raise UserError(
            f"{path}: holds {len(train)} training and {len(val)} test frames, "
            f"wanted {expected.train} and {expected.val}; {ADVICE[SPLITS]}"
        )
    if sorted(train + val) != list(range(1, expected.frames + 1)):
        raise UserError(f"{path}: its indices are not 1..{expected.frames}, each once; {ADVICE[SPLITS]}")
    return {"train": [f"{index:06d}" for index in train], "val": [f"{index:06d}" for index in val]}


def read_classes(path: Path) -> Classes:
    """The names of the 40 classes and the table from the 894 raw labels to them."""
    content = read_mat(path, ["mapClass", "className"])
    table, names = as_list(content["mapClass"]), as_list(content["className"])
    if len(table) != 894 or len(names) != 40 or set(table) != set(range(1, 41)):
        raise UserError(
            f"{path}: maps {len(table)} labels to {len(names)} classes, wanted 894 to 40, 1..40; {ADVICE[MAPPING]}"
        )
    return Classes(names, np.array([0, *table], dtype=np.uint8))


def _check(archive: Any, path: Path, expected: Expected, raw_classes: int) -> None:
    """Compare keys, shapes and types with what the official archive holds (HDF5 reverses MATLAB's axes)."""
    frames = expected.frames
    wanted = {
        "images": ((frames, 3, WIDTH, HEIGHT), "uint8"),
        "depths": ((frames, WIDTH, HEIGHT), "float32"),
        "rawDepths": ((frames, WIDTH, HEIGHT), "float32"),
        "labels": ((frames, WIDTH, HEIGHT), "uint16"),
    }
    for key, (shape, dtype) in wanted.items():
        if key not in archive:
            raise UserError(f"{path}: holds {', '.join(archive) or 'nothing'}, but not {key}; {ADVICE[ARCHIVE]}")
        came = archive[key]
        if getattr(came, "shape", None) != shape or came.dtype != dtype:
            raise UserError(
                f"{path}: {key} is {getattr(came, 'dtype', 'a group')} {list(getattr(came, 'shape', []))}, "
                f"wanted {dtype} {list(shape)}; {ADVICE[ARCHIVE]}"
            )
    if "names" in archive and archive["names"].size != raw_classes:
        raise UserError(f"{path}: names has {archive['names'].size} entries, wanted {raw_classes}; {ADVICE[ARCHIVE]}")


def _read_frame(
    archive: Any, path: Path, index: int, table: np.ndarray, depth: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rgb uint8 [H, W, 3], depth in metres [H, W], label uint8 [H, W] of one frame."""
    try:
        rgb = archive["images"][index].transpose(2, 1, 0)
        depth_m = archive["depths" if depth == "filled" else "rawDepths"][index].T
        raw_label = archive["labels"][index].T
    except OSError as error:
        raise UserError(f"{path}: frame {index + 1} cannot be read ({error}); download it again") from None
    if not (np.isfinite(depth_m).all() and depth_m.min() >= 0 and depth_m.max() <= MAX_DEPTH_M):
        raise UserError(f"{path}: the depth of frame {index + 1} is not within 0..{MAX_DEPTH_M} m; download it again")
    if raw_label.max() >= len(table):
        raise UserError(f"{path}: frame {index + 1} holds label {raw_label.max()}, wanted 0..{len(table) - 1}")
    return np.ascontiguousarray(rgb), depth_m, table[raw_label]


def _write_frame(staging: Staging, name: str, rgb: np.ndarray, depth_m: np.ndarray, label: np.ndarray) -> int:
    """Write the three images and return how many pixels have no depth."""
    depth_mm = np.ascontiguousarray(np.round(depth_m * 1000.0).astype(np.uint16))
    staging.image(f"rgb/{name}.png", rgb)
    staging.image(f"depth/{name}.png", depth_mm)
    staging.image(f"label/{name}.png", np.ascontiguousarray(label))
    return int((depth_mm == 0).sum())


def _description(names: list[str]) -> dict[str, Any]:
    return {
        "name": "nyudv2",
        "modalities": {
            "rgb": {"kind": "rgb", "files": "rgb/{id}.png"},
            "depth": {"kind": "depth", "files": "depth/{id}.png", "scale": 0.001},
        },
        "target": {"kind": "label", "files": "label/{id}.png", "offset": -1, "unlabelled": 0},
        "classes": names,
        "crop": CROP,
    }
