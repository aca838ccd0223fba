"""The whole chain as a user walks it: train, eval, predict, report, compare; every fuser, one to four modalities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tasks.translation.nano import NARROW, TASKS, recipe, words
from tasks.walk import command, lines

import tokenfusion
from tokenfusion import api

BLOCKS = [*(f"enc{n}.0" for n in range(1, 6)), *(f"dec{n}.0" for n in range(1, 5))]
FUSED = [*BLOCKS[:5]]  # where placement is last


def test_a_run_folder_is_complete(run: Path) -> None:
    for name in ("recipe.yaml", "dataset.yaml", "metrics.jsonl", "metrics.json", "samples/index.json"):
        assert (run / name).is_file(), name
    logged = lines(run, "train")[-1]
    terms = {"adversarial", "l1/rgb", "l1/depth", "l1/ensemble", "sparsity"}
    assert {name for name in logged if name.startswith("loss/")} == {
        *(f"loss/discriminator/{name}" for name in ("rgb", "depth", "total")),
        *(f"loss/generator/{name}" for name in (*terms, "total")),
    }
    assert logged["loss/generator/total"] == pytest.approx(sum(logged[f"loss/generator/{name}"] for name in terms))
    for rate in ("exchange", "donor_below"):
        watched = {name for name in logged if name.startswith(f"{rate}/")}
        assert watched == {f"{rate}/{block}/{name}" for block in BLOCKS for name in ("rgb", "depth")}


def test_figures_of_a_run(run: Path) -> None:
    content = json.loads((run / "metrics.json").read_text())
    assert {name: content[name] for name in ("task", "dataset", "split", "images", "target", "checkpoint", "step")} == {
        "task": "translation", "dataset": "rooms", "split": "val", "images": 3, "target": "normal",
        "checkpoint": "last", "step": 4,
    }  # fmt: skip
    assert content["primary"] in content["streams"]["ensemble"]
    assert list(content["streams"]) == ["rgb", "depth", "ensemble"]
    for row in content["streams"].values():
        assert set(row) == {"mae", "mse", "angle_deg", "contrast", "diversity", "fid", "kid", "kid_std"}
        assert 0 < row["mae"] < 2
        assert 0 < row["angle_deg"] < 180
    assert list(content["exchange"]) == list(content["donor_below"]) == BLOCKS
    assert content["parameters"] == sum(p.numel() for p in tokenfusion.load(run).parameters())
    assert "\n" not in content["protocol"]


def test_samples_of_a_run(run: Path) -> None:
    index = json.loads((run / "samples" / "index.json").read_text())
    assert index == {
        "task": "translation", "target": "normal", "ids": ["000006", "000007", "000008"],
        "modalities": ["rgb", "depth"], "blocks": BLOCKS, "threshold": 0.5,
    }  # fmt: skip
    with np.load(run / "samples" / "000007.npz") as arrays:
        pictures = {"input/rgb", "input/depth", "target", *(f"prediction/{n}" for n in ("rgb", "depth", "ensemble"))}
        assert set(arrays) == pictures | {f"scores/{block}" for block in BLOCKS}
        for name in pictures:
            assert (arrays[name].dtype, arrays[name].shape) == (np.uint8, (32, 64, 3))
        assert arrays["scores/enc1.0"].shape == (2, 16, 32)
        assert arrays["scores/enc5.0"].shape == (2, 1, 2)
        assert arrays["scores/dec4.0"].shape == (2, 16, 32)
        assert not np.array_equal(arrays["prediction/rgb"], arrays["prediction/depth"])


def test_the_command_line_walks_all_the_way(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command("train", "toy-translation", *words(rooms, "rgb"), "--out", out, capsys=capsys)
    trained = json.loads((out / "metrics.json").read_text())
    command("eval", out, "--checkpoint", "best", capsys=capsys)
    assert json.loads((out / "metrics.json").read_text())["checkpoint"] == "best"
    command("eval", out, capsys=capsys)
    assert json.loads((out / "metrics.json").read_text()) == trained
    command("predict", out, "--data", rooms, "--split", "val", "--out", tmp_path / "made", capsys=capsys)
    assert len(list((tmp_path / "made").glob("*.png"))) == 3
    command("report", out, capsys=capsys)
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert "edge_texture" in page
    command("compare", out, out, "--out", tmp_path / "compare.html", capsys=capsys)
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.parametrize("target", list(TASKS))
def test_every_kind_of_target_is_reported(target: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    from tokenfusion.report import write_report

    run = trained(target)
    page = write_report(run).read_text()
    assert all(name in page for name in (*TASKS[target], target))
    (run / "report.html").unlink()  # the run is shared


COMBINATIONS = [  # fuser, modalities, placement, score networks
    ("none", 1, "every", "stage"),
    ("tokenfusion", 1, "last", "block"),
    ("concat", 2, "every", "stage"),
    ("average", 3, "last", "block"),
    ("random", 4, "every", "stage"),
    ("tokenfusion", 4, "every", "block"),
    ("tokenfusion-paper", 2, "last", "stage"),
    ("tokenfusion-paper", 3, "every", "block"),
]


@pytest.mark.parametrize(("fuser", "count", "placement", "nets"), COMBINATIONS)
def test_every_fuser_and_number_of_modalities(
    fuser: str, count: int, placement: str, nets: str, rooms: Path, tmp_path: Path
) -> None:
    names = ("shade", "edge_texture", "normal", "depth")[:count]
    changes = [f"data.modalities=[{', '.join(names)}]", f"fuser={fuser}", f"model.placement={placement}"]
    changes += [f"model.score_nets={nets}", f"model.alignment={nets == 'block'}", "data.drop_modality=0.3"]
    short = recipe(rooms, "rgb", *changes, "train.steps=1")
    api.train(short, tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert list(content["streams"]) == [*names, "ensemble"]
    scoring = BLOCKS if placement == "every" else FUSED
    assert list(content["exchange"]) == (scoring if fuser.startswith("tokenfusion") else [])
    if count > 1:
        assert content["streams"][names[0]] != content["streams"][names[1]]
    model = tokenfusion.load(tmp_path)
    output = model({name: torch.rand(1, 3, 32, 64) for name in names})
    assert torch.isfinite(output.ensemble).all()
    if count == 1:
        torch.testing.assert_close(output.ensemble, output.images["shade"])
    written = {path.name for path in api.predict(tmp_path, tmp_path / "made", data=rooms, split="val")}
    assert ("000006_scores.npz" in written) == fuser.startswith("tokenfusion")


def test_resized_runs_make_images_of_that_size(rooms: Path, tmp_path: Path) -> None:
    changes = ["data.resize=[64, 32]", "data.enlarge=[72, 40]", "data.crop=[64, 32]", "train.steps=1"]
    api.train(recipe(rooms, "depth", *changes), tmp_path)
    with np.load(tmp_path / "samples" / "000006.npz") as arrays:
        assert arrays["prediction/ensemble"].shape == arrays["target"].shape == (64, 32, 3)
    made = api.predict(tmp_path, tmp_path / "made", {"rgb": rooms / "rgb" / "000006.png"})[0]
    assert Image.open(made).size == (32, 64)  # columns, rows


def test_real_views(real_data: Path, tmp_path: Path) -> None:
    """Recorded views in Taskonomy's names: prepared, trained on, judged, drawn."""
    source, data = real_data / "taskonomy_like", tmp_path / "data"
    api.prepare("taskonomy", source, data, {"domains": ["rgb", "normal", "depth_zbuffer"], "on_bad": "skip"})
    spec = yaml.safe_load((data / "dataset.yaml").read_text())
    split = next(iter(spec["splits"]))
    changes = [
        f"data.root={data}", "data.modalities=[rgb]", f"data.train={split}", f"data.val={split}",
        "data.resize=[64, 64]", "data.enlarge=[72, 72]", "data.crop=[64, 64]", "train.steps=2", "train.batch_size=1",
        f"model.generator={{_target_: tokenfusion.backbones.mirror.MirroredMiT, {NARROW}}}", "train.warmup_steps=1",
    ]  # fmt: skip
    for target in ("normal", next(name for name in spec["modalities"] if name.startswith("depth"))):
        run = tmp_path / target
        api.train(tokenfusion.read_recipe("toy-translation", [*changes, f"data.target={target}", "fuser=none"]), run)
        content = json.loads((run / "metrics.json").read_text())
        assert np.isfinite(content["streams"]["ensemble"]["mae"])
