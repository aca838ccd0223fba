"""The released code's drawing and its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenfusion.tasks.translation.released import drawn, released_distances, stretched

GOLDEN = Path(__file__).parents[2] / "golden" / "fid_kid"


def _scene(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height)) - 0.6


def test_stretch_reaches_both_ends_over_all_channels() -> None:
    image = torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1).expand(3, 4, 4)
    assert stretched(image).unique().tolist() == [0, 128, 255]
    assert torch.equal(stretched(image), stretched(0.1 * image + 0.7))
    assert stretched(torch.full((3, 4, 4), 0.7)).unique().tolist() == [0]


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (96, 128), (600, 500)])
def test_every_image_becomes_500_by_500(size: tuple[int, int]) -> None:
    pytest.importorskip("matplotlib")
    scene = _scene(*size)
    image = drawn(scene)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 500, 500))
    assert torch.equal(image, drawn(scene))
    np.testing.assert_allclose(image.float().mean((1, 2)), stretched(scene).float().mean((1, 2)), atol=2)
    assert image.max() - image.min() > 150  # resampling may smooth the ends away, not the picture


def test_whole_multiples_are_drawn_pixel_by_pixel() -> None:
    """No margin, no flip, no swapped channels."""
    pytest.importorskip("matplotlib")
    assert torch.equal(drawn(_scene(500, 500)), stretched(_scene(500, 500)))
    small = stretched(_scene(250, 250))
    assert torch.equal(drawn(_scene(250, 250)), small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert drawn(torch.zeros(3, 8, 8)).unique().tolist() == [0]


def test_settings_of_the_user_do_not_move_figures() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = drawn(_scene(256, 256))
    mine = {"image.interpolation": "nearest", "image.origin": "lower", "image.aspect": "equal", "image.resample": False,
            "figure.facecolor": "red", "figure.dpi": 30}  # fmt: skip
    with matplotlib.rc_context(mine):
        assert torch.equal(drawn(_scene(256, 256)), plain)


def test_reference_figures() -> None:
    """All subsets are the whole set: one discrepancy, times 100, of as many images as both have."""
    pytest.importorskip("torchmetrics")
    with np.load(GOLDEN / "outputs.npz") as file:
        outputs = {name: torch.from_numpy(file[name]) for name in file.files}
    a, b = outputs["features_a"], outputs["features_b"]
    found = released_distances(a, b)
    np.testing.assert_allclose(found.fid, outputs["fid"], rtol=1e-6)
    np.testing.assert_allclose(found.kid_x100, 100 * outputs["mmd2_first180"], rtol=1e-9)
    np.testing.assert_allclose(released_distances(b, a).kid_x100, found.kid_x100, rtol=1e-9)
