"""Generated images on one's own files: their size, encoding and unit, missing inputs, scores; nothing is written over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.translation.nano import TASKS
from tasks.walk import command, plain_image

import tokenfusion
from tokenfusion import UserError, api
from tokenfusion.data import Folder
from tokenfusion.data.inputs import to_tanh

Trained = Callable[[str], Path]


def own(folder: Path, size: tuple[int, int]) -> dict[str, Path]:
    """A file for every input of ``nano.TASKS``: noise of the right kind."""
    draw = np.random.default_rng(0)
    arrays = {
        "rgb": draw.integers(0, 255, (*size, 3), dtype=np.uint8),
        "normal": draw.integers(1, 255, (*size, 3), dtype=np.uint8),
        "depth": draw.integers(500, 4000, size, dtype=np.uint16),
        **{name: draw.integers(0, 255, size, dtype=np.uint8) for name in ("shade", "edge_texture", "edge_occlusion")},
    }
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in arrays}


@pytest.mark.parametrize(
    ("target", "shape", "dtype"),
    [
        ("rgb", (45, 71, 3), np.uint8),
        ("normal", (45, 71, 3), np.uint8),
        ("depth", (45, 71), np.uint16),
        ("shade", (45, 71), np.uint8),
    ],
)
def test_every_target_in_its_own_encoding(
    target: str, shape: tuple[int, ...], dtype: type, trained: Trained, rooms: Path, tmp_path: Path
) -> None:
    """45 x 71 pixels are no multiples of anything."""
    files = {name: path for name, path in own(tmp_path, (45, 71)).items() if name in TASKS[target]}
    written = api.predict(trained(target), tmp_path / "out", files)
    stem = TASKS[target][0]
    assert [p.name for p in written] == [f"{stem}{end}" for end in (".png", "_scores.npz", "_view.png")
                                         if end != "_view.png" or target != "rgb"]  # fmt: skip
    stored = np.array(Image.open(written[0]))
    assert (stored.shape, stored.dtype) == (shape, dtype)
    spec = Folder(rooms).modalities[target]
    if target != "rgb":
        assert np.array(Image.open(written[2])).shape == (45, 71, 3)
    if target == "depth":
        assert spec.limits[0] == 1.0
        assert stored.min() > 0, "no hole is made up"
        assert stored.max() <= 8000
        assert len(np.unique(stored)) > 256, "more steps than eight bits have"
    if target == "normal":
        lengths = np.linalg.norm(stored / 127.5 - 1, axis=2)
        assert abs(lengths - 1).max() < 3**0.5 / 255 + 1e-6


def test_the_image_is_the_models_ensemble(trained: Trained, rooms: Path, tmp_path: Path) -> None:
    run, folder = trained("rgb"), Folder(rooms)
    written = api.predict(run, tmp_path, {name: folder.image_path("000006", name) for name in TASKS["rgb"]})
    raw = folder.read("000006", TASKS["rgb"])
    with torch.no_grad():
        seen = tokenfusion.load(run)({name: to_tanh(x, folder.modalities[name])[None] for name, x in raw.items()})
    wanted = ((seen.ensemble[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(Image.open(written[0])), wanted)


def test_files_and_the_folder_give_the_same(run: Path, rooms: Path, tmp_path: Path) -> None:
    folder = Folder(rooms)
    alone = api.predict(run, tmp_path / "one", {n: folder.image_path("000007", n) for n in TASKS["normal"]})
    together = api.predict(run, tmp_path / "all", data=rooms, split="val")
    assert len(together) == 9
    for path in alone:
        other = (tmp_path / "all" / path.name).read_bytes()
        assert path.suffix == ".npz" or path.read_bytes() == other


def test_scores(run: Path, tmp_path: Path) -> None:
    """Maps of the image, without the padding to multiples of 32."""
    files = {name: path for name, path in own(tmp_path, (45, 71)).items() if name in TASKS["normal"]}
    with np.load(api.predict(run, tmp_path / "out", files)[1]) as scores:
        assert list(scores["modalities"]) == ["rgb", "depth"]
        assert scores["threshold"] == np.float32(0.5)
        sizes = {name: scores[name].shape for name in scores.files if name[:3] in ("enc", "dec")}
        assert sizes == {
            "enc1.0": (2, 23, 36), "enc2.0": (2, 12, 18), "enc3.0": (2, 6, 9), "enc4.0": (2, 3, 5), "enc5.0": (2, 2, 3),
            "dec1.0": (2, 3, 5), "dec2.0": (2, 6, 9), "dec3.0": (2, 12, 18), "dec4.0": (2, 23, 36),
        }  # fmt: skip
        assert all(0 <= scores[name].min() <= scores[name].max() <= 1 for name in sizes)


@pytest.mark.parametrize("name", TASKS["normal"])
def test_a_missing_modality(name: str, run: Path, rooms: Path, tmp_path: Path) -> None:
    file = Folder(rooms).image_path("000006", name)
    written = api.predict(run, tmp_path, {name: file})
    assert np.array(Image.open(written[0])).shape == (32, 64, 3)
    gone = 1 - TASKS["normal"].index(name)
    with np.load(written[1]) as scores:
        assert (scores["dec2.0"][gone] == 0).all()
        assert (scores["dec2.0"][1 - gone] > 0).all()


def test_a_folder_without_one_of_the_modalities(run: Path, rooms: Path, tmp_path: Path) -> None:
    """A description that names rgb alone: the run makes do with it, and needs no truth."""
    import yaml

    spec = yaml.safe_load((rooms / "dataset.yaml").read_text())
    few = {key: spec[key] for key in ("name", "splits")} | {"modalities": {"rgb": spec["modalities"]["rgb"]}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({**few, "root": str(rooms)}))
    assert len(api.predict(run, tmp_path / "out", data=tmp_path, split="val")) == 9
    few["modalities"] = {"infrared": spec["modalities"]["rgb"]}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({**few, "root": str(rooms)}))
    with pytest.raises(UserError, match="none of the run's modalities rgb, depth"):
        api.predict(run, tmp_path / "more", data=tmp_path)


def test_neither_truth_nor_inputs_are_written_over(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for place in ("normal", "rgb", "label", "shade"):
        message = command("predict", run, "--data", copy, "--out", copy / place, code=2, capsys=capsys)
        assert "choose another --out" in message
        assert message.count("\n") == 1
    photo = copy / "rgb" / "000006.png"
    assert "000006.png" in command("predict", run, f"rgb={photo}", "--out", copy / "rgb", code=2, capsys=capsys)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of predict, and what the message must name."""
    rgb, depth = plain_image(folder / "rgb.png", (32, 64, 3)), plain_image(folder / "depth.png", (32, 64), np.uint16, 9)
    small = plain_image(folder / "small.png", (32, 60), np.uint16, 2000)
    gray, empty = plain_image(folder / "gray.png", (32, 64)), plain_image(folder / "empty.png", (32, 64), np.uint16, 0)
    (folder / "cut.png").write_bytes(rgb.read_bytes()[:60])
    return {
        "another size": ([f"rgb={rgb}", f"depth={small}"], "small.png"),
        "truncated": ([f"rgb={folder / 'cut.png'}", f"depth={depth}"], "cut.png"),
        "one channel": ([f"rgb={gray}", f"depth={depth}"], "gray.png"),
        "three channels": ([f"rgb={rgb}", f"depth={rgb}"], "rgb.png"),
        "empty depth": ([f"rgb={rgb}", f"depth={empty}"], "empty.png"),
        "the target": ([f"rgb={rgb}", f"normal={rgb}"], "normal=...: this run has no such modality"),
        "no split": ([f"rgb={rgb}", "--split", "val"], "--split"),
        "nothing": ([], "rgb=a.jpg"),
    }


CASES = [
    "another size",
    "truncated",
    "one channel",
    "three channels",
    "empty depth",
    "the target",
    "no split",
    "nothing",
]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, named = mistakes(tmp_path)[case]
    message = command("predict", run, *arguments, "--out", tmp_path / "out", code=2, capsys=capsys)
    assert named in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
