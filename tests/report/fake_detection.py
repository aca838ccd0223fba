"""Folders of detection runs that the tests draw themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from report.fake import scene

HEADS = ("proposal", "0head", "last", "all_layers", "last_three")
CLASSES = ["sofa", "table", "lamp"]
COLOURS = [[174, 30, 40], [20, 119, 180], [90, 160, 60]]
PROTOCOL = "NMS 0.25, IoU > 0.25, 0.5, true sizes, batch 1, fp32; trained with exact sizes"


def fake_detection(
    path: Path, images: bool = True, fuser: str = "token", both: bool = False, samples: int = 1, points: int = 40
) -> Path:
    """Draw the folder of a detection run, the same for the same arguments.

    Args:
        images: points and images, else points alone.
        fuser: ``token`` scores and exchanges; another one does not.
        both: points go to images too.
    """
    rng = np.random.default_rng(0)
    modalities = ["points", "rgb"] if images else ["points"]
    scored = modalities[: 2 if both else 1] if images and fuser == "token" else []
    target = "TokenExchange" if fuser == "token" else "ConcatExchange" if fuser == "concat" else "NoExchange"
    chosen: dict[str, Any] = {"_target_": f"tokenfusion.fusion.crossing.{target}"}
    recipe = {
        "seed": 0, "task": "detection3d", "data": {"root": "data/rooms", "modalities": modalities},
        "fuser": chosen | ({"threshold": 0.5} if fuser == "token" else {}), "train": {"steps": 400},
    }  # fmt: skip
    (path / "samples").mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    final = {
        head: {"map25": 40.0 + at, "ar25": 80.0 + at, "map50": 20.0 + at, "ar50": 50.0 + at}
        for at, head in enumerate(HEADS)
    }
    rates = {f"layer{layer}": dict.fromkeys(scored, 0.2 + 0.3 * layer) for layer in range(2)} if scored else {}
    _write_log(path / "metrics.jsonl", rng, final, rates, images, points)
    evaluation = {
        "task": "detection3d", "dataset": "rooms", "split": "val", "images": 100, "protocol": PROTOCOL,
        "primary": "map25", "streams": final, "classes": CLASSES, "parameters": 6_255_355, "checkpoint": "last",
        "per_class": {"last": {"ap25": [10.0, 70.0, None], "recall25": [55.0, 85.0, None], "ap50": [5.0, 30.0, None],
                               "recall50": [45.0, 60.0, None]}},
        "step": 400, "exchange": rates,
    }  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(evaluation))
    index = {
        "task": "detection3d", "ids": [f"{n:04d}" for n in range(samples)], "modalities": modalities, "blocks": [],
        "threshold": 0.5 if scored else None, "least_objectness": 0.3,
        "classes": [{"name": n, "color": c} for n, c in zip(CLASSES, COLOURS, strict=True)],
    }  # fmt: skip
    (path / "samples" / "index.json").write_text(json.dumps(index))
    for number in range(samples):
        plan = np.full((480, 640, 3), 255, np.uint8)
        plan[100:300:40, 80:500] = 20
        pictures = {"picture/from above": plan} | (
            {"picture/in the image": scene(number, 480, 640)[0]} if images else {}
        )
        np.savez(path / "samples" / f"{number:04d}.npz", **pictures)  # type: ignore[arg-type]
    return path


def _write_log(
    path: Path, rng: np.random.Generator, final: dict[str, dict[str, float]], rates: dict[str, dict[str, float]],
    images: bool, points: int,
) -> None:  # fmt: skip
    with path.open("w") as file:
        for point in range(1, points + 1):
            part, step = point / points, 400 * point // points
            line: dict[str, Any] = {"step": step, "split": "train", "time": 3.0 * step, "lr": 2e-3 * (1 - part)}
            line |= {f"loss/points/{name}": 1 + np.exp(-3 * part) + 0.1 * rng.random() for name in ("center", "kps")}
            if images:
                line |= {f"loss/image/{name}": 2 - part for name in ("classes2d", "giou_2d")}
            line |= {"loss/total": 9 - part} | ({"loss/sparsity": 0.01} if rates else {})
            line |= {f"exchange/{block}/{name}": rate for block, row in rates.items() for name, rate in row.items()}
            file.write(json.dumps(line) + "\n")
            if point % max(points // 4, 1) == 0:
                figures = {f"{head}/{k}": v * part for head, row in final.items() for k, v in row.items()}
                file.write(json.dumps({"step": step, "split": "val", "time": 3.0 * step, **figures}) + "\n")
