"""NoFusion and TokenFusion on one block, against slow literal readings of Eq. 4, 6 and 7, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.backbones.mit import MiTBlock
from tokenfusion.fusion import Context, NoFusion, PerModality, TokenFusion, make_private, partners
from tokenfusion.fusion.allocation import present_partners

GRID = (4, 4)
C = 8


@pytest.fixture
def block_of(shake) -> Callable[[int], MiTBlock]:
    """A MiT block with private norms for M streams, float64."""

    def make(modalities: int) -> MiTBlock:
        block = make_private(MiTBlock(C, 2, 2, drop_path=0.0), modalities, (nn.LayerNorm,))
        return shake(block.double()).eval()

    return make


def alone(module: nn.Module, m: int) -> nn.Module:
    """What stream m sees of a block: its own copies of the private layers."""
    module = copy.copy(module)
    module._modules = {
        name: child[m] if isinstance(child, PerModality) else child and alone(child, m)
        for name, child in module._modules.items()
    }
    return module


def streams(modalities: int, batch: int = 2, tokens: int = 16) -> Tensor:
    return torch.randn(modalities, batch, tokens, C, dtype=torch.float64, requires_grad=True)


def token_fusion(shake, modalities: int, **options: object) -> TokenFusion:
    return shake(TokenFusion(C, modalities, stage=1, seed=5, **{"threshold": 0.5, **options}).double())


def literal_scores(fuser: TokenFusion, x: Tensor) -> list[list[Tensor]]:
    return [
        [net(sample).softmax(-1)[:, 0] for sample in stream] for net, stream in zip(fuser.score.nets, x, strict=True)
    ]


def literal_exchange(
    values: list[list[Tensor]], scores: list[list[Tensor]], theta: float, allotted: Tensor
) -> list[list[Tensor]]:
    """Eq. 7, term by term: ``e_m * I[s >= theta] + sum over m' != m of a_m'(m) * e_m' * I[s < theta]``."""
    result = []
    for m in range(len(values)):
        row = []
        for b in range(len(values[m])):
            tokens = []
            for n in range(len(values[m][b])):
                keep = float(scores[m][b][n] >= theta)
                token = values[m][b][n] * keep
                for other in range(len(values)):
                    if other != m:
                        a = float(allotted[m, n] == other)
                        token = token + a * values[other][b][n] * (1 - keep)
                tokens.append(token)
            row.append(torch.stack(tokens))
        result.append(row)
    return result


