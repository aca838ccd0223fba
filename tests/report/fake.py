"""Run folders that the tests draw themselves, and a reader of the pages that the report writes for them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

STAGES = {"stage1": ((1, 8), 2), "stage2": ((1, 16), 2), "stage3": ((1, 32), 3), "stage4": ((1, 64), 2)}
BLOCKS = [f"{stage}.{number}" for stage, (_, depth) in STAGES.items() for number in range(depth)]
CLASSES = ["wall", "floor", "ceiling", 'a "box" <b>&', "poster", "lamp", "rug $x$", "door"]


def pixels(data: bytes) -> NDArray[np.uint8]:
    """A picture's rows, columns and colours."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def scene(seed: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """A drawn room: rgb [H, W, 3], depth as grey [H, W, 3], class ids [H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    horizon, corner = rng.uniform(0.55, 0.68), rng.uniform(0.25, 0.7)
    label = np.where(y > horizon + 0.12 * np.abs(x - corner), 1, np.where(y < 0.16 - 0.1 * np.abs(x - corner), 2, 0))
    depth = np.where(label == 1, 1.35 - y, 0.72 - 0.25 * np.abs(x - corner))
    depth = np.where(label == 2, 0.5 + y, depth)
    for kind, (cx, cy, w, h, near) in {
        7: (0.12, 0.48, 0.12, 0.5, 0.0), 4: (0.62, 0.36, 0.2, 0.2, 0.0), 6: (0.55, 0.86, 0.5, 0.12, 0.0),
        3: (0.75, 0.66, 0.22, 0.3, 0.3), 5: (0.38, 0.55, 0.05, 0.34, 0.25),
    }.items():  # fmt: skip
        cx, cy = cx + rng.uniform(-0.06, 0.06), cy + rng.uniform(-0.03, 0.03)
        inside = (np.abs(x - cx) < w / 2) & (np.abs(y - cy) < h / 2)
        label, depth = np.where(inside, kind, label), np.where(inside & (near > 0), 0.75 - near, depth)
    colours = np.array(
        [[196, 188, 172], [148, 112, 82], [228, 226, 220], [190, 182, 168], [178, 62, 52], [240, 214, 130],
         [76, 104, 128], [118, 84, 60]], np.float32,
    )  # fmt: skip
    light = 0.75 + 0.35 * np.exp(-((x - 0.4) ** 2 + (y - 0.2) ** 2) * 3)
    rgb = colours[label] * light[..., None] + rng.normal(0, 3, (height, width, 1))
    label = np.where((np.abs(np.diff(label, axis=1, prepend=label[:, :1])) > 0), 255, label)
    grey = np.repeat((255 * depth.clip(0, 1))[..., None], 3, axis=2)
    return rgb.clip(0, 255).astype(np.uint8), grey.astype(np.uint8), label.astype(np.uint8)


