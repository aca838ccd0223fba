"""A small DINOv2: its weights in the names of the published files, and its equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from golden_rules import fill
from torch import Tensor
from torch.nn import functional as F

WIDTH, LAYERS = 64, 2


def small_weights() -> dict[str, Tensor]:
    """A small DINOv2 in the names of the published files."""
    shapes = {
        "embeddings.cls_token": [1, 1, WIDTH],
        "embeddings.position_embeddings": [1, 1 + 16 * 16, WIDTH],
        "embeddings.patch_embeddings.projection.weight": [WIDTH, 3, 14, 14],
        "embeddings.patch_embeddings.projection.bias": [WIDTH],
        "layernorm.weight": [WIDTH],
        "layernorm.bias": [WIDTH],
    }
    linear = {f"attention.attention.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")}
    linear |= {"attention.output.dense": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for layer in (f"encoder.layer.{index}." for index in range(LAYERS)):
        for name, shape in linear.items():
            shapes |= {f"{layer}{name}.weight": list(shape), f"{layer}{name}.bias": [shape[0]]}
        for index in (1, 2):
            shapes |= {f"{layer}norm{index}.{n}": [WIDTH] for n in ("weight", "bias")}
            shapes[f"{layer}layer_scale{index}.lambda1"] = [WIDTH]
    return {key: torch.from_numpy(fill(key, shape)) for key, shape in shapes.items()}


def save_weights(path: Path) -> str:
    """As an .npz of half precision, like the published ones."""
    np.savez(path, **{key: value.half().numpy() for key, value in small_weights().items()})
    return str(path)


def class_token(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """A DINOv2 of one head, written out in the published names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    patches = F.conv2d((images / 255 - mean) / std, weights[f"{projection}.weight"], weights[f"{projection}.bias"], 14)
    x = torch.cat([weights["embeddings.cls_token"].expand(len(images), 1, WIDTH), patches.flatten(2).mT], 1)
    x = x + weights["embeddings.position_embeddings"]
    for layer in (f"encoder.layer.{index}." for index in range(LAYERS)):
        y = norm(x, f"{layer}norm1")
        q, k, v = (linear(y, f"{layer}attention.attention.{n}") for n in ("query", "key", "value"))
        y = linear((q @ k.mT / WIDTH**0.5).softmax(-1) @ v, f"{layer}attention.output.dense")
        x = x + weights[f"{layer}layer_scale1.lambda1"] * y
        y = linear(F.gelu(linear(norm(x, f"{layer}norm2"), f"{layer}mlp.fc1")), f"{layer}mlp.fc2")
        x = x + weights[f"{layer}layer_scale2.lambda1"] * y
    return norm(x, "layernorm")[:, 0]
