"""What a user gets wrong in clouds, cameras, boxes, recipes and run folders ends in one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tasks.detection3d.small import refused, words
from tasks.walk import check_cut_checkpoints, command

import tokenfusion
from tokenfusion import UserError


def untrained(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    return refused(capsys, "train", "toy-detection3d", *arguments, "--out", out)


def rewritten(file: Path, change: Callable[[Any], None]) -> Path:
    """A JSON or YAML file, changed in place."""
    text, is_json = file.read_text(), file.suffix == ".json"
    content = json.loads(text) if is_json else yaml.safe_load(text)
    change(content)
    file.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))
    return file


# ---- training data ------------------------------------------------------------------------------------------------


def spoil(case: str, rooms: Path) -> str:
    """Damage the rooms; returns what the message must say."""
    cloud, boxes, camera, rgb = (
        rooms / kind / f"000002.{end}"
        for kind, end in (("points", "npy"), ("boxes", "json"), ("camera", "json"), ("rgb", "png"))
    )
    described = rooms / "dataset.yaml"
    if case == "cloud cut short":
        cloud.write_bytes(cloud.read_bytes()[:100])
        return f"{cloud}: cannot be read as a point cloud"
    if case == "empty cloud":
        np.save(cloud, np.zeros((0, 6), np.float32))
        return f"{cloud}: holds no points"
    if case == "missing cloud":
        cloud.unlink()
        return f"{cloud}: no such file; split 'train' lacks 1 of"
    if case == "missing camera":
        camera.unlink()
        return str(camera)
    if case == "missing image":
        rgb.unlink()
        return f"{rgb}: no such file"
    if case == "image cut short":
        rgb.write_bytes(rgb.read_bytes()[:100])
        return str(rgb)
    if case == "boxes that are no JSON":
        boxes.write_text("boxes: []")
        return str(boxes)
    if case == "box without a size":
        rewritten(boxes, lambda content: content["boxes"][0].update(size=[1, 0, 1]))
        return f"{boxes}: boxes.0: size is [1.0, 0.0, 1.0]"
    if case == "box of another class":
        rewritten(boxes, lambda content: content["boxes"][0].update({"class": "cupbord"}))
        return f"{boxes}: a box has the class 'cupbord', which {described} does not name; did you mean 'cupboard'?"
    if case == "no scene":
        rewritten(described, lambda content: content.pop("scene"))
        return f"{described}: has no scene.classes"
    if case == "no boxes":
        rewritten(described, lambda content: content["scene"].pop("boxes"))
        return f"{described}: has no scene.boxes"
    if case == "no boxes and no classes":
        rewritten(described, lambda content: [content["scene"].pop(key) for key in ("boxes", "classes")])
        return f"{described}: has no scene.classes"
    if case == "no camera":
        rewritten(described, lambda content: content["scene"].pop("camera"))
        return f"{described}: has no scene.camera"
    if case == "no images":
        rewritten(described, lambda content: content["modalities"].pop("rgb"))
        return f"{described}: no modality 'rgb'"
    assert case == "no rectangles"
    for path in (rooms / "boxes").glob("*.json"):
        rewritten(path, lambda content: [box.pop("box2d") for box in content["boxes"]])
    return "has a box2d; set data.boxes2d to projected"


SPOILT = [
    "cloud cut short",
    "empty cloud",
    "missing cloud",
    "missing camera",
    "missing image",
    "image cut short",
    "boxes that are no JSON",
    "box without a size",
    "box of another class",
    "no scene",
    "no boxes",
    "no boxes and no classes",
    "no camera",
    "no images",
    "no rectangles",
]


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_training_data(case: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = spoil(case, broken)
    changes = words(broken, "train.batch_size=6", "data.boxes2d=annotated", "train.steps=1")
    assert said in untrained(capsys, tmp_path / "run", *changes)


def test_spoilt_training_data_behind_workers(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = spoil("cloud cut short", broken)
    changes = words(broken, "train.batch_size=6", "train.workers=1", "train.steps=1")
    assert said in untrained(capsys, tmp_path / "run", *changes)


def test_data_that_cannot_be_judged(
    run: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.json").read_text()
    rewritten(broken / "dataset.yaml", lambda content: content["scene"]["classes"].remove("table"))
    assert "scene.classes has no 'table'" in refused(capsys, "eval", run, "--data", broken)
    rewritten(broken / "dataset.yaml", lambda content: content["scene"].pop("boxes"))
    assert "has no scene.boxes" in refused(capsys, "eval", run, "--data", broken)
    rewritten(broken / "dataset.yaml", lambda content: content.pop("scene"))
    for verb in (["eval", run], ["predict", run, "--out", tmp_path / "out"]):
        assert f"{broken / 'dataset.yaml'}: has no scene" in refused(capsys, *verb, "--data", broken)
    assert "no split 'test'" in refused(capsys, "eval", run, "--split", "test")
    assert (run / "metrics.json").read_text() == before
    assert not (tmp_path / "out").exists()


def test_a_split_without_any_box_is_not_judged(
    run: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures would all be zero."""
    for id in (broken / "val.txt").read_text().split():
        rewritten(broken / f"boxes/{id}.json", lambda content: content["boxes"].clear())
    said = "no scene of split 'val' has a box of the run's classes; nothing can be judged"
    assert said in refused(capsys, "eval", run, "--data", broken, "--to", tmp_path / "metrics.json")
    assert not (tmp_path / "metrics.json").exists()
    assert said in untrained(capsys, tmp_path / "run", *words(broken, "train.steps=1"))
    command("predict", run, "--data", broken, "--split", "val", "--out", tmp_path / "out", capsys=capsys)


