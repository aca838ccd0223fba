"""What a user gets wrong in training data, recipes and run folders ends in one line that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tasks.translation.nano import recipe, words
from tasks.walk import check_cut_checkpoints, command, plain_image

import tokenfusion
from tokenfusion import UserError, api
from tokenfusion.data import Folder
from tokenfusion.tasks.translation.task import frames


@pytest.fixture
def broken(rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms that a test may damage."""
    return Path(shutil.copytree(rooms, tmp_path / "rooms"))


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """The last line of a training that ends with exit code 2."""
    message = command("train", "toy-translation", *arguments, "--out", out, code=2, capsys=capsys)
    *progress, last = message.splitlines()
    assert last.startswith("tokenfusion: ")
    assert all(line.startswith("step ") for line in progress), message
    return last


def damage(case: str, folder: Path) -> tuple[str, str]:
    """Spoil one training image; returns what the message must say, of which file."""
    rgb, depth, normal = (folder / name / "000002.png" for name in ("rgb", "depth", "normal"))
    if case == "input cut short":
        rgb.write_bytes(rgb.read_bytes()[:100])
        return "may be damaged", str(rgb)
    if case == "target cut short":
        normal.write_bytes(normal.read_bytes()[:100])
        return "may be damaged", str(normal)
    if case == "input with one channel":
        plain_image(rgb, (32, 64))
        return "has 1 channel(s), rgb needs 3", str(rgb)
    if case == "target with one channel":
        plain_image(normal, (32, 64))
        return "has 1 channel(s), normal needs 3", str(normal)
    if case == "target of another size":
        plain_image(normal, (32, 60, 3))
        return "normal is 32x60", str(normal)
    if case == "empty input":
        plain_image(depth, (32, 64), np.uint16, 0)
        return "holds no depth at all", str(depth)
    assert case == "missing file"
    normal.unlink()
    return "no such file", str(normal)


CASES = [
    "input cut short",
    "target cut short",
    "input with one channel",
    "target with one channel",
    "target of another size",
    "empty input",
    "missing file",
]


