"""Images and projections are resized together: what is seen in a pixel stays in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.scene import View, projection_of
from tokenfusion.data.scene_views import load_views, resized_projection

SPEC = ModalitySpec(kind="rgb")
K = torch.tensor([[90.0, 0, 47.5], [0, 80, 31.5], [0, 0, 1]], dtype=torch.float64)


def view(path: Path, pixels: np.ndarray, shift: float = 0.0) -> View:
    Image.fromarray(pixels).save(path)
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, 3] = shift
    return View(path, K, pose)


@pytest.mark.parametrize("size", [(64, 96), (32, 96), (128, 48), (40, 60)])
def test_a_light_is_seen_where_its_projection_says(tmp_path: Path, size: tuple[int, int]) -> None:
    """The centre of light of a small bright square, before and after resizing."""
    point = torch.tensor([0.3, -0.2, 2.0, 1.0], dtype=torch.float64)
    (u, v) = (K @ point[:3])[:2] / 2.0
    pixels = np.zeros((64, 96, 3), np.uint8)
    column, row = round(float(u)), round(float(v))
    pixels[row - 2 : row + 3, column - 2 : column + 3] = 255
    found = load_views([view(tmp_path / "a.png", pixels)], SPEC, size, 1)
    assert found.images.shape == (1, 3, *size)
    assert found.sizes == [(64, 96)]
    light = found.images[0].sum(0).double()
    light = light - light.min()
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    centre = torch.stack([(light * columns).sum(), (light * rows).sum()]) / light.sum()
    shown = found.projection[0] @ point
    off = torch.stack([u - column, v - row]) * torch.tensor([size[1] / 96, size[0] / 64])
    torch.testing.assert_close(shown[:2] / shown[2], centre + off, atol=0.05, rtol=0)


def test_corners_of_the_image_stay_corners() -> None:
    P = resized_projection(torch.eye(3, 4, dtype=torch.float64), (10, 20), (5, 80))
    for before, after in (((-0.5, -0.5), (-0.5, -0.5)), ((19.5, 9.5), (79.5, 4.5))):
        torch.testing.assert_close(P @ torch.tensor([*before, 1.0, 1.0]).double(), torch.tensor([*after, 1.0]).double())
    same = projection_of(K, torch.eye(4, dtype=torch.float64))
    assert torch.equal(resized_projection(same, (64, 96), (64, 96)), same)


def test_views_that_are_missing_are_zeros_and_of_too_many_some_are_taken(tmp_path: Path) -> None:
    grey = np.full((64, 96, 3), 128, np.uint8)
    views = [view(tmp_path / f"{n}.png", grey, float(n)) for n in range(7)]
    few = load_views(views[:2], SPEC, (32, 48), 3)
    assert few.images.flatten(1).any(1).tolist() == [True, True, False]
    assert few.projection.flatten(1).any(1).tolist() == [True, True, False]
    assert len(few.sizes) == 2
    assert not load_views([], SPEC, (32, 48), 2).images.any()
    many = load_views(views, SPEC, (32, 48), 3)
    fit = resized_projection(K @ torch.eye(3, 4, dtype=torch.float64), (64, 96), (32, 48))
    for P, n in zip(many.projection, (0, 2, 4), strict=True):
        torch.testing.assert_close(P[:, 3], -fit[:, 0] * n)


def test_channels_are_rgb_with_the_statistics_of_imagenet(tmp_path: Path) -> None:
    colour = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    seen = load_views([view(tmp_path / "a.png", colour)], SPEC, (4, 4), 1).images[0].mean((1, 2))
    wanted = [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]
    assert seen.tolist() == pytest.approx(wanted, abs=1e-4)
