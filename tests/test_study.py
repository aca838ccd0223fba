"""Studies: which runs they ask for, and the table that they make of the runs' figures; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tokenfusion import study
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe

THREE = ["data.modalities=[rgb, depth, normal]"]
MAE = {  # (modalities, fuser) -> of the ensemble, seed 0
    ("rgb", "NoFusion"): 0.5, ("depth", "NoFusion"): 0.4, ("normal", "NoFusion"): 0.3,
    ("rgb,depth", "NoFusion"): 0.25, ("rgb,depth", "TokenFusion"): 0.2,
    ("rgb,depth,normal", "NoFusion"): 0.15, ("rgb,depth,normal", "TokenFusion"): 0.1,
    ("rgb,depth,normal", "Concat"): 0.125,
}  # fmt: skip


def judged(arguments: dict[Path, list[str]], jobs: int) -> None:
    """In place of training: a translation's figures, 0.02 higher with every seed."""
    for run, words in arguments.items():
        recipe = read_recipe(words[0], words[1:])
        names = ",".join(recipe.data.modalities)
        value = MAE[names, recipe.fuser["_target_"].rpartition(".")[2]] + 0.02 * recipe.seed
        streams = {name: {"mse": 0.9, "mae": value} for name in (*recipe.data.modalities, "ensemble")}
        metrics = {"task": "translation", "dataset": "rooms", "split": "val", "images": 7, "target": "shade",
                   "primary": "mae", "protocol": "standard", "streams": streams, "checkpoint": "last",
                   "step": recipe.train.steps}  # fmt: skip
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Runs are drawn instead of trained."""
    monkeypatch.setattr(study, "_run_all", judged)
    return monkeypatch


def test_modalities_are_rows_and_ways_to_fuse_them_columns(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = study.modalities("toy-segmentation", THREE, 2, tmp_path)
    title, _, *table = (tmp_path / "table.md").read_text().splitlines()
    assert title == (
        "MAE of shade (lower is better) on rooms val (7 images), 300 steps, 2 seeds: mean ± standard deviation; standard"
    )
    assert table[:7] == [
        "| inputs | alone | late ensemble | TokenFusion |",
        "|---|---|---|---|",
        "| rgb | 0.5100 ± 0.0141 |  |  |",
        "| depth | 0.4100 ± 0.0141 |  |  |",
        "| normal | 0.3100 ± 0.0141 |  |  |",
        "| rgb + depth |  | 0.2600 ± 0.0141 | 0.2100 ± 0.0141 |",
        "| rgb + depth + normal |  | 0.1600 ± 0.0141 | 0.1100 ± 0.0141 |",
    ]
    assert "`tokenfusion study modalities --recipe toy-segmentation 'data.modalities=[rgb, depth, normal]'" in text
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"{name}-seed{seed}" for seed in (0, 1) for name in (
            "rgb-only", "depth-only", "normal-only", "rgb+depth", "rgb+depth-late-ensemble",
            "rgb+depth+normal", "rgb+depth+normal-late-ensemble",
        )
    }  # fmt: skip
    assert (tmp_path / "compare.html").is_file()
    assert (tmp_path / "rgb+depth+normal-seed0" / "report.html").is_file()


def test_methods_rank_by_the_primary_figure(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = study.methods("toy-segmentation", THREE, 1, tmp_path)
    assert "MAE of shade (lower is better) on rooms" in table
    assert "| method | rgb | depth | normal | ensemble |" in table
    assert "| depth only |  | 0.4000 |  | 0.4000 |" in table
    assert "| concat | 0.1250 | 0.1250 | 0.1250 | 0.1250 |" in table


MAP = {("points", "NoExchange"): 40.0, ("points,rgb", "NoExchange"): 41.0, ("points,rgb", "ConcatExchange"): 42.0,
       ("points,rgb", "RandomExchange"): 43.0, ("points,rgb", "TokenExchange"): 44.0}  # fmt: skip


def detected(arguments: dict[Path, list[str]], jobs: int) -> None:
    """In place of training: a detector's figures, 2 higher with every seed; other heads are not to be looked at."""
    for run, words in arguments.items():
        recipe = read_recipe(words[0], words[1:])
        value = MAP[",".join(recipe.data.modalities), recipe.fuser["_target_"].rpartition(".")[2]] + 2 * recipe.seed
        last = {"map25": value, "ar25": 90.0, "map50": value / 2, "ar50": 80.0}
        metrics = {"task": "detection3d", "dataset": "rooms", "split": "val", "images": 7, "primary": "map25",
                   "protocol": "true sizes", "streams": {"proposal": dict.fromkeys(last, 99.0), "last": last},
                   "checkpoint": "last", "step": recipe.train.steps}  # fmt: skip
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))


