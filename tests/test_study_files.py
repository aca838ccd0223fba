"""The shipped studies: every row is a recipe that is understood, every table of the paper has its study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.report.metric import METRICS
from tokenfusion.study import SCALES, SHIPPED, Part, Wish, plan, read_study, shipped

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
WORDS = {"primary", "exchange", "seconds"}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_recipe_at_every_scale(name: str, tmp_path: Path) -> None:
    study = read_study(name)[1]
    for scale in {scale for part in study.parts.values() for scale in part.scales}:
        for part in plan(study, Wish(tmp_path, scale, seeds=1)):
            for cells in part.cells.values():
                recipe = read_recipe(
                    cells[0].recipe, cells[0].overrides
                )  # checks names and arguments of all components
                assert recipe.seed == 0
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_rows_differ_and_figures_exist(name: str, tmp_path: Path) -> None:
    study = read_study(name)[1]
    for part in study.parts.values():
        assert {figure.rpartition("/")[2] for figure in part.columns.values()} <= {*METRICS, *WORDS}
    for scale in SCALES:
        if any(scale in part.scales for part in study.parts.values()):
            for part in plan(study, Wish(tmp_path, scale, seeds=2)):
                runs = [cell for cells in part.cells.values() for cell in cells]
                assert len({cell.run for cell in runs}) == len(runs)
                assert len({cell.overrides for cell in runs}) == len(runs)


@pytest.mark.parametrize("name", ["alignment", "exchange"])
def test_rows_with_alignment_have_it_in_detectors_too(name: str, tmp_path: Path) -> None:
    """Only patches have positions, so that these must take in something."""
    for scale in ("toy", "full"):
        part = next(
            part for part in plan(read_study(name)[1], Wish(tmp_path, scale, seeds=1)) if part.name == "detection"
        )
        for title, cells in part.cells.items():
            recipe: Any = read_recipe(cells[0].recipe, cells[0].overrides)
            assert recipe.model.exchange == "both"
            assert recipe.model.alignment == ("RPA" in title and "without RPA" not in title)


def test_what_a_row_has_at_one_scale_is_varied_too(tmp_path: Path) -> None:
    study = read_study("channels")[1]
    with pytest.raises(UserError, match=r"fuser.channel_threshold=0.5: is what this study varies"):
        plan(study, Wish(tmp_path, overrides=("fuser.channel_threshold=0.5",)))
    own = plan(study, Wish(tmp_path, recipe="nyudv2-vit-s-dev"))[0].cells["both"][0]
    assert not any("channel_threshold" in override for override in own.overrides)


def test_all_tables_of_the_paper_have_one_study_each() -> None:
    tables = [number for name in NAMES for number in read_study(name)[1].tables]
    assert sorted(tables) == list(range(1, 11))
    for number in range(1, 11):
        assert number in read_study(f"table{number}")[1].tables
    assert {"demo", "threshold", "rules", "robustness"} <= set(NAMES) == set(shipped())


@pytest.mark.parametrize(
    ("table", "part", "row", "numbers"),
    [
        (1, "rgb + shade to normal", "TokenFusion", (0.073, 0.183)),
        (2, "nyudv2", "TokenFusion", (78.6, 66.2, 53.3)),
        (2, "sunrgbd", "TokenFusion (S)", (84.7, 64.1, 53.0)),
        (4, "scannet, L12 O512", "TokenFusion", (69.8, 53.6)),
        (5, "detection", "random 30 %", (59.5, 42.4)),
        (7, "to rgb", "depth + normal + texture + shade", (47.69, 1.01, None, None)),
        (8, "translation", "all shared", (67.45, 1.82, None, None)),
        (9, "segmentation", "both", (78.8, 66.6, 53.8)),
        (10, "detection", "five", (67.9, 50.5, 5.9)),
    ],
)
def test_numbers_of_the_paper(table: int, part: str, row: str, numbers: tuple[float | None, ...]) -> None:
    assert read_study(f"table{table}")[1].parts[part].rows[row].paper == numbers


GOOD = """
description: mine
parts:
  one:
    scales: {toy: {recipe: toy-segmentation, set: [train.steps=2]}}
    columns: {mIoU: miou}
    rows:
      late: {set: [fuser=none], reference: true}
      TokenFusion: {paper: [53.3]}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("description: mine", "descriptions: mine", "unknown key 'descriptions'; did you mean 'description'"),
        ("columns:", "colums:", r"unknown key 'parts.one.colums'; did you mean 'columns'"),
        ("{paper:", "{papers:", r"unknown key 'parts.one.rows.TokenFusion.papers'; did you mean 'paper'"),
        ("{recipe:", "{recipes:", r"parts.one.scales.toy.recipe"),
        ("[53.3]", "[53.3, 1]", "has 2 numbers; wanted one per column, 1"),
        ("{paper: [53.3]}", "{reference: true}", "several are the reference"),
        ("TokenFusion:", "Late:", "equal names of files"),
        ("TokenFusion:", '"a, b":', "has a comma"),
        ("{paper: [53.3]}", "{set: [evaluation.flip=true]}", "rows.TokenFusion changes evaluation"),
        ("{paper: [53.3]}", '{set: ["evaluation={missing: [rgb]}"]}', "rows.TokenFusion changes evaluation"),
        ("mIoU: miou", '"{modality}": miou', r"rows.TokenFusion.paper: a {modality} stands for several"),
        (
            "parts:",
            "parts:\n  ONE: {scales: {toy: {recipe: x}}, columns: {a: miou}, rows: {b: {}}}",
            "equal names of folders",
        ),
        ("scales: {toy:", "scales: {tiny:", "parts.one.scales"),
        ("description: mine", "description: [", "not readable as YAML"),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert read_study(str(file))[0] == "mine"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=said) as error:
        read_study(str(file))
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_unknown_studies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study named 'threshhold'; did you mean 'threshold'"):
        read_study("threshhold")
    with pytest.raises(UserError, match="no study named 'table11'"):
        read_study("table11")
    with pytest.raises(UserError, match="no such study file"):
        read_study(str(tmp_path / "x.yaml"))


