"""How near generated images are to the true ones: pixel errors, FID and KID over features, and the spread of the images.

Figures of pixels are rows of sums, one per image, in float64: however images are spread over processes, the rows of all
are put together and reduced once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.errors import require

COLLAPSED = 0.02  # a generator whose images hold less than this share of the true spread shows nothing
STEP = 2 / 255  # one step of an 8-bit image in -1..1: a spread below it is none
CELLS = 8  # a thumbnail is CELLS x CELLS


class KernelDistance(NamedTuple):
    """KID over random subsets; not multiplied by 100."""

    mean: float
    std: float  # over the subsets; NaN where there is only one, the whole set


class Spread(NamedTuple):
    """How much generated images vary, as a share of what the true ones do: 1 = as much, 0 = not at all."""

    contrast: float  # between the pixels of an image
    diversity: float  # between the images


# ---- sets of features --------------------------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians with the features' means and covariances (n - 1), in float64: FID.

    Fewer images than features make it large: compare only figures of equally many images.

    Args:
        a, b: features ``[n, D]`` and ``[m, D]``; the order does not matter.

    Returns:
        NaN where a set has fewer than two rows or holds values that are not finite.
    """
    if not _comparable(a, b):
        return float("nan")
    a, b = _common_span(a.detach().cpu().double(), b.detach().cpu().double())
    identity = nn.Identity()
    identity.num_features = torch.tensor(a.shape[1])
    # every process holds all rows already: nothing may be summed over processes once more
    metric = require("torchmetrics.image.fid", "fid").FrechetInceptionDistance(identity, sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return max(float(metric.compute()), 0.0)  # rounding may leave equal sets a hair below


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, in float64.

    Args:
        a, b: features ``[n, D]``, equally many; the order does not matter.

    Returns:
        NaN where a set has fewer than two rows or holds values that are not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"the sets hold {len(a)} and {len(b)} images; wanted equally many")
    if not _comparable(a, b):
        return float("nan")
    return float(
        require("torchmetrics.image.kid", "fid").poly_mmd(a.detach().cpu().double(), b.detach().cpu().double())
    )


def kernel_distance(a: Tensor, b: Tensor, subsets: int, size: int, seed: int) -> KernelDistance:
    """KID: :func:`polynomial_mmd` over random subsets, each drawn without replacement.

    Args:
        a, b: features ``[n, D]`` and ``[m, D]``.
        subsets: how many pairs of subsets are drawn.
        size: rows of a subset; at most n and m are taken.
        seed: decides the subsets, alone.
    """
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        return KernelDistance(polynomial_mmd(a, b), float("nan"))
    draw = torch.Generator().manual_seed(seed)
    a, b = a.detach().cpu(), b.detach().cpu()
    values = [
        polynomial_mmd(*(rows[torch.randperm(len(rows), generator=draw)[:size]] for rows in (a, b)))
        for _ in range(subsets)
    ]
    found = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(float(found.mean()), float(found.std(correction=0)))


def _comparable(a: Tensor, b: Tensor) -> bool:
    """A diverged generator or a handful of images ends no evaluation."""
    return min(len(a), len(b)) >= 2 and bool(a.isfinite().all()) and bool(b.isfinite().all())


def _common_span(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in the space that both sets span around b's mean: the same distances, in n + m numbers per row.

    A few images of 2048 features then cost milliseconds, not seconds, and no rounding noise of empty dimensions enters.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre
    if len(a) + len(b) >= a.shape[1]:
        return a, b
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q
    return a @ basis, b @ basis


# ---- rows of one image each --------------------------------------------------------------------------------------


def image_errors(coded: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Sums of absolute and squared differences, and how many values were compared: float64 ``[3]``.

    Args:
        coded, truth: ``[3, H, W]`` in -1..1.
        valid: bool ``[1, H, W]``: where the truth was measured.
    """
    difference = (_pixels(coded, valid) - _pixels(truth, valid)).abs()
    return torch.stack([difference.sum(), difference.square().sum(), difference.new_tensor(difference.numel())])


def angle_deg(coded: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Sum of the angles between predicted and true normals in degrees, and the number of pixels: float64 ``[2]``.

    Args:
        coded, truth: vectors ``[3, H, W]`` of any length; a prediction without direction counts as 90 degrees off.
        valid: bool ``[1, H, W]``.
    """
    cosine = F.cosine_similarity(_pixels(coded, valid), _pixels(truth, valid), dim=0)
    angles = cosine.clamp(-1, 1).acos().rad2deg()
    return torch.stack([angles.sum(), angles.new_tensor(angles.numel())])


def depth_error_m(depth_m: Tensor, truth_m: Tensor, valid: Tensor) -> Tensor:
    """Sum of absolute differences in metres, and the number of pixels: float64 ``[2]``; all arguments ``[1, H, W]``."""
    difference = (_pixels(depth_m, valid) - _pixels(truth_m, valid)).abs()
    return torch.stack([difference.sum(), difference.new_tensor(difference.numel())])


def mean_over_pixels(rows: Tensor) -> list[float]:
    """Rows ``[n, k]`` of sums with their count in the last column -> k - 1 means over all values of all images.

    NaN where nothing was counted.
    """
    total = rows.double().sum(0)
    return (total[:-1] / total[-1]).tolist()


def spread(image: Tensor, valid: Tensor) -> Tensor:
    """What :func:`spread_ratios` wants of one image: deviation of its pixels, and its thumbnail: float64 ``[193]``.

    Args:
        image: ``[3, H, W]`` in -1..1, generated or true.
        valid: bool ``[1, H, W]``; what lies outside leaves no trace, empty thumbnail cells are NaN.
    """
    image, valid = image.detach().cpu().double(), valid.cpu()
    inside = _pixels(image, valid)
    deviation = (inside - inside.mean(1, keepdim=True)).square().mean().sqrt()  # a plain colour has none
    known = F.adaptive_avg_pool2d(valid.double(), CELLS)
    thumbnail = F.adaptive_avg_pool2d(torch.where(valid, image, 0.0), CELLS) / known  # 0 / 0 = NaN
    return torch.cat([deviation.view(1), thumbnail.flatten()])


def spread_ratios(generated: Tensor, truth: Tensor) -> Spread:
    """Rows ``[n, 193]`` of :func:`spread`, of generated and of the same true images -> contrast and diversity, finite."""
    return Spread(
        _ratio(_mean(generated[:, 0]), _mean(truth[:, 0])),
        _ratio(_between(generated[:, 1:]), _between(truth[:, 1:])),
    )


def collapsed(contrast: float, diversity: float) -> bool:
    """Whether a generator draws constant images, or the same one whatever comes in, although the true ones differ."""
    return not (contrast >= COLLAPSED and diversity >= COLLAPSED)


def _pixels(image: Tensor, valid: Tensor) -> Tensor:
    """The valid pixels in float64: ``[C, H, W]`` -> ``[C, K]``."""
    return image.detach().cpu()[:, valid[0].cpu()].double()


def _between(thumbnails: Tensor) -> float:
    """Deviation of each cell over the images."""
    return _mean((thumbnails - thumbnails.nanmean(0)).square()) ** 0.5


def _mean(values: Tensor) -> float:
    """Mean of what is known; 0 where nothing is."""
    return float(values.nanmean()) if not values.isnan().all() else 0.0


def _ratio(generated: float, truth: float) -> float:
    """Two spreads that are both none are equal; one of nothing is none."""
    return 1.0 if max(generated, truth) < STEP else generated / max(truth, STEP)
