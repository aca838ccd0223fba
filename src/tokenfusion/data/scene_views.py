"""The images of a scene at one size, and the projections that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenfusion.data.image import decode, load_image
from tokenfusion.data.inputs import normalise, resize_image
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.scene import View, projection_of


class Views(NamedTuple):
    """V images; those that a scene has fewer are zeros, with a projection of zeros."""

    images: Tensor  # float32 [V, 3, H, W], normalised
    projection: Tensor  # float64 [V, 3, 4], onto the resized image
    sizes: list[tuple[int, int]]  # rows and columns of each file, before it was resized


def spread(views: Sequence[View], count: int) -> list[View]:
    """At most ``count`` of the views, evenly spread over those that are there."""
    if len(views) <= count:
        return list(views)
    return [views[k * len(views) // count] for k in range(count)]


def load_views(
    views: Sequence[View],
    spec: ModalitySpec,
    size: tuple[int, int],
    count: int,
    worse: Callable[[Tensor, str], Tensor] | None = None,
) -> Views:
    """Read ``count`` views (``spread``) and bring each to ``size`` (rows, columns).

    ``worse`` changes the physical image [3, H, W] of the file of that name before.
    """
    chosen = spread(views, count)
    images, projections = torch.zeros(count, 3, *size), torch.zeros(count, 3, 4, dtype=torch.float64)
    sizes = []
    for row, view in enumerate(chosen):
        stored = load_image(view.image, spec)
        if worse is not None:
            stored = worse(decode(stored, spec), view.image.name).to(stored.dtype)
        rows, columns = stored.shape[-2:]
        resized = resize_image(stored, size, spec.modality.interpolation)  # as bytes: four times as fast
        images[row] = normalise({"rgb": decode(resized, spec)}, {"rgb": spec})["rgb"]
        projections[row] = resized_projection(projection_of(view.K, view.pose), (rows, columns), size)
        sizes.append((rows, columns))
    return Views(images, projections, sizes)


def resized_projection(projection: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """P [3, 4] for an image of ``old`` (rows, columns) that is resized to ``new``: u' = (u + 0.5) s - 0.5."""
    by = [new[1] / old[1], new[0] / old[0]]
    fit = projection.new_tensor([[by[0], 0, by[0] / 2 - 0.5], [0, by[1], by[1] / 2 - 0.5], [0, 0, 1]])
    return fit @ projection
