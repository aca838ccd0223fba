"""SUN RGB-D: the frames of SUNRGBD.zip and the tables of SUNRGBDtoolbox.zip -> the on-disk format, 37 classes."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from tokenfusion.data.prepare.archive import Staging, as_list, find_file, open_hdf5, read_mat, track
from tokenfusion.data.prepare.photo import read_photo
from tokenfusion.errors import UserError
from tokenfusion.manifest import file_sha256

META = "SUNRGBDMeta.mat"
LABELS = "SUNRGBD2Dseg.mat"
SPLITS = "allsplit.mat"
TOOLBOX = "it is in SUNRGBDtoolbox.zip of https://rgbd.cs.princeton.edu"
FRAMES = "unpack SUNRGBD.zip of https://rgbd.cs.princeton.edu there"
FILES = ("rgbpath", "depthname")  # fields of SUNRGBDMeta
SENSORS = ("kv1", "kv2", "realsense", "xtion")
MAX_DEPTH_MM = 8000  # the official toolbox clips here
CLASSES = [
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture"),
    *("counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat", "clothes"),
    *("ceiling", "books", "fridge", "tv", "paper", "towel", "shower_curtain", "box", "whiteboard", "person"),
    *("night_stand", "toilet", "sink", "lamp", "bathtub", "bag"),
]


class Expected(NamedTuple):
    """How many of each the official archives hold."""

    frames: int = 10335
    train: int = 5285
    val: int = 5050


class Entry(NamedTuple):
    """One frame as the tables name it: its folder from the sensor's on, and its files."""

    folder: str  # "kv1/b3dodata/img_0063"
    rgb: str
    depth: str


OFFICIAL = Expected()


def prepare(
    source: Path,
    out: Path,
    depth: Literal["filled", "raw"] = "filled",
    progress: bool = True,
    expected: Expected = OFFICIAL,
) -> dict[str, int | str]:
    """Write SUN RGB-D to ``out``; return counts and the SHA-256 of the three source tables.

    Ids are the 1-based order of SUNRGBDMeta.mat (000001). rgb: the jpg's own bytes; depth: 16-bit png in millimetres,
    0 = missing, at most 8 m; label: png, 0 = unlabelled and 1..37. Every sensor keeps its image size. One frame is in
    memory at a time.

    Args:
        source: a folder that holds both unpacked archives, at any depth.
        out: the new folder; it appears only when everything is written.
        depth: "filled" (depth_bfx) or "raw" (depth, with holes).

    Errors: UserError that names the file where one is missing, damaged or not what it should be.
    """
    if depth not in ("filled", "raw"):
        raise UserError(f"depth is {depth!r}; choose 'filled' or 'raw'")
    meta_path, labels_path, splits_path = (find_file(source, name, TOOLBOX) for name in (META, LABELS, SPLITS))
    entries = entries_of(read_rows(meta_path, (), expected), meta_path)
    splits = read_splits(splits_path, entries, expected)
    folders = find_frames(source, entries)
    missing = unlabelled = without_depth = 0
    with open_hdf5(labels_path) as labels:
        references = _check_labels(labels, labels_path, expected)
        with Staging(out) as staging:
            for index in track(range(expected.frames), "sunrgbd", progress):
                name, folder, entry = f"{index + 1:06d}", folders[index], entries[index]
                photo = read_photo(folder / "image" / entry.rgb, FRAMES)
                depth_mm = read_depth(folder, "depth_bfx" if depth == "filled" else "depth", entry.depth)
                label = _read_label(labels, labels_path, references[index], index)
                _check_sizes(folder, photo.pixels.shape[:2], depth_mm, labels_path, label, index)
                staging.write(f"rgb/{name}.jpg", photo.data)
                staging.image(f"depth/{name}.png", depth_mm)
                staging.image(f"label/{name}.png", label)
                missing += int((depth_mm == 0).sum())
                without_depth += int(not depth_mm.any())
                unlabelled += int((label == 0).sum())
            digests = {f"sha256 {path.name}": file_sha256(path) for path in (meta_path, labels_path, splits_path)}
            staging.json("source.json", {"dataset": "sunrgbd", "depth": depth, **digests})
            staging.write("frames.txt", "".join(f"{i + 1:06d} {entry.folder}\n" for i, entry in enumerate(entries)))
            staging.dataset(_description(), splits)
    counts = {"frames": expected.frames, "train": expected.train, "val": expected.val, "classes": len(CLASSES)}
    counts["frames without any depth"] = without_depth
    return {**counts, "missing depth pixels": missing, "unlabelled pixels": unlabelled, **digests}


