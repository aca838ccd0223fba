"""Stacks of streams and private copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.fusion import PerModality, make_private, merge, split
from tokenfusion.fusion.batch_norms import TOLD, on_rows


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


@pytest.fixture
def told() -> Iterator[Callable[[Tensor], None]]:
    """``told(present)``: as a forward pass says who is present."""

    def tell(present: Tensor) -> None:
        TOLD.present = present

    yield tell
    TOLD.present = None


def test_statistics_of_a_batch_are_of_what_is_present(told) -> None:
    private, x = PerModality(nn.BatchNorm2d(4), 2).train(), torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    alone = copy.deepcopy(private[1])
    told(torch.tensor([[True, True, True], [True, False, True]]))
    y = split(private(merge(x)), 2)
    torch.testing.assert_close(y[1, [0, 2]], alone(x[1, [0, 2]]))
    torch.testing.assert_close(private[1].running_var, alone.running_var)
    y.square().sum().backward()
    assert not x.grad[1, 1].any()
    windows = x.repeat_interleave(4, 1)
    once, often = (split(private(merge(z)), 2)[1] for z in (x, windows))
    torch.testing.assert_close(often[:4], once[:1].expand(4, -1, -1, -1))


def test_a_stream_that_nobody_has_leaves_its_statistics(told) -> None:
    private, x = PerModality(nn.BatchNorm2d(4), 2).train(), torch.zeros(2, 3, 4, 5, 5)
    before = copy.deepcopy(private[1].state_dict())
    told(torch.tensor([[True, True, True], [False, False, False]]))
    private(merge(x)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in private[1].state_dict().items())
    assert private[1].weight.grad is not None, "whoever waits for all gradients (DDP) waits for this one too"
    assert private[1].training
    assert private[0].num_batches_tracked == 1


def test_of_one_value_there_are_no_statistics(told) -> None:
    private, x = PerModality(nn.BatchNorm1d(4), 2).train(), torch.randn(2, 3, 4)
    told(torch.tensor([[True, True, True], [False, True, False]]))
    y = split(private(merge(x)), 2)
    torch.testing.assert_close(y[1], private[1].eval()(x[1]))
    assert private[1].num_batches_tracked == 0


def test_rows_that_are_left_out_are_as_if_they_were_not_in_the_batch() -> None:
    norm, x, there = nn.BatchNorm1d(3), torch.randn(4, 3), torch.tensor([True, False, True, True])
    y = on_rows(norm, there, x)
    torch.testing.assert_close(y[there], copy.deepcopy(norm)(x[there]))
    assert not y[~there].any()
