"""Gating against its formula, and where it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenfusion.fusion import Average, Context, Gating

C = 6
CTX = Context((2, 4))


def attended(modalities: int) -> Tensor:
    return torch.randn(modalities, 2, 8, C, dtype=torch.float64)


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_it_starts_as_the_average(modalities: int, missing: bool) -> None:
    """A missing stream's content is not looked at: NaN would be seen."""
    x, ctx = attended(modalities), Context((2, 4))
    if missing:
        ctx.present = torch.tensor([[True, False], [True, True], [False, True]])[:modalities]
        expected = Average(C, modalities).leave(x * ctx.present[:, :, None, None], None, ctx)
        x[~ctx.present] = float("nan")
    else:
        expected = Average(C, modalities).leave(x, None, ctx)
    got = Gating(C, modalities).double().leave(x, None, ctx)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # 2 / 3 in float32


def test_equals_the_formula_token_by_token(shake) -> None:
    fuser, x = shake(Gating(C, 3, reduction=2).double()), attended(3)
    got = fuser.leave(x, None, CTX)
    assert fuser.squeeze.weight.shape == (9, 18)
    for b in range(2):
        for n in range(8):
            token = torch.cat([x[0, b, n], x[1, b, n], x[2, b, n]])
            hidden = (fuser.squeeze.weight @ token + fuser.squeeze.bias).clamp(min=0)
            gate = 1 / (1 + torch.exp(-(fuser.excite.weight @ hidden + fuser.excite.bias)))
            for m in range(3):
                torch.testing.assert_close(got[m, b, n], fuser.proj.weight @ (gate * token))


def test_over_fewer_streams_it_is_the_sum_of_those_present_scaled_up(shake) -> None:
    fuser, x = shake(Gating(C, 2).double()), attended(2)
    present = torch.tensor([[True, True], [False, True]])
    got = fuser.leave(x, None, Context((2, 4), present=present))
    lone = fuser.leave(torch.stack([x[0], torch.zeros_like(x[0])]), None, CTX)
    torch.testing.assert_close(got[:, 0], 2 * lone[:, 0])
    torch.testing.assert_close(got[:, 1], fuser.leave(x, None, CTX)[:, 1])


def test_no_stream_at_all_gives_zeros(shake) -> None:
    fuser = shake(Gating(C, 2).double())
    got = fuser.leave(attended(2), None, Context((2, 4), present=torch.zeros(2, 2, dtype=torch.bool)))
    assert torch.equal(got, torch.zeros_like(got))


def test_the_bottleneck_has_one_channel_at_least() -> None:
    assert Gating(4, 2, reduction=100).squeeze.out_features == 1
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Gating(C, 2, reduction=0)
