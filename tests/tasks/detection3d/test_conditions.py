"""Detectors that are judged without their image, or with worse points and images."""

from __future__ import annotations

from pathlib import Path

import pytest
from tasks.detection3d.small import metrics, recipe, refused
from tasks.walk import lines

import tokenfusion
from tokenfusion import api
from tokenfusion.data import Folder
from tokenfusion.data.scenes import Scenes
from tokenfusion.tasks.detection3d.inference import evaluate, figures
from tokenfusion.tasks.detection3d.task import scenes


def test_no_image_is_the_points_alone(run: Path, rooms: Path, tmp_path: Path) -> None:
    made, model, folder = api.recipe_of(run), tokenfusion.load(run), Folder(rooms)
    data = made.data
    alone = Scenes(
        folder, "val", ("points",), data.points, None, made.seed, None, 1, model.points.indexer(), classes=folder.scene.classes  # type: ignore[union-attr, operator]
    )  # fmt: skip
    found = api.evaluate(run, evaluation={"missing": ["rgb"]}, to=tmp_path / "a.json")
    assert found["streams"] == figures(evaluate(model, alone, made.evaluation).runs)  # type: ignore[arg-type]
    assert found["protocol"].split("; ")[0].endswith("fp32, without rgb")
    plain = figures(evaluate(model, scenes(made, folder, model, "val", folder.scene.classes), made.evaluation).runs)  # type: ignore[arg-type]
    assert plain == metrics(run)["streams"]
    assert found["streams"] != plain


@pytest.mark.parametrize(
    "degrade",
    [
        {"points": {"kind": "noise", "amount": 0.2}},
        {"points": {"kind": "holes", "amount": 0.6}},
        {"rgb": {"kind": "dark", "amount": 0.9}},
        {"rgb": {"kind": "shift", "amount": 8}, "points": {"kind": "noise", "amount": 0.05}},
    ],
)
def test_worse_twice_alike(degrade: dict[str, dict[str, object]], run: Path, tmp_path: Path) -> None:
    first, again = (api.evaluate(run, evaluation={"degrade": degrade}, to=tmp_path / f"{i}.json") for i in range(2))
    assert first == again
    told = [f"{name} with {how['kind']} {how['amount']:g}" for name, how in degrade.items()]
    assert ", ".join(told) in first["protocol"]
    if "points" in degrade:
        assert first["streams"] != metrics(run)["streams"]


def test_training_judges_by_the_recipes_conditions(rooms: Path, tmp_path: Path) -> None:
    api.train(recipe(rooms, "evaluation.missing=[rgb]", "train.steps=2"), tmp_path)
    in_training, own = lines(tmp_path, "val")[-1], metrics(tmp_path)
    assert "without rgb" in own["protocol"]
    for head, row in own["streams"].items():
        assert {name: in_training[f"{head}/{name}"] for name in row} == row
    api.predict(tmp_path, tmp_path / "out", data=rooms, split="val")
    assert list((tmp_path / "out").glob("*_boxes.png")), "predict is given the image"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("evaluation.missing=[points]", "missing: the detector finds boxes in its points; leave them in"),
        ("evaluation.missing=[depth]", "names 'depth', which is no input here; known: points, rgb"),
        ("evaluation.degrade={points: {kind: dark, amount: 0.5}}", "points can have noise, holes"),
        ("evaluation.degrade={rgb: {kind: holes, amount: 0.5}}", "rgb can have noise, shift, dark"),
    ],
)
def test_mistakes(change: str, wanted: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in refused(capsys, "eval", run, change, "--to", tmp_path / "a.json")
