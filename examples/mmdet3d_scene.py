"""One scene as mmdetection3d describes it -> a data set folder of one id, for training, prediction and pictures.

    python examples/mmdet3d_scene.py INFO.json POINTS.bin --out DIR [--image IMAGE.jpg]

INFO.json is the content of an info file (``metainfo``, ``data_list``) whose first entry is the scene; POINTS.bin holds
float32 rows x y z r g b. SUN RGB-D's matrices count pixels from 1, ScanNet's points are not aligned yet: both is undone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.linalg import rq

from tokenfusion.data.prepare.scannet import CLASSES as SCANNET
from tokenfusion.data.prepare.sunrgbd_boxes import CLASSES as SUNRGBD


def camera(depth2img: np.ndarray) -> dict[str, Any]:
    """K and pose (camera to upright) out of their product, a matrix [3, 3] for pixels that count from 1."""
    K, turn = rq(depth2img)
    sign = np.diag(np.sign(np.diag(K)))
    K, turn = K @ sign, sign @ turn
    from_zero = np.array([[1.0, 0, -1], [0, 1, -1], [0, 0, 1]]) @ (K / K[2, 2])
    pose = np.eye(4)
    pose[:3, :3] = turn.T
    return {"K": np.triu(from_zero).tolist(), "pose": pose.tolist()}


def boxes(instances: list[dict[str, Any]], classes: list[str]) -> list[dict[str, Any]]:
    """Centre, full sizes and, where there is one, yaw: mmdetection3d's numbers are ours."""
    found = []
    for instance in instances:
        numbers = [*instance["bbox_3d"], 0.0][:7]
        entry = {"class": classes[instance["bbox_label_3d"]], "center": numbers[:3], "size": numbers[3:6]}
        found.append({**entry, "yaw_rad": numbers[6], **({"box2d": instance["bbox"]} if "bbox" in instance else {})})
    return found


def write(info: dict[str, Any], points: Path, image: Path | None, out: Path) -> None:
    """Write the folder ``out``, which must not exist."""
    scene = info["data_list"][0]
    classes = list(SUNRGBD if info["metainfo"]["DATASET"] == "SUNRGBD" else SCANNET)
    cloud = np.fromfile(points, np.float32).reshape(-1, 6)
    if "axis_align_matrix" in scene:
        move = np.array(scene["axis_align_matrix"])
        cloud[:, :3] = cloud[:, :3] @ move[:3, :3].T + move[:3, 3]
    if cloud[:, 3:].max() > 1:
        cloud[:, 3:] /= 255
    for folder in ("points", "boxes", "camera", "rgb"):
        (out / folder).mkdir(parents=True)
    name = points.stem
    np.save(out / "points" / f"{name}.npy", cloud)
    (out / "boxes" / f"{name}.json").write_text(json.dumps({"boxes": boxes(scene["instances"], classes)}))
    view = camera(np.array(scene["images"]["CAM0"]["depth2img"])[:3, :3]) if image else {"views": []}
    (out / "camera" / f"{name}.json").write_text(json.dumps(view))
    if image:
        shutil.copy(image, out / "rgb" / f"{name}{image.suffix}")
    for split in ("train", "val"):
        (out / f"{split}.txt").write_text(f"{name}\n")
    files = {"points": "points/{id}.npy", "boxes": "boxes/{id}.json", "camera": "camera/{id}.json"}
    description = {
        "name": info["metainfo"]["DATASET"].lower(),
        "modalities": {"rgb": {"kind": "rgb", "files": f"rgb/{{id}}{image.suffix if image else '.jpg'}"}},
        "scene": {**files, "classes": classes},
        "splits": {"train": "train.txt", "val": "val.txt"},
    }
    (out / "dataset.yaml").write_text(yaml.safe_dump(description, sort_keys=False))


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("info", type=Path)
    parser.add_argument("points", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write(json.loads(arguments.info.read_text()), arguments.points, arguments.image, arguments.out)


if __name__ == "__main__":
    main()