@pytest.mark.parametrize("case", CASES)
def test_spoilt_training_data(case: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, file = damage(case, broken)
    last = refused(capsys, tmp_path / "run", *words(broken, "normal", "train.batch_size=6"))
    assert said in last
    assert file in last


def test_spoilt_training_data_behind_workers(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loading process says the same, and in one line."""
    said, file = damage("target cut short", broken)
    last = refused(capsys, tmp_path / "run", *words(broken, "normal", "train.batch_size=6", "train.workers=1"))
    assert said in last
    assert file in last


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.target=rgb", "data.target 'rgb' is one of data.modalities"),
        ("data.target=normals", "no modality 'normals'; did you mean 'normal'?"),
        ("data.targt=normal", "'target'"),
        ("data.modalities=[]", "data.modalities"),
        ("data.modalities=[rgb, rgb]", "must be different names"),
        ("data.modalities=[rgb, dept]", "no modality 'dept'; did you mean 'depth'?"),
        ("data.val=test", "no split 'test'"),
        ("data.crop=[32]", "data.crop"),
        ("data.flip=2", "data.flip"),
        ("loss.l1=-1", "loss.l1"),
        ("model.placement=first", "model.placement"),
        ("model.generator.widths=[16, 16, 16]", "model.generator"),
        ("model.generator.widths=[16, 16, 16, 16, 15]", "model.generator"),
        ("model.generator={_target_: tokenfusion.backbones.mit.mit, variant: b0}", "wanted a MirroredMiT, got MiT"),
        ("model.discriminator={_target_: tokenfusion.backbones.mit.mit, variant: b0}", "model.discriminator"),
        ("model.discriminator={_target_: torch.nn.Identity}", "--trust"),
        ("fuser.threshold=2", "0..1"),
        ("train.accumulate=2", "train.accumulate is 2"),
        ("train.batch_size=7", "6 samples, less than batch_size = 7"),
        ("evaluation.features=dinov2", "evaluation.feature_weights=FILE"),
    ],
)
def test_recipes(change: str, said: str, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, tmp_path / "run", *words(rooms, "normal", change))


def test_a_folder_with_another_run(run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = (copy / "recipe.yaml").read_text()
    last = refused(capsys, copy, *words(rooms, "normal", "loss.l1=7"))
    assert "another recipe (different: loss.l1)" in last
    assert "another recipe" in refused(capsys, copy, *words(rooms, "shade"))
    message = command("train", "toy-segmentation", f"data.root={rooms}", "--out", copy, code=2, capsys=capsys)
    assert message.count("\n") == 1
    assert (copy / "recipe.yaml").read_text() == before


def test_a_checkpoint_cut_short(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    check_cut_checkpoints(copy, "rgb=none.png", tmp_path / "out", capsys)


def test_a_run_whose_papers_do_not_agree(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    spec = yaml.safe_load((copy / "dataset.yaml").read_text())
    del spec["modalities"]["normal"]
    (copy / "dataset.yaml").write_text(yaml.safe_dump(spec))
    for words_of_verb in (["eval", copy], ["predict", copy, "rgb=a.png", "--out", tmp_path / "out"]):
        message = command(*words_of_verb, code=2, capsys=capsys)
        assert "has no modality 'normal', which recipe.yaml names" in message
    shutil.copy(run / "dataset.yaml", copy)
    content = yaml.safe_load((copy / "recipe.yaml").read_text())
    content["model"]["generator"]["widths"] = [32] * 5
    (copy / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert "does not fit recipe.yaml" in command("eval", copy, code=2, capsys=capsys)


def test_a_run_of_others_builds_nothing_foreign(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    own = yaml.safe_load((copy / "recipe.yaml").read_text())
    evil = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    for place in ("fuser", "model.generator", "evaluation.features"):
        content = yaml.safe_load(yaml.safe_dump(own))
        section, _, key = place.rpartition(".")
        (content[section] if section else content)[key] = evil
        (copy / "recipe.yaml").write_text(yaml.safe_dump(content))
        assert "--trust" in command("eval", copy, code=2, capsys=capsys), place
        if place != "evaluation.features":
            with pytest.raises(UserError, match="--trust"):
                tokenfusion.load(copy)
    assert not (tmp_path / "owned").exists()


def test_a_crop_larger_than_the_images_teaches_nothing_of_its_border(rooms: Path, tmp_path: Path) -> None:
    """The border is padding: it is not valid, so the losses leave it out."""
    large = recipe(rooms, "shade", "data.crop=[64, 96]", "train.steps=1")
    for frame in frames(large, Folder(rooms), "train", training=True):  # type: ignore[attr-defined]
        assert frame.target is not None
        assert frame.valid is not None
        assert frame.target.shape == (3, 64, 96)
        assert frame.valid.sum() == 32 * 64, "as many as the image has pixels"
        rows, columns = (frame.valid[0].any(axis) for axis in (1, 0))
        assert (rows.sum(), columns.sum()) == (32, 64), "and in one piece"
        stored = Folder(rooms).read(frame.id, ["shade"])["shade"][0] * 2 - 1
        inside = frame.target[0][frame.valid[0]].view(32, 64)
        assert torch.allclose(inside, stored) or torch.allclose(inside, stored.flip(-1))
    assert api.train(large, tmp_path / "run").steps == 1


def test_images_of_several_sizes(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch wants one size; evaluation takes every image as it is."""
    for name in ("rgb", "depth", "normal"):
        for frame in ("000002", "000007"):
            file = broken / name / f"{frame}.png"
            Image.fromarray(np.array(Image.open(file))[:, :50]).save(file)
    last = refused(capsys, tmp_path / "run", *words(broken, "normal", "train.batch_size=6"))
    assert "differ in size" in last
    assert "a crop or a resize" in last
    cropped = recipe(broken, "normal", "train.batch_size=6", "data.crop=[32, 48]", "train.steps=1")
    assert api.train(cropped, tmp_path / "other").steps == 1