def literal(fuser: TokenFusion, block: MiTBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """A whole block, stream by stream, sample by sample, token by token."""
    modalities, batch = x.shape[:2]
    allotted = partners(modalities, x.shape[2], fuser.seed, fuser.stage)
    scores = literal_scores(fuser, x)
    tokens = [[x[m, b] for b in range(batch)] for m in range(modalities)]
    own = [alone(block, m) for m in range(modalities)]
    if fuser.rule == "paper":  # Eq. 6 before the layer, Eq. 4 in it
        weight = literal_exchange(scores, scores, fuser.threshold, allotted)
        tokens = literal_exchange(tokens, scores, fuser.threshold, allotted)
        branch = [
            [own[m].attention(own[m].norm1(e[None]) * s[None, :, None], GRID)[0] for e, s in zip(es, ss, strict=True)]
            for m, (es, ss) in enumerate(zip(tokens, weight, strict=True))
        ]
    else:
        branch = [
            [own[m].attention(own[m].norm1(e[None]), GRID)[0] * s[:, None] for e, s in zip(es, ss, strict=True)]
            for m, (es, ss) in enumerate(zip(tokens, scores, strict=True))
        ]
        branch = literal_exchange(branch, scores, fuser.threshold, allotted)
    result = []
    for m in range(modalities):
        for b in range(batch):
            y = tokens[m][b] + branch[m][b]
            result.append(y + own[m].mlp(own[m].norm2(y[None]), GRID)[0])
    return torch.stack(result).unflatten(0, (modalities, batch)), torch.stack([torch.stack(s) for s in scores])


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("rule", ["released", "paper"])
def test_equals_the_literal_equations_in_value_and_gradient(shake, block_of, modalities: int, rule: str) -> None:
    block, fuser = block_of(modalities), token_fusion(shake, modalities, rule=rule)
    x = streams(modalities)
    y, scores = fuser(block, x, Context(GRID))
    expected, expected_scores = literal(fuser, block, x)
    assert 0.2 < (scores < 0.5).double().mean() < 0.8, "the case must exchange something"
    torch.testing.assert_close(scores, expected_scores, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)

    probe = torch.randn_like(y)
    wanted = (x, *fuser.parameters(), *block.parameters())
    mine = torch.autograd.grad((y * probe).sum() + scores.sum(), wanted)
    theirs = torch.autograd.grad((expected * probe).sum() + expected_scores.sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_gradcheck(shake, block_of, rule: str) -> None:
    block, fuser = block_of(2), token_fusion(shake, 2, rule=rule)
    x = streams(2, batch=1)
    assert torch.autograd.gradcheck(lambda v: fuser(block, v, Context(GRID)), (x,), fast_mode=True)


def test_the_rules_differ(shake, block_of) -> None:
    block, x = block_of(2), streams(2)
    released, paper = (token_fusion(shake, 2, rule=rule)(block, x, Context(GRID))[0] for rule in ("released", "paper"))
    assert (released - paper).abs().max() > 0.1


class Held(nn.Module):
    """Scores that are given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.to(x).expand(x.shape[:3])


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("rule", ["released", "paper"])
def test_with_full_scores_and_threshold_zero_it_is_no_fusion_bit_for_bit(block_of, modalities: int, rule: str) -> None:
    block = block_of(modalities).float()
    x = streams(modalities).float()
    fuser = TokenFusion(C, modalities, rule=rule, threshold=0.0)
    fuser.score = Held(torch.ones(1, 1, 1))
    plain, none = NoFusion(C, modalities)(block, x, Context(GRID))
    assert none is None
    assert torch.equal(fuser(block, x, Context(GRID))[0], plain)


def test_no_fusion_is_each_stream_alone(block_of) -> None:
    block, x = block_of(3), streams(3)
    y, scores = NoFusion(C, 3)(block, x, Context(GRID))
    assert scores is None
    for m in range(3):
        single = alone(block, m)
        e = x[m] + single.attention(single.norm1(x[m]), GRID)
        torch.testing.assert_close(y[m], e + single.mlp(single.norm2(e), GRID), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize("held", [0.3, 0.9999])
def test_threshold_one_exchanges_everything(block_of, rule: str, held: float) -> None:
    """Two streams then swap: the fuser on (a, b) keeps what the exchanging fuser gives to (b, a)."""
    block, x = block_of(2), streams(2)
    everything, nothing = (TokenFusion(C, 2, rule=rule, threshold=theta).double() for theta in (1.0, 0.0))
    everything.score = nothing.score = Held(torch.full((1, 1, 1), held, dtype=torch.float64))
    shared = make_private_equal(block)
    y = everything(shared, x, Context(GRID))[0]
    if rule == "paper":
        torch.testing.assert_close(y, nothing(shared, x.flip(0), Context(GRID))[0], rtol=1e-10, atol=1e-12)
    else:
        single = alone(shared, 0)
        attended = torch.stack([single.attention(single.norm1(stream), GRID) for stream in x]) * held
        e = x + attended.flip(0)
        expected = torch.stack([stream + single.mlp(single.norm2(stream), GRID) for stream in e])
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def make_private_equal(block: MiTBlock) -> MiTBlock:
    """The same block with equal private copies."""
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, PerModality):
            for copy_ in list(module)[1:]:
                copy_.load_state_dict(module[0].state_dict())
    return block


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_threshold_one_exchanges_tokens_whose_score_rounds_to_one(block_of, rule: str) -> None:
    """A confident score network gives exactly 1.0 in float32, and soon in bfloat16: "everything" includes those."""
    block, x = block_of(2).float(), streams(2).float()
    fuser = TokenFusion(C, 2, rule=rule, threshold=1.0)
    fuser.score = Held(torch.ones(1, 1, 1))
    exchanged = fuser(block, x, Context(GRID))[0]
    kept = NoFusion(C, 2)(block, x, Context(GRID))[0]
    assert not torch.equal(exchanged, kept)


@pytest.mark.parametrize(
    ("held", "exchanged"), [(0.0, True), (0.0199, True), (0.02, False), (0.0201, False), (1.0, False)]
)
def test_a_token_is_replaced_strictly_below_the_threshold(block_of, held: float, exchanged: bool) -> None:
    """Eq. 6: kept where ``s >= theta``."""
    block, x = block_of(2), streams(2)
    fuser = TokenFusion(C, 2, rule="paper", threshold=0.02).double()
    fuser.score = Held(torch.full((1, 1, 1), held, dtype=torch.float64))
    replaced = x.flip(0) if exchanged else x
    y = fuser(block, x, Context(GRID))[0]
    plain = TokenFusion(C, 2, rule="paper", threshold=0.0).double()
    plain.score = fuser.score
    torch.testing.assert_close(y, plain(block, replaced, Context(GRID))[0], rtol=1e-10, atol=1e-12)


def test_released_donor_is_weighed_by_its_own_score(block_of) -> None:
    """Where rgb is below the threshold it receives depth's attention times depth's score, not rgb's."""
    block, x = block_of(2), streams(2)
    fuser = TokenFusion(C, 2, threshold=0.02).double()
    fuser.score = Held(torch.tensor([0.01, 0.7], dtype=torch.float64).view(2, 1, 1))
    depth = alone(block, 1)
    attended = depth.attention(depth.norm1(x[1]), GRID) * 0.7
    e = torch.stack([x[0] + attended, x[1] + attended])
    expected = torch.stack([e[m] + alone(block, m).mlp(alone(block, m).norm2(e[m]), GRID) for m in range(2)])
    torch.testing.assert_close(fuser(block, x, Context(GRID))[0], expected, rtol=1e-10, atol=1e-12)


def test_released_gradient_of_the_score_net_is_one_way(shake, block_of) -> None:
    """The receiver's score of a replaced token has no part in the outputs: only the l1 penalty moves it."""
    block, x = block_of(2), streams(2)
    fuser = token_fusion(shake, 2)
    scores = fuser.score(x).detach().requires_grad_()
    fuser.score = Held(scores)
    y, _ = fuser(block, x, Context(GRID))
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), scores)
    below = scores < 0.5
    lone = below & below.flip(0)  # neither kept here, nor given: the other side keeps nothing of it either
    assert lone.any()
    given_away = below & ~below.flip(0)
    assert given_away.any()
    assert (gradient[given_away] == 0).all()
    assert (gradient[~below] != 0).all()


