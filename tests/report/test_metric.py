"""Metrics: their order, how they are written, and which value is the best."""

from __future__ import annotations

import math

import pytest

from tokenfusion.report import metric


def test_primary_metric_comes_first() -> None:
    assert metric.names([{"rgb": {"pixel_accuracy": 1.0}}, {"rgb": {"miou": 2.0}}]) == ["miou", "pixel_accuracy"]


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [(41.97, "miou", "42.0"), (0.0123456, "fid", "0.01235"), (None, "miou", "–"), (math.nan, "fid", "–")],
)
def test_number(value: float | None, name: str, text: str) -> None:
    assert metric.number(value, name) == text


@pytest.mark.parametrize(("name", "best"), [("miou", "b"), ("fid", "a"), ("rgb/MAE", "a")])
def test_best_is_the_lowest_of_errors(name: str, best: str) -> None:
    values = metric.finite({"a": 1.0, "b": 2.0, "c": None, "d": math.inf})
    assert metric.best(values, name) == best
