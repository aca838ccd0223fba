"""The mended rule: better donors, weighed by nothing but the two scores, within a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.backbones.mit import MiTBlock
from tokenfusion.fusion import Context, MendedFusion, NoFusion, make_private

GRID = (4, 4)
C = 8


@pytest.fixture
def block(shake) -> MiTBlock:
    return shake(make_private(MiTBlock(C, 2, 2, drop_path=0.0), 2, (nn.LayerNorm,)).double()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, C, dtype=torch.float64)


def with_scores(fuser: MendedFusion, scores: Tensor) -> MendedFusion:
    """Scores as given, whatever the tokens are."""
    fuser.score.forward = lambda x, stand_in: fuser.score.weighed(scores, stand_in)  # type: ignore[method-assign]
    return fuser


def given(scores: Tensor, **options: float) -> MendedFusion:
    return with_scores(MendedFusion(C, 2, **options), scores)


def test_it_starts_exactly_as_the_unfused_model(block: MiTBlock, x: Tensor) -> None:
    for training in (False, True):
        fuser = MendedFusion(C, 2).double().train(training)
        out, scores = fuser(block, x, Context(GRID))
        assert torch.equal(out, NoFusion(C, 2)(block, x, Context(GRID))[0])
        assert fuser.rates(scores).exchanged.tolist() == [0, 0]


def test_a_token_gives_way_to_one_that_scores_higher_by_their_two_scores(x: Tensor) -> None:
    scores = torch.rand(2, 3, 16, dtype=torch.float64)
    scores[0, 0, 0] = 0.0  # worth nothing: all of the partner
    fuser = given(scores, budget=1.0)
    for training in (False, True):
        fuser.train(training)
        got = fuser.leave(x, fuser.enter(x, Context(GRID)).scores, Context(GRID))
        own, other = scores[..., None], scores.flip(0)[..., None]
        blend = (own * x + other * x.flip(0)) / (own + other)
        torch.testing.assert_close(got, torch.where(other > own, blend, x), rtol=1e-12, atol=1e-12)
        assert torch.equal(got[0, 0, 0], x[1, 0, 0])


def test_whole_tokens_come_where_that_is_wanted(x: Tensor) -> None:
    scores = torch.rand(2, 3, 16, dtype=torch.float64)
    for training in (False, True):
        fuser = given(scores, budget=1.0, whole=True).train(training)
        shares = fuser.enter(x, Context(GRID)).scores.requires_grad_()
        got = fuser.leave(x, shares, Context(GRID))
        higher = scores.flip(0) > scores
        torch.testing.assert_close(got, torch.where(higher[..., None], x.flip(0), x), rtol=0, atol=0)
    got.sum().backward()
    torch.testing.assert_close(shares.grad, (x - x.flip(0)).sum(-1))


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_budget_holds_where_scores_tie(budget: float) -> None:
    equal = torch.tensor([0.4, 0.6]).view(2, 1, 1).expand(2, 3, 40)  # a flat wall: every token like the next
    fuser = given(equal, budget=budget)
    shares = fuser.enter(torch.zeros(2, 3, 40, C), Context((5, 8))).scores
    assert (shares < 0.5).sum(-1).tolist() == [[40 * budget] * 3, [0] * 3]


def test_scores_in_half_types_are_told_apart() -> None:
    torch.manual_seed(0)
    fuser = MendedFusion(64, 2)
    for net in fuser.score.nets:
        nn.init.trunc_normal_(net[-1].weight, std=0.002)
    x = torch.randn(2, 3, 100, 64)
    with torch.autocast("cpu", torch.bfloat16):
        shares = fuser.enter(x, Context((10, 10))).scores
        assert fuser.leave(x.bfloat16(), shares, Context((10, 10))).dtype == torch.bfloat16
    exact = fuser.enter(x, Context((10, 10))).scores
    assert shares.dtype == torch.float32
    assert shares[0].unique().numel() > 10 * shares[0].bfloat16().unique().numel()
    assert ((shares < 0.5) == (exact < 0.5)).float().mean() > 0.95
    assert ((shares < 0.5).sum(-1) <= 50).all()


@pytest.mark.parametrize("small", [1e-8, 1e-30])
def test_the_higher_of_two_tiny_scores_stays(small: float, x: Tensor) -> None:
    scores = torch.tensor([small, 2 * small], dtype=torch.float64).view(2, 1, 1).expand(2, 3, 16)
    shares = given(scores, budget=1.0).enter(x, Context(GRID)).scores
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 2 / 3]).double().view(2, 1, 1).expand(2, 3, 16))
    nothing = given(torch.zeros_like(scores), budget=1.0).enter(x, Context(GRID)).scores
    assert (nothing == 0.5).all()


def test_budget_goes_to_those_whose_partners_are_furthest_ahead(x: Tensor) -> None:
    own = torch.full((3, 16), 0.5, dtype=torch.float64)
    partner = torch.linspace(0.1, 0.9, 16, dtype=torch.float64).expand(3, 16)
    fuser = given(torch.stack([own, partner]), budget=0.25).eval()
    shares = fuser.enter(x, Context(GRID)).scores
    assert (shares[0] < 0.5).tolist() == [[False] * 12 + [True] * 4] * 3
    assert (shares[1] < 0.5).tolist() == [[True] * 4 + [False] * 12] * 3
    assert fuser.rates(shares).exchanged.tolist() == [0.25, 0.25]
    assert fuser.rates(shares).donor_below.tolist() == [0, 0]
    shares = given(torch.stack([own, partner]), budget=0.0).enter(x, Context(GRID)).scores
    assert (shares >= 0.5).all()


def test_a_missing_modality_is_filled_in_beyond_the_budget_and_gives_nothing(x: Tensor) -> None:
    present = torch.tensor([[True, True, False], [True, False, True]])
    scores = torch.rand(2, 3, 16, dtype=torch.float64)
    fuser = given(scores, budget=0.25).eval()
    ctx = Context(GRID, present=present)
    got = fuser.leave(x, fuser.enter(x, ctx).scores, ctx)
    assert torch.equal(got[:, 1], x[0, 1].expand(2, 16, C))
    assert torch.equal(got[:, 2], x[1, 2].expand(2, 16, C))


def test_scores_learn_from_the_task_at_the_start(block: MiTBlock, x: Tensor) -> None:
    """The last layers, which start at zero, get the gradient of the blend."""
    fuser = MendedFusion(C, 2).double().train()
    wanted = torch.randn(2, 3, 16, C, dtype=torch.float64)
    start = fuser.enter(x, Context(GRID)).scores.detach()
    for shares in (start, torch.rand_like(start)):
        leaf, blend = shares.clone().requires_grad_(), shares.clone().requires_grad_()
        (fuser.leave(x, leaf, Context(GRID)) * wanted).sum().backward()
        ((blend[..., None] * x + (1 - blend[..., None]) * x.flip(0)) * wanted).sum().backward()
        torch.testing.assert_close(leaf.grad, blend.grad)
    (fuser(block, x, Context(GRID))[0] * wanted).sum().backward()
    assert all(net[-1].weight.grad.abs().max() > 0 for net in fuser.score.nets)


def test_a_budget_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must be in 0..1, not 2"):
        MendedFusion(C, 2, budget=2)
