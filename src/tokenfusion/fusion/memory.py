"""Activations that are cheaper to compute twice than to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Tensor:
    """``function(x)``; in training what lies between is computed again in the backward pass, the same bits.

    For functions without randomness. The second time it stops before its last layer's product, which nobody needs.
    """
    if training and torch.is_grad_enabled():
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)
