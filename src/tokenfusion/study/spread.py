"""What several seeds say together: mean, spread, and the difference of two rows seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


class Difference(NamedTuple):
    """A mean difference over seeds with its 95 % interval; no interval of a single seed."""

    mean: float
    half: float | None  # half the width of the interval
    seeds: int


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table the normal one with the first terms of its expansion."""
    if freedom <= len(T):
        return T[freedom - 1]
    z, n = statistics.NormalDist().inv_cdf(0.975), freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The difference to a reference over the seeds that both have: Student's interval of paired samples.

    Args:
        values, reference: seed -> figure.
    """
    found = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not found:
        return None
    spread = deviation(found)
    half = None if spread is None else t_quantile(len(found) - 1) * spread / len(found) ** 0.5
    return Difference(statistics.mean(found), half, len(found))
