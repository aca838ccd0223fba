"""Charts: the series that they read, and that what was logged is what is drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from report.fake import pixels

from tokenfusion.report import plots
from tokenfusion.report.theme import DARK, LIGHT, Theme

LINES = [
    {"step": 10, "split": "train", "time": 1.0, "loss/rgb": 2.0, "lr": 1e-4, "exchange/stage1.0/rgb": 0.25},
    {"step": 10, "split": "val", "time": 2.0, "rgb/miou": 30.0, "ensemble/miou": 31.0},
    {"step": 20, "split": "train", "time": 3.0, "loss/rgb": 1.0, "lr": 5e-5, "exchange/stage1.0/rgb": math.nan},
]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def near(picture: np.ndarray, colour: str) -> int:
    """How many pixels have about this colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(picture.astype(int) - wanted).max(axis=2) <= 12).sum())


def test_series_are_read_by_split_and_name() -> None:
    train, val = plots.series(LINES, "train"), plots.series(LINES, "val")
    assert train["loss/rgb"] == ([10, 20], [2.0, 1.0])
    assert "time" not in train
    assert val == {"rgb/miou": ([10], [30.0]), "ensemble/miou": ([10], [31.0])}
    assert plots.select(train, "loss/") == {"rgb": ([10, 20], [2.0, 1.0])}
    assert plots.select(train, "exchange/", "/rgb").keys() == {"stage1.0"}
    assert plots.select(val, last="/miou").keys() == {"rgb", "ensemble"}


def test_running_mean_keeps_constants_and_leaves_gaps_out() -> None:
    assert plots._running_mean([3.0] * 100, 7) == pytest.approx([3.0] * 100)
    assert plots._running_mean([1.0, math.nan, 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert math.isnan(plots._running_mean([math.nan, math.nan, math.nan], 1)[0])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_curves_stand_on_the_page_in_its_colours(theme: Theme) -> None:
    picture = pixels(plots.curves({"rgb": ([1, 2], [1.0, 2.0]), "ensemble": ([1, 2], [2.0, 3.0])}, theme))
    assert picture.shape[1] == round(plots.CHART[0] * plots.DPI)
    assert near(picture, theme.surface) > 0.8 * picture[..., 0].size
    assert near(picture, theme.cycle[0]) > 300
    assert near(picture, theme.ink) > 300


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [math.nan, math.nan], [math.inf, 1.0], [1e-9, 1e9], [-1.0, 1.0], list(np.linspace(1, 2, 500))],
)
def test_curves_of_any_values(values: list[float]) -> None:
    steps = list(range(len(values)))
    assert plots.curves({"a": (steps, values), "$x_": (steps, values)}, LIGHT, "%", loss=True)


def test_picture_is_a_function_of_the_values_and_only_losses_are_logarithmic() -> None:
    found = {"a": ([1, 2, 3], [1.0, 2.0, 40.0])}
    linear = plots.curves(found, LIGHT)
    assert linear == plots.curves(found, LIGHT)
    assert linear != plots.curves(found, LIGHT, loss=True)


@pytest.mark.parametrize(("share", "text"), [(0.0, "0"), (0.0049, "<1"), (0.006, "1"), (0.5, "50"), (1.0, "100")])
def test_a_little_is_not_nothing(share: float, text: str) -> None:
    assert plots.percent(share) == text


def test_many_long_names_make_room_for_their_legend() -> None:
    one = pixels(plots.curves({"a": ([1], [1.0])}, LIGHT))
    many = pixels(plots.curves({f"a run with quite a long name {n}": ([1], [1.0]) for n in range(9)}, LIGHT))
    assert many.shape[0] > one.shape[0]
    assert many.shape[1] == one.shape[1]


def test_ensemble_is_strong_by_either_name() -> None:
    found = {"l1 ensemble": ([1, 2], [1.0, 2.0])}
    strong = near(pixels(plots.curves(found, LIGHT)), LIGHT.ink)
    assert strong > near(pixels(plots.curves({"l1 rgb": found["l1 ensemble"]}, LIGHT)), LIGHT.ink) + 500


def test_constant_rate_leaves_its_axis_labels_whole() -> None:
    picture = pixels(plots.curves({"learning rate": ([1, 2], [2e-4, 2e-4])}, LIGHT))
    assert near(picture[:, :4], LIGHT.surface) == picture[:, :4, 0].size  # nothing runs out on the left


def test_long_names_of_columns_take_two_lines() -> None:
    assert plots._column("edge_texture") == "edge_\ntexture"
    assert plots._column("depth_zbuffer_filled") == "depth_\nzbuffer_f…"
    assert plots._column("shade") == "shade"
    assert plots._column("principalcurvature") == "principal…"
    rates = {"enc1.0": {"edge_texture": 0.5}}
    assert plots.exchange_at_end(rates, rates, ["edge_texture"], LIGHT)


def test_exchange_at_the_end_is_shaded_by_its_share() -> None:
    full = pixels(plots.exchange_at_end({"stage1.0": {"rgb": 1.0, "depth": 1.0}}, {}, ["rgb", "depth"], LIGHT))
    none = pixels(plots.exchange_at_end({"stage1.0": {"rgb": 0.0, "depth": 0.0}}, {}, ["rgb", "depth"], LIGHT))
    assert near(full, LIGHT.orange) > 5000
    assert near(none, LIGHT.orange) == 0


def test_share_of_nothing_is_left_empty() -> None:
    below = {"stage1.0": {"rgb": 1.0}}
    some = pixels(plots.exchange_at_end({"stage1.0": {"rgb": 0.5}}, below, ["rgb"], LIGHT))
    none = pixels(plots.exchange_at_end({"stage1.0": {"rgb": 0.0}}, below, ["rgb"], LIGHT))
    unknown = pixels(plots.exchange_at_end({"stage1.0": {"rgb": None}}, below, ["rgb"], LIGHT))
    assert near(some, LIGHT.blue) > 2000
    assert near(none, LIGHT.blue) == 0
    assert near(unknown, LIGHT.blue) == 0


def test_exchange_charts_of_the_same_blocks_are_equally_high() -> None:
    end = pixels(plots.exchange_at_end({f"stage1.{n}": {"rgb": 0.5} for n in range(5)}, {}, ["rgb"], DARK))
    found = {f"stage1.{n}": ([10, 20], [0.0, 1.0]) for n in range(5)}
    assert pixels(plots.exchange_over_training(found, DARK)).shape[0] == end.shape[0]


def test_exchange_over_training_grows_to_the_right() -> None:
    picture = pixels(plots.exchange_over_training({"stage1.0": ([10, 20], [0.0, 1.0])}, LIGHT))
    columns = np.nonzero((np.abs(picture.astype(int) - [224, 134, 0]).max(axis=2) <= 12).any(axis=0))[0]
    assert columns.size
    assert columns.min() > picture.shape[1] * 0.5
    assert plots.exchange_over_training({"a": ([10], [0.5]), "b": ([20], [math.nan])}, LIGHT)


def test_class_bars_take_any_name_and_missing_values() -> None:
    scores = {"rgb": [10.0, None, 30.0], "ensemble": [20.0, None, 40.0]}
    data = plots.class_bars(["a$b$", "<&>", "a name that is much longer than its place"], scores, "IoU, %", LIGHT)
    assert near(pixels(data), LIGHT.cycle[0]) > 50
    assert plots.class_bars(["a"], {"rgb": [None]}, "IoU, %", DARK)