def test_one_stream_weighs_but_has_nobody_to_exchange_with(shake, block_of) -> None:
    block, x = block_of(1), streams(1)
    fuser = token_fusion(shake, 1, threshold=1.0)
    y, scores = fuser(block, x, Context(GRID))
    single = alone(block, 0)
    e = x[0] + single.attention(single.norm1(x[0]), GRID) * scores[0].unsqueeze(-1)
    torch.testing.assert_close(y[0], e + single.mlp(single.norm2(e), GRID), rtol=1e-10, atol=1e-12)


def test_where_a_stream_is_alone_nothing_counts_as_exchanged() -> None:
    scores = torch.zeros(2, 3, 4)  # all below theta
    both_then_one = torch.tensor([[True, True, True], [True, False, False]])
    assert TokenFusion(C, 1, threshold=0.5).rates(scores[:1]).exchanged.tolist() == [0]
    fuser = TokenFusion(C, 2, threshold=0.5)
    assert fuser.rates(scores).exchanged.tolist() == [1, 1]
    assert fuser.rates(scores, both_then_one).exchanged.tolist() == [1, 1], "of the tokens that have a stand-in"
    assert fuser.rates(scores, both_then_one[:, 1:].repeat(1, 2)[:, :3]).exchanged.tolist() == [0, 0]


