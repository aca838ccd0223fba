"""The position embedding of residual alignment; its way through the layers: tests/backbones/test_fused.py."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.fusion import LearnedPosition


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (15, 20), (31, 7), (120, 160)])
@pytest.mark.parametrize("dim", [4, 8, 10])
def test_any_grid_and_width(grid: tuple[int, int], dim: int) -> None:
    position = LearnedPosition(4)
    torch.nn.init.normal_(position.embedding)
    value = position(grid, dim)
    assert value.shape == (grid[0] * grid[1], dim)
    assert value.isfinite().all()


def test_starts_at_zero() -> None:
    assert LearnedPosition(4)((6, 8), 4).abs().max() == 0


def test_at_its_own_size_it_is_the_map_in_row_order() -> None:
    position = LearnedPosition(4, grid=(3, 5))
    torch.nn.init.normal_(position.embedding)
    value = position((3, 5), 4)
    torch.testing.assert_close(value[1 * 5 + 2], position.embedding[0, :, 1, 2])


def test_wider_stages_repeat_its_channels() -> None:
    position = LearnedPosition(4)
    torch.nn.init.normal_(position.embedding)
    narrow, wide = position((6, 8), 4), position((6, 8), 10)
    assert torch.equal(wide, torch.cat([narrow, narrow, narrow[:, :2]], dim=1))


def test_places_are_the_middles_of_cells() -> None:
    """A third of the size hits every third cell in its middle, not corner on corner."""
    position = LearnedPosition(4, grid=(3, 9))
    torch.nn.init.normal_(position.embedding)
    torch.testing.assert_close(position((1, 3), 4), position.embedding[0, :, 1, 1::3].T)


def test_resampling_keeps_places() -> None:
    """A ramp stays a ramp from left to right, whatever the grid."""
    position = LearnedPosition(1, grid=(4, 8))
    with torch.no_grad():
        position.embedding.copy_(torch.linspace(-1, 1, 8).expand(1, 1, 4, 8))
    rows = position((2, 32), 1).reshape(2, 32)
    assert (rows.diff(dim=1) > -1e-3).all()
    assert torch.allclose(rows[0], rows[1])
    assert rows[0, 0] < -0.9
    assert rows[0, -1] > 0.9
