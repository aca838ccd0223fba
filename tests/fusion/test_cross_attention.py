"""Pixel-wise cross-modal attention against its formulas, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.fusion import Context, CrossAttention

C, HEADS = 8, 2
CTX = Context((2, 3))


def attended(modalities: int) -> Tensor:
    return torch.randn(modalities, 2, 6, C, dtype=torch.float64)


def literal(fuser: CrossAttention, x: Tensor, others: list[Tensor]) -> Tensor:
    """Jia et al.: one token ``x [C]`` and the other streams' at its place."""
    wq, wk, wv = (layer.weight.T for layer in (fuser.q, fuser.k, fuser.v))

    def phi(other: Tensor) -> Tensor:
        logit = torch.cat([fuser.of_own.weight[0], fuser.of_other.weight[0]]) @ torch.cat([x, other])
        return torch.stack([logit + fuser.of_own.bias[0], torch.zeros_like(logit)]).softmax(0)[0]

    q = x @ wq
    keys = torch.stack([(x + fuser.noise_k) @ wk, *((x * phi(other)) @ wk for other in others)])
    values = torch.stack([(x + fuser.noise_v) @ wv, *(other @ wv for other in others)])
    heads, width = [], C // HEADS
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        weight = (keys[:, part] @ q[part] / math.sqrt(width)).softmax(0)
        heads.append(weight @ values[:, part])
    return x + fuser.proj(torch.cat(heads))


@pytest.mark.parametrize("modalities", [2, 3])
def test_equals_the_formulas(shake, modalities: int) -> None:
    fuser, x = shake(CrossAttention(C, modalities, heads=HEADS).double()), attended(modalities)
    got = fuser.leave(x, None, CTX)
    for m in range(modalities):
        for b in range(2):
            for n in range(6):
                others = [x[j, b, n] for j in range(modalities) if j != m]
                torch.testing.assert_close(got[m, b, n], literal(fuser, x[m, b, n], others))


def test_the_softmax_runs_over_the_streams_that_are_present(shake) -> None:
    fuser, x = shake(CrossAttention(C, 3, heads=HEADS).double()), attended(3)
    got = fuser.leave(x, None, Context((2, 3), present=torch.tensor([[True] * 2, [False, True], [True] * 2])))
    for n in range(6):
        torch.testing.assert_close(got[0, 0, n], literal(fuser, x[0, 0, n], [x[2, 0, n]]))
        torch.testing.assert_close(got[0, 1, n], literal(fuser, x[0, 1, n], [x[1, 1, n], x[2, 1, n]]))


def test_where_it_is_alone_a_stream_attends_to_itself(shake) -> None:
    fuser, x = shake(CrossAttention(C, 2, heads=HEADS).double()), attended(2)
    got = fuser.leave(x, None, Context((2, 3), present=torch.tensor([[True] * 2, [False] * 2])))
    torch.testing.assert_close(got[0], x[0] + fuser.proj(fuser.v(x[0] + fuser.noise_v)))


def test_a_token_sees_its_own_place_only(shake) -> None:
    fuser, x = shake(CrossAttention(C, 2, heads=HEADS).double()), attended(2)
    other = x.clone()
    other[1, :, 4] += 1
    moved = (fuser.leave(x, None, CTX)[0] != fuser.leave(other, None, CTX)[0]).any(-1)
    assert moved.tolist() == [[n == 4 for n in range(6)]] * 2


def test_every_parameter_learns_once_the_projection_has_left_zero(shake) -> None:
    fuser = shake(CrossAttention(C, 2, heads=HEADS).double())
    fuser.leave(attended(2), None, CTX).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fuser.parameters())
    fresh = CrossAttention(C, 2).double()
    fresh.leave(attended(2), None, CTX).square().sum().backward()
    assert fresh.proj.weight.grad.abs().max() > 0, "zero is a start, not an end"


def test_heads_share_the_width_out() -> None:
    assert CrossAttention(20, 2).heads == 4
    assert CrossAttention(64, 2).heads == 8
    with pytest.raises(ValueError, match="at least 1, not 0"):
        CrossAttention(C, 2, heads=0)


def test_one_stream_has_nobody_to_attend_to_and_nothing_to_learn() -> None:
    fuser, x = CrossAttention(C, 1), attended(1)
    assert not list(fuser.parameters())
    assert torch.equal(fuser.leave(x, None, CTX), x)


def test_parameters_are_those_of_four_projections_and_little_more() -> None:
    count = sum(p.numel() for p in CrossAttention(64, 3).parameters())
    assert count == 4 * 64 * 64 + 4 * 64 + 1
    assert all(isinstance(m, nn.Linear) for m in CrossAttention(64, 3).children())
