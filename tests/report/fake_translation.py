"""Folders of translation runs that the tests draw themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from report.fake import field, scene

LAST = {f"enc{stage}.{last}": 2**stage for stage, last in zip(range(1, 6), (2, 3, 3, 5, 2), strict=True)}
EVERY = {f"enc{stage}.{n}": 2**stage for stage, n in ((s, n) for s in range(1, 6) for n in range(2))} | {
    f"dec{stage}.{n}": 2 ** (5 - stage) for stage, n in ((s, n) for s in range(1, 5) for n in range(2))
}  # block -> stride of its tokens
PROTOCOL = "standard: batch 1, fp32, MAE and MSE in -1..1 over measured pixels"


def fake_translation(
    path: Path,
    modalities: Sequence[str] = ("shade", "edge_texture"),
    target: str = "normal",
    fuser: str = "token",
    every: bool = False,
    samples: int = 1,
    size: tuple[int, int] = (96, 96),
    points: int = 40,
    collapsed: Sequence[str] = (),
    features: str = "",
    seed: int = 0,
) -> Path:
    """Draw the folder of a translation run, the same for the same arguments.

    Args:
        fuser: ``token`` scores and exchanges; another one does not.
        every: fuse every block of encoder and decoder, not the last of each encoder stage.
        collapsed: streams whose images are grey.
        features: what FID and KID stand on; without it there is neither.
    """
    rng = np.random.default_rng(seed)
    blocks = (EVERY if every else LAST) if fuser == "token" else {}
    rates = {(block, name): rng.uniform(0.02, 0.98) ** 2 for block in blocks for name in modalities}
    streams = [*modalities, "ensemble"]
    final = {stream: _figures(rng, target, stream == "ensemble", bool(features)) for stream in streams}
    for stream in collapsed:
        final[stream] |= {"contrast": 0.01, "diversity": 0.0}
    (path / "samples").mkdir(parents=True)
    recipe = {
        "seed": seed,
        "task": "translation",
        "data": {"root": "data/rooms", "modalities": list(modalities), "target": target},
        "fuser": {"_target_": "tokenfusion.fusion.TokenFusion", "rule": "released", "threshold": 0.02}
        if blocks
        else fuser,
        "train": {"steps": 20000, "batch_size": 8, "lr": 2e-4},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    primary = "fid" if features else "mae"
    _write_log(path / "metrics.jsonl", rng, modalities, final, rates, points)
    evaluation = {
        "task": "translation", "dataset": "rooms", "split": "val", "images": 100, "target": target, "primary": primary,
        "protocol": PROTOCOL + (f"; FID and KID (100 subsets of 100, x 100) on {features}" if features else ""),
        "streams": final, "collapsed": list(collapsed), "parameters": 4_200_000, "checkpoint": "last", "step": 20000,
        "exchange": {b: {m: rates[b, m] for m in modalities} for b in blocks},
        "donor_below": {b: dict.fromkeys(modalities, 0.4) for b in blocks},
    }  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(evaluation))
    index = {
        "task": "translation", "target": target, "ids": [f"{n:04d}" for n in range(samples)],
        "modalities": list(modalities), "blocks": list(blocks), "threshold": 0.02 if blocks else None,
    }  # fmt: skip
    (path / "samples" / "index.json").write_text(json.dumps(index))
    for number in range(samples):
        shown = _pictures(number, *size)
        arrays: dict[str, Any] = {f"input/{name}": shown[name] for name in modalities} | {"target": shown[target]}
        for stream in streams:
            arrays[f"prediction/{stream}"] = _made(shown[target], rng, stream in collapsed, stream == "ensemble")
        for block, stride in blocks.items():
            grid = (-(-size[0] // stride), -(-size[1] // stride))
            arrays[f"scores/{block}"] = np.stack([field(rng, *grid, rates[block, m]) for m in modalities])
        np.savez(path / "samples" / f"{number:04d}.npz", **arrays)
    return path


def _figures(rng: np.random.Generator, target: str, better: bool, with_features: bool) -> dict[str, float]:
    scale = (0.6 if better else 1.0) * rng.uniform(0.8, 1.2)
    found = {"mae": 0.12 * scale, "mse": 0.03 * scale, "contrast": 1.05 - 0.2 * scale, "diversity": 1 - 0.3 * scale}
    if with_features:
        found = {"fid": 71.82 * scale, "kid": 2.36 * scale, "kid_std": 0.11 * scale} | found
    unit = {"normal": {"angle_deg": 18.3 * scale}, "depth": {"mae_m": 0.214 * scale}}
    return found | unit.get(target, {})


def _write_log(
    path: Path, rng: np.random.Generator, modalities: Sequence[str], final: dict[str, dict[str, float]],
    rates: dict[tuple[str, str], float], points: int,
) -> None:  # fmt: skip
    with path.open("w") as file:
        for point in range(1, points + 1):
            part, step = point / points, 20000 * point // points
            judged = {f"loss/discriminator/{name}": 0.7 - 0.2 * part + 0.05 * rng.normal() for name in modalities}
            made = {"adversarial": 1.4 + 0.6 * part + 0.1 * rng.normal()}
            made |= {f"l1/{name}": 6 + 40 * np.exp(-6 * part) + rng.normal() / 3 for name in (*modalities, "ensemble")}
            made["sparsity"] = 0.3 + 0.2 * np.exp(-6 * part)
            line: dict[str, Any] = {"step": step, "split": "train", "time": 1.6 * step, "lr": 2e-4} | judged
            line["loss/discriminator/total"] = sum(judged.values())
            line |= {f"loss/generator/{name}": value for name, value in made.items()}
            line["loss/generator/total"] = sum(made.values())
            for (block, name), rate in rates.items():
                line[f"exchange/{block}/{name}"] = rate / (1 + np.exp(-12 * (part - 0.4)))
                line[f"donor_below/{block}/{name}"] = 0.4
            file.write(json.dumps(line) + "\n")
            if point % max(points // 8, 1) == 0:
                worse = {
                    f"{s}/{k}": v * (1 + 2 * np.exp(-5 * part)) for s, row in final.items() for k, v in row.items()
                }
                file.write(json.dumps({"step": step, "split": "val", "time": 1.6 * step, **worse}) + "\n")


def _pictures(seed: int, height: int, width: int) -> dict[str, NDArray[np.uint8]]:
    """A scene as every modality of the tests: uint8 [H, W, 3]."""
    rgb, depth, label = scene(seed, height, width)
    grey = np.asarray(Image.fromarray(rgb).convert("L"), np.float32)
    edges = np.hypot(*np.gradient(grey)).clip(0, 40) * 6
    colours = np.array([[128, 128, 250], [128, 250, 140], [128, 20, 140], [250, 128, 140], [20, 128, 160]], np.uint8)
    normal = colours[np.where(label == 255, 0, label) % 5]
    shade = (60 + 0.6 * grey + 0.2 * depth[..., 0]).clip(0, 255)
    found = {"rgb": rgb, "depth": depth, "normal": normal}
    return found | {
        n: np.repeat(x[..., None], 3, 2).astype(np.uint8) for n, x in {"shade": shade, "edge_texture": edges}.items()
    }


def _made(truth: NDArray[np.uint8], rng: np.random.Generator, flat: bool, better: bool) -> NDArray[np.uint8]:
    """A generated image: the truth, shifted and noisy; or grey all over."""
    if flat:
        return np.full_like(truth, 128)
    shifted = np.roll(truth, 1 if better else 3, axis=1)
    return (shifted + rng.normal(0, 6 if better else 18, truth.shape)).clip(0, 255).astype(np.uint8)
