"""The comparison of runs: figures, curves, warnings, and what differs in the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.fake import Page, damage, fake_run
from report.fake_detection import fake_detection
from report.fake_translation import fake_translation

from tokenfusion.errors import UserError
from tokenfusion.report import write_comparison


def test_comparison_marks_the_best_and_lists_what_differs(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / "token", samples=0, points=2),
        fake_run(tmp_path / "late", fuser="none", samples=0, seed=3, points=2),
        fake_run(tmp_path / "rgb", modalities=("rgb",), fuser="none", samples=0, seed=4, points=2),
    ]
    page = Page(write_comparison(runs, tmp_path / "out" / "compare.html"))
    values = [json.loads((run / "metrics.json").read_text())["streams"].get("ensemble", {}).get("miou") for run in runs]
    best = runs[max((0, 1), key=lambda place: values[place])].name
    assert f"{best} best ensemble" in page.text
    assert page.text.count("best ensemble") == 1
    assert all(f"{value:.1f}" in page.text for value in values[:2])
    keys = page.text.split("What differs in the recipes")[1]
    assert "data.modalities" in keys
    assert "seed" in keys
    assert "fuser.rule" in keys
    assert "batch_size" not in keys
    assert "data.root" not in keys
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert len(page.loaded) == 2


def test_translations_are_ranked_downwards_and_collapsed_ones_not_at_all(tmp_path: Path) -> None:
    runs = [
        fake_translation(tmp_path / "token", samples=0, points=0),
        fake_translation(tmp_path / "late", fuser="none", samples=0, seed=3, points=0),
        fake_translation(tmp_path / "grey", fuser="none", samples=0, seed=4, points=0, collapsed=("ensemble",)),
    ]
    for run, value in zip(runs, (0.25, 0.5, 0.125), strict=True):
        evaluation = json.loads((run / "metrics.json").read_text())
        evaluation["streams"]["ensemble"]["mae"] = value
        damage(run / "metrics.json", json.dumps(evaluation))
    text = Page(write_comparison(runs, tmp_path)).text
    assert "MAE of normal Lower is better." in text
    assert "grey: The images made by ensemble have collapsed" in text
    assert "token best ensemble" in text
    assert text.count("best ensemble") == 1
    assert "Run Stream MAE MSE Mean angle, ° Contrast Diversity" in text
    assert "different" not in text


def test_detectors_are_ranked_by_their_last_head(tmp_path: Path) -> None:
    runs = [
        fake_detection(tmp_path / "points", images=False, fuser="none", samples=0, points=8),
        fake_detection(tmp_path / "fused", samples=0, points=8),
    ]
    evaluation = json.loads((runs[0] / "metrics.json").read_text())
    evaluation["streams"]["last"]["map25"], evaluation["streams"]["0head"]["map25"] = 33.0, 99.0
    damage(runs[0] / "metrics.json", json.dumps(evaluation))
    page = Page(write_comparison(runs, tmp_path))
    assert "Run last Fuser Modalities Seed Step Parameters points 33.0 NoExchange points" in page.text
    assert "fused best last head 42.0 TokenExchange (threshold 0.5) points + rgb" in page.text
    assert "Run Head mAP@0.25, %" in page.text
    assert page.captions == ["mAP@0.25 of the last head on the validation split"] * len(page.captions) != []
    assert "ensemble" not in page.text
    assert "stream" not in page.text.lower()


def test_runs_that_make_different_things_have_no_best(tmp_path: Path) -> None:
    runs = [
        fake_translation(tmp_path / "normal", samples=0, points=0),
        fake_translation(tmp_path / "rgb", target="rgb", features="pixels 8x8", samples=0, points=0),
        fake_run(tmp_path / "labels", samples=0, points=0),
    ]
    text = Page(write_comparison(runs, tmp_path)).text
    assert "The runs make different things (normal; rgb; segmentation)." in text
    assert "The runs are ranked by different figures (MAE; FID; mIoU, %)." in text
    assert "Target" in text
    assert "best ensemble" not in text


def test_comparison_warns_of_different_protocols(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, samples=0, points=0) for name in ("a", "b")]
    evaluation = json.loads((runs[1] / "metrics.json").read_text()) | {"protocol": "flip", "parameters": 44_000_000}
    damage(runs[1] / "metrics.json", json.dumps(evaluation))
    text = Page(write_comparison(runs, tmp_path)).text
    assert "different protocols" in text
    assert "different splits" not in text
    assert "44,000,000" in text
    assert "The recipes are the same" in text


def test_comparison_of_incomplete_and_namesake_runs(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True)
        damage(tmp_path / folder / "run" / "recipe.yaml", f"seed: {folder}\n")
    path = write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path)
    assert path == tmp_path / "compare.html"
    text = Page(path).text
    assert "Not evaluated yet: a/run, b/run" in text
    assert "without a curve: a/run, b/run" in text


def test_comparison_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to compare"):
        write_comparison([], tmp_path)
