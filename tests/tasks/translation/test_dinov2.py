"""DINOv2 from the published layout: its equations, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tasks.translation.small_vit import WIDTH, class_token, save_weights, small_weights
from torch.nn import functional as F

from tokenfusion.errors import UserError
from tokenfusion.tasks.translation.dinov2 import read_dinov2

pytest.importorskip("transformers")


def test_dinov2_equals_its_equations(tmp_path: Path) -> None:
    """At 224 x 224 nothing is resized; every weight finds its place, from either kind of file, with a task's prefix too."""
    weights = small_weights()
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    file = tmp_path / "classifier.safetensors"
    extra = {"dinov2.embeddings.mask_token": torch.zeros(1, WIDTH), "classifier.weight": torch.zeros(9, 2 * WIDTH)}
    save_file({f"dinov2.{key}": value for key, value in weights.items()} | extra, file)
    with torch.no_grad():
        torch.testing.assert_close(read_dinov2(str(file))(images), class_token(weights, images), rtol=1e-4, atol=1e-4)
        halves = {key: value.half().float() for key, value in weights.items()}
        found = read_dinov2(save_weights(tmp_path / "small.npz"))(images)
        torch.testing.assert_close(found, class_token(halves, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [100, 448])
def test_other_sizes_are_resized_as_pillow_does(size: int, tmp_path: Path) -> None:
    """Hard noise: an enlarged one must not leave the range, a reduced one must be averaged; rounding differs."""
    network = read_dinov2(save_weights(tmp_path / "small.npz"))
    image = torch.randint(0, 2, (3, size, size), dtype=torch.uint8) * 255
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    wanted = network(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None])
    assert (network(image[None]) - wanted).abs().max() < 0.002 * wanted.abs().max()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no zip", "pickled", "other names", "key gone", "shape"])
def test_refuses(damage: str, tmp_path: Path) -> None:
    path, content = tmp_path / "weights.npz", Path(save_weights(tmp_path / "good.npz")).read_bytes()
    arrays = {key: value.numpy() for key, value in small_weights().items()}
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "no zip":
        path.write_bytes(b"not an archive")
    elif damage == "pickled":
        np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    elif damage == "other names":
        np.savez(path, **{f"blocks.{key}": value for key, value in arrays.items()})
    elif damage == "key gone":
        np.savez(path, **{key: value for key, value in arrays.items() if key != "layernorm.weight"})
    elif damage == "shape":
        np.savez(path, **arrays | {"encoder.layer.1.mlp.fc2.bias": np.zeros(5, np.float32)})
    with pytest.raises(UserError, match="weights.npz") as refusal:
        read_dinov2(str(path))
    assert "\n" not in str(refusal.value)


def test_published_size(real_data: Path) -> None:
    """A picture stays itself under noise; another picture is another one."""
    path = real_data.parent / "weights" / "dinov2_vits14.npz"
    if not path.is_file():
        pytest.skip("no DINOv2 weights beside the recordings")
    network = read_dinov2(str(path))
    assert network.name == "dinov2-vits14"
    files = sorted((real_data / "pipe_rgbd").rglob("*rgb*/*"))[::20][:2] or pytest.skip("no pictures here")
    first, second = (
        torch.from_numpy(np.array(Image.open(f).convert("RGB").resize((320, 240)))).permute(2, 0, 1) for f in files
    )
    noisy = (first + 4 * torch.randn(first.shape)).clamp(0, 255).to(torch.uint8)
    a, b, c = network(torch.stack([first, noisy, second]))
    assert a.shape == (384,)
    assert F.cosine_similarity(a, b, dim=0) > F.cosine_similarity(a, c, dim=0)