# ---- recipes and runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.modalities=[rgb]", "wanted [points] or [points, rgb]"),
        ("data.modalities=[points, points]", "wanted [points] or [points, rgb]"),
        ("data.modalities=[points, depth]", "data.modalities"),
        ("data.point=100", "did you mean 'points'?"),
        ("data.points=0", "data.points"),
        ("data.image=[8, 8]", "data.image"),
        ("data.image=[32]", "data.image"),
        ("data.image=[100000, 100000]", "data.image.0: Input should be less than or equal to 4096"),
        ("data.views=0", "data.views"),
        ("data.val=test", "no split 'test'"),
        ("data.scale=[2, 1]", "scale"),
        ("data.rotation_deg=200", "data.rotation_deg"),
        ("data.boxes2d=drawn", "data.boxes2d"),
        ("model.points.proposals=64", "64 proposals of 32 seeds"),
        ("model.points.layers=0", "layers: wanted whole numbers above 0, not 0"),
        ("model.points.proposals=0", "proposals: wanted whole numbers above 0, not 0"),
        ("model.points.heading_bins=0", "heading_bins: wanted whole numbers above 0, not 0"),
        ("model.points.points=[64, 32, 16, 0]", "points: wanted whole numbers above 0, not 64, 32, 16, 0"),
        ("model.points.samples=[0, 0, 0, 0]", "samples: wanted whole numbers above 0, not 0, 0, 0, 0"),
        ("model.points.samples=[8.5, 8, 8, 8]", "samples: wanted whole numbers above 0"),
        ("model.points.radii=[-1, 1, 1, 1]", "radii: wanted metres above 0, not [-1, 1, 1, 1]"),
        ("model.points.radii=[0, 0, 0, 0]", "radii: wanted metres above 0"),
        ("model.points.width=0", "width: wanted at least 0.015625, a channel per layer, not 0"),
        ("model.points.width=0.001", "width: wanted at least 0.015625"),
        ("model.points.momentum=5", "momentum: wanted above 0 and at most 1, not 5"),
        (f"model.points.mean_sizes={[[1, 1, 1]] * 8 + [[1, 0, 1]]}", "wanted three lengths above 0 of each class"),
        (f"model.points.mean_sizes={[1] * 9}", "wanted three lengths above 0 of each class"),
        ("model.points.samplng=fps", "model.points.samplng"),
        ("model.points.mean_sizes=[[1, 1, 1]]", "1 mean sizes for 9 classes"),
        ("model.points={_target_: torch.nn.Identity}", "--trust"),
        ("model.points={_target_: tokenfusion.backbones.mit.mit, variant: b0}", "model.points"),
        ("model.image=null", "model.image is missing"),
        ("model.image.variant=tiny", "variant must be one of"),
        ("model.image.detections=0", "model.image.detections: wanted at least 1, got 0"),
        ("model.image.init_size=[8, 8]", "wanted an init_size of at least 16 x 16"),
        ("model.image.drop_path=2", "drop_path is 2; wanted 0 or more, and less than 1"),
        ("model.exchange=points-to-image", "model.exchange"),
        ("model.point_weights=nowhere.pth", "nowhere.pth"),
        ("fuser=tokenfusion-paper", "did you mean 'tokenfusion'?"),
        ("fuser.threshold=2", "0..1"),
        ("fuser={_target_: tokenfusion.fusion.Concat}", "fuser"),
        ("loss.points.kps=-1", "loss.points.kps"),
        ("loss.points.gt_size=hull", "loss.points.gt_size"),
        ("loss.image_steps=-1", "loss.image_steps"),
        ("evaluation.thresholds=[]", "evaluation.thresholds"),
        ("evaluation.thresholds=[1.5]", "evaluation.thresholds"),
        ("evaluation.repeats=0", "evaluation.repeats"),
        ("train.batch_size=7", "6 samples, less than batch_size = 7"),
    ],
)
def test_recipes(change: str, said: str, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in untrained(capsys, tmp_path / "run", *words(rooms, change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.gt_size=hull", "evaluation: gt_size"),
        ("evaluation.nms=0.5", "did you mean 'nms_iou'?"),
        ("loss.sparsity=1", "eval changes keys below evaluation only"),
    ],
)
def test_other_ways_to_judge(change: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.json").read_text()
    assert said in refused(capsys, "eval", run, change)
    assert (run / "metrics.json").read_text() == before


def test_a_folder_with_another_run(run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert "another recipe (different: loss.points.kps)" in untrained(capsys, copy, *words(rooms, "loss.points.kps=7"))
    assert "another recipe" in untrained(capsys, copy, *words(rooms, "data.modalities=[points]"))
    message = refused(capsys, "train", "toy-segmentation", f"data.root={rooms}", "--out", copy)
    assert str(copy) in message
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_checkpoint_cut_short(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    check_cut_checkpoints(copy, "points=none.npy", tmp_path / "out", capsys)


def test_a_run_whose_papers_do_not_agree(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    verbs: list[list[object]] = [["eval", copy], ["predict", copy, "points=a.npy", "--out", tmp_path / "out"]]
    for change, said in (
        (lambda content: content["modalities"].pop("rgb"), "has no modality 'rgb', which recipe.yaml names"),
        (lambda content: content.pop("scene"), f"{copy / 'dataset.yaml'}: has no scene.classes"),
        (lambda content: content["scene"]["classes"].pop(), "mean sizes for 8 classes"),
    ):
        shutil.copy(run / "dataset.yaml", copy)
        rewritten(copy / "dataset.yaml", change)
        for verb in verbs:
            assert said in refused(capsys, *verb)
    shutil.copy(run / "dataset.yaml", copy)
    rewritten(copy / "recipe.yaml", lambda content: content["model"]["points"].update(layers=3))
    assert "does not fit recipe.yaml" in refused(capsys, "eval", copy)


def test_a_run_of_others_builds_nothing_foreign(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    evil = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    for place in ("fuser", "model.points", "model.image"):
        shutil.copy(run / "recipe.yaml", copy)
        section, _, key = place.rpartition(".")
        rewritten(copy / "recipe.yaml", lambda c, s=section, k=key: (c[s] if s else c).update({k: evil}))
        assert "--trust" in refused(capsys, "eval", copy), place
        with pytest.raises(UserError, match="--trust"):
            tokenfusion.load(copy)
    assert not (tmp_path / "owned").exists()


def test_a_place_that_cannot_be_written(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    cloud = f"points={rooms / 'points' / '000006.npy'}"
    assert str(file) in refused(capsys, "predict", run, cloud, "--out", file)
    assert str(file) in untrained(capsys, file, *words(rooms))
    assert str(file) in untrained(capsys, file / "below", *words(rooms))
    assert file.read_text() == "mine"
