"""Lambda, fixed and steered to a rate."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.fusion.pressure import Pressure


def test_without_a_target_it_is_lambda_times_the_norms() -> None:
    norms = [torch.tensor(2.0), torch.tensor(3.0)]
    assert Pressure(0.1, 2)(norms).item() == pytest.approx(0.5)
    assert not Pressure(0.0, 2).is_on
    assert Pressure(0.0, 2).levels() == []


def test_controller_follows_its_rule_for_every_stage() -> None:
    pressure = Pressure(0.1, 2, target=0.5, gain=2.0, pull=0.1)
    norms, rates = torch.tensor([1.0, 10.0]).unbind(), torch.tensor([0.2, 0.9]).unbind()
    # missing 0.3 and -0.4: levels 0.13 and 0.06, lambdas 0.73 and -0.74
    assert pressure(norms, rates).item() == pytest.approx(0.73 - 7.4)
    assert [level.item() for level in pressure.levels()] == pytest.approx([0.13, 0.06])


def test_a_step_in_pieces_moves_it_as_a_whole_one() -> None:
    whole, parts = Pressure(0.1, 1, target=0.5), Pressure(0.1, 1, target=0.5, pieces=2)
    whole([torch.tensor(1.0)], [torch.tensor(0.3)])
    for rate in (0.2, 0.4):
        parts([torch.tensor(1.0)], [torch.tensor(rate)])
    torch.testing.assert_close(parts.level, whole.level)


def test_evaluation_does_not_move_it() -> None:
    pressure = Pressure(0.1, 1, target=0.5).eval()
    pressure([torch.tensor(1.0)], [torch.tensor(0.0)])
    assert [level.item() for level in pressure.levels()] == pytest.approx([0.1])


def test_scores_are_brought_to_the_wanted_rate() -> None:
    """Tokens of fixed spread and one learnt offset: 30 % of them end below theta, from either side."""
    spread = torch.randn(500)
    for start in (6.0, -6.0):
        offset = torch.tensor(start, requires_grad=True)
        pressure = Pressure(1e-3, 1, target=0.3)
        optimizer = torch.optim.Adam([offset], 0.05)
        for _ in range(1000):
            scores = torch.sigmoid(spread + offset)
            loss = pressure([scores.mean()], [(scores < 0.5).float().mean()])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (torch.sigmoid(spread + offset.detach()) < 0.5).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_level_is_kept_in_the_state() -> None:
    pressure, copy = Pressure(0.1, 2, target=0.5), Pressure(0.1, 2, target=0.5)
    pressure(torch.ones(2).unbind(), torch.zeros(2).unbind())
    copy.load_state_dict(pressure.state_dict())
    assert copy.levels() == pressure.levels()
    assert Pressure(0.1, 2).state_dict() == {}


def test_a_rate_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must be in 0..1, not 1.5"):
        Pressure(0.1, 1, target=1.5)