def test_detectors_are_compared_by_their_last_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "_run_all", detected)
    table = study.methods("toy-detection3d", [], 2, tmp_path).splitlines()
    steps = read_recipe("toy-detection3d").train.steps
    assert table[:9] == [
        f"Mean AP on rooms val (7 scenes), {steps} steps, 2 seeds: mean ± standard deviation; true sizes",
        "",
        "| method | mAP@0.25, % | mAP@0.50, % |",
        "|---|---|---|",
        "| points only | 41.0 ± 1.4 | 20.5 ± 0.7 |",
        "| no exchange | 42.0 ± 1.4 | 21.0 ± 0.7 |",
        "| concat | 43.0 ± 1.4 | 21.5 ± 0.7 |",
        "| random | 44.0 ± 1.4 | 22.0 ± 0.7 |",
        "| TokenFusion | 45.0 ± 1.4 | 22.5 ± 0.7 |",
    ]
    assert (tmp_path / "tokenfusion-seed0" / "report.html").is_file()
    assert {path.name for path in tmp_path.glob("*-seed1")} == {
        "points-only-seed1", "no-exchange-seed1", "concat-seed1", "random-seed1", "tokenfusion-seed1"
    }  # fmt: skip


def test_detection_has_no_study_of_modalities(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images alone find no 3D boxes.*study methods"):
        study.modalities("toy-detection3d", [], 1, tmp_path)
    with pytest.raises(UserError, match="has points alone"):
        study.methods("toy-detection3d", ["data.modalities=[points]"], 1, tmp_path)


def test_finished_runs_are_not_repeated(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = study.modalities("toy-segmentation", THREE, 1, tmp_path)
    fake.undo()  # from here on a missing run would be trained
    fake.setattr(study.subprocess, "run", None)
    assert study.modalities("toy-segmentation", THREE, 1, tmp_path) == table


def test_figures_of_different_protocols_share_no_table(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study.modalities("toy-segmentation", THREE, 1, tmp_path)
    path = tmp_path / "rgb+depth-seed0" / "metrics.json"
    path.write_text(path.read_text().replace('"standard"', '"released"'))
    fake.undo()
    with pytest.raises(UserError, match=r"rgb\+depth-seed0: was judged otherwise \(released\)"):
        study.modalities("toy-segmentation", THREE, 1, tmp_path)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("methods", ["fuser=concat"], "fuser=concat: is what this study varies"),
        ("methods", ["seed=1"], "seed=1: is what this study varies"),
        ("modalities", ["seed=1"], "seed=1: is what this study varies"),
        ("modalities", ["fuser=none"], "fuser is none, which this study sets beside"),
        ("modalities", ["data.modalities=[rgb]"], "has rgb alone"),
    ],
)
def test_overrides_that_leave_nothing_to_compare(tmp_path: Path, name: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        study.STUDIES[name]("toy-segmentation", overrides, 1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_outcome_names_the_figure(tmp_path: Path) -> None:
    streams = {"ensemble": {"miou": 45.26, "mae": 0.12345}}
    assert study._outcome({"streams": streams}) == "ensemble mIoU 45.3"
    assert study._outcome({"streams": streams, "primary": "mae"}) == "ensemble MAE 0.1235"
    found = {"task": "detection3d", "primary": "map50", "streams": {"last": {"map50": 12.34}}}
    assert study._outcome(found) == "last mAP@0.50 12.3"
