"""Metrics: their order, how they are written, and which value is the best."""

from __future__ import annotations

import math

import pytest

from tokenfusion.report import metric


def test_primary_metric_comes_first_and_foreign_ones_last() -> None:
    tables: list[dict[str, dict[str, float | None]]] = [
        {"rgb": {"own": 0.0, "pixel_accuracy": 1.0}}, {"rgb": {"miou": 2.0}}
    ]  # fmt: skip
    assert metric.names(tables, "miou") == ["miou", "pixel_accuracy", "own"]
    row: dict[str, float | None] = dict.fromkeys(("diversity", "mse", "angle_deg", "mae", "kid", "fid"), 1.0)
    assert metric.names([{"rgb": row}], "mae") == ["mae", "fid", "kid", "mse", "angle_deg", "diversity"]


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (41.97, "miou", "42.0"),
        (0.004, "miou", "0.0"),
        (71.824, "fid", "71.82"),
        (0.00123, "fid", "0.0012"),
        (0.08231, "mae", "0.0823"),
        (0.0123456, "own", "0.01235"),
        (None, "miou", "–"),
        (math.nan, "fid", "–"),
    ],
)
def test_number(value: float | None, name: str, text: str) -> None:
    assert metric.number(value, name) == text


@pytest.mark.parametrize(
    ("name", "best"),
    [("miou", "b"), ("fid", "a"), ("angle_deg", "a"), ("mae_m", "a"), ("rgb/MAE", "a"), ("own", "b"),
     ("contrast", None), ("diversity", None), ("kid_std", None)],
)  # fmt: skip
def test_best_is_the_lowest_of_errors_and_nothing_of_what_ranks_nothing(name: str, best: str | None) -> None:
    values = metric.finite({"a": 1.0, "b": 2.0, "c": None, "d": math.inf})
    assert metric.best(values, name) == best
    assert metric.best({}, name) is None


@pytest.mark.parametrize(
    ("name", "heading", "quantity"),
    [
        ("miou", "mIoU, %", "12.3\N{THIN SPACE}%"),
        ("angle_deg", "Mean angle, °", "12.35°"),
        ("mae_m", "MAE, m", "12.346\N{THIN SPACE}m"),
        ("fid", "FID", "12.35"),
        ("own", "own", "12.35"),
    ],
)
def test_units_stand_in_the_head_or_behind_the_value(name: str, heading: str, quantity: str) -> None:
    assert metric.heading(name) == heading
    assert metric.quantity(12.3456, name) == quantity


def test_terminal_gets_further_digits_and_notes_come_once() -> None:
    assert metric.number(41.974, "miou", least=2) == "41.97"
    assert metric.number(0.08123, "mae", least=2) == "0.0812"
    assert len(metric.notes(["mae", "mse", "contrast", "diversity", "miou"])) == 2
    assert metric.notes(["miou", "fid"]) == []
