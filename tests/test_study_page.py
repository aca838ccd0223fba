"""The page of a study and its charts: everything that was asked for is on it, and what was reached is what is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from report.fake import Page, pixels

from tokenfusion.report.dots import Dots, Point, exchange_and_quality, rows_of_dots
from tokenfusion.report.study import Sheet, write_study
from tokenfusion.report.theme import DARK, LIGHT, Theme


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def places(picture: np.ndarray, colour: str) -> np.ndarray:
    """(row, column) of all pixels of about this colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return np.argwhere(np.abs(picture.astype(int) - wanted).max(axis=2) <= 12)


ROWS = [Dots("late ensemble", [49.0, 49.5, 48.0], 50.0), Dots("concat", []), Dots("TokenFusion", [55.0, 56.5, 53.0])]


def below_legend(found: np.ndarray) -> np.ndarray:
    return found[found[:, 0] > 70]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_means_stand_where_they_belong(theme: Theme) -> None:
    found = below_legend(places(pixels(rows_of_dots(ROWS, "mIoU, %", theme)), theme.accent))
    upper, lower = np.sort(np.unique(found[:, 0]))[[0, -1]]
    middle = (upper + lower) / 2
    assert not (np.abs(found[:, 0] - middle) < 20).any()  # nothing is drawn for a row without runs
    first, last = found[found[:, 0] < middle][:, 1], found[found[:, 0] > middle][:, 1]
    assert first.max() < last.min()  # 49 is left of 53
    assert np.ptp(first) < np.ptp(last)  # and spreads less


def test_papers_numbers_are_drawn_where_there_are_any() -> None:
    assert len(below_legend(places(pixels(rows_of_dots(ROWS, "mIoU, %", LIGHT)), LIGHT.orange)))
    without = [row._replace(paper=None) for row in ROWS]
    assert not len(places(pixels(rows_of_dots(without, "mIoU, %", LIGHT)), LIGHT.orange))


def test_exchange_goes_right_and_quality_up() -> None:
    points = [Point(10.0, 50.0, 0.02, 0.001), Point(90.0, 55.0, 1.0, 0.1), Point(50.0, 52.0, None, None)]
    picture = pixels(exchange_and_quality(points, "mIoU, %", ("late ensemble", 51.0), LIGHT))
    low, high = (below_legend(places(picture, colour)) for colour in LIGHT.cycle[:2])
    low, high = low[low[:, 0] > 100], high[high[:, 0] > 100]
    assert low[:, 1].max() < high[:, 1].min()
    assert low[:, 0].min() > high[:, 0].max()
    assert len(LIGHT.cycle) >= 5  # as many thetas have a colour of their own


def sheet(**changes: object) -> Sheet:
    grid = [
        ["method", "mIoU, %", "paper mIoU", "runs"],
        ["late ensemble", "48.8 ± 0.8", "50.0", "3"],
        ["<b>", "–", "", "0"],
    ]
    made = Sheet("rooms", "judged on <rooms>", "Read me.", grid, "late ensemble", "miou", ROWS, [], {
        "late ensemble": ["tokenfusion train toy-segmentation fuser=none seed=0 --out a", "tokenfusion train b"],
    })  # fmt: skip
    return made._replace(**changes)  # type: ignore[arg-type]


def test_the_page_holds_table_charts_and_commands(tmp_path: Path) -> None:
    out = write_study(tmp_path / "study.html", "rules", "What replaces what", [sheet()], "tokenfusion study rules")
    text, page = out.read_text(), Page(out)
    assert "method mIoU, % paper mIoU runs late ensemble reference 48.8 ± 0.8 50.0 3 <b> – 0" in page.text
    assert not [place for place in page.loaded if not place.startswith("data:")]
    assert page.captions == ["mIoU by row"]
    assert "judged on &lt;rooms&gt;" in text
    assert "fuser=none seed=0 --out a\ntokenfusion train b</pre>" in text
    assert "<pre>tokenfusion study rules</pre>" in text
    assert text.count("data:image/png") == 2  # one chart, light and dark


def test_charts_only_of_what_there_is(tmp_path: Path) -> None:
    empty = sheet(dots=[Dots("late ensemble", [])], name="empty")
    both = sheet(points=[Point(10.0, 50.0, 0.02, 0.001)], name="both")
    text = write_study(tmp_path / "study.html", "two", "", [empty, both], "tokenfusion study two").read_text()
    assert text.count("data:image/png") == 4
    assert 'href="#part-2"' in text
