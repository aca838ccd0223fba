"""Stacks of streams and private copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tokenfusion.fusion import PerModality, make_private, merge, split


def test_merge_and_split_are_inverse_and_order_by_modality_first() -> None:
    x = torch.arange(24.0).reshape(3, 2, 4)
    assert torch.equal(merge(x)[2], x[1, 0])
    assert torch.equal(split(merge(x), 3), x)


def test_copies_start_equal_but_are_not_shared() -> None:
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    private = PerModality(norm, 3)
    assert all(torch.equal(copy_.weight, norm.weight) for copy_ in private)
    with torch.no_grad():
        private[0].weight.zero_()
    assert private[1].weight.abs().sum() > 0
    assert norm.weight.abs().sum() > 0


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_every_stream_goes_through_its_own_copy(modalities: int) -> None:
    private = PerModality(nn.Linear(4, 6), modalities)
    for copy_ in private:
        nn.init.normal_(copy_.weight)
    x = torch.randn(modalities, 5, 7, 4)
    expected = torch.stack([copy_(stream) for copy_, stream in zip(private, x, strict=True)])
    torch.testing.assert_close(split(private(merge(x)), modalities), expected)


def test_further_arguments_reach_every_copy() -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x + by

    assert torch.equal(PerModality(Shift(), 2)(torch.zeros(4, 1), 3.0), torch.full((4, 1), 3.0))


def test_it_is_a_list_of_its_copies_that_answers_for_the_first() -> None:
    private = PerModality(nn.LayerNorm(4), 3)
    assert list(private.state_dict()) == [f"{m}.{name}" for m in range(3) for name in ("weight", "bias")]
    assert not isinstance(private, nn.ModuleList), "peft wraps no lists"
    assert [*private] == [private[m] for m in range(len(private))]
    assert private[-1] is private[2]
    assert private.weight is private[0].weight
    assert private.normalized_shape == (4,)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        private.nothing  # noqa: B018
    with pytest.raises(AttributeError):
        PerModality.__new__(PerModality).weight  # noqa: B018


@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_private_copies_are_their_own(way: Callable[[nn.Module], nn.Module]) -> None:
    network = make_private(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 2, (nn.LayerNorm,)).eval()
    other = way(network)
    x = torch.randn(6, 4)
    assert torch.equal(other(x), network(x))
    assert not other[1].training
    nn.init.zeros_(other[1][0].weight)
    assert network[1].weight.abs().sum() > 0


def test_make_private_replaces_the_given_kinds_at_every_depth_and_nothing_else() -> None:
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4), nn.GELU()))
    assert make_private(network, 2, (nn.LayerNorm,)) is network
    assert network[0] is shared
    assert isinstance(network[1], PerModality)
    assert isinstance(network[2][0], PerModality)
    assert isinstance(network[2][1], nn.GELU)
    assert sum(isinstance(module, nn.LayerNorm) for module in network.modules()) == 4


def test_a_network_with_private_copies_is_what_the_single_one_was() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(3, 5, 4)
    expected = network(x)
    torch.testing.assert_close(make_private(network, 3, (nn.LayerNorm,))(x.repeat(3, 1, 1)), expected.repeat(3, 1, 1))