def test_a_condition_that_no_recipe_knows_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD + "    conditions: {upside down: {turned: 180}}\n")
    with pytest.raises(UserError, match=r"one.conditions.upside down: unknown key 'turned'"):
        plan(read_study(str(file))[1], Wish(tmp_path / "out"))


def test_the_reference_is_found() -> None:
    part = read_study("rules")[1].parts["segmentation"]
    assert isinstance(part, Part)
    assert part.reference == "late ensemble"


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (
            "{no depth: {missing: [depth]}}",
            "one.conditions.no depth, of 'rgb only': .*names 'depth', which is no input",
        ),
        (
            "{dark: {degrade: {rgb: {kind: holes, amount: 0.5}}}}",
            "one.conditions.dark, of 'late': .*rgb can have noise",
        ),
        ("{nothing: {missing: [rgb, depth]}}", "one.conditions.nothing, of 'late': .*every input"),
    ],
)
def test_a_condition_that_does_not_fit_a_row_is_refused_before_training(
    tmp_path: Path, conditions: str, said: str
) -> None:
    file = tmp_path / "mine.yaml"
    row = '      rgb only: {set: [fuser=none, "data.modalities=[rgb]"]}\n'
    file.write_text(GOOD + row + f"    conditions: {conditions}\n")
    with pytest.raises(UserError, match=said):
        plan(read_study(str(file))[1], Wish(tmp_path / "out"))


@pytest.mark.parametrize("name", ["my set #1", "2024", "a: b", "plain-set_1", "it's", "true"])
def test_any_folder_can_hold_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    cell = plan(read_study(str(file))[1], Wish(tmp_path / "out", data=name))[0].cells["late"][0]
    assert read_recipe(cell.recipe, cell.overrides).data.root == name
