"""The frames of one ScanNet scene, as scannet_frames_25k holds them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tokenfusion.data.prepare.photo import Photo, read_photo
from tokenfusion.data.scene import is_rigid
from tokenfusion.errors import UserError

FRAMES = "scannet_frames_25k"
ADVICE = f"get {FRAMES}.zip with the script that http://www.scan-net.org sends"


class Shot(NamedTuple):
    """One frame; K [3, 3], whose pixels count from 0, and pose [4, 4] from the camera's to axis-aligned axes."""

    photo: Photo
    K: np.ndarray
    pose: np.ndarray


def read_shots(folder: Path, count: int, align: np.ndarray) -> list[Shot]:
    """At most ``count`` frames, evenly spread over those whose pose is known: where tracking failed it is infinite.

    Errors: UserError that names the file where one is missing or damaged.
    """
    poses = {path.stem: _read_matrix(path, finite=False) for path in sorted((folder / "pose").glob("*.txt"))}
    usable = [stem for stem, pose in poses.items() if is_rigid(torch.from_numpy(pose))]
    if not usable:
        return []
    K = _read_matrix(folder / "intrinsics_color.txt")[:3, :3]
    if min(K[0, 0], K[1, 1]) <= 0 or K[2].tolist() != [0, 0, 1]:
        raise UserError(f"{folder / 'intrinsics_color.txt'}: is no camera matrix; {ADVICE}")
    steps = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int))
    chosen = [usable[step] for step in steps]
    return [Shot(read_photo(folder / "color" / f"{stem}.jpg", ADVICE), K, align @ poses[stem]) for stem in chosen]


def _read_matrix(path: Path, finite: bool = True) -> np.ndarray:
    """float64 [4, 4] from its 16 numbers."""
    try:
        matrix = np.array([float(word) for word in path.read_text(encoding="utf-8").split()]).reshape(4, 4)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as 4x4 numbers ({error}); {ADVICE}") from None
    if finite and not np.isfinite(matrix).all():
        raise UserError(f"{path}: holds numbers that are not finite; {ADVICE}")
    return matrix
