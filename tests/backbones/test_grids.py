"""Rows and columns of a map in images of other sizes than the surveyed one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenfusion
from tokenfusion.backbones.calls import first_tensor
from tokenfusion.backbones.grids import grid_of_tokens
from tokenfusion.backbones.held import FusedBlock
from tokenfusion.backbones.plan import BlockPlan, Parts
from tokenfusion.fusion import NoFusion

PARTS = Parts(8, "tokens", "tokens", "tokens", "norm", "attention", True, None)
SIZES = [(480, 640), (640, 480), (237, 300), (300, 237), (90, 1001), (1001, 90)]


def plan(grid: tuple[int, int]) -> BlockPlan:
    return BlockPlan("blocks.0", PARTS, 0, 1, 0, grid)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("example", [(224, 224), (480, 640), (230, 317)])
@pytest.mark.parametrize("stride", [14, 16])
@pytest.mark.parametrize("missing", ["dropped", "padded"])
def test_the_strides_of_the_example_tell(
    size: tuple[int, int], example: tuple[int, int], stride: int, missing: str
) -> None:
    def count(pixels: tuple[int, int]) -> tuple[int, int]:
        rest = 0 if missing == "dropped" else stride - 1
        return (pixels[0] + rest) // stride, (pixels[1] + rest) // stride

    rows, columns = count(size)
    assert grid_of_tokens(plan(count(example)), rows * columns, size, (2, 3, *example)) == (rows, columns)


def test_patches_that_are_not_square() -> None:
    """Of 16 x 8 pixels: the map of the nearest proportions."""
    assert grid_of_tokens(plan((14, 28)), 30 * 80, (480, 640), (2, 3, 224, 224)) == (30, 80)
    assert grid_of_tokens(plan((14, 28)), 40 * 60, (650, 485), (2, 3, 224, 224)) == (40, 60)


def test_a_network_that_resizes_its_input_keeps_its_map() -> None:
    assert grid_of_tokens(plan((14, 14)), 196, (480, 640), (2, 3, 224, 224)) == (14, 14)
    assert grid_of_tokens(plan((4, 25)), 100, (7, 16000), (2, 16000)) == (4, 25), "of a signal, in another batch"


def test_a_map_that_has_no_such_proportions_is_told() -> None:
    with pytest.raises(tokenfusion.UserError, match=r"blocks\.0: how its 1201 tokens stand in an input of 480x640"):
        grid_of_tokens(plan((14, 14)), 1201, (480, 640), (2, 3, 224, 224))


@pytest.mark.parametrize("size", [(69, 97), (97, 69)])
@torch.no_grad()
def test_maps_and_positions_of_portraits_and_landscapes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = tokenfusion.fuse(transformers.Dinov2Model(config), ["a", "b"], NoFusion, alignment=True).eval()
    seen: list[Tensor] = []
    places = [module for module in model.modules() if isinstance(module, FusedBlock)]
    places[1].block.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output)))
    aligned: list[Tensor] = []
    position_of = model.position_of

    def noted(*args: Any) -> Tensor | None:
        aligned.append(position_of(*args))
        return aligned[-1]

    monkeypatch.setattr(model, "position_of", noted)
    maps, _, _ = model.pyramid({name: torch.randn(1, 3, *size) for name in "ab"}, [1])
    grid = size[0] // 14, size[1] // 14
    torch.testing.assert_close(maps[0][:, 0], seen[0][:, 1:].transpose(1, 2).unflatten(2, grid))
    torch.testing.assert_close(aligned[1], model.position.on(model.network, grid, 1))
