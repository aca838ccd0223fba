"""Order of the data: a function of (seed, epoch, index), whoever loads it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from train.toy import Samples

from tokenfusion.errors import UserError
from tokenfusion.train.batches import Batches, derive_seed


class Marked:
    """Items say their index and the epoch in which they were made; the epoch lies in memory that workers share."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(self.epoch), index


def take(steps: int, start: int = 0, batch_size: int = 4, **arguments: Any) -> list[list[Any]]:
    source: Iterator[list[Any]] = Batches(Marked(), batch_size, 5, collate=list, **arguments).from_step(start)
    return list(islice(source, steps))


def flat(steps: list[list[Any]]) -> list[tuple[int, int]]:
    return [item for pieces in steps for piece in pieces for item in piece]


def test_epochs_are_permutations_without_the_partial_batch() -> None:
    items = flat(take(4))
    assert [epoch for epoch, _ in items] == [0] * 8 + [1] * 8
    orders = [[i for e, i in items if e == epoch] for epoch in (0, 1)]
    assert all(len(set(order)) == 8 for order in orders)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("start", [1, 2, 5])
def test_from_any_step(start: int) -> None:
    assert take(7)[start:] == take(7 - start, start)


def test_workers_change_nothing() -> None:
    assert take(9, 1, workers=2) == take(9, 1)


def test_pieces_and_processes_share_the_same_batch() -> None:
    whole = take(3)
    assert [[item for piece in step for item in piece] for step in take(3, pieces=2)] == [step[0] for step in whole]
    shares = [take(3, world=2, rank=rank) for rank in (0, 1)]
    assert [a[0] + b[0] for a, b in zip(*shares, strict=True)] == [step[0] for step in whole]


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    next(Batches(Samples(), 4, 0).from_step(0))
    assert torch.equal(torch.rand(3), expected)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="batch_size is 4; wanted a multiple of devices x accumulate = 3 x 1 = 3"):
        Batches(Marked(), 4, 0, world=3)
    with pytest.raises(UserError, match="has 10 samples, less than batch_size = 12"):
        Batches(Marked(), 12, 0)


def test_seeds_differ() -> None:
    seeds = {derive_seed(seed, word, step) for seed in range(5) for word in ("step", "order") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "step", 2) == 8381546592646788231
