"""Batch norms where samples lack a modality: what is missing stays out of their statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a layer, or one in it, norms by the statistics of a batch: what is missing must not be among them."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def on_rows(run: Callable[..., Tensor], there: Tensor, *maps: Tensor) -> Tensor:
    """What a layer gives of some rows of a batch, as if the others were not in it; zeros for these.

    Args:
        run: the layer, called on ``maps``.
        there: bool ``[B]``, at least one of them true.
        maps: ``[B, ...]``.
    """
    found = run(*(x[there] for x in maps))
    return found.new_zeros(len(there), *found.shape[1:]).index_put((there,), found)


class _Told(threading.local):
    """What the forward pass of this thread knows that layers inside a network are not given."""

    present: Tensor | None = None  # bool [M, B]


TOLD = _Told()


def of_present(own: nn.Module, x: Tensor, there: Tensor, *args: object) -> Tensor:
    """What a layer with batch norms, called on ``x [B, C, ...]`` and ``args``, gives in training of those who are there."""
    if int(there.sum()) * x[0, 0].numel() > 1:  # values of a channel
        return on_rows(lambda some: own(some, *args), there, x)
    with still(own):  # too few for statistics; called even if nobody is there, for whoever waits for its gradient (DDP)
        return cast("Tensor", own(x, *args))


@contextmanager
def still(network: nn.Module) -> Iterator[None]:
    """Batch norms go by their running statistics meanwhile, and leave them as they are."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
