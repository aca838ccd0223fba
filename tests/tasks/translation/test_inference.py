"""One way to judge: training, eval and what predict wrote give one figure; extractors, protocols, holes, other data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tasks.translation.nano import TASKS, recipe, words
from tasks.walk import command
from torch import Tensor
from torch.nn import functional as F

import tokenfusion
from tokenfusion import UserError, api
from tokenfusion.data import Folder
from tokenfusion.data.image import read_image
from tokenfusion.data.inputs import from_tanh, to_tanh
from tokenfusion.tasks.translation.features import pixels
from tokenfusion.tasks.translation.inference import evaluate, figures
from tokenfusion.tasks.translation.task import frames
from tokenfusion.train import jsonable

FLATTEN = "evaluation.features={_target_: torch.nn.Flatten}"  # somebody else's extractor: bytes in, [B, D] out
PIXELS = {"features": "pixels", "kid_subsets": 5}


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that a test may judge anew."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def by_hand(made: list[Tensor], truth: list[Tensor], known: list[Tensor]) -> tuple[float, float]:
    """MAE and MSE over all measured values of all images; images ``[3, H, W]``, known ``[H, W]``."""
    differences = np.concatenate(
        [(a.double() - b.double()).numpy()[:, k.numpy()].ravel() for a, b, k in zip(made, truth, known, strict=True)]
    )
    return float(np.abs(differences).mean()), float((differences**2).mean())


def truths(folder: Folder, target: str) -> tuple[list[Tensor], list[Tensor]]:
    """The true images in physical units, and where they were measured: read from the files, not by the program's frames."""
    images = [folder.read(name, [target])[target] for name in folder.ids("val")]
    return images, [(image != 0).any(0) if target in ("depth", "normal") else image[0] == image[0] for image in images]


@pytest.mark.parametrize("target", list(TASKS))
def test_training_eval_and_the_models_own_images_give_one_figure(
    target: str, trained: Callable[[str], Path], rooms: Path
) -> None:
    run, folder = trained(target), Folder(rooms)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"val"' in line][-1]
    before = (run / "metrics.json").read_text()
    judged = api.evaluate(run)
    assert (run / "metrics.json").read_text() == before
    for stream, row in judged["streams"].items():
        assert {name: logged[f"{stream}/{name}"] for name in row} == row
    model, spec = tokenfusion.load(run), folder.modalities[target]
    made = []
    for name in folder.ids("val"):
        inputs = {n: to_tanh(x, folder.modalities[n])[None] for n, x in folder.read(name, TASKS[target]).items()}
        with torch.no_grad():
            made.append(model(inputs).ensemble[0])
    images, known = truths(folder, target)
    mae, mse = by_hand(made, [to_tanh(image, spec) for image in images], known)
    assert judged["streams"]["ensemble"]["mae"] == pytest.approx(mae, rel=1e-9)
    assert judged["streams"]["ensemble"]["mse"] == pytest.approx(mse, rel=1e-9)


def test_written_rgb_is_what_was_judged_but_for_the_rounding(
    trained: Callable[[str], Path], rooms: Path, tmp_path: Path
) -> None:
    run, folder = trained("rgb"), Folder(rooms)
    api.predict(run, tmp_path, data=rooms, split="val")
    spec = folder.modalities["rgb"]
    made = [to_tanh(read_image(tmp_path / f"{name}.png", spec), spec) for name in folder.ids("val")]
    images, known = truths(folder, "rgb")
    mae, _ = by_hand(made, [to_tanh(image, spec) for image in images], known)
    assert abs(mae - api.evaluate(run)["streams"]["ensemble"]["mae"]) < 1 / 255  # half a step of 2 / 255


def test_written_depth_gives_the_metres_that_were_judged(
    trained: Callable[[str], Path], rooms: Path, tmp_path: Path
) -> None:
    run, folder = trained("depth"), Folder(rooms)
    api.predict(run, tmp_path, data=rooms, split="val")
    images, known = truths(folder, "depth")
    assert not all(k.all() for k in known), "rooms have holes"
    made = [read_image(tmp_path / f"{name}.png", folder.modalities["depth"]) for name in folder.ids("val")]
    errors = torch.cat([(a - b).abs()[0, k] for a, b, k in zip(made, images, known, strict=True)])
    assert errors.double().mean().item() == pytest.approx(
        api.evaluate(run)["streams"]["ensemble"]["mae_m"], abs=0.0005
    )  # half a millimetre


