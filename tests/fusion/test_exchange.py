"""Substitution (Eq. 6) and the figures about it."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.fusion import exchange_rates, substitute


def test_substitute_takes_whole_tokens_where_told() -> None:
    own, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    replaced = torch.tensor([[True, False, False], [False, False, True]])
    expected = torch.zeros(2, 3, 4)
    expected[0, 0] = expected[1, 2] = 1
    assert torch.equal(substitute(own, other, replaced), expected)


def test_substitute_is_the_masked_sum_of_the_paper_in_value_and_gradient() -> None:
    own = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    score = torch.rand(2, 3, dtype=torch.float64)
    keep = (score >= 0.5).double().unsqueeze(-1)
    torch.testing.assert_close(substitute(own, other, score < 0.5), own * keep + other * (1 - keep), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda a, b: substitute(a, b, score < 0.5), (own, other))


def test_an_infinite_stand_in_that_is_not_taken_does_no_harm() -> None:
    own, other = torch.ones(1, 2, 3, requires_grad=True), torch.full((1, 2, 3), float("inf"))
    result = substitute(own, other, torch.zeros(1, 2, dtype=torch.bool))
    result.sum().backward()
    assert result.isfinite().all()
    assert own.grad is not None
    assert own.grad.isfinite().all()


def test_rates_count_received_tokens_and_worthless_donors() -> None:
    scores = torch.tensor([[[0.01, 0.5, 0.019, 0.02]], [[0.9, 0.001, 0.001, 0.9]]])
    rates = exchange_rates(scores, scores.flip(0), 0.02)
    # rgb gives up tokens 0 and 2 (0.02 is not below 0.02), and what stands in for token 2 is below as well
    assert rates.exchanged.tolist() == [0.5, 0.5]
    assert rates.donor_below.tolist() == [0.5, 0.5]


def test_rates_are_over_batch_and_tokens() -> None:
    scores = torch.ones(2, 3, 4)
    scores[1, 0, :3] = 0
    rates = exchange_rates(scores, scores.flip(0), 0.5)
    assert rates.exchanged.tolist() == [0.0, 0.25]
    assert rates.donor_below.tolist() == [0.0, 0.0]


def test_no_exchange_has_no_worthless_donors() -> None:
    scores = torch.ones(2, 1, 4)
    assert exchange_rates(scores, torch.zeros(2, 1, 4), 0.5).donor_below.tolist() == [0.0, 0.0]


def test_a_missing_sample_is_not_counted() -> None:
    scores = torch.tensor([[[0.1, 0.9], [0.0, 0.0]], [[0.9, 0.9], [0.1, 0.1]]])  # [M, B, N]
    present = torch.tensor([[True, False], [True, True]])
    rates = exchange_rates(scores, scores.flip(0), 0.5, present)
    assert rates.exchanged.tolist() == [0.5, 0.5]
    assert exchange_rates(scores, scores.flip(0), 0.5).exchanged.tolist() == [0.75, 0.5]


def test_tokens_without_a_stand_in_are_not_counted() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.1, 1.0]]])
    has = torch.tensor([[[True, True, True, False]]])
    rates = exchange_rates(scores, torch.tensor([[[0.9, 0.9, 0.1, -1.0]]]), 0.5, has=has)
    assert rates.exchanged.item() == pytest.approx(2 / 3)
    assert rates.donor_below.tolist() == [0.5]
    assert exchange_rates(scores, scores, 1.0, has=has).exchanged.tolist() == [1.0]