def guess(label: NDArray[np.uint8], rng: np.random.Generator, wrong: float) -> NDArray[np.uint8]:
    """A prediction: the target with blocks of it exchanged for another class."""
    height, width = label.shape
    cells = rng.random((height // 12 + 1, width // 12 + 1)) < wrong
    bad = np.kron(cells, np.ones((12, 12), bool))[:height, :width]
    shifted = np.roll(label, 5, axis=1)
    found = np.where(bad, rng.integers(0, len(CLASSES)), np.where(shifted == 255, 0, shifted))
    return found.astype(np.uint8)


def field(rng: np.random.Generator, height: int, width: int, level: float) -> NDArray[np.float16]:
    """Smooth scores in 0..1, of which about ``level`` lie below 0.02."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    waves = sum(np.sin(a * 6 * x + b * 6 * y + c) for a, b, c in rng.uniform(-2, 2, (5, 3)))
    order = np.argsort(np.argsort(np.asarray(waves).ravel())).reshape(height, width) / (height * width)
    return np.clip(0.02 + (order - level) * 0.9, 0, 1).astype(np.float16)


def fake_run(
    path: Path,
    modalities: Sequence[str] = ("rgb", "depth"),
    fuser: str = "token",
    samples: int = 1,
    size: tuple[int, int] = (120, 160),
    points: int = 40,
    seed: int = 0,
) -> Path:
    """Draw the folder of a segmentation run, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    scored = fuser == "token"
    streams = [*modalities, "ensemble"] if len(modalities) > 1 else list(modalities)
    (path / "samples").mkdir(parents=True)
    recipe = {
        "seed": seed,
        "task": "segmentation",
        "data": {"root": "data/nyudv2", "modalities": list(modalities)},
        "fuser": {"_target_": "tokenfusion.fusion.fusers.TokenFusion", "rule": "released", "threshold": 0.02}
        if scored
        else fuser,
        "train": {"steps": 20000, "batch_size": 8, "lr": 6e-5, "precision": "bf16", "devices": 1},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    level = {(b, m): rng.uniform(0.02, 0.98) ** 2 for b in BLOCKS for m in modalities}
    final = {stream: 34 + 8 * rng.random() + 7 * (stream == "ensemble") for stream in streams}
    with (path / "metrics.jsonl").open("w") as file:
        for point in range(1, points + 1):
            part, step = point / points, 20000 * point // points
            line: dict[str, Any] = {"step": step, "split": "train", "time": 1.6 * step, "lr": 6e-5 * (1 - part) ** 0.9}
            line |= {f"loss/{stream}": 0.5 + 2.6 * np.exp(-4 * part) + 0.15 * rng.random() for stream in streams}
            line["loss/total"] = sum(value for name, value in line.items() if name.startswith("loss/"))
            if scored:
                line["loss/sparsity"] = 0.05 + 0.4 * np.exp(-6 * part)
                for (block, name), rate in level.items():
                    line[f"exchange/{block}/{name}"] = rate / (1 + np.exp(-12 * (part - 0.4)))
                    line[f"donor_below/{block}/{name}"] = min(1.0, 0.2 + rate)
            file.write(json.dumps(line) + "\n")
            if point % max(points // 8, 1) == 0:
                figures = {f"{name}/miou": value * (1 - np.exp(-5 * part)) for name, value in final.items()}
                file.write(json.dumps({"step": step, "split": "val", "time": 1.6 * step, **figures}) + "\n")
    _write_evaluation(path, rng, modalities, streams, final, level if scored else {})
    _write_samples(path, rng, modalities, streams, scored, samples, size, level)
    return path


def _write_evaluation(
    path: Path, rng: np.random.Generator, modalities: Sequence[str], streams: list[str], final: dict[str, float],
    level: dict[tuple[str, str], float],
) -> None:  # fmt: skip
    exchange = {b: {m: level[b, m] if b != "stage3.1" else 0.0 for m in modalities} for b in BLOCKS} if level else {}
    iou = {name: [float(rng.uniform(value - 25, value + 25)) for _ in CLASSES] for name, value in final.items()}
    table = {name: {"pixel_accuracy": v + 24, "mean_accuracy": v + 11, "miou": v} for name, v in final.items()}
    evaluation: dict[str, Any] = {
        "task": "segmentation", "split": "val", "images": 654, "streams": table, "checkpoint": "checkpoints/best",
        "protocol": "single scale, no flip, batch 1, fp32, crop of the data set", "step": 20000, "classes": CLASSES,
        "per_class": {s: {"iou": [*v[:-1], None], "accuracy": [x + 9 for x in v]} for s, v in iou.items()},
        "exchange": exchange, "donor_below": {b: dict.fromkeys(modalities, 0.64) for b in exchange},
    }  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(evaluation))


def _write_samples(
    path: Path, rng: np.random.Generator, modalities: Sequence[str], streams: list[str], scored: bool, samples: int,
    size: tuple[int, int], level: dict[tuple[str, str], float],
) -> None:  # fmt: skip
    colours = [[174, 199, 232], [152, 223, 138], [240, 240, 215], [31, 119, 180], [214, 39, 40], None, [148, 103, 189]]
    index = {
        "task": "segmentation", "ids": [f"{n:04d}" for n in range(samples)],
        "modalities": list(modalities), "blocks": BLOCKS if scored else [], "threshold": 0.02 if scored else None,
        "classes": [{"name": n, "color": c} for n, c in zip(CLASSES, [*colours, None], strict=True)], "ignore": 255,
    }  # fmt: skip
    (path / "samples" / "index.json").write_text(json.dumps(index))
    for number in range(samples):
        rgb, depth, label = scene(number, *size)
        arrays: dict[str, Any] = {f"input/{m}": rgb if m == "rgb" else depth for m in modalities}
        arrays["target"] = label
        for stream in streams:
            wrong = 0.02 if stream == "ensemble" else 0.1
            arrays[f"prediction/{stream}"] = guess(label, rng, wrong)
        for block in BLOCKS if scored else []:
            divisor = STAGES[block.split(".")[0]][0][1] // 2
            grid = (-(-size[0] // divisor), -(-size[1] // divisor))
            arrays[f"scores/{block}"] = np.stack([field(rng, *grid, level[block, m]) for m in modalities])
        np.savez(path / "samples" / f"{number:04d}.npz", **arrays)


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.captions: list[str] = []
        self.shown: list[str] = []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.loaded += [found[name] for name in ("src", "srcset") if name in found]
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        self.captions += [found["alt"]] if "alt" in found else []

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"] or "{" not in data:
            self.shown.append(data)


def damage(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