def test_written_normals_give_the_angle_that_was_judged(run: Path, rooms: Path, tmp_path: Path) -> None:
    folder = Folder(rooms)
    api.predict(run, tmp_path, data=rooms, split="val")
    images, known = truths(folder, "normal")
    made = [read_image(tmp_path / f"{name}.png", folder.modalities["normal"]) for name in folder.ids("val")]
    cosine = torch.cat([F.cosine_similarity(a, b, dim=0)[k] for a, b, k in zip(made, images, known, strict=True)])
    angle = cosine.clamp(-1, 1).acos().rad2deg().double().mean().item()
    assert angle == pytest.approx(api.evaluate(run)["streams"]["ensemble"]["angle_deg"], abs=0.3)


def test_holes_of_the_target_do_not_count(trained: Callable[[str], Path], rooms: Path, tmp_path: Path) -> None:
    """A quarter of the truth taken away: the figure is that of the rest, whatever the model makes of the hole."""
    shutil.copytree(rooms, tmp_path / "rooms")
    folder, run = Folder(tmp_path / "rooms"), Path(shutil.copytree(trained("depth"), tmp_path / "run"))
    for name in folder.ids("val"):
        path = folder.image_path(name, "depth")
        stored = np.array(Image.open(path))
        stored[:16, :32] = 0
        Image.fromarray(stored).save(path)
    judged = api.evaluate(run, data=tmp_path / "rooms")["streams"]["ensemble"]
    api.predict(run, tmp_path / "made", data=tmp_path / "rooms", split="val")
    images, known = truths(folder, "depth")
    assert not any(k[:16, :32].any() for k in known)
    made = [read_image(tmp_path / "made" / f"{name}.png", folder.modalities["depth"]) for name in folder.ids("val")]
    errors = torch.cat([(a - b).abs()[0, k] for a, b, k in zip(made, images, known, strict=True)])
    assert errors.double().mean().item() == pytest.approx(judged["mae_m"], abs=0.0005)


def test_rows_of_several_processes_are_those_of_one(run: Path, rooms: Path) -> None:
    """Four processes, three images, one each: their rows, added up, give the figures of one process."""
    made: Any = api.recipe_of(run)
    judged, model = frames(made, Folder(rooms), "val"), tokenfusion.load(run)
    spec, extractor = judged.specs["normal"], pixels()
    one = evaluate(model, judged, made.evaluation, extractor)  # type: ignore[arg-type]
    total, *others = (evaluate(model, judged, made.evaluation, extractor, n, 4) for n in range(4))  # type: ignore[arg-type]
    for other in others:
        tables = [{n: a[n] + b[n] for n in a} for a, b in zip(total[:4], other[:4], strict=True)]
        total = total._replace(pixels=tables[0], physical=tables[1], spread=tables[2], features=tables[3])
    wanted = figures(one, spec, made.evaluation, 0)
    for stream, row in figures(total, spec, made.evaluation, 0).items():
        assert jsonable(row) == jsonable(wanted[stream])


