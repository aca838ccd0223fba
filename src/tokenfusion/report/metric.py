"""A metric: which are shown first, how their values are written, and which of them is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tokenfusion.report.run import Figures

PERCENT = {"miou": "mIoU", "pixel_accuracy": "Pixel accuracy", "mean_accuracy": "Mean accuracy",
           "iou": "IoU", "accuracy": "Accuracy"}  # fmt: skip
LOWER_IS_BETTER = re.compile(r"mae|mse|l1|l2|fid|kid|loss|error", re.IGNORECASE)

Key = TypeVar("Key")


def names(tables: Sequence[Figures]) -> list[str]:
    """The metrics of some tables, the primary one first."""
    found = dict.fromkeys(metric for table in tables for row in table.values() for metric in row)
    return sorted(found, key=lambda name: name != "miou")


def label(metric: str) -> str:
    """Its name as a page shows it."""
    return PERCENT.get(metric, metric)


def unit(metric: str) -> str:
    """``%`` or nothing."""
    return "%" if metric in PERCENT else ""


def number(value: float | None, metric: str) -> str:
    """A value as a page shows it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if unit(metric) else f"{value:.4g}"


def finite(values: Mapping[Key, float | None]) -> dict[Key, float]:
    """The values that there are."""
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def lower_is_better(metric: str) -> bool:
    """Whether it is an error or a distance, as far as its name tells."""
    return LOWER_IS_BETTER.search(metric) is not None


def best(values: Mapping[Key, float], metric: str) -> Key:
    """The key of the best value."""
    return (min if lower_is_better(metric) else max)(values, key=lambda key: values[key])
