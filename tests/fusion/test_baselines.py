"""Concat, Average and Random on one block."""

from __future__ import annotations

import pytest
import torch
from plain_attention import attend
from torch import Tensor, nn

from tokenfusion.backbones.mit import MiTBlock
from tokenfusion.fusion import Average, Concat, Context, NoFusion, Random, make_private, partners

GRID = (4, 4)
C = 8


@pytest.fixture
def block(shake) -> MiTBlock:
    """Shared by three streams, with private norms and a spatial reduction, float64."""
    return shake(make_private(MiTBlock(C, 2, 2, drop_path=0.0), 3, (nn.LayerNorm,)).double()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 16, C, dtype=torch.float64)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def feed(block: MiTBlock, m: int, x: Tensor) -> Tensor:
    return block.mlp(norm(block.norm2[m], x), GRID)


def own_keys(block: MiTBlock, m: int, x: Tensor) -> Tensor:
    """What stream m's keys and values are made of, [B, K, C]."""
    image = norm(block.norm1[m], x).transpose(1, 2).unflatten(2, GRID)
    return norm(block.attention.norm[m], block.attention.sr(image).flatten(2).transpose(1, 2))


# ---- concat --------------------------------------------------------------------------------------------------------


def test_concat_attends_to_the_keys_of_all_streams(block: MiTBlock, x: Tensor) -> None:
    keys = torch.cat([own_keys(block, m, x[m]) for m in range(3)], dim=1)
    y, scores = Concat(C, 3)(block, x, Context(GRID))
    assert scores is None
    for m in range(3):
        e = x[m] + attend(block, norm(block.norm1[m], x[m]), keys)
        torch.testing.assert_close(y[m], e + feed(block, m, e), rtol=1e-9, atol=1e-10)


def test_concat_masks_the_keys_of_missing_streams(block: MiTBlock, x: Tensor) -> None:
    present = torch.tensor([[True, True], [False, True], [True, True]])
    y, _ = Concat(C, 3)(block, x, Context(GRID, present=present))
    keys = torch.cat([own_keys(block, m, x[m, :1]) for m in (0, 2)], dim=1)
    for m in range(3):
        e = x[m, :1] + attend(block, norm(block.norm1[m], x[m, :1]), keys)
        torch.testing.assert_close(y[m, :1], e + feed(block, m, e), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(y[:, 1], Concat(C, 3)(block, x, Context(GRID))[0][:, 1], rtol=1e-9, atol=1e-10)


def test_concat_of_one_stream_is_no_fusion(shake, x: Tensor) -> None:
    block = shake(make_private(MiTBlock(C, 2, 2, 0.0), 1, (nn.LayerNorm,)).double()).eval()
    torch.testing.assert_close(
        Concat(C, 1)(block, x[:1], Context(GRID))[0], NoFusion(C, 1)(block, x[:1], Context(GRID))[0]
    )


# ---- average -------------------------------------------------------------------------------------------------------


def attended(block: MiTBlock, x: Tensor) -> Tensor:
    return torch.stack([attend(block, norm(block.norm1[m], x[m]), own_keys(block, m, x[m])) for m in range(len(x))])


def test_average_gives_everyone_the_mean(block: MiTBlock, x: Tensor) -> None:
    y, scores = Average(C, 3)(block, x, Context(GRID))
    assert scores is None
    mean = attended(block, x).mean(0)
    for m in range(3):
        e = x[m] + mean
        torch.testing.assert_close(y[m], e + feed(block, m, e), rtol=1e-9, atol=1e-10)


def test_average_is_over_the_streams_that_are_present(block: MiTBlock, x: Tensor) -> None:
    present = torch.tensor([[True, True], [False, True], [True, True]])
    y, _ = Average(C, 3)(block, x, Context(GRID, present=present))
    all_attended = attended(block, x)
    mean = torch.stack([all_attended[[0, 2], 0].mean(0), all_attended[:, 1].mean(0)])
    for m in range(3):
        e = x[m] + mean
        torch.testing.assert_close(y[m], e + feed(block, m, e), rtol=1e-9, atol=1e-10)


# ---- random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_random_exchanges_the_expected_share(modalities: int, training: bool) -> None:
    """Streams are told apart by their constant value; the block below hands tokens on."""
    x = torch.arange(1.0, modalities + 1).view(-1, 1, 1, 1).expand(modalities, 4, 3000, 1)
    fuser = Random(1, modalities, stage=1, seed=3, rate=0.3).train(training)
    y = fuser(_Handing(), x, Context((50, 60)))[0] - x
    moved = y != x
    assert (moved.float().mean((1, 2, 3)) - 0.3).abs().max() < 0.05
    donor = partners(modalities, 3000, 3, 1)
    for m in range(modalities):
        expected = (donor[m] + 1).float().expand(4, 3000).unsqueeze(-1)
        assert torch.equal(y[m][moved[m]], expected[moved[m]])


class _Handing(nn.Module):
    """Attention that gives back what it gets; an MLP that adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.drop = nn.Identity()

    def attention(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x

    def feed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_random_at_its_ends(rate: float) -> None:
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 2, 16, 1)
    for training in (False, True):
        y = Random(1, 2, rate=rate).train(training)(_Handing(), x, Context(GRID))[0] - x
        assert torch.equal(y, x.flip(0) if rate else x)


def test_random_is_fixed_in_evaluation_and_new_in_every_training_step() -> None:
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 2, 400, 1)
    fuser = Random(1, 2, rate=0.3)
    ctx = Context((20, 20))
    first, second = (fuser(_Handing(), x, ctx)[0] for _ in range(2))
    assert not torch.equal(first, second)
    fuser.eval()
    state = torch.random.get_rng_state()
    first = fuser(_Handing(), x, ctx)[0]
    assert torch.equal(torch.random.get_rng_state(), state), "evaluation leaves torch's generator alone"
    torch.manual_seed(1)
    assert torch.equal(fuser(_Handing(), x, ctx)[0], first)
    assert not torch.equal(Random(1, 2, seed=1, rate=0.3).eval()(_Handing(), x, ctx)[0], first)
    assert not torch.equal(Random(1, 2, stage=1, rate=0.3).eval()(_Handing(), x, ctx)[0], first)


def test_random_draws_other_tokens_in_every_block_and_the_same_ones_again() -> None:
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 2, 400, 1)
    fuser = Random(1, 2, rate=0.3).eval()
    moved = [fuser(_Handing(), x, Context((20, 20), block=block))[0] != 2 * x for block in (0, 1, 2, 0)]
    assert torch.equal(moved[0], moved[3])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        both = (moved[one] & moved[other]).float().mean()
        assert abs(float(both) - 0.3 * 0.3) < 0.05, "independent of each other"


@pytest.mark.parametrize("missing", [False, True])
def test_random_leaves_prefix_tokens_alone(missing: bool) -> None:
    present = torch.tensor([[True], [False]]) if missing else None
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 18, 1)
    y = Random(1, 2, rate=1.0).eval()(_Handing(), x, Context(GRID, prefix=2, present=present))[0] - x
    assert torch.equal(y[:, :, :2], x[:, :, :2])


def test_random_fills_in_a_missing_stream() -> None:
    present = torch.tensor([[True, True], [False, True]])
    x = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 2, 16, 1)
    y = Random(1, 2, rate=0.1).eval()(_Handing(), x, Context(GRID, present=present))[0] - x
    assert (y[:, 0] == 1).all()


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rate_out_of_range_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match=f"0..1, not {rate}"):
        Random(C, 2, rate=rate)
