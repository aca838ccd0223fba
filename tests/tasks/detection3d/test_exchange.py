"""What becomes of tokens that have a stand-in, and that all others stay as they are."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.tasks.detection3d import FUSERS
from tokenfusion.tasks.detection3d.exchange import (
    AverageExchange,
    ConcatExchange,
    Exchange,
    NoExchange,
    RandomExchange,
    TokenExchange,
)

DIM = 16
KINDS = [NoExchange, TokenExchange, RandomExchange, AverageExchange, ConcatExchange]


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    own, other = torch.randn(2, 2, 9, DIM).unbind(0)
    return own, other, torch.rand(2, 9) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_a_stand_in_stays(kind: type[Exchange]) -> None:
    own, other, has = tokens()
    fused, scores = kind(DIM).eval()(own, other, has)
    torch.testing.assert_close(fused[~has], own[~has])
    assert scores is None or torch.equal(scores[~has], torch.ones_like(scores[~has]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_without_images_goes_through_untouched(kind: type[Exchange]) -> None:
    own, other, has = tokens()
    fused, _ = kind(DIM)(own, other, torch.zeros_like(has))
    torch.testing.assert_close(fused, own)


def test_scores_weigh_and_replace() -> None:
    own, other, has = tokens()
    exchange = TokenExchange(DIM, threshold=0.5)
    with torch.no_grad():  # scores around one half: some are replaced, some are not
        exchange.score.nets[0][-1].weight.mul_(400)
    fused, scores = exchange(own, other, has)
    assert scores is not None
    replaced = (scores < 0.5) & has
    assert replaced.any()
    assert (has & ~replaced).any()
    torch.testing.assert_close(fused[replaced], other[replaced])
    torch.testing.assert_close(fused[~replaced], own[~replaced] * scores[~replaced].unsqueeze(-1))


def test_threshold_one_replaces_all_that_can_be() -> None:
    own, other, has = tokens()
    fused, _ = TokenExchange(DIM, threshold=1.0)(own, other, has)
    torch.testing.assert_close(fused, torch.where(has.unsqueeze(-1), other, own))


def test_gradients_reach_scores_and_stand_ins() -> None:
    own, other, has = tokens()
    other.requires_grad_()
    exchange = TokenExchange(DIM, threshold=0.5, init_bias=3.0)
    exchange(own, other, has)[0].square().sum().backward()
    assert all(p.grad is not None for p in exchange.parameters())
    assert not other.grad.any()  # with this bias nothing is replaced
    TokenExchange(DIM, threshold=1.0)(own, other, has)[0].square().sum().backward()
    assert torch.equal(other.grad.abs().sum(-1) > 0, has)


def test_random_is_fixed_in_evaluation_and_keeps_its_rate() -> None:
    own, other, _ = tokens()
    wide, beside = (x.repeat(1, 200, 1) for x in (own, other))
    has = torch.ones(wide.shape[:2], dtype=torch.bool)
    exchange = RandomExchange(DIM, seed=3, rate=0.3).eval()
    first, again = (exchange(wide, beside, has)[0] for _ in range(2))
    assert torch.equal(first, again)
    share = (first == beside).all(-1).double().mean()
    assert share == pytest.approx(0.3, abs=0.04)
    assert not torch.equal(exchange.train()(wide, beside, has)[0], exchange(wide, beside, has)[0])


def test_average_and_concat() -> None:
    own, other, has = tokens()
    everywhere = torch.ones_like(has)
    torch.testing.assert_close(AverageExchange(DIM)(own, other, everywhere)[0], (own + other) / 2)
    concat = ConcatExchange(DIM)
    torch.testing.assert_close(concat(own, other, everywhere)[0], own)  # it starts as the token alone
    with torch.no_grad():
        concat.merge.weight[:, DIM:] = torch.eye(DIM)
    torch.testing.assert_close(concat(own, other, everywhere)[0], own + other)


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="threshold must be in 0..1, not 2"):
        TokenExchange(DIM, threshold=2)
    with pytest.raises(ValueError, match="rate must be in 0..1"):
        RandomExchange(DIM, rate=-1)


def test_every_word_names_an_exchange() -> None:
    names = {spec["_target_"].rpartition(".")[2] for spec in FUSERS.values()}
    assert names == {kind.__name__ for kind in KINDS}
