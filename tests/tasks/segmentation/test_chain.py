"""The whole chain as a user walks it: prepare, train, kill, train, eval, predict, report; and a user's mistakes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tasks.walk import check_same_bits, command, kill_at, plain_image, start

import tokenfusion
from tokenfusion import api
from tokenfusion.data import Folder
from tokenfusion.tasks.segmentation.inference import MULTI_SCALE, infer
from tokenfusion.tasks.segmentation.metrics import confusion_matrix, segmentation_scores

SMALL = ["train.steps=6", "train.batch_size=2", "train.log_every=2", "train.checkpoint_every=2", "train.warmup_steps=1"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "rooms"
    api.prepare_rooms(out, train=6, val=3, height=64, width=96, seed=1)
    return out


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "toy"
    recipe = tokenfusion.read_recipe("toy-segmentation", [f"data.root={rooms}", "data.crop=[64, 96]", *SMALL])
    api.train(recipe, out)
    return out


def test_a_run_folder_is_complete(run: Path) -> None:
    for name in ("recipe.yaml", "dataset.yaml", "metrics.jsonl", "metrics.json", "samples/index.json"):
        assert (run / name).is_file(), name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["split"] == "train"][-1]
    for name in (
        "loss/rgb",
        "loss/depth",
        "loss/ensemble",
        "loss/sparsity",
        "exchange/stage1.0/rgb",
        "donor_below/stage4.1/depth",
    ):
        assert name in logged
    assert logged["lr"] > 0


def test_training_eval_and_predict_agree_to_the_last_digit(run: Path, rooms: Path, tmp_path: Path) -> None:
    in_training = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if '"val"' in x][-1]
    in_eval = api.evaluate(run)
    api.predict(run, tmp_path, data=rooms, split="val")
    folder, matrix = Folder(rooms), torch.zeros(13, 13, dtype=torch.int64)
    for name in folder.ids("val"):
        predicted = torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png"))).long()
        matrix += confusion_matrix(folder.read_target(name), predicted, 13)
    summed = segmentation_scores(matrix)
    for name, value in (
        ("miou", summed.miou),
        ("pixel_accuracy", summed.pixel_accuracy),
        ("mean_accuracy", summed.mean_accuracy),
    ):
        assert in_eval["streams"]["ensemble"][name] == value
        assert in_training[f"ensemble/{name}"] == value


def test_a_killed_run_goes_on_to_the_same_bits(rooms: Path, run: Path, tmp_path: Path) -> None:
    changes = [f"data.root={rooms}", "data.crop=[64, 96]", *SMALL]
    kill_at(start("toy-segmentation", changes, tmp_path / "again"), tmp_path / "again", 2, 6)
    assert api.train(tokenfusion.read_recipe("toy-segmentation", changes), tmp_path / "again").steps == 6
    check_same_bits(run, tmp_path / "again")


def test_predict_writes_label_overlay_and_scores(run: Path, rooms: Path, tmp_path: Path) -> None:
    name = Folder(rooms).ids("val")[0]
    files = {"rgb": rooms / "rgb" / f"{name}.png", "depth": rooms / "depth" / f"{name}.png"}
    written = api.predict(run, tmp_path, files)
    assert [path.name for path in written] == [f"{name}.png", f"{name}_overlay.png", f"{name}_scores.npz"]
    assert np.array(Image.open(written[0])).shape == (64, 96)
    assert np.array(Image.open(written[1])).shape == (64, 96, 3)
    scores = np.load(written[2])
    assert scores["stage1.0"].shape == (2, 16, 24)
    assert list(scores["modalities"]) == ["rgb", "depth"]
    alone = api.predict(run, tmp_path / "rgb", {"rgb": files["rgb"]})  # a missing modality
    assert (np.load(alone[2])["stage1.0"][1] == 0).all()


def test_any_size(run: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (101, 77, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(generator.integers(500, 4000, (101, 77), dtype=np.uint16)).save(tmp_path / "d.png")
    written = api.predict(run, tmp_path / "out", {"rgb": tmp_path / "a.png", "depth": tmp_path / "d.png"})
    assert np.array(Image.open(written[0])).shape == (101, 77)


def test_multi_scale_is_another_protocol(run: Path) -> None:
    plain, many = api.evaluate(run), api.evaluate(run, evaluation=MULTI_SCALE)
    api.evaluate(run)
    assert plain["protocol"] != many["protocol"]
    assert "flip" in many["protocol"]
    assert 0 <= many["streams"]["ensemble"]["miou"] <= 100


def test_report_and_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("report", run, capsys=capsys)
    assert "<html" in (run / "report.html").read_text()
    command("compare", run, run, "--out", tmp_path / "compare.html", capsys=capsys)
    assert (tmp_path / "compare.html").is_file()


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of predict, and the file that the message must name."""
    rgb, depth = (
        plain_image(folder / "rgb.png", (64, 96, 3)),
        plain_image(folder / "depth.png", (64, 96), np.uint16, 2000),
    )
    small = plain_image(folder / "small.png", (32, 48), np.uint16, 2000)
    empty = plain_image(folder / "empty.png", (64, 96), np.uint16, 0)
    (folder / "cut.png").write_bytes(rgb.read_bytes()[:60])
    (folder / "noise.jpg").write_bytes(os.urandom(500))
    np.save(folder / "nan.npy", np.full((64, 96), np.nan, np.float32))
    return {
        "another size": ([f"rgb={rgb}", f"depth={small}"], "small.png"),
        "truncated": ([f"rgb={folder / 'cut.png'}", f"depth={depth}"], "cut.png"),
        "no image": ([f"rgb={folder / 'noise.jpg'}", f"depth={depth}"], "noise.jpg"),
        "missing file": ([f"rgb={folder / 'none.png'}", f"depth={depth}"], "none.png"),
        "empty depth": ([f"rgb={rgb}", f"depth={empty}"], "empty.png"),
        "NaN depth": ([f"rgb={rgb}", f"depth={folder / 'nan.npy'}"], "nan.npy"),
        "channels": ([f"rgb={rgb}", f"depth={rgb}"], "rgb.png"),
        "unknown modality": ([f"rgb={rgb}", f"thermal={depth}"], "thermal"),
        "no pair": (["rgb.png"], "rgb.png"),
    }


