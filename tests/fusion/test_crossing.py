"""What a stream takes from another that shares no blocks with it, and that tokens without a stand-in stay as they are."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.components import EXCHANGES, build
from tokenfusion.fusion.crossing import (
    AverageExchange,
    ConcatExchange,
    Exchange,
    NoExchange,
    RandomExchange,
    TokenExchange,
)

DIM = 8
OWN, OTHER = torch.randn(2, 2, 5, DIM, generator=torch.Generator().manual_seed(0)).unbind(0)
HAS = torch.tensor([[True, True, False, True, True], [False, False, True, True, True]])
WHERE_IT_CAN = torch.where(HAS.unsqueeze(-1), OTHER, OWN)
KINDS = [NoExchange, TokenExchange, RandomExchange, AverageExchange, ConcatExchange]


def fused(exchange: Exchange, has: torch.Tensor = HAS) -> torch.Tensor:
    return exchange.take(OWN, OTHER, has, exchange.score(OWN, has))


def replaced(exchange: Exchange, has: torch.Tensor = HAS) -> torch.Tensor:
    return (fused(exchange, has) == OTHER).all(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has", [HAS, torch.zeros_like(HAS)])
def test_a_token_without_a_stand_in_stays(kind: type[Exchange], has: torch.Tensor) -> None:
    tokens, scores = kind(DIM)(OWN, OTHER, has)
    torch.testing.assert_close(tokens[~has], OWN[~has])
    assert scores is None or (scores[~has] == 1).all()


def test_what_scores_below_theta_is_replaced() -> None:
    exchange = TokenExchange(DIM, threshold=0.5)
    scores = torch.tensor([[0.4, 0.5, 0.1, 0.0, 0.9], [0.1, 0.1, 0.1, 0.6, 0.2]])
    expected = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    taken = exchange.take(OWN, OTHER, HAS, scores)
    assert torch.equal(taken, torch.where(expected.unsqueeze(-1), OTHER, OWN))


def test_scores_are_the_score_nets_and_one_without_a_stand_in() -> None:
    exchange = TokenExchange(DIM)
    scores = exchange.score(OWN, HAS)
    assert (scores[~HAS] == 1).all()
    assert torch.equal(scores[HAS], exchange.scorer(OWN[None])[0][HAS])


def test_at_once_tokens_are_weighed_and_stand_ins_are_not() -> None:
    exchange = TokenExchange(DIM, threshold=0.5)
    with torch.no_grad():  # scores around one half: some are replaced, some are not
        exchange.scorer.nets[0][-1].weight.mul_(400)
    tokens, scores = exchange(OWN, OTHER, HAS)
    assert scores is not None
    gone = (scores < 0.5) & HAS
    assert gone.any()
    assert (HAS & ~gone).any()
    assert torch.equal(tokens[gone], OTHER[gone])
    torch.testing.assert_close(tokens[~gone], OWN[~gone] * scores[~gone].unsqueeze(-1))


def test_gradients_reach_scores_and_stand_ins() -> None:
    other = OTHER.clone().requires_grad_()
    exchange = TokenExchange(DIM, threshold=0.5, init_bias=3.0)
    exchange(OWN, other, HAS)[0].square().sum().backward()
    assert all(p.grad is not None for p in exchange.parameters())
    assert not other.grad.any()  # with this bias nothing is replaced
    TokenExchange(DIM, threshold=1.0)(OWN, other, HAS)[0].square().sum().backward()
    assert torch.equal(other.grad.abs().sum(-1) > 0, HAS)


@pytest.mark.parametrize("make", [lambda: TokenExchange(DIM, threshold=1.0), lambda: RandomExchange(DIM, rate=1.0)])
def test_at_the_limit_all_tokens_with_a_stand_in_are_replaced(make) -> None:
    assert torch.equal(fused(make()), WHERE_IT_CAN)
    assert torch.equal(make().eval()(OWN, OTHER, HAS)[0], WHERE_IT_CAN)


def test_average_and_none() -> None:
    torch.testing.assert_close(fused(AverageExchange(DIM)), (OWN + WHERE_IT_CAN) / 2)
    assert torch.equal(fused(NoExchange(DIM)), OWN)


def test_concat_starts_as_the_token_alone_and_reads_its_stand_in() -> None:
    concat = ConcatExchange(DIM)
    torch.testing.assert_close(fused(concat), OWN)
    with torch.no_grad():
        concat.merge.weight[:, DIM:] = torch.eye(DIM)
    torch.testing.assert_close(fused(concat), OWN + OTHER * HAS.unsqueeze(-1))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(concat).dtype == OWN.dtype


def test_random_draws_anew_in_training_and_once_in_evaluation() -> None:
    exchange, has = RandomExchange(DIM, seed=3, rate=0.4), torch.ones_like(HAS)
    torch.manual_seed(0)
    assert len({tuple(replaced(exchange, has).flatten().tolist()) for _ in range(8)}) > 1
    exchange.eval()
    fixed = replaced(exchange, has)
    assert fixed.sum(1).tolist() == [2, 2]
    assert torch.equal(replaced(exchange, has), fixed)
    assert not torch.equal(replaced(RandomExchange(DIM, seed=4, rate=0.4).eval(), has), fixed)


def test_random_keeps_its_rate() -> None:
    own, has = torch.zeros(2, 2000, 1), torch.ones(2, 2000, dtype=torch.bool)
    exchange = RandomExchange(1, rate=0.3)
    torch.manual_seed(0)
    assert exchange(own, own + 1, has)[0].mean().item() == pytest.approx(0.3, abs=0.04)
    assert exchange.eval()(own, own + 1, has)[0].mean().item() == pytest.approx(0.3)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"threshold must be in 0\.\.1, not 1\.1"):
        TokenExchange(DIM, threshold=1.1)
    with pytest.raises(ValueError, match=r"rate must be in 0\.\.1, not -0\.1"):
        RandomExchange(DIM, rate=-0.1)


def test_every_exchange_has_a_word() -> None:
    assert {type(build(spec, "fuser", dim=DIM, seed=0)) for spec in EXCHANGES.values()} == set(KINDS)
