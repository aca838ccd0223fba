"""What may befall a run: a kill, several processes, loading processes, few bits, other classes, numbers that explode."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tasks.detection3d.small import metrics, recipe, words
from tasks.walk import PATIENCE, check_same_bits, command, digests, kill_at, lines, newest, start
from torch.utils.data import DataLoader

import tokenfusion
from tokenfusion import UserError, api
from tokenfusion.data import Folder
from tokenfusion.data.scenes import collate_scenes
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.detection3d import build_model
from tokenfusion.tasks.detection3d.inference import Result, evaluate, figures
from tokenfusion.tasks.detection3d.run import _shared
from tokenfusion.tasks.detection3d.task import scenes


def test_killed_in_the_middle_ends_at_the_same_bits(rooms: Path, tmp_path: Path) -> None:
    changes = ["train.steps=8", "train.eval_every=4", "data.drop_images=0.3", "loss.image_steps=5"]
    api.train(recipe(rooms, *changes), tmp_path / "whole")
    kill_at(start("toy-detection3d", words(rooms, *changes), tmp_path / "cut"), tmp_path / "cut", 4, 8)
    assert api.train(recipe(rooms, *changes), tmp_path / "cut").steps == 8
    check_same_bits(tmp_path / "whole", tmp_path / "cut")


class Apart:
    """Stands for the engine of processes that all hold what one of them counted."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results

    def gather(self, _: Any) -> list[Any]:
        return [result.runs for result in self.results]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_of_processes_add_up(world: int, run: Path, rooms: Path) -> None:
    """Also where there are more processes than scenes."""
    made, model = api.recipe_of(run), tokenfusion.load(run)
    validation = scenes(made, Folder(rooms), model, "val", Folder(rooms).scene.classes)
    protocol = made.evaluation.model_copy(update={"repeats": 2})
    whole = figures(evaluate(model, validation, protocol).runs)
    results = [evaluate(model, validation, protocol, rank, world) for rank in range(world)]
    assert [result.scenes for result in results] == [len(range(rank, 3, world)) for rank in range(world)]
    for result in reversed(results):
        assert figures(_shared(result, Apart(results)).runs) == whole