CASES = [
    "another size",
    "truncated",
    "no image",
    "missing file",
    "empty depth",
    "NaN depth",
    "channels",
    "unknown modality",
    "no pair",
]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_that_names_the_file(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = mistakes(tmp_path)[case]
    message = command("predict", run, *arguments, "--out", tmp_path / "out", code=2, capsys=capsys)
    assert message.count("\n") == 1
    assert named in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_mistakes_in_recipes_and_runs(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, without_labels = plain_image(tmp_path / "photo.png", (64, 96, 3)), tmp_path / "bare"
    shutil.copytree(rooms, without_labels)
    spec = yaml.safe_load((without_labels / "dataset.yaml").read_text())
    (without_labels / "dataset.yaml").write_text(yaml.safe_dump({k: v for k, v in spec.items() if k != "target"}))
    cases = [
        (["train", "toy-segmentaton"], "toy-segmentation"),
        (["train", "toy-segmentation", "train.step=3"], "'steps'"),
        (["train", "toy-segmentation", "fuser=concatt"], "'concat'"),
        (["train", "toy-segmentation", "fuser.treshold=3"], "'threshold'"),
        (["train", "toy-segmentation", f"data.root={rooms}", "fuser.threshold=3"], "0..1"),
        (["train", "toy-segmentation", "train.lr"], "train.lr=1e-4"),
        (["train", "toy-segmentation", "data.root=nowhere"], "nowhere"),
        (["train", "toy-segmentation", f"data.root={rooms}", "data.modalities=[rgb, lidar]"], "lidar"),
        (["train", "toy-segmentation", f"data.root={rooms}", "data.crop=[64, 96]", "--out", run], "another recipe"),
        (["train", "toy-segmentation", "task=[a]"], "segmentation"),
        (["train", "toy-segmentation", "data.root={a: b}"], "data.root"),
        (["train", "toy-segmentation", "evaluation.scales=[0]"], "evaluation.scales"),
        (
            [
                "train",
                "toy-segmentation",
                f"data.root={rooms}",
                "data.resize=[8, 8]",
                *SMALL,
                "--out",
                tmp_path / "tiny",
            ],
            "32x32",
        ),
        (["eval", run, "--data", without_labels], "needs a target"),
        (["predict", run, "rgb=a.png", "--split", "val"], "--split"),
        (["predict", run, f"rgb={photo}", "--out", photo], "photo.png"),
        (["bench", "nyudv2-mit-b2", "--size", "8x8"], "32x32"),
        (["study", "demo", "fuser=concat", "--out", tmp_path / "study"], "fuser=concat"),
        (["eval", tmp_path], "not a run folder"),
        (["eval", run, "--split", "test"], "test"),
        (["predict", run], "rgb=a.jpg"),
        (["prepare", "nyudv3", "--out", tmp_path / "x"], "nyudv2"),
        (["prepare", "nyudv2", "--out", tmp_path / "x"], "--source"),
        (["convert", rooms / "dataset.yaml", "--from", "segformr", "--out", tmp_path / "y"], "segformer"),
    ]
    for arguments, wanted in cases:
        message = command(*arguments, code=2, capsys=capsys)
        assert wanted in message, (arguments, message)
        assert message.count("\n") == 1, (arguments, message)


def test_a_recipe_of_others_builds_nothing_foreign(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["fuser"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "--trust" in command("eval", copy, code=2, capsys=capsys)
    assert not (tmp_path / "owned").exists()


def test_only_parts_that_this_package_defines_are_built(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library's function that can be reached through this package is not one of its parts, not even for ``show``."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    for target in ("tokenfusion.convert.save_file", "tokenfusion.tasks.segmentation.run.Path", "tokenfusion.api.load"):
        evil = tmp_path / "evil.yaml"
        part = {"_target_": target, "tensors": {}, "filename": str(victim)}
        evil.write_text(yaml.safe_dump({"base": "toy-segmentation", "fuser": {"threshold": part}}))
        assert "--trust" in command("show", evil, code=2, capsys=capsys)
        evil.write_text(yaml.safe_dump({"base": "toy-segmentation", "model": {"backbone": part}}))
        assert "--trust" in command("show", evil, code=2, capsys=capsys)
    assert victim.read_text() == "mine"


def test_predict_spares_its_inputs_and_writes_all_or_nothing(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = plain_image(tmp_path / "a.png", (64, 96, 3))
    before = photo.read_bytes()
    assert "a.png" in command("predict", run, f"rgb={photo}", "--out", tmp_path, code=2, capsys=capsys)
    assert photo.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    second = copy / "rgb" / f"{Folder(copy).ids('val')[1]}.png"
    second.write_bytes(second.read_bytes()[:80])
    message = command(
        "predict", run, "--data", copy, "--split", "val", "--out", tmp_path / "out", code=2, capsys=capsys
    )
    assert second.name in message
    assert not (tmp_path / "out").exists()


def test_one_scale_other_than_one_is_used(run: Path) -> None:
    recipe = api.recipe_of(run)
    model = tokenfusion.load(run)
    image = {name: torch.randn(3, 64, 96) for name in ("rgb", "depth")}
    plain, half = (
        infer(model, image, (64, 96), recipe.evaluation.model_copy(update={"scales": scales})).predictions["ensemble"]
        for scales in ((1.0,), (0.5,))
    )
    assert not torch.equal(plain, half)


def test_a_run_is_lengthened_but_not_given_other_classes(rooms: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    words = [f"data.root={copy}", "data.crop=[64, 96]", "train.batch_size=2", "train.warmup_steps=1"]
    api.train(tokenfusion.read_recipe("toy-segmentation", [*words, "train.steps=1"]), tmp_path / "run")
    longer = tokenfusion.read_recipe("toy-segmentation", [*words, "train.steps=2"])
    assert api.train(longer, tmp_path / "run").steps == 2
    before = (tmp_path / "run" / "dataset.yaml").read_text()
    spec = yaml.safe_load((copy / "dataset.yaml").read_text())
    spec["classes"].reverse()
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(tokenfusion.UserError, match="other classes"):
        api.train(longer, tmp_path / "run")
    assert (tmp_path / "run" / "dataset.yaml").read_text() == before


def test_without_a_labelled_pixel_there_is_nothing_to_judge(run: Path, rooms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rooms"
    shutil.copytree(rooms, folder)
    for file in folder.glob("label/*.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), 255)).save(file)
    with pytest.raises(tokenfusion.UserError, match="split val has no pixel with a class; there is nothing to judge"):
        api.evaluate(run, data=folder)


def test_a_label_out_of_range_is_named(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    plain_image(copy / "label" / f"{Folder(copy).ids('train')[0]}.png", (64, 96), value=99)
    message = command(
        "train",
        "toy-segmentation",
        f"data.root={copy}",
        "data.crop=[64, 96]",
        *SMALL,
        "--out",
        tmp_path / "r",
        code=2,
        capsys=capsys,
    )
    assert "99" in message
    assert "label" in message


def test_real_images(real_data: Path, tmp_path: Path) -> None:
    """Train two steps on NYUDv2, judge two images' worth, predict on one real pair."""
    dataset = Path(__file__).parents[3] / "examples" / "nyuv2" / "dataset.yaml"
    spec = yaml.safe_load(dataset.read_text())
    (tmp_path / "few.txt").write_text("000003\n000007\n")
    spec["splits"]["few"] = str(tmp_path / "few.txt")
    spec["root"] = str(real_data / "nyuv2")
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(spec))
    recipe = tokenfusion.read_recipe(
        "toy-segmentation",
        [
            f"data.root={tmp_path / 'dataset.yaml'}",
            "data.train=few",
            "data.val=few",
            "data.resize=[117, 156]",
            "data.crop=[96, 128]",
            "train.steps=2",
            "train.batch_size=2",
            "train.warmup_steps=1",
        ],
    )
    api.train(recipe, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["images"] == 2
    assert len(metrics["classes"]) == 40
    files = {name: real_data / "nyuv2" / name / f"000003.{end}" for name, end in (("rgb", "jpg"), ("depth", "png"))}
    written = api.predict(tmp_path / "run", tmp_path / "out", files)
    assert np.array(Image.open(written[0])).shape == (480, 640)
