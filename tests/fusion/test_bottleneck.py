"""Bottleneck tokens: who sees them, what they see, and what is carried from block to block."""

from __future__ import annotations

import pytest
import torch
from plain_attention import attend
from torch import Tensor, nn

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mit import MiTBlock, mit
from tokenfusion.fusion import Bottleneck, Context, NoFusion, make_private

GRID, C, K = (4, 4), 8, 3


@pytest.fixture
def block(shake) -> MiTBlock:
    return shake(make_private(MiTBlock(C, 2, 2, drop_path=0.0), 3, (nn.LayerNorm,)).double()).eval()


@pytest.fixture
def fuser(shake) -> Bottleneck:
    return shake(Bottleneck(C, 3, tokens=K).double())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 16, C, dtype=torch.float64)


def literal(block: MiTBlock, m: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Stream m with bottleneck tokens ``z [B, K, C]``: its tokens and its copy of the bottleneck's."""
    norm, norm2 = block.norm1[m], block.norm2[m]
    image = norm(x).transpose(1, 2).unflatten(2, GRID)
    reduced = block.attention.norm[m](block.attention.sr(image).flatten(2).transpose(1, 2))
    keys = torch.cat([reduced, norm(z)], 1)
    y = x + attend(block, norm(x), keys)
    return y + block.mlp(norm2(y), GRID), z + attend(block, norm(z), keys)


def test_equals_the_formulas_over_two_blocks(block, fuser, x) -> None:
    ctx = Context(GRID)
    y, scores = fuser(block, x, ctx)
    assert scores is None
    z = fuser.offset.expand(2, -1, -1)
    expected = [literal(block, m, x[m], z) for m in range(3)]
    torch.testing.assert_close(y, torch.stack([own for own, _ in expected]))
    carried = sum(copy for _, copy in expected) / 3
    torch.testing.assert_close(ctx.carried, carried)

    y2, _ = fuser(block, y, ctx)
    expected = [literal(block, m, y[m], carried + fuser.offset) for m in range(3)]
    torch.testing.assert_close(y2, torch.stack([own for own, _ in expected]))
    torch.testing.assert_close(ctx.carried, sum(copy for _, copy in expected) / 3)


def test_copies_of_missing_streams_do_not_count(block, fuser, x) -> None:
    ctx = Context(GRID, present=torch.tensor([[True, True], [False, True], [True, False]]))
    fuser(block, x, ctx)
    z = fuser.offset.expand(2, -1, -1)
    copies = [literal(block, m, x[m], z)[1] for m in range(3)]
    torch.testing.assert_close(ctx.carried[0], (copies[0][0] + copies[2][0]) / 2)
    torch.testing.assert_close(ctx.carried[1], (copies[0][1] + copies[1][1]) / 2)


def test_streams_meet_in_the_second_block_and_nowhere_else(block, fuser, x) -> None:
    """In the first block the tokens are nobody's yet; if they are not carried on, streams never meet."""
    other = x.clone()
    other[1] += torch.randn_like(other[1])
    contexts = Context(GRID), Context(GRID)
    first, second = (fuser(block, v, ctx)[0] for v, ctx in zip((x, other), contexts, strict=True))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(fuser(block, first, contexts[0])[0][0], fuser(block, first, contexts[1])[0][0])
    assert torch.equal(fuser(block, first, Context(GRID))[0][0], fuser(block, second, Context(GRID))[0][0])


def test_tokens_that_nobody_attends_to_are_no_fusion(block, fuser, x) -> None:
    """Keys far away in every head: the softmax gives the bottleneck tokens nothing, and the streams are on their own."""

    class Far(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention = attention
            self.reduce = attention.reduce

        def forward(self, x: Tensor, grid: tuple[int, int], context: Tensor | None = None) -> Tensor:
            mask = None
            if context is not None:
                mask = torch.arange(context.shape[1]).expand(len(context), -1) < context.shape[1] - K
            return self.attention(x, grid, context, mask)

    block.attention = Far(block.attention)
    torch.testing.assert_close(fuser(block, x, Context(GRID))[0], NoFusion(C, 3)(block, x, Context(GRID))[0])


def test_there_must_be_a_token() -> None:
    assert Bottleneck(C, 2).offset.shape == (4, C)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Bottleneck(C, 2, tokens=0)


def test_tokens_that_go_from_block_to_block_want_every_block() -> None:
    with pytest.raises(ValueError, match="set 'every'"):
        FusedBackbone(mit("b0"), ("rgb", "depth"), Bottleneck, placement="last")
