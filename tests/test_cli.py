"""The verbs that only tell, and the one that compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

import tokenfusion
from tokenfusion import api
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
    assert {"nyudv2", "sunrgbd", "scannet", "taskonomy", "rooms"} == content["datasets"].keys()
    assert content["fusers of detection3d"].keys() == {"none", "concat", "average", "random", "tokenfusion"}
    assert {"mit-b0", "mirror-ti", "group-free", "yolos-ti", "yolos-s"} <= content["backbones"].keys()
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


def test_a_task_chooses_the_preparation_and_its_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--boxes is no option of prepare sunrgbd; it takes --out, --source, --depth"):
        api.prepare("sunrgbd", tmp_path, tmp_path / "out", {"boxes": "v2"})
    with pytest.raises(UserError, match="--boxes is 'v9'; choose v1 or v2"):
        api.prepare("sunrgbd", tmp_path, tmp_path / "out", {"task": "detection3d", "boxes": "v9"})
    with pytest.raises(UserError, match="--task is 'detection'; did you mean 'detection3d'"):
        api.prepare("sunrgbd", tmp_path, tmp_path / "out", {"task": "detection"})
    with pytest.raises(UserError, match="--task is 'detection3d'; prepare rooms takes no --task"):
        api.prepare("rooms", None, tmp_path / "out", {"task": "detection3d"})
    with pytest.raises(UserError, match=r"holds no scannetv2-labels\.combined\.tsv"):
        api.prepare("scannet", tmp_path, tmp_path / "out", {"views": 3})


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(output(capsys, monkeypatch, "doctor", "--json"))
    assert content["tokenfusion"] == tokenfusion.__version__
    assert content["torch"]
    assert content["numba"][0].isdigit()


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


def test_eval_of_a_detection_prints_heads_and_classes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"map25": 41.234, "ar25": 80.0, "map50": 20.0, "ar50": 50.0}
    classes = {"ap25": [12.345, None], "recall25": [60.0, None], "ap50": [1.0, None], "recall50": [30.0, None]}
    metrics = {"task": "detection3d", "dataset": "rooms", "split": "val", "images": 3, "step": 9, "primary": "map25",
               "protocol": "IoU > 0.25, 0.5, true sizes", "streams": {"proposal": row, "last": row},
               "classes": ["sofa", "lamp"], "per_class": {"last": classes}}  # fmt: skip
    monkeypatch.setattr(api, "recipe_of", lambda _: SimpleNamespace(task="detection3d"))
    monkeypatch.setattr(api, "evaluate", lambda *_: metrics)
    text = output(capsys, monkeypatch, "eval", str(tmp_path), "--per-class")
    words = [line.replace("┃", " ").replace("│", " ").split() for line in text.splitlines()]
    assert "rooms val, 3 scenes, step 9" in text
    assert "true sizes" in text
    assert words[2] == ["head", "mAP@0.25,", "%", "mAP@0.50,", "%", "AR@0.25,", "%", "AR@0.50,", "%"]
    assert ["last", "41.23", "20.00", "80.00", "50.00"] in words
    assert ["class", "AP@0.25,", "%", "Recall@0.25,", "%", "AP@0.50,", "%", "Recall@0.50,", "%"] in words
    assert ["sofa", "12.35", "60.00", "1.00", "30.00"] in words
    assert ["lamp", "–", "–", "–", "–"] in words


def test_classes_of_a_segmentation_are_a_column_per_stream(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    metrics = {"dataset": "rooms", "split": "val", "images": 3, "step": 9, "primary": "miou", "protocol": "single scale",
               "streams": {"rgb": {"miou": 1.0}, "ensemble": {"miou": 2.0}}, "classes": ["wall"],
               "per_class": {"rgb": {"iou": [31.0], "accuracy": [71.0]},
                             "ensemble": {"iou": [32.5], "accuracy": [72.0]}}}  # fmt: skip
    monkeypatch.setattr(api, "recipe_of", lambda _: SimpleNamespace(task="segmentation"))
    monkeypatch.setattr(api, "evaluate", lambda *_: metrics)
    lines = output(capsys, monkeypatch, "eval", str(tmp_path), "--per-class").splitlines()
    words = [line.replace("┃", " ").replace("│", " ").split() for line in lines]
    assert ["class", "rgb", "ensemble"] in words
    assert ["wall", "31.00", "32.50"] in words


@pytest.mark.parametrize(("task", "option", "said"), [
    ("translation", "--per-class", "is a translation, which has no classes"),
    ("translation", "--multi-scale", "is a run of translation; only segmentation"),
    ("detection3d", "--multi-scale", "is a run of detection3d; only segmentation is judged at several scales"),
])  # fmt: skip
def test_options_of_another_task_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    task: str,
    option: str,
    said: str,
) -> None:
    monkeypatch.setattr(api, "recipe_of", lambda _: SimpleNamespace(task=task))
    monkeypatch.setattr(sys, "argv", ["tokenfusion", "eval", str(tmp_path), option])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert option in shown
    assert said in shown