# ---- prefix, position, rates, presence -----------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A block whose attention and MLP work token by token: what moved can be told from the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.norm2 = self.drop = nn.Identity()

    def attention(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x

    def feed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_prefix_tokens_are_never_scored_weighed_or_exchanged(
    shake, rule: str, modalities: int, threshold: float
) -> None:
    x = streams(modalities, tokens=18)
    fuser = token_fusion(shake, modalities, rule=rule, threshold=threshold)
    y, scores = fuser(Pointwise(), x, Context(GRID, prefix=2))
    assert scores.shape == (modalities, 2, 16)
    torch.testing.assert_close(y[:, :, :2], 2 * x[:, :, :2])
    assert not torch.allclose(y[:, :, 2:], 2 * x[:, :, 2:])
    torch.testing.assert_close(scores, fuser.score(x[:, :, 2:]))


def test_rates_know_the_same_donors_as_the_exchange_behind_a_prefix() -> None:
    """With three streams the donor differs token by token: the figure must speak of the donor that gave."""
    fuser = TokenFusion(C, 3, seed=5, rule="paper", threshold=0.5).double()
    scores = torch.full((3, 1, 16), 0.9, dtype=torch.float64)
    scores[0] = 0.1  # rgb receives everywhere ...
    scores[1] = 0.2  # ... and depth's tokens are worthless as well, thermal's are not
    fuser.score = Held(scores)
    identity = torch.arange(3, dtype=torch.float64).view(3, 1, 1, 1).expand(3, 1, 18, C)
    given, _ = fuser(Pointwise(), identity, Context(GRID, prefix=2))
    weight = given[0, 0, 2:, 0]  # depth: 1 + 1 * 0.2, thermal: 2 + 2 * 0.9
    from_depth = torch.isclose(weight, torch.tensor(1.2, dtype=torch.float64))
    assert torch.isclose(weight[~from_depth], torch.tensor(3.8, dtype=torch.float64)).all()

    class Spy(TokenFusion):
        def stand_in(self, x: Tensor, present: Tensor | None) -> Tensor:
            self.asked = super().stand_in(x, present)
            return self.asked

    spy = Spy(C, 3, seed=5, threshold=0.5)
    spy.rates(scores)
    assert torch.equal(spy.asked[0, 0] == 0.2, from_depth)


def test_stochastic_depth_drops_both_residual_branches(shake, block_of) -> None:
    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    block, x = block_of(2), streams(2)
    block.drop = Drop()
    for fuser in (NoFusion(C, 2), token_fusion(shake, 2)):
        assert torch.equal(fuser(block, x, Context(GRID))[0], x)


def test_position_is_added_before_scores_and_attention_in_the_released_rule(shake, block_of) -> None:
    block, x = block_of(2), streams(2)
    fuser = token_fusion(shake, 2)
    position = torch.randn(16, C, dtype=torch.float64)
    with_position = fuser(block, x, Context(GRID, position=position))
    before = fuser(block, x + position, Context(GRID))
    for a, b in zip(with_position, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_position_is_added_after_the_exchange_in_the_papers_rule(block_of) -> None:
    """Figures 1 and 2: the embedding follows the fusion, on every token, so aligned tokens carry it once, not twice."""
    block, x = block_of(2), streams(2)
    fuser = TokenFusion(C, 2, rule="paper", threshold=0.5).double()
    fuser.score = Held(torch.tensor([0.1, 0.8], dtype=torch.float64).view(2, 1, 1))
    position = torch.randn(16, C, dtype=torch.float64)
    y, _ = fuser(block, x, Context(GRID, position=position))
    everything_depth = torch.stack([x[1] + position, x[1] + position])
    fuser.score = Held(torch.tensor([0.8, 0.8], dtype=torch.float64).view(2, 1, 1))
    torch.testing.assert_close(y, fuser(block, everything_depth, Context(GRID))[0], rtol=1e-10, atol=1e-12)


def test_rates_of_a_fuser(shake) -> None:
    fuser = TokenFusion(C, 2, threshold=0.5)
    scores = torch.tensor([[[0.1, 0.9, 0.4, 0.9]], [[0.9, 0.9, 0.2, 0.1]]])
    rates = fuser.rates(scores)
    assert rates.exchanged.tolist() == [0.5, 0.5]
    assert rates.donor_below.tolist() == [0.5, 0.5]


def test_fusers_without_a_threshold_have_no_rates() -> None:
    with pytest.raises(AssertionError, match="threshold"):
        NoFusion(C, 2).rates(torch.rand(2, 1, 4))


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_presence_of_everybody_changes_nothing(shake, block_of, rule: str) -> None:
    for modalities in (1, 2, 3):
        block, x = block_of(modalities), streams(modalities)
        fuser = token_fusion(shake, modalities, rule=rule)
        everybody = torch.ones(modalities, 2, dtype=torch.bool)
        with_flag, without = fuser(block, x, Context(GRID, present=everybody)), fuser(block, x, Context(GRID))
        for a, b in zip(with_flag, without, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_a_missing_stream_scores_zero_receives_everywhere_and_gives_nowhere(shake, rule: str) -> None:
    present = torch.tensor([[True, True], [False, True], [True, True]])
    x = torch.arange(1.0, 4.0).double().view(3, 1, 1, 1).expand(3, 2, 16, C)
    fuser = token_fusion(shake, 3, rule=rule, threshold=0.02)
    x = x * present[:, :, None, None]
    y, scores = fuser(Pointwise(), x, Context(GRID, present=present))
    assert (scores[1, 0] == 0).all()
    assert (scores[1, 1] > 0).any()
    donors = present_partners(partners(3, 16, fuser.seed, fuser.stage), present)
    assert set(donors[1, 0].tolist()) == {0, 2}
    assert (y[1, 0] > 0).all(), "filled in by the streams that are there"
    assert (y[0, 0] > 0).all()


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_content_of_a_missing_stream_has_no_influence_on_the_others(shake, block_of, rule: str) -> None:
    present = torch.tensor([[True, True], [False, True], [True, True]])
    block, fuser = block_of(3), token_fusion(shake, 3, rule=rule)
    x = streams(3).detach()
    y = fuser(block, x, Context(GRID, present=present))[0]
    garbage = x.clone()
    garbage[1, 0] = 100 * torch.randn(16, C, dtype=torch.float64)
    z = fuser(block, garbage, Context(GRID, present=present))[0]
    assert torch.equal(y[[0, 2]], z[[0, 2]])
    assert torch.equal(y[1, 1], z[1, 1])


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "papers"}, "'released' or 'paper', not 'papers'"),
        ({"threshold": 1.5}, "0..1, not 1.5"),
        ({"threshold": -0.1}, "0..1, not -0.1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFusion(C, 2, **options)  # type: ignore[arg-type]
