"""Inputs that are missing or worse: each kind does what it says, always the same to the same file, before all else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from tokenfusion.data.cloud import Cloud
from tokenfusion.data.degrade import Conditions, Degradation, degraded, degraded_cloud
from tokenfusion.data.folder import Folder
from tokenfusion.data.frames import Frames
from tokenfusion.data.inputs import normalise, prepare_inputs, resize_image
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.scenes import Scenes
from tokenfusion.errors import UserError

SPECS = {kind: ModalitySpec(kind=kind) for kind in ("rgb", "depth", "normal", "thermal", "curvature")}
KINDS = {"rgb": "rgb", "depth": "depth", "heat": "thermal", "points": "points"}


def image(kind: str, rows: int = 60, columns: int = 80) -> Tensor:
    """Physical; a tenth of what can be missing is."""
    generator = torch.Generator().manual_seed(1)
    if kind == "rgb":
        return torch.randint(0, 256, (3, rows, columns), generator=generator).float()
    x = torch.rand(3 if kind in ("normal", "curvature") else 1, rows, columns, generator=generator)
    if kind in ("normal", "depth"):
        x = torch.nn.functional.normalize(x - 0.5, dim=0) if kind == "normal" else 1.0 + 4.0 * x
        x = x * (torch.rand(rows, columns, generator=generator) > 0.1)
    return x


def made(kind: str, how: str, amount: float, id: str = "a", **size: int) -> tuple[Tensor, Tensor]:
    before = image(kind, **size)
    kept = before.clone()
    after = degraded(before, SPECS[kind], Degradation(kind=how, amount=amount), id, kind)  # type: ignore[arg-type]
    assert torch.equal(before, kept), "what was read is not changed in place"
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    return before, after


@pytest.mark.parametrize("kind", ["rgb", "thermal", "curvature"])
def test_a_shifted_image_moves_right_and_down_and_repeats_its_edge(kind: str) -> None:
    before, after = made(kind, "shift", 5)
    assert torch.equal(after[:, 5:, 5:], before[:, :-5, :-5])
    assert torch.equal(after[:, :5, 5:], before[:, :1, :-5].expand(-1, 5, -1))
    assert torch.equal(after[:, 5:, :5], before[:, :-5, :1].expand(-1, -1, 5))


@pytest.mark.parametrize("kind", ["depth", "normal"])
def test_behind_what_can_be_missing_nothing_was_measured(kind: str) -> None:
    before, after = made(kind, "shift", 3)
    assert torch.equal(after[:, 3:, 3:], before[:, :-3, :-3])
    assert not after[:, :3].any()
    assert not after[:, :, :3].any()
    assert not made(kind, "shift", 1000)[1].any()


def test_dark_is_less_light_in_whole_steps() -> None:
    before, after = made("rgb", "dark", 0.9)
    assert torch.equal(after, (before * 0.1).round())
    assert len(after.unique()) == 27, "of 256 levels: nothing brings the others back"
    assert not made("rgb", "dark", 1)[1].any()


def test_noise_of_rgb_is_a_share_of_its_range() -> None:
    before, after = made("rgb", "noise", 0.05, rows=200, columns=200)
    inside = (before > 60) & (before < 195)
    noise = (after - before)[inside]
    assert noise.std().item() == pytest.approx(0.05 * 255, rel=0.02)
    assert noise.mean().abs() < 0.2
    assert after.min() >= 0
    assert after.max() <= 255
    assert torch.equal(after, after.round())


def test_noise_of_depth_is_in_metres_and_leaves_what_is_missing() -> None:
    before, after = made("depth", "noise", 0.2, rows=200, columns=200)
    known = before > 0
    assert (after - before)[known].std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(after > 0, known), "measured stays measured, missing stays missing"
    drowned = made("depth", "noise", 50)[1]
    assert torch.equal(drowned > 0, image("depth") > 0)


def test_noise_of_other_kinds() -> None:
    before, after = made("thermal", "noise", 0.1, rows=200, columns=200)
    assert (after - before).std().item() == pytest.approx(0.1, rel=0.02)
    before, after = made("normal", "noise", 0.3)
    known = before.any(0)
    assert torch.equal(after.any(0), known)
    torch.testing.assert_close(after.norm(dim=0)[known], torch.ones(int(known.sum())))
    assert not torch.allclose(after, before, atol=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_holes_are_a_share_of_what_was_measured(share: float) -> None:
    before, after = made("depth", "holes", share)
    known, left = before > 0, after > 0
    assert int(known.sum() - left.sum()) == round(share * int(known.sum()))
    assert torch.equal(after[left], before[left])
    assert not (left & ~known).any()


def test_holes_are_blobs() -> None:
    """Of a hole's neighbours far more are holes than of any pixel's."""
    full = torch.ones(1, 120, 160)
    hole = degraded(full, SPECS["depth"], Degradation(kind="holes", amount=0.2), "a", "depth")[0] == 0
    beside = (hole[:, 1:] & hole[:, :-1]).sum() / hole[:, :-1].sum()
    assert beside > 0.6
    apart = (hole[:, 40:] & hole[:, :-40]).sum() / hole[:, :-40].sum()
    assert apart < 0.35, "and they are spread over the image"


@pytest.mark.parametrize(("kind", "how", "amount"), [("rgb", "noise", 0.1), ("depth", "holes", 0.3)])
def test_the_same_file_always_suffers_the_same(kind: str, how: str, amount: float) -> None:
    torch.manual_seed(5)
    first = made(kind, how, amount)[1]
    torch.manual_seed(6)
    assert torch.equal(made(kind, how, amount)[1], first), "whatever was drawn before"
    assert not torch.equal(made(kind, how, amount, id="b")[1], first)
    worse = Degradation(kind=how, amount=amount)  # type: ignore[arg-type]
    assert not torch.equal(degraded(image(kind), SPECS[kind], worse, "a", "other"), first)


def cloud(count: int = 4000) -> Cloud:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(count, 6, generator=generator) * torch.tensor([4.0, 4, 2, 1, 1, 1])
    return Cloud(points, torch.arange(count))


def test_noise_of_points_moves_coordinates_alone() -> None:
    before, after = cloud(), degraded_cloud(cloud(), Degradation(kind="noise", amount=0.05), "a")
    moved = after.points[:, :3] - before.points[:, :3]
    assert moved.std().item() == pytest.approx(0.05, rel=0.03)
    assert torch.equal(after.points[:, 3:], before.points[:, 3:])
    assert torch.equal(after.box, before.box)  # type: ignore[arg-type]
    again = degraded_cloud(cloud(), Degradation(kind="noise", amount=0.05), "a")
    assert torch.equal(again.points, after.points)


@pytest.mark.parametrize("share", [0.25, 0.8, 1.0])
def test_holes_of_a_cloud_are_cubes_without_points(share: float) -> None:
    before, after = cloud(), degraded_cloud(cloud(), Degradation(kind="holes", amount=share), "a")
    dropped = round(share * 4000)
    assert len(after.points) == max(4000 - dropped, 1)
    assert after.box is not None
    assert torch.equal(after.points, before.points[after.box]), "each point keeps its box, and all keep their order"
    cubes = {tuple(row) for row in (before.points[:, :3] / 0.25).floor().int().tolist()}
    left = {tuple(row) for row in (after.points[:, :3] / 0.25).floor().int().tolist()}
    assert len(left) <= (1 - share) * len(cubes) * 1.1 + 1, "whole cubes went, not points here and there"
    assert degraded_cloud(Cloud(before.points), Degradation(kind="holes", amount=share), "a").box is None


def test_what_is_given_is_what_is_not_missing() -> None:
    names = list(KINDS)
    for count in range(len(names)):
        for missing in itertools.combinations(names, count):
            given = Conditions(missing=missing).given(KINDS)
            assert given == tuple(name for name in names if name not in missing)
    assert Conditions().are_plain
    assert Conditions().told() == ""


def worse(name: str, kind: str, amount: float = 0.5) -> Conditions:
    return Conditions.model_validate({"degrade": {name: {"kind": kind, "amount": amount}}})


def test_a_protocol_tells_its_conditions() -> None:
    assert Conditions(missing=("rgb", "heat")).told() == ", without rgb and heat"
    both = Conditions.model_validate(
        {
            "missing": ["rgb"],
            "degrade": {"depth": {"kind": "shift", "amount": 8}, "heat": {"kind": "noise", "amount": 0.1}},
        }
    )
    assert both.told() == ", without rgb, depth with shift 8, heat with noise 0.1"
    assert not both.are_plain


MISTAKES = {
    "every input": (Conditions(missing=tuple(KINDS)), r"evaluation\.missing is .*, which is every input; leave one"),
    "an unknown name": (Conditions(missing=("dept",)), r"missing names 'dept', which is no input.*mean 'depth'"),
    "an unknown name, degraded": (worse("rbg", "noise"), r"degrade names 'rbg', which is no input.*mean 'rgb'"),
    "missing and worse": (
        Conditions(missing=("rgb",), degrade=worse("rgb", "dark").degrade),
        r"degrade names 'rgb', which evaluation\.missing leaves out",
    ),
    "dark depth": (worse("depth", "dark"), r"degrade\.depth\.kind is 'dark'; depth can have noise, shift, holes"),
    "holes in rgb": (worse("rgb", "holes"), "rgb can have noise, shift, dark"),
    "holes in thermal": (worse("heat", "holes"), r"degrade\.heat\.kind is 'holes'; thermal can have noise, shift"),
    "shifted points": (worse("points", "shift", 2), "points can have noise, holes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_one_line(name: str) -> None:
    conditions, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        conditions.given(KINDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "amount"),
    [("noise", 0), ("noise", -1), ("noise", float("inf")), ("shift", 1.5), ("dark", 1.1), ("holes", 2), ("fog", 0.1)],
)
def test_amounts_that_mean_nothing(kind: str, amount: float) -> None:
    with pytest.raises(ValidationError):
        Degradation(kind=kind, amount=amount)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Three frames 24x32 of noise, with boxes and a camera."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "depth", "label", "points", "boxes", "camera"):
        (tmp_path / name).mkdir()
    camera = {"K": [[30, 0, 15.5], [0, 30, 11.5], [0, 0, 1]], "pose": np.eye(4).tolist()}
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(tmp_path / f"rgb/{index}.png")
        Image.fromarray(rng.integers(500, 5000, (24, 32), dtype=np.uint16)).save(tmp_path / f"depth/{index}.png")
        Image.fromarray(rng.integers(0, 3, (24, 32), dtype=np.uint8)).save(tmp_path / f"label/{index}.png")
        np.save(tmp_path / f"points/{index}.npy", rng.random((300, 3)).astype(np.float32) * 4)
        (tmp_path / f"boxes/{index}.json").write_text(json.dumps({"boxes": []}))
        (tmp_path / f"camera/{index}.json").write_text(json.dumps(camera))
    (tmp_path / "val.txt").write_text("0\n1\n2\n")
    content = {
        "name": "noise",
        "modalities": {name: {"kind": name, "files": name + "/{id}.png"} for name in ("rgb", "depth")},
        "target": {"files": "label/{id}.png"},
        "classes": list("abc"),
        "splits": {"val": "val.txt"},
        "scene": {
            "points": "points/{id}.npy",
            "boxes": "boxes/{id}.json",
            "camera": "camera/{id}.json",
            "classes": ["x"],
        },
    }
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(content))
    return Folder(tmp_path)


def test_frames_suffer_before_they_are_resized(folder: Folder) -> None:
    """And labels, and the other modality, do not."""
    conditions = worse("rgb", "shift", 4)
    plain = Frames(folder, "val", ["rgb", "depth"], resize=(12, 16))[1]
    shifted = Frames(folder, "val", ["rgb", "depth"], resize=(12, 16), conditions=conditions)[1]
    raw = folder.read("1", ["rgb"])
    raw["rgb"] = degraded(raw["rgb"], folder.modalities["rgb"], conditions.degrade["rgb"], "1", "rgb")
    assert torch.equal(shifted.inputs["rgb"], prepare_inputs(raw, folder.select(["rgb"]), (12, 16))["rgb"])
    assert not torch.equal(shifted.inputs["rgb"], plain.inputs["rgb"])
    assert torch.equal(shifted.inputs["depth"], plain.inputs["depth"])
    assert torch.equal(shifted.target, plain.target)  # type: ignore[arg-type]


def test_a_missing_modality_is_not_even_read(folder: Folder) -> None:
    plain = Frames(folder, "val", ["rgb", "depth"])[0]
    for path in (folder.root / "depth").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no such file"):
        Frames(folder, "val", ["rgb", "depth"])
    frame = Frames(folder, "val", ["rgb", "depth"], conditions=Conditions(missing=("depth",)))[0]
    assert list(frame.inputs) == ["rgb"]
    assert torch.equal(frame.inputs["rgb"], plain.inputs["rgb"])


def test_a_target_that_is_generated_is_no_input(folder: Folder) -> None:
    plain = Frames(folder, "val", ["rgb"], target="depth")[2]
    dark = Frames(folder, "val", ["rgb"], target="depth", conditions=worse("rgb", "dark"))[2]
    assert torch.equal(dark.target, plain.target)  # type: ignore[arg-type]
    assert (dark.inputs["rgb"] <= plain.inputs["rgb"] + 0.01).all()
    with pytest.raises(UserError, match="'depth', which is no input"):
        Frames(folder, "val", ["rgb"], target="depth", conditions=worse("depth", "holes"))


def scenes(folder: Folder, conditions: Conditions, modalities: tuple[str, ...] = ("points", "rgb")) -> Scenes:
    return Scenes(folder, "val", modalities, points=200, image_size=(12, 16), conditions=conditions)


def test_scenes_without_their_image_are_scenes_of_points(folder: Folder) -> None:
    missing, alone = scenes(folder, Conditions(missing=("rgb",)))[1], scenes(folder, Conditions(), ("points",))[1]
    assert missing.images is None
    assert missing.projection is None
    assert torch.equal(missing.points, alone.points)


def test_a_scenes_image_and_points_suffer_apart(folder: Folder) -> None:
    plain, dark = scenes(folder, Conditions())[1], scenes(folder, worse("rgb", "dark", 0.7))[1]
    assert torch.equal(dark.points, plain.points)
    raw = (folder.read("1", ["rgb"])["rgb"] * 0.3).round().to(torch.uint8)
    spec = folder.modalities["rgb"]
    assert torch.equal(
        dark.images[0], normalise({"rgb": resize_image(raw, (12, 16), "bilinear").float()}, {"rgb": spec})["rgb"]
    )  # type: ignore[index]
    moved = scenes(folder, worse("points", "noise", 0.1))[1]
    assert torch.equal(moved.images, plain.images)  # type: ignore[arg-type]
    assert (moved.points - plain.points).std().item() == pytest.approx(0.1, rel=0.15)
    assert len(scenes(folder, worse("points", "holes", 0.9))[1].points) == 200
