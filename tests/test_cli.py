"""The verbs that only tell, and the one that compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import tokenfusion
from tokenfusion import api, study
from tokenfusion.cli import main
from tokenfusion.errors import UserError
from tokenfusion.recipe import shipped


def output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["tokenfusion", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_ls_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(output(capsys, monkeypatch, "ls", "--json"))
    assert content["recipes"].keys() == shipped().keys()
    assert {"none", "concat", "average", "random", "tokenfusion"} <= content["fusers"].keys()
    assert {"nyudv2", "sunrgbd", "taskonomy", "rooms"} == content["datasets"].keys()
    assert all(content["recipes"].values())
    assert "nyudv2-mit-b3" in output(capsys, monkeypatch, "ls")


def test_show_prints_a_recipe_that_can_be_read_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = output(capsys, monkeypatch, "show", "nyudv2-mit-b3", "train.lr=1e-4")
    assert yaml.safe_load(text)["train"]["lr"] == 1e-4
    (tmp_path / "mine.yaml").write_text(text)
    assert output(capsys, monkeypatch, "show", str(tmp_path / "mine.yaml")) == text


def test_prepare_takes_only_options_of_its_data_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for point in range(3):
        for domain in ("rgb", "normal"):
            image = Image.new("RGB", (8, 6), (point, 90, 200))
            image.save(tmp_path / f"point_{point}_view_0_domain_{domain}.png")
    words = [
        "prepare",
        "taskonomy",
        "--source",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--domains",
        "rgb, normal",
    ]
    assert "views: 3" in output(capsys, monkeypatch, *words)
    assert "10 files as prepared" in output(capsys, monkeypatch, *words, "--verify")
    monkeypatch.setattr(sys, "argv", ["tokenfusion", *words[:4], "--out", str(tmp_path / "more"), "--height", "5"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--height is no option of prepare taskonomy" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(output(capsys, monkeypatch, "doctor", "--json"))
    assert content["tokenfusion"] == tokenfusion.__version__
    assert content["torch"]


def test_methods_study_trains_skips_and_tabulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    api.prepare_rooms(tmp_path / "rooms", train=4, val=2, height=64, width=96)
    small = [
        f"data.root={tmp_path / 'rooms'}",
        "data.crop=[64, 96]",
        "train.steps=2",
        "train.batch_size=2",
        "train.warmup_steps=1",
    ]
    # three of the five stand already: what is left is done
    monkeypatch.setattr(study, "_run_all", _in_this_process)
    table = study.methods("toy-segmentation", small, 1, tmp_path / "out")
    for row in ("rgb only", "depth only", "late ensemble", "concat", "TokenFusion"):
        assert f"| {row} |" in table
    assert (tmp_path / "out" / "table.md").is_file()
    assert (tmp_path / "out" / "compare.html").is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/metrics.json")}
    monkeypatch.undo()
    assert study.methods("toy-segmentation", small, 1, tmp_path / "out") == table  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in before}
    (tmp_path / "out" / "concat-seed0" / "metrics.json").unlink()
    (tmp_path / "out" / "concat-seed0" / "recipe.yaml").write_text("task: segmentation")
    with pytest.raises(UserError, match=r"train\.log"):
        study.methods("toy-segmentation", small, 1, tmp_path / "out")


def _in_this_process(arguments: dict[Path, list[str]], jobs: int) -> None:
    for run, words in arguments.items():
        api.train(tokenfusion.read_recipe(words[0], words[1:]), run)


def test_eval_prints_the_primary_figure_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"mse": 0.01, "mae": 0.0812, "mae_m": 0.2141, "contrast": 0.9}
    metrics = {"dataset": "rooms", "split": "val", "images": 3, "step": 9, "protocol": "standard", "target": "depth",
               "primary": "mae", "streams": {"shade": row, "ensemble": row | {"mae": None}}}  # fmt: skip
    monkeypatch.setattr(api, "evaluate", lambda *_: metrics)
    lines = output(capsys, monkeypatch, "eval", str(tmp_path)).splitlines()
    assert "rooms val, 3 images, step 9, target depth" in lines[0]
    words = [line.replace("┃", " ").replace("│", " ").split() for line in lines]
    assert ["stream", "MAE", "MSE", "MAE,", "m", "Contrast"] in words
    assert ["shade", "0.0812", "0.0100", "0.214", "0.90"] in words
    assert ["ensemble", "–", "0.0100", "0.214", "0.90"] in words


def test_classes_of_a_task_without_any_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Translation:
        task = "translation"

    monkeypatch.setattr(api, "recipe_of", lambda _: Translation)
    monkeypatch.setattr(sys, "argv", ["tokenfusion", "eval", str(tmp_path), "--per-class"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--per-class" in capsys.readouterr().err
