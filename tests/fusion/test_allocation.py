"""Which modality stands in for which token (Eq. 7)."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenfusion.fusion import partners
from tokenfusion.fusion.allocation import present_partners, take


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_groups_are_of_equal_size_and_never_the_stream_itself(modalities: int, tokens: int) -> None:
    partner = partners(modalities, tokens, seed=3, stage=1)
    assert partner.shape == (modalities, tokens)
    assert partner.dtype == torch.int64
    for own, row in enumerate(partner):
        sizes = torch.bincount(row, minlength=modalities)
        if modalities == 1:
            assert sizes.tolist() == [tokens]
            continue
        assert sizes[own] == 0
        others = torch.cat([sizes[:own], sizes[own + 1 :]])
        assert others.max() - others.min() <= 1


def test_two_streams_stand_in_for_each_other() -> None:
    assert partners(2, 3, seed=11).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_pure_function_that_asks_no_random_generator() -> None:
    state = torch.random.get_rng_state()
    first = partners(4, 100, seed=5, stage=2)
    torch.manual_seed(99)
    assert torch.equal(partners(4, 100, seed=5, stage=2), first)
    torch.random.set_rng_state(state)
    partners(4, 100, seed=5, stage=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fixed_for_ever() -> None:
    """A published checkpoint relies on its allocation: this must not change between releases."""
    assert partners(3, 12, seed=0).tolist() == [
        [1, 1, 1, 2, 1, 2, 2, 2, 2, 1, 1, 2],
        [0, 2, 2, 0, 0, 2, 0, 2, 2, 0, 2, 0],
        [1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0],
    ]


def test_seeds_stages_and_streams_draw_independently() -> None:
    drawn = {
        (seed, stage, own): (row - own) % 3
        for seed, stage in itertools.product(range(3), range(4))
        for own, row in enumerate(partners(3, 2000, seed, stage))
    }
    for a, b in itertools.combinations(drawn.values(), 2):
        assert 0.42 < (a == b).float().mean().item() < 0.58  # independent: 0.5, five standard deviations 0.056


@pytest.mark.parametrize("modalities", [3, 4, 5])
@pytest.mark.parametrize("size", [(15, 20), (32, 32), (60, 80)])
def test_groups_look_random(modalities: int, size: tuple[int, int]) -> None:
    """Neighbours at any small distance, along rows or columns, share a group as often as chance has it."""
    chance = 1 / (modalities - 1)
    tokens = size[0] * size[1]
    five_sigma = 5 * (chance * (1 - chance) / (tokens - 8 * size[1])) ** 0.5
    for seed in range(3):
        for row in partners(modalities, tokens, seed):
            for lag in (*range(1, 9), *(size[1] * k for k in (1, 2, 4, 8))):
                same = (row[lag:] == row[:-lag]).float().mean().item()
                assert abs(same - chance) < five_sigma, (seed, lag)


def test_groups_are_balanced_in_every_part_of_the_picture() -> None:
    row = (partners(3, 4800, seed=1)[0] == 1).float()
    for quarter in (*row.chunk(4), *row.reshape(60, 80).chunk(4, dim=1), row[::2], row[1::2]):
        assert abs(quarter.mean().item() - 0.5) < 0.07


def test_large_and_negative_seeds() -> None:
    for seed in (-1, 2**31, 2**62 + 7):
        partner = partners(3, 64, seed)
        assert partner.min() >= 0
        assert partner.max() <= 2
        assert (partner != torch.arange(3).unsqueeze(1)).all()


# ---- present_partners ----------------------------------------------------------------------------------------------


def _next_present(own: int, allotted: int, modalities: int, there: list[bool]) -> int:
    """From the allotted modality onwards, cyclically, without the receiver: the first that is there."""
    for step in range(modalities):
        candidate = (allotted + step) % modalities
        if candidate != own and there[candidate]:
            return candidate
    return own


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
def test_where_all_are_present_the_allocation_stays(modalities: int) -> None:
    partner = partners(modalities, 24, seed=2)
    chosen = present_partners(partner, torch.ones(modalities, 3, dtype=torch.bool))
    assert torch.equal(chosen, partner.unsqueeze(1).expand(modalities, 3, 24))


@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
def test_present_partners_equal_a_slow_search(modalities: int) -> None:
    patterns = list(itertools.product([False, True], repeat=modalities))
    present = torch.tensor(patterns).t()
    partner = partners(modalities, 24, seed=2)
    chosen = present_partners(partner, present)
    for own, (b, there), n in itertools.product(range(modalities), enumerate(patterns), range(24)):
        expected = _next_present(own, int(partner[own, n]), modalities, list(there))
        assert chosen[own, b, n] == expected, (own, there, int(partner[own, n]))


@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
def test_never_a_missing_donor_and_self_only_where_alone(modalities: int) -> None:
    patterns = list(itertools.product([False, True], repeat=modalities))
    present = torch.tensor(patterns).t()
    chosen = present_partners(partners(modalities, 24, seed=2), present)
    for own, (b, there) in itertools.product(range(modalities), enumerate(patterns)):
        others = {m for m in range(modalities) if m != own and there[m]}
        assert set(chosen[own, b].tolist()) <= (others or {own})


# ---- take ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 4])
def test_take_picks_the_partners_entries(rank: int) -> None:
    x = torch.randn(3, 2, 5, *(4,) * (rank - 3))
    partner = partners(3, 5, seed=1)
    per_sample = torch.stack([partner, partner.roll(1, 1)], dim=1)
    shared, each = take(x, partner), take(x, per_sample)
    for m, b, n in itertools.product(range(3), range(2), range(5)):
        assert torch.equal(shared[m, b, n], x[partner[m, n], b, n])
        assert torch.equal(each[m, b, n], x[per_sample[m, b, n], b, n])


def test_take_gradient() -> None:
    x = torch.randn(3, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: take(v, partners(3, 4, seed=0)), (x,))