def test_features_pixels(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json.loads((copy / "metrics.json").read_text())
    command("eval", copy, "evaluation.features=none", capsys=capsys)
    without = json.loads((copy / "metrics.json").read_text())
    assert not {"fid", "kid"} & set(without["streams"]["ensemble"])
    assert without["primary"] == "mae"
    assert "FID" not in without["protocol"]
    command("eval", copy, "evaluation.features=pixels", capsys=capsys)
    again = json.loads((copy / "metrics.json").read_text())
    assert again["streams"] == own["streams"]
    assert "pixels 8x8" in again["protocol"]


def test_a_smaller_grid_of_pixels_is_a_part_of_the_package(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts of tokenfusion need no trust."""
    finer = "evaluation.features={_target_: tokenfusion.tasks.translation.features.pixels, size: 4}"
    command("eval", copy, finer, capsys=capsys)
    assert "pixels 4x4" in json.loads((copy / "metrics.json").read_text())["protocol"]


def test_foreign_features_need_trust(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copy / "metrics.json").read_text()
    message = command("eval", copy, FLATTEN, code=2, capsys=capsys)
    assert "--trust" in message
    assert message.count("\n") == 1
    assert (copy / "metrics.json").read_text() == before
    command("eval", copy, FLATTEN, "--trust", capsys=capsys)
    trusted = json.loads((copy / "metrics.json").read_text())
    assert "Flatten" in trusted["protocol"]
    assert trusted["streams"]["ensemble"]["fid"] > 0


def test_foreign_features_in_a_recipe_need_trust_before_the_first_step(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toy-translation", *words(rooms, "rgb", FLATTEN, "train.steps=1"), "--out", tmp_path / "run"]
    assert "--trust" in command(*arguments, code=2, capsys=capsys)
    assert not (tmp_path / "run").exists()
    command(*arguments, "--trust", capsys=capsys)
    assert "--trust" in command("eval", tmp_path / "run", code=2, capsys=capsys)
    command("eval", tmp_path / "run", "--trust", capsys=capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.features={_target_: torch.nn.Identity}", "wanted [images, features]"),
        ("evaluation.features={_target_: torch.zeros, size: 1}", "torch.zeros"),
        ("evaluation.features={_target_: collections.Counter}", "wanted a torch module"),
        ("evaluation.features={_target_: torch.nn.Nothing}", "torch.nn.Nothing"),
        ("evaluation.features=inceptoin", "evaluation: features: Input should be 'none'"),
        ("evaluation.features=inception", "evaluation.feature_weights=FILE"),
        ("evaluation.feature=pixels", "'features'"),
        ("evaluation.kid_subset_size=1", "kid_subset_size"),
        ("evaluation.scales=[1]", "scales"),
        ("train.lr=1", "keys below evaluation"),
    ],
)
def test_what_cannot_judge_is_said_in_one_line(
    change: str, said: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = command("eval", copy, change, "--trust", code=2, capsys=capsys)
    assert said in message
    assert message.count("\n") == 1


def test_dinov2_judges(real_data: Path, copy: Path) -> None:
    weights = real_data.parent / "weights" / "dinov2_vits14.npz"
    if not weights.is_file():
        pytest.skip("no DINOv2 weights beside the recordings")
    judged = api.evaluate(copy, evaluation={"features": "dinov2", "feature_weights": str(weights)})
    assert "dinov2-vits14" in judged["protocol"]
    assert all(row["fid"] > 0 for row in judged["streams"].values())


def test_the_released_protocol_is_another_one(copy: Path) -> None:
    pytest.importorskip("matplotlib")
    plain = api.evaluate(copy, evaluation=PIXELS)
    released = api.evaluate(copy, evaluation={**PIXELS, "protocol": "released"})
    assert "released" in released["protocol"]
    assert "stretched" in released["protocol"]
    one, other = (content["streams"]["ensemble"] for content in (plain, released))
    assert one["fid"] != other["fid"]
    assert one["mae"] == other["mae"]
    assert "kid_std" not in other


def test_other_data(copy: Path, rooms: Path, tmp_path: Path) -> None:
    samples = (copy / "samples" / "index.json").read_bytes()
    api.prepare_rooms(tmp_path / "more", train=1, val=2, height=40, width=70, seed=3)
    judged = api.evaluate(copy, data=tmp_path / "more")
    assert (judged["images"], judged["split"]) == (2, "val")
    assert judged["streams"] != api.evaluate(copy)["streams"]
    assert api.evaluate(copy, split="train")["images"] == 6
    assert (copy / "samples" / "index.json").read_bytes() == samples
    spec = yaml.safe_load((tmp_path / "more" / "dataset.yaml").read_text())
    spec["modalities"]["normals"] = spec["modalities"].pop("normal")
    (tmp_path / "more" / "dataset.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(UserError, match="no modality 'normal'; did you mean 'normals'"):
        api.evaluate(copy, data=tmp_path / "more")


def test_the_data_moved(rooms: Path, tmp_path: Path) -> None:
    shutil.copytree(rooms, tmp_path / "here")
    api.train(recipe(tmp_path / "here", "shade", "train.steps=1"), tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(UserError, match="say --data FOLDER"):
        api.evaluate(tmp_path / "run")
    assert api.evaluate(tmp_path / "run", data=tmp_path / "there")["target"] == "shade"


def test_from_tanh_undoes_what_the_targets_went_through(rooms: Path) -> None:
    """What files hold survives the way to the network's range and back, within a step of the file."""
    folder = Folder(rooms)
    for target, step in (("rgb", 0.01), ("shade", 1e-5), ("depth", 1e-4), ("normal", 1e-4)):
        (image, *_), (known, *_) = truths(folder, target)
        low, high = folder.modalities[target].limits
        back = from_tanh(to_tanh(image, folder.modalities[target]), folder.modalities[target])
        inside = known & (image <= high).all(0) & (image >= low).all(0)
        assert inside.any()
        assert (back - image).abs()[:, inside].max() < step
