"""The released code's way to FID and KID: only for comparison with its published figures, not with anybody else's.

Every image, true ones too, is stretched to its own full range and drawn by matplotlib before an extractor sees it;
all of KID's subsets are the whole set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenfusion.errors import require
from tokenfusion.tasks.translation.metrics import frechet_distance, polynomial_mmd

INCHES, DPI = 5.0, 100  # 500 x 500 pixels, whatever the image's size


class ReleasedDistances(NamedTuple):
    """As the released code prints them."""

    fid: float
    kid_x100: float


def released_distances(generated: Tensor, truth: Tensor) -> ReleasedDistances:
    """FID and KID of features ``[n, D]`` and ``[m, D]`` of :func:`drawn` images; NaN as in :mod:`.metrics`.

    KID takes min(n, m) images once: without replacement, its 50 subsets of that size are all the same.
    """
    size = min(len(generated), len(truth))
    return ReleasedDistances(frechet_distance(generated, truth), 100 * polynomial_mmd(generated[:size], truth[:size]))


def stretched(coded: Tensor) -> Tensor:
    """An image ``[3, H, W]`` -> uint8: its smallest value over all pixels and channels becomes 0, its largest 255.

    A constant image becomes black.
    """
    image = coded.nan_to_num(0.0)
    low, high = image.aminmax()
    return ((image - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)


def drawn(coded: Tensor) -> Tensor:
    """An image ``[3, H, W]`` in -1..1 -> uint8 ``[3, 500, 500]``: stretched, then resampled by matplotlib.

    Raises:
        UserError: where matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "report").Figure((INCHES, INCHES), dpi=DPI)
    canvas = require("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # all said here: neither a user's matplotlibrc nor a new default may move the figures
    axes.imshow(
        stretched(coded).permute(1, 2, 0).cpu().numpy(),
        interpolation="antialiased", resample=True, origin="upper", aspect="auto",
    )  # fmt: skip
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy())
