"""The whole chain as a user walks it: train, eval, predict, report, compare; every fuser, any number of views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tasks.detection3d.small import boxes_of, files_of, metrics, recipe, words
from tasks.walk import command, lines

import tokenfusion
from tokenfusion import api
from tokenfusion.data import Folder
from tokenfusion.data.scenes import collate_scenes
from tokenfusion.tasks.detection3d import FUSERS, DetectionTask, build_model
from tokenfusion.tasks.detection3d.metrics import AveragePrecision, Detections, Protocol, suppress
from tokenfusion.tasks.detection3d.task import scenes

HEADS = ["proposal", "0head", "last", "all_layers", "last_three"]
TERMS = {f"points/{name}" for name in ("objectness", "center", "heading", "size", "class", "kps")}
TERMS_2D = {f"image/{name}" for name in ("classes2d", "l1_2d", "giou_2d")}
CLASSES = ["picture", "cupboard", "panel", "cushion", "box", "sofa", "table", "dresser", "locker"]
FIGURES = {"map5", "ar5", "map15", "ar15"}


# ---- a run --------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_complete(run: Path) -> None:
    for name in ("recipe.yaml", "dataset.yaml", "metrics.jsonl", "metrics.json", "samples/index.json"):
        assert (run / name).is_file(), name
    logged = lines(run, "train")[-1]
    terms = TERMS | TERMS_2D | {"sparsity"}
    assert {name for name in logged if name.startswith("loss/")} == {f"loss/{name}" for name in (*terms, "total")}
    assert logged["loss/total"] == pytest.approx(sum(logged[f"loss/{name}"] for name in terms))
    assert {f"exchange/layer{i}/points" for i in (0, 1)} | {"visible", "lr"} <= logged.keys()
    assert 0 < logged["visible"] <= 1


def test_figures_of_a_run(run: Path) -> None:
    content = metrics(run)
    assert {name: content[name] for name in ("task", "dataset", "split", "images", "primary", "checkpoint", "step")} == {
        "task": "detection3d", "dataset": "rooms", "split": "val", "images": 3, "primary": "map5",
        "checkpoint": "last", "step": 4,
    }  # fmt: skip
    assert list(content["streams"]) == HEADS
    assert all(set(row) == FIGURES for row in content["streams"].values())
    assert all(0 < row["map15"] <= row["map5"] <= 100 for row in content["streams"].values())
    assert content["classes"] == CLASSES
    assert list(content["per_class"]) == HEADS
    for name, mean in (("ap5", "map5"), ("recall15", "ar15")):
        values = content["per_class"]["last"][name]
        assert len(values) == 9
        assert np.mean([v for v in values if v is not None]) == pytest.approx(content["streams"]["last"][mean])
    assert [list(row) for row in content["exchange"].values()] == [["points"], ["points"]]
    assert content["parameters"] == sum(p.numel() for p in tokenfusion.load(run).parameters())
    assert content["protocol"] == "NMS 0.25, IoU > 0.05, 0.15, true sizes, batch 1, fp32; trained with exact sizes"


def test_samples_of_a_run(run: Path) -> None:
    index = json.loads((run / "samples" / "index.json").read_text())
    assert [entry["name"] for entry in index.pop("classes")] == CLASSES
    assert index == {
        "task": "detection3d", "ids": ["000006", "000007", "000008"], "modalities": ["points", "rgb"],
        "blocks": [], "threshold": 0.5, "least_objectness": 0.3,
    }  # fmt: skip
    with np.load(run / "samples" / "000007.npz") as arrays:
        assert set(arrays) == {"picture/from above", "picture/in the image"}
        assert arrays["picture/in the image"].dtype == arrays["picture/from above"].dtype == np.uint8


def judged(folder: Folder, predictions: Path, split: str, protocol: Protocol) -> Any:
    """AP of the boxes that ``predict`` wrote, from its files alone."""
    classes = list(folder.scene.classes)
    score = AveragePrecision(len(classes), protocol)
    for id in folder.ids(split):
        found = json.loads((predictions / f"{id}.json").read_text())["boxes"]
        truth = folder.read_boxes(id)
        kept = Detections(
            torch.tensor([[*b["center"], *b["size"], b["yaw_rad"]] for b in found]).reshape(-1, 7),
            torch.tensor([b["objectness"] for b in found]),
            torch.tensor([[b["probabilities"][name] for name in classes] for b in found]).reshape(-1, len(classes)),
        )
        score.add(kept, truth.boxes, torch.tensor([classes.index(name) for name in truth.names]), id)
    return score.compute().means


def test_training_eval_and_predict_agree_to_the_last_digit(run: Path, rooms: Path, tmp_path: Path) -> None:
    content = api.evaluate(run)
    in_training = lines(run, "val")[-1]
    written = api.predict(run, tmp_path, data=rooms, split="val")
    ids = Folder(rooms).ids("val")
    ends = (".json", "_above.png", "_boxes.png", "_scores.npz")
    assert {path.name for path in written} == {f"{id}{end}" for id in ids for end in ends}
    summed = judged(Folder(rooms), tmp_path, "val", api.recipe_of(run).evaluation)
    assert summed["map5"] > 0
    for name, value in summed.items():
        assert content["streams"]["last"][name] == in_training[f"last/{name}"] == value
    for head, row in content["streams"].items():
        assert {name: in_training[f"{head}/{name}"] for name in row} == row


def test_the_command_line_walks_all_the_way(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command("train", "toy-detection3d", *words(rooms, "train.eval_every=2"), "--out", out, capsys=capsys)
    trained = metrics(out)
    command("eval", out, "--checkpoint", "best", capsys=capsys)
    best = max(line["last/map5"] for line in lines(out, "val"))
    assert (metrics(out)["checkpoint"], metrics(out)["streams"]["last"]["map5"]) == ("best", best)
    command("eval", out, "evaluation.remove_empty=true", "--split", "train", capsys=capsys)
    assert metrics(out)["images"] == 6
    assert "without empty boxes" in metrics(out)["protocol"]
    command("eval", out, "--per-class", capsys=capsys)
    assert metrics(out) == trained
    command("predict", out, "--data", rooms, "--split", "val", "--out", tmp_path / "made", capsys=capsys)
    assert len(list((tmp_path / "made").glob("*.json"))) == 3
    command("report", out, capsys=capsys)
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert all(name in page for name in ("cupboard", "from above", "in the image"))
    command("compare", out, out, "--out", tmp_path / "compare.html", capsys=capsys)
    assert (tmp_path / "compare.html").is_file()


# ---- other runs ---------------------------------------------------------------------------------------------------


COMBINATIONS = [
    ("none", "both"),
    ("concat", "image-to-point"),
    ("average", "both"),
    ("random", "image-to-point"),
    ("tokenfusion", "both"),
]


def test_no_word_is_forgotten() -> None:
    assert {fuser for fuser, _ in COMBINATIONS} == set(FUSERS)


@pytest.mark.parametrize(("fuser", "exchange"), COMBINATIONS)
def test_every_fuser(fuser: str, exchange: str, rooms: Path, tmp_path: Path) -> None:
    changes = [f"fuser={fuser}", f"model.exchange={exchange}", "model.exchange_queries=true", "data.drop_images=0.3"]
    api.train(recipe(rooms, *changes, "train.steps=1"), tmp_path)
    content = metrics(tmp_path)
    assert list(content["streams"]) == HEADS
    scored = ["points", "rgb", "queries"] if exchange == "both" else ["points", "queries"]
    expected = {"layer0": scored, "layer1": scored} if fuser == "tokenfusion" else {}
    assert {layer: list(row) for layer, row in content["exchange"].items()} == expected
    files = files_of(rooms, "000006", "points", "rgb", "camera")
    written = {path.name for path in api.predict(tmp_path, tmp_path / "made", files)}
    assert ("000006_scores.npz" in written) == (fuser == "tokenfusion")
    assert "000006_boxes.png" in written


def test_points_alone(rooms: Path, tmp_path: Path) -> None:
    api.train(recipe(rooms, "data.modalities=[points]", "model.image=null", "train.steps=1"), tmp_path / "alone")
    assert {n for n in lines(tmp_path / "alone", "train")[-1] if n.startswith("loss/")} == {
        f"loss/{name}" for name in (*TERMS, "total")
    }
    index = json.loads((tmp_path / "alone" / "samples" / "index.json").read_text())
    assert (index["modalities"], index["threshold"]) == (["points"], None)
    made = api.predict(tmp_path / "alone", tmp_path / "made", data=rooms, split="val")
    assert {path.suffix for path in made} == {".json", ".png"}
    assert not any("_boxes" in path.name for path in made)
    summed = judged(Folder(rooms), tmp_path / "made", "val", api.recipe_of(tmp_path / "alone").evaluation)
    assert summed == metrics(tmp_path / "alone")["streams"]["last"]
    named = build_model(recipe(rooms, "data.modalities=[points]"), 9)
    assert named.image is None, "a network of images that is named is not built"
    assert named.state_dict().keys() == tokenfusion.load(tmp_path / "alone").state_dict().keys()


def test_repetitions_give_means_and_the_best(run: Path, rooms: Path) -> None:
    once = api.evaluate(run)
    twice = api.evaluate(run, evaluation={"repeats": 2})
    assert "mean of 2 runs" in twice["protocol"]
    for head, row in twice["streams"].items():
        assert set(row) == FIGURES | {f"{name}_best" for name in FIGURES}
        for name in FIGURES:
            first, mean, best = once["streams"][head][name], row[name], row[f"{name}_best"]
            assert best == pytest.approx(max(first, 2 * mean - first))
    assert any(twice["streams"]["last"][name] != once["streams"]["last"][name] for name in FIGURES)
    api.evaluate(run)


def test_sizes_as_group_free_judges_them(run: Path) -> None:
    exact = api.evaluate(run)
    theirs = api.evaluate(run, evaluation={"gt_size": "groupfree"})
    assert theirs["streams"]["last"] != exact["streams"]["last"]
    assert "hull sizes as Group-Free's, not comparable with others" in theirs["protocol"]
    assert "true sizes" in exact["protocol"]
    api.evaluate(run)


def test_a_folder_without_images_or_without_boxes(run: Path, rooms: Path, tmp_path: Path) -> None:
    """Points alone are judged; and where nothing is known of boxes, they are predicted."""
    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    spec = yaml.safe_load((copy / "dataset.yaml").read_text())
    del spec["scene"]["camera"]
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    own = (run / "metrics.json").read_text()
    content = api.evaluate(run, data=copy)
    assert content["exchange"] == {}
    assert content["streams"] != json.loads(own)["streams"]
    for key in ("boxes", "classes"):
        del spec["scene"][key]
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    shutil.rmtree(copy / "boxes")
    made = api.predict(run, tmp_path / "made", data=copy, split="val")
    assert [path.name for path in made if path.suffix == ".json"] == ["000006.json", "000007.json", "000008.json"]
    assert boxes_of([made[0]])[0]["class"] in CLASSES
    api.evaluate(run)
    assert (run / "metrics.json").read_text() == own


# ---- several views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["image-to-point", "both"])
def test_several_views(exchange: str, views: Path, tmp_path: Path) -> None:
    changes = ["data.views=2", f"model.exchange={exchange}", "train.steps=2", "train.batch_size=3"]
    api.train(recipe(views, *changes), tmp_path / "run")
    logged = lines(tmp_path / "run", "train")[-1]
    assert all(np.isfinite(value) for value in logged.values())
    assert logged["loss/image/l1_2d"] > 0
    made = api.predict(tmp_path / "run", tmp_path / "made", data=views, split="val")
    of_views = sorted(path.name for path in made if "_boxes" in path.name)
    assert of_views == ["000006_boxes_0.png", "000006_boxes_1.png", "000007_boxes_0.png", "000007_boxes_1.png"]
    summed = judged(Folder(views), tmp_path / "made", "val", api.recipe_of(tmp_path / "run").evaluation)
    assert summed == metrics(tmp_path / "run")["streams"]["last"]
    samples = sorted((tmp_path / "run" / "samples").glob("*.npz"))
    names = [{name.removeprefix("picture/") for name in np.load(path)} for path in samples]
    assert names == [{"from above", "in view 1", "in view 2"}] * 2 + [{"from above"}]


def test_what_the_image_learns(rooms: Path) -> None:
    """Rectangles of the files, or those around the 3D boxes; nothing else changes."""
    found = {}
    for boxes2d in ("annotated", "projected"):
        made = recipe(rooms, f"data.boxes2d={boxes2d}")
        task = DetectionTask(build_model(made, 9), made).eval()
        split = scenes(made, Folder(rooms), task.model, "train", CLASSES, training=True)
        batch = collate_scenes([split[0], split[1]])
        found[boxes2d] = task.losses(batch, task(batch), "model")
    one, other = found["annotated"], found["projected"]
    changed = {name for name in one if one[name] != other[name]}
    assert {"image/l1_2d", "image/giou_2d"} <= changed <= TERMS_2D, "a class may be matched to the same token"


def test_empty_boxes_are_dropped_where_asked_for() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0], [9.0, 9, 9, 1, 1, 1, 0]])
    found = Detections(boxes, torch.tensor([0.5, 0.9]), torch.eye(2))
    points = torch.zeros(8, 3)
    assert len(suppress(found, points, Protocol()).boxes) == 2
    assert suppress(found, points, Protocol(remove_empty=True)).boxes.tolist() == boxes[:1].tolist()