def read_rows(path: Path, fields: tuple[str, ...], expected: Expected) -> list[Any]:
    """SUNRGBDMeta: one structure per frame with some of its fields, in the order that the labels follow too."""
    rows = as_list(read_mat(path, ["SUNRGBDMeta"], (*fields, *FILES))["SUNRGBDMeta"])
    if len(rows) != expected.frames:
        raise UserError(f"{path}: describes {len(rows)} frames, wanted {expected.frames}; {TOOLBOX}")
    return rows


def entries_of(rows: list[Any], path: Path) -> list[Entry]:
    """Where the files of the frames are."""
    entries = []
    for index, row in enumerate(rows):
        values = [row.get(field) if isinstance(row, dict) else None for field in FILES]
        texts = [value for value in values if isinstance(value, str) and value]
        if len(texts) < len(FILES):
            raise UserError(f"{path}: frame {index + 1} lacks {' or '.join(FILES)}; {TOOLBOX}")
        rgb = PurePosixPath(texts[0])  # <frame folder>/image/<name>.jpg
        entries.append(Entry(_from_sensor(str(rgb.parent.parent), path), rgb.name, PurePosixPath(texts[1]).name))
    return entries


def _from_sensor(official: str, path: Path) -> str:
    """ "/n/fs/sun3d/data/SUNRGBD/kv1/b3dodata/img_0063/" -> "kv1/b3dodata/img_0063"."""
    parts = PurePosixPath(official).parts
    start = next((at for at, part in enumerate(parts) if part in SENSORS), None)
    if start is None or ".." in parts:
        raise UserError(f"{path}: names the frame folder {official!r}, wanted .../SUNRGBD/<sensor>/...; {TOOLBOX}")
    return "/".join(parts[start:])


def read_splits(path: Path, entries: list[Entry], expected: Expected) -> dict[str, list[str]]:
    """The ids of the official split: {"train": ..., "val": ...}."""
    content = read_mat(path, ["alltrain", "alltest"])
    lists = {"train": as_list(content["alltrain"]), "val": as_list(content["alltest"])}
    wanted = {"train": expected.train, "val": expected.val}
    for split, folders in lists.items():
        if len(folders) != wanted[split]:
            raise UserError(f"{path}: lists {len(folders)} {split} frames, wanted {wanted[split]}; {TOOLBOX}")
    split_of = {_from_sensor(folder, path): split for split, folders in lists.items() for folder in folders}
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for index, entry in enumerate(entries):
        if entry.folder not in split_of:
            raise UserError(f"{path}: the frame {entry.folder} of {META} is in neither list; {TOOLBOX}")
        splits[split_of[entry.folder]].append(f"{index + 1:06d}")
    for split, ids in splits.items():
        if len(ids) != wanted[split]:
            raise UserError(f"{path}: {len(ids)} frames of {META} are {split}, wanted {wanted[split]}; {TOOLBOX}")
    return splits


