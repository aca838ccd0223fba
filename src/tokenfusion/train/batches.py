"""Batches whose order and content are functions of (seed, epoch, index): nothing about them needs storing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenfusion.errors import UserError


def derive_seed(*parts: int | str) -> int:
    """A seed out of numbers and words; near parts give unrelated seeds, on every machine the same."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Epochs(Dataset[Any]):
    """The data set addressed by (epoch, index), so that the epoch reaches every worker together with its items."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.epoch: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if epoch != self.epoch and hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        self.epoch = epoch
        return self.data[index]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """One process's pieces of the batches of one epoch, from batch ``first`` on; the last partial batch is dropped.

    A batch is ``batch_size`` neighbours in the epoch's permutation. Process ``rank`` of ``world`` has the ``rank``-th
    equal share of them, in ``pieces`` equal pieces: together all processes see the same batch as one process would.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world: int, pieces: int) -> None:
        self.size, self.batch_size, self.seed, self.rank = size, batch_size, seed, rank
        self.pieces = pieces
        self.piece = batch_size // (world * pieces)
        self.per_epoch = size // batch_size
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first, self.per_epoch):
            begin = batch * self.batch_size + self.rank * self.pieces * self.piece
            for piece in range(self.pieces):
                start = begin + piece * self.piece
                yield [(self.epoch, index) for index in order[start : start + self.piece]]

    def __len__(self) -> int:
        return (self.per_epoch - self.first) * self.pieces


class Batches:
    """The batches of a run, from any step on.

    Args:
        data: a data set with a length; where it has ``set_epoch``, an item is a function of (seed, epoch, index).
        batch_size: samples per step over all processes and pieces.
        rank, world: this process and the number of them.
        pieces: parts that a process cuts its share into.
        workers: loading processes; they live as long as the run.
        collate: list of samples -> batch; PyTorch's default otherwise.

    Raises:
        UserError: where the batch cannot be shared out evenly, or is larger than the data.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        pieces: int = 1,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size % (world * pieces):
            raise UserError(
                f"batch_size is {batch_size}; wanted a multiple of devices x accumulate = {world} x {pieces}"
                f" = {world * pieces}"
            )
        if len(data) < batch_size:
            raise UserError(f"the training data has {len(data)} samples, less than batch_size = {batch_size}: lower it")
        self.sampler = EpochSampler(len(data), batch_size, seed, rank, world, pieces)
        self.loader: DataLoader[Any] = DataLoader(
            _Epochs(data),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # without its own generator the loader would draw from the global one, and shift dropout after a resume
            generator=torch.Generator().manual_seed(derive_seed(seed, "loader")),
        )

    def from_step(self, step: int) -> Iterator[list[Any]]:
        """Endless: the pieces of step ``step``, ``step + 1``, ...

        No epoch is begun before the last one is used up: a data set whose epoch lies in memory that all workers share
        would otherwise change under their hands.
        """
        while True:
            self.sampler.epoch, self.sampler.first = divmod(step, self.sampler.per_epoch)
            pieces = _in_one_line(self.loader)
            while batch := list(islice(pieces, self.sampler.pieces)):
                yield batch
                step += 1


def _in_one_line(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's items; PyTorch wraps the error of a loading process in that process's traceback: only its end is told."""
    try:
        yield from loader
    except UserError as error:
        said = str(error).rstrip().splitlines()[-1]
        raise UserError(said.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from None
