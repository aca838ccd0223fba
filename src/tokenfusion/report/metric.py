"""A metric: its name and unit as people write them, which come first, and which value is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from tokenfusion.report.run import Figures

Better = Literal["higher", "lower", ""]  # "": it ranks nothing
Key = TypeVar("Key")


class Metric(NamedTuple):
    """How one metric is shown; ``digits`` after the point, significant ones where it is None."""

    label: str
    unit: str = ""
    digits: int | None = None
    better: Better = "higher"
    note: str = ""


CODED = "MAE and MSE without a unit are taken between images whose values lie in −1..1."
SPREAD = (
    "Contrast compares the spread of pixels within an image with that of the truth, diversity the spread across"
    " images: 1 is as the truth, 0 is constant or all alike."
)
METRICS = {  # in the order in which a table shows them
    "miou": Metric("mIoU", "%", 1),
    "pixel_accuracy": Metric("Pixel accuracy", "%", 1),
    "mean_accuracy": Metric("Mean accuracy", "%", 1),
    "iou": Metric("IoU", "%", 1),
    "accuracy": Metric("Accuracy", "%", 1),
    **{
        f"{key}{percent}{best}": Metric(f"{name}@0.{percent:02d}{best.replace('_', ', ')}", "%", 1)
        for key, name in (("map", "mAP"), ("ar", "AR"), ("ap", "AP"), ("recall", "Recall"))
        for percent in (25, 50)
        for best in ("", "_best")
    },
    "fid": Metric("FID", "", 2, "lower"),
    "kid": Metric("KID ×100", "", 2, "lower"),
    "kid_std": Metric("± sd", "", 2, ""),
    "mae": Metric("MAE", "", 4, "lower", note=CODED),
    "mse": Metric("MSE", "", 4, "lower", note=CODED),
    "angle_deg": Metric("Mean angle", "°", 2, "lower"),
    "mae_m": Metric("MAE", "m", 3, "lower"),
    "contrast": Metric("Contrast", "", 2, "", note=SPREAD),
    "diversity": Metric("Diversity", "", 2, "", note=SPREAD),
    "exchange": Metric("Exchanged", "%", 1, ""),
    "seconds": Metric("Seconds per 100", "", 1, "lower"),
}
LOWER_IS_BETTER = re.compile(r"mae|mse|l1|l2|fid|kid|loss|error", re.IGNORECASE)


def about(metric: str) -> Metric:
    """What is known of a metric; of a foreign one its name must tell whether it is an error or a distance."""
    better: Better = "lower" if LOWER_IS_BETTER.search(metric) else "higher"
    return METRICS.get(metric, Metric(metric, better=better))


def names(tables: Sequence[Figures], primary: str) -> list[str]:
    """The metrics of some tables, the primary one first, foreign ones last."""
    found = dict.fromkeys(metric for table in tables for row in table.values() for metric in row)
    order = list(METRICS)
    return sorted(found, key=lambda name: (name != primary, order.index(name) if name in order else len(order)))


def label(metric: str) -> str:
    """Its name as people write it."""
    return about(metric).label


def unit(metric: str) -> str:
    """``%``, ``°``, ``m`` or nothing."""
    return about(metric).unit


def heading(metric: str) -> str:
    """Its name and unit, as the head of a column."""
    return ", ".join(filter(None, (label(metric), unit(metric))))


def number(value: float | None, metric: str, least: int = 0) -> str:
    """A value as a page shows it, with ``least`` digits after the point or more; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    known = about(metric)
    if known.digits is None or (known.digits > 1 and 0 < abs(value) < 10**-known.digits):
        return f"{value:.{4 if known.digits is None else 2}g}"
    return f"{value:.{max(known.digits, least)}f}"


def quantity(value: float | None, metric: str) -> str:
    """A value with its unit."""
    gap = "" if unit(metric) in ("", "°") else "\N{THIN SPACE}"
    return f"{number(value, metric)}{gap}{unit(metric)}"


def notes(metrics: Iterable[str]) -> list[str]:
    """What a reader must know of them, once."""
    return list(dict.fromkeys(filter(None, (about(metric).note for metric in metrics))))


def finite(values: Mapping[Key, float | None]) -> dict[Key, float]:
    """The values that there are."""
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def lower_is_better(metric: str) -> bool:
    """Whether it is an error or a distance."""
    return about(metric).better == "lower"


def best(values: Mapping[Key, float], metric: str) -> Key | None:
    """The key of the best value; None where there is none, or where the metric ranks nothing."""
    if not values or not about(metric).better:
        return None
    return (min if lower_is_better(metric) else max)(values, key=lambda key: values[key])