def find_frames(source: Path, entries: list[Entry]) -> list[Path]:
    """The folder of every frame, however deep the zip was unpacked."""
    roots = sorted(
        {path.parent for depth in range(5) for sensor in SENSORS for path in source.glob("*/" * depth + sensor)},
        key=lambda path: (len(path.parts), path),
    )
    if not roots:
        raise UserError(f"{source}: holds none of the folders {', '.join(SENSORS)}, at most 4 folders down; {FRAMES}")
    folders = [next((root / e.folder for root in roots if (root / e.folder).is_dir()), None) for e in entries]
    found = [folder for folder in folders if folder is not None]
    if len(found) < len(entries):
        lacking = entries[folders.index(None)].folder
        raise UserError(
            f"{source}: {len(found)} of {len(entries)} frame folders found below {', '.join(map(str, roots[:3]))}; "
            f"the first that is missing is {lacking}; {FRAMES}"
        )
    return found


def _check_labels(labels: Any, path: Path, expected: Expected) -> list[Any]:
    """The object references to the label images in the order of the frames."""
    if "SUNRGBD2Dseg" not in labels or "seglabel" not in labels["SUNRGBD2Dseg"]:
        raise UserError(f"{path}: holds {', '.join(labels)}, but not SUNRGBD2Dseg/seglabel; {TOOLBOX}")
    references = labels["SUNRGBD2Dseg"]["seglabel"]
    if references.size != expected.frames or references.dtype.kind != "O":
        raise UserError(f"{path}: has {references.size} label images, wanted {expected.frames}; {TOOLBOX}")
    return list(references[()].ravel())


def _read_label(labels: Any, path: Path, reference: Any, index: int) -> np.ndarray:
    """uint8 [H, W] of one frame; stored [W, H]."""
    try:
        values = labels[reference][()]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: label {index + 1} cannot be read ({error}); download it again") from None
    if values.ndim != 2 or values.dtype.kind not in "uif" or not _is_label(values):
        raise UserError(f"{path}: label {index + 1} is no image of 0..{len(CLASSES)}; {TOOLBOX}")
    return np.ascontiguousarray(values.T.astype(np.uint8))


def _is_label(values: np.ndarray) -> bool:
    return values.size > 0 and bool(((values >= 0) & (values <= len(CLASSES))).all())


def read_depth(folder: Path, kind: str, name: str) -> np.ndarray:
    """Millimetres uint16 [H, W], at most 8 m; the file's bits are rotated by three. ``kind``: depth or depth_bfx."""
    path = folder / kind / name
    if not path.is_file():  # depth/ and depth_bfx/ may name their one image differently
        images = sorted((folder / kind).glob("*.png"))
        if len(images) != 1:
            raise UserError(f"{path}: no such file, and {len(images)} other images beside it; {FRAMES}")
        path = images[0]
    try:
        with Image.open(path) as image:
            stored = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); {FRAMES}") from None
    if stored.ndim != 2 or stored.dtype.kind not in "ui" or stored.itemsize < 2 or stored.max() > 65535:
        raise UserError(f"{path}: holds {stored.dtype} {list(stored.shape)}, wanted 16 bits [H, W]; {FRAMES}")
    return np.minimum(undo_shift(stored.astype(np.uint16)), np.uint16(MAX_DEPTH_MM))


def undo_shift(stored: np.ndarray) -> np.ndarray:
    """uint16 -> millimetres uint16: the archive rotates the bits left by three."""
    return (stored >> np.uint16(3)) | (stored << np.uint16(13))


def _check_sizes(
    folder: Path, size: tuple[int, ...], depth: np.ndarray, labels_path: Path, label: np.ndarray, index: int
) -> None:
    if depth.shape != size:
        raise UserError(f"{folder}: image is {size} but depth {depth.shape} (height, width); {FRAMES}")
    if label.shape != size:
        raise UserError(f"{labels_path}: label {index + 1} is {label.shape}, but {folder} has {size} (height, width)")


def _description() -> dict[str, Any]:
    return {
        "name": "sunrgbd",
        "modalities": {
            "rgb": {"kind": "rgb", "files": "rgb/{id}.jpg"},
            "depth": {"kind": "depth", "files": "depth/{id}.png", "scale": 0.001},
        },
        "target": {"kind": "label", "files": "label/{id}.png", "offset": -1, "unlabelled": 0},
        "classes": list(CLASSES),
    }