@pytest.mark.slow
def test_two_processes_judge_as_one(rooms: Path, tmp_path: Path) -> None:
    """Batch norms see each process's own scenes, so weights differ from those of one process; figures must not."""
    changes = ["train.batch_size=4", "train.steps=3", "train.devices=2", "train.accelerator=cpu"]
    process = start("toy-detection3d", words(rooms, *changes), tmp_path / "two")
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert newest(tmp_path / "two").state["devices"] == 2
    in_training, own = lines(tmp_path / "two", "val")[-1], metrics(tmp_path / "two")
    for head, row in own["streams"].items():
        assert {name: in_training[f"{head}/{name}"] for name in row} == row
    assert own["images"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("modalities", ["[points, rgb]", "[points]"])
def test_boxes_are_learned(tmp_path: Path, modalities: str) -> None:
    """Minutes of training find furniture that fresh weights do not, with images and without."""
    api.prepare_rooms(tmp_path / "rooms", train=160, val=30)
    changes = [
        f"data.root={tmp_path / 'rooms'}",
        f"data.modalities={modalities}",
        "train.steps=160",
        "train.eval_every=0",
    ]
    changes += ["fuser=none"] if modalities == "[points]" else []
    api.train(read_recipe("toy-detection3d", changes), tmp_path / "run")
    assert metrics(tmp_path / "run")["streams"]["last"]["map25"] > 8


@pytest.mark.parametrize("change", ["train.workers=2", "data.index_points=false"])
def test_who_loads_and_who_finds_neighbours_changes_nothing(
    change: str, run: Path, rooms: Path, tmp_path: Path
) -> None:
    own = api.recipe_of(run)
    assert own.train.workers == 0
    assert own.data.index_points
    api.train(recipe(rooms, change), tmp_path)
    assert digests(newest(tmp_path).model) == digests(newest(run).model)
    assert digests(newest(tmp_path).optimizer) == digests(newest(run).optimizer)
    for split in ("train", "val"):
        assert lines(tmp_path, split) == lines(run, split)


def test_indices_travel_with_batches(rooms: Path) -> None:
    made = recipe(rooms)
    model = build_model(made, 9)
    split = scenes(made, Folder(rooms), model, "train", Folder(rooms).scene.classes, training=True)
    batch = next(iter(DataLoader(split, batch_size=3, num_workers=1, collate_fn=collate_scenes)))
    expected = model.points.indexer()(batch.points)
    assert all(torch.equal(x, y) for x, y in zip(batch.index, expected, strict=True))


def test_few_bits(rooms: Path, tmp_path: Path) -> None:
    api.train(recipe(rooms, "train.precision=bf16", "train.steps=2"), tmp_path)
    checkpoint = newest(tmp_path)
    assert all(x.dtype == torch.float32 for x in checkpoint.model.values() if x.is_floating_point())
    assert all(x.isfinite().all() for x in checkpoint.model.values())
    assert metrics(tmp_path)["streams"]["last"]["map5"] == lines(tmp_path, "val")[-1]["last/map5"]


def test_a_run_is_lengthened_but_not_given_other_classes(run: Path, rooms: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    shutil.copytree(run, tmp_path / "run")
    assert api.train(recipe(copy, "train.steps=5"), tmp_path / "run").steps == 5
    assert metrics(tmp_path / "run")["step"] == 5
    before = (tmp_path / "run" / "dataset.yaml").read_text()
    spec = yaml.safe_load((copy / "dataset.yaml").read_text())
    spec["scene"]["classes"].reverse()
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(UserError, match=r"knows other scene\.classes than rooms has now"):
        api.train(recipe(copy, "train.steps=6"), tmp_path / "run")
    assert (tmp_path / "run" / "dataset.yaml").read_text() == before
    content = api.evaluate(tmp_path / "run")
    assert content["classes"][0] == "picture", "labels keep the run's meaning"


def test_labels_keep_their_meaning_on_data_that_orders_its_classes_otherwise(
    run: Path, rooms: Path, tmp_path: Path
) -> None:
    own = api.evaluate(run)
    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    spec = yaml.safe_load((copy / "dataset.yaml").read_text())
    spec["scene"]["classes"].reverse()
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    other = api.evaluate(run, data=copy)
    assert other["classes"] == own["classes"]
    assert other["streams"] == own["streams"]
    api.evaluate(run)


def test_a_class_that_never_occurs_counts_for_nothing(run: Path, rooms: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    for path in (copy / "boxes").glob("*.json"):
        kept = [box for box in json.loads(path.read_text())["boxes"] if box["class"] != "table"]
        path.write_text(json.dumps({"boxes": kept}))
    content = api.evaluate(run, data=copy)
    values = content["per_class"]["last"]["ap5"]
    assert [name for name, v in zip(content["classes"], values, strict=True) if v is None] == ["table"]
    mean = sum(v for v in values if v is not None) / 8
    assert content["streams"]["last"]["map5"] == pytest.approx(mean)
    for id in (copy / "train.txt").read_text().split():
        (copy / f"boxes/{id}.json").write_text('{"boxes": []}')
    changes = ["train.steps=1", "data.boxes2d=projected"]
    assert api.train(recipe(copy, *changes), tmp_path / "run").steps == 1, "scenes without boxes are trained on"
    api.evaluate(run)


def test_weights_start_both_networks(run: Path, rooms: Path, tmp_path: Path) -> None:
    """``model.point_weights`` and ``model.image_weights`` take our own names too."""
    model = tokenfusion.load(run)
    for name, network in (("points", model.points), ("image", model.image)):
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    weights = [f"model.point_weights={tmp_path / 'points.pth'}", f"model.image_weights={tmp_path / 'image.pth'}"]
    api.train(recipe(rooms, *weights, "train.lr=1e-12", "train.steps=1"), tmp_path / "run")
    first, second = model.state_dict(), tokenfusion.load(tmp_path / "run").state_dict()
    same = {name for name in first if torch.allclose(first[name].double(), second[name].double(), atol=1e-9)}
    other = {name for name in first if name not in same}
    assert all(name.startswith(("key_exchange.", "to_point.")) or ".running_" in name or "num_batches" in name
               for name in other), other  # fmt: skip
    assert {name for name in first if name.startswith("key_exchange.0.score") and name.endswith("weight")} & other


def test_numbers_that_explode_end_the_run_in_one_line(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(rooms, "train.lr=1e30", "train.warmup_steps=0", "train.checkpoint_every=1")
    message = command("train", "toy-detection3d", *arguments, "--out", tmp_path / "run", code=2, capsys=capsys)
    last = message.splitlines()[-1]
    assert last.startswith("tokenfusion: step ")
    assert "not finite" in last
    assert "lower train.lr" in last
    assert "Traceback" not in message
