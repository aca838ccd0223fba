"""Channel exchange by the norms' scales, its penalty, and both kinds of exchange at once (Eq. 10)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.backbones.mit import MiTBlock
from tokenfusion.fusion import (
    ChannelExchange,
    Context,
    NoFusion,
    TokenChannel,
    TokenFusion,
    make_private,
    scale_penalty,
)
from tokenfusion.fusion.channels import exchange_channels, others_mean, scales_of

GRID, C = (4, 4), 8
INF = float("inf")


@pytest.fixture
def block_of(shake) -> Callable[[int], MiTBlock]:
    return lambda m: shake(make_private(MiTBlock(C, 2, 2, drop_path=0.0), m, (nn.LayerNorm,)).double()).eval()


def streams(modalities: int, batch: int = 2, tokens: int = 16) -> Tensor:
    return torch.randn(modalities, batch, tokens, C, dtype=torch.float64)


# ---- the exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_definition_channel_by_channel(modalities: int, missing: bool) -> None:
    normed, scales = streams(modalities), torch.randn(modalities, C, dtype=torch.float64)
    present = torch.ones(modalities, 2, dtype=torch.bool)
    present[1, 0] = not missing
    got = exchange_channels(normed, scales, 0.5, present if missing else None)
    taken = 0
    for m in range(modalities):
        for b in range(2):
            others = [normed[j, b] for j in range(modalities) if j != m and present[j, b]]
            for c in range(C):
                is_taken = bool(others) and (abs(float(scales[m, c])) < 0.5 or not present[m, b])
                taken += is_taken
                expected = sum(other[:, c] for other in others) / len(others) if is_taken else normed[m, b, :, c]
                torch.testing.assert_close(got[m, b, :, c], expected)
    assert 0 < taken < modalities * 2 * C


def test_between_two_streams_the_other_is_taken_bit_for_bit() -> None:
    x = streams(2)
    assert torch.equal(others_mean(x, None), x.flip(0))
    assert torch.equal(exchange_channels(x, torch.zeros(2, C), 0.02), x.flip(0))


def test_who_has_no_others_keeps_its_own() -> None:
    one = streams(1)
    assert torch.equal(others_mean(one, None), one)
    x = streams(3)
    present = torch.tensor([[True, False], [False, False], [False, False]])
    got = exchange_channels(x, torch.zeros(3, C), 0.02, present)
    assert torch.equal(got[0, 0], x[0, 0])
    assert torch.equal(got[1:, 0], x[:1, 0].expand(2, -1, -1))
    assert torch.equal(got[:, 1], x[:, 1])


@pytest.mark.parametrize(("scale", "taken"), [(0.0199, True), (-0.0199, True), (0.02, False), (-0.02, False)])
def test_a_channel_is_taken_strictly_below_the_threshold(scale: float, taken: bool) -> None:
    x = streams(2)
    assert torch.equal(exchange_channels(x, torch.full((2, C), scale), 0.02), x.flip(0) if taken else x)


# ---- the fuser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_threshold_zero_is_no_fusion(block_of, modalities: int) -> None:
    block, x = block_of(modalities), streams(modalities)
    fuser = ChannelExchange(C, modalities, threshold=0.0)
    assert torch.equal(fuser(block, x, Context(GRID))[0], NoFusion(C, modalities)(block, x, Context(GRID))[0])


def test_threshold_infinity_swaps_what_the_norms_give(block_of) -> None:
    block, x = block_of(2), streams(2)
    seen = []
    block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ChannelExchange(C, 2, threshold=INF)(block, x, Context(GRID))
    expected = torch.cat([block.norm1[1](x[1]), block.norm1[0](x[0])])
    torch.testing.assert_close(seen[0], expected)


def test_it_goes_by_the_private_scales_of_the_block(block_of) -> None:
    block, x = block_of(2), streams(2)
    with torch.no_grad():
        block.norm1[0].weight[2] = 0.01
        block.norm1[1].weight[5] = -0.01
    seen = []
    block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(0, (2, 2))))
    for fuser in (ChannelExchange(C, 2), NoFusion(C, 2)):
        fuser(block, x, Context(GRID))
    exchanged, plain = seen
    moved = (exchanged != plain).flatten(1, 2).any(1)
    assert [row.nonzero().flatten().tolist() for row in moved] == [[2], [5]]
    assert torch.equal(exchanged[0, :, :, 2], plain[1, :, :, 2])


def test_prefix_tokens_keep_their_channels(block_of) -> None:
    block, x = block_of(2), streams(2, tokens=18)
    norm = block.norm1
    fuser, ctx = ChannelExchange(C, 2, threshold=INF), Context(GRID, prefix=2)
    normed = norm(x.flatten(0, 1)).unflatten(0, (2, 2))
    got = fuser.between(normed, norm, fuser.enter(x, ctx), ctx)
    assert torch.equal(got[:, :, :2], normed[:, :, :2])
    assert torch.equal(got[:, :, 2:], normed.flip(0)[:, :, 2:])


class Held(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[:3])


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_both_exchanges_contain_each(shake, block_of, rule: str) -> None:
    """Without channels it is TokenFusion; without tokens it is the channels' exchange; without both it is no fusion."""
    block, x = block_of(2), streams(2)

    def run(fuser: nn.Module) -> Tensor:
        return shake(fuser.double())(block, x, Context(GRID))[0]

    tokens = {"rule": rule, "threshold": 0.5}
    assert torch.equal(run(TokenChannel(C, 2, **tokens, channel_threshold=0.0)), run(TokenFusion(C, 2, **tokens)))
    fuser = TokenChannel(C, 2, rule=rule, threshold=0.0, channel_threshold=1.0)
    fuser.score = Held()
    assert torch.equal(run(fuser), run(ChannelExchange(C, 2, threshold=1.0)))
    fuser.channel_threshold = 0.0
    assert torch.equal(run(fuser), run(NoFusion(C, 2)))


# ---- scales and their penalty --------------------------------------------------------------------------------------


def test_scales_are_those_of_every_stream(block_of) -> None:
    block = block_of(3)
    got = scales_of(block.norm1, 3)
    assert torch.equal(got, torch.stack([block.norm1[m].weight for m in range(3)]))
    shared = nn.LayerNorm(C)
    assert torch.equal(scales_of(shared, 3), shared.weight.expand(3, -1))


def test_penalty_is_the_sum_of_magnitudes() -> None:
    scales = [torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[-1.0], [4.0]])]
    assert scale_penalty(scales).item() == 8.5
    assert scale_penalty([]).item() == 0


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_thresholds_below_zero_are_named(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"0 or more, not {threshold}"):
        ChannelExchange(C, 2, threshold=threshold)
    with pytest.raises(ValueError, match=f"0 or more, not {threshold}"):
        TokenChannel(C, 2, channel_threshold=threshold)
