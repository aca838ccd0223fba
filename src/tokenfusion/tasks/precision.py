"""In what precision losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> Tensor:
    """In fp32 where autocast made it less; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
