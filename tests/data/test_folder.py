"""dataset.yaml and what is read through it, on folders that the tests write and on real recordings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tokenfusion.data.description import IGNORE, default_palette
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError

SCENE = {"points": "points/{id}.npy", "boxes": "boxes/{id}.json", "classes": ["bed", "sofa"]}
EXAMPLE = Path(__file__).parents[2] / "examples" / "nyuv2"
LABEL = np.array([[0, 1, 2, 3], [1, 2, 3, 255]], dtype=np.uint8)  # 0 = unlabelled, 1..3 = classes


def description(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "modalities": {
            "rgb": {"kind": "rgb", "files": "rgb/{id}.png"},
            "depth": {"kind": "depth", "files": "depth/{id}.png", "scale": 0.001},
        },
        "target": {"kind": "label", "files": "label/{id}.png", "offset": -1, "unlabelled": 0},
        "classes": ["wall", {"name": "floor", "color": [1, 2, 3]}, "bed"],
        "splits": {"train": "train.txt", "fit": {"of": "train.txt", "without": "val.txt"}, "val": "val.txt"},
        **changes,
    }


def write(place: Path, **changes: Any) -> Folder:
    rng = np.random.default_rng(0)
    for folder in ("rgb", "depth", "label"):
        (place / folder).mkdir(exist_ok=True)
    for id in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 255, (2, 4, 3), dtype=np.uint8)).save(place / f"rgb/{id}.png")
        Image.fromarray(rng.integers(1, 9000, (2, 4), dtype=np.uint16)).save(place / f"depth/{id}.png")
        Image.fromarray(LABEL).save(place / f"label/{id}.png")
    (place / "train.txt").write_text("a\nb\n\n c \n")
    (place / "val.txt").write_text("b\n")
    (place / "dataset.yaml").write_text(yaml.safe_dump(description(**changes)))
    return Folder(place)


def test_reads_splits_images_target_and_colours(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert folder.ids("train") == ["a", "b", "c"]
    assert folder.ids("fit") == ["a", "c"]
    assert folder.classes == ["wall", "floor", "bed"]
    assert folder.palette.shape == (3, 3)
    assert folder.palette[1].tolist() == [1, 2, 3]
    assert folder.has_target
    frame = folder.read("a", ["depth", "rgb"])
    assert list(frame) == ["depth", "rgb"]
    assert frame["rgb"].shape == (3, 2, 4)
    assert frame["depth"].shape == (1, 2, 4)
    assert 0 < frame["depth"].max() < 9
    assert folder.display("a", "depth").shape == (2, 4, 3)


def test_target_counts_from_zero_and_255_is_ignored(tmp_path: Path) -> None:
    target = write(tmp_path).read_target("a")
    assert target.dtype == torch.int64
    assert target.tolist() == [[255, 0, 1, 2], [0, 1, 2, 255]]
    other = {"files": "label/{id}.png", "ignore": 3, "unlabelled": [0, 255], "offset": -1}
    assert write(tmp_path, target=other).read_target("a").tolist() == [[255, 0, 1, 255], [0, 1, 255, 255]]


@pytest.mark.parametrize("value", [4, 254])
def test_a_label_that_is_no_class_names_file_and_value(tmp_path: Path, value: int) -> None:
    folder = write(tmp_path)
    Image.fromarray(np.where(LABEL == 3, value, LABEL).astype(np.uint8)).save(tmp_path / "label/b.png")
    with pytest.raises(UserError, match=rf"b\.png: holds the label {value}; wanted 1\.\.3"):
        folder.read_target("b")


def test_an_offset_never_makes_a_label_ignored_by_chance(tmp_path: Path) -> None:
    folder = write(tmp_path, target={"files": "label/{id}.png", "ignore": None, "offset": 252})
    with pytest.raises(UserError, match="holds the label 0"):
        folder.read_target("a")


def test_crop_cuts_everything_and_must_fit(tmp_path: Path) -> None:
    whole, folder = write(tmp_path), write(tmp_path, crop=[0, 2, 1, 3])
    assert torch.equal(folder.read("a", ["rgb"])["rgb"], whole.read("a", ["rgb"])["rgb"][:, :, 1:3])
    assert folder.read_target("a").tolist() == [[0, 1], [1, 2]]
    with pytest.raises(UserError, match=r"a\.png: is 2x4, too small for crop"):
        write(tmp_path, crop=[0, 3, 0, 4]).read("a", ["rgb"])


def test_root_may_lie_elsewhere_and_hold_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    write(tmp_path / "files")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(description(root="$TOKENFUSION_TEST_ROOT/files")))
    with pytest.raises(UserError, match="TOKENFUSION_TEST_ROOT"):
        Folder(file)
    monkeypatch.setenv("TOKENFUSION_TEST_ROOT", str(tmp_path))
    assert Folder(file).ids("val") == ["b"]
    assert Folder(file).read("a", ["rgb"])["rgb"].shape == (3, 2, 4)
    (tmp_path / "val.txt").write_text("c\n")  # a list beside the yaml goes before one under root
    assert Folder(file).ids("val") == ["c"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clases": []}, "unknown key 'clases'; did you mean 'classes'"),
        ({"modalities": {"rgb": {"kind": "rgb", "file": "x"}}}, "'modalities.rgb.file'; did you mean 'files'"),
        ({"modalities": {"rgb": {"kind": "rgd", "files": "{id}"}}}, "did you mean 'rgb'"),
        ({"modalities": {"rgb": {"kind": "rgb", "files": "rgb.png"}}}, "must hold {id}"),
        ({"modalities": {}}, "modalities: is empty"),
        ({"target": {"files": "{id}", "ofset": 1}}, "'target.ofset'; did you mean 'offset'"),
        ({"target": {"kind": "label"}}, "'target.files' is missing"),
        ({"classes": []}, "classes: is missing"),
        ({"classes": ["a", "a"]}, "'a' stands there twice"),
        ({"classes": ["a", {"name": "b", "color": [0, 0, 256]}]}, "0..255"),
        ({"splits": {"train": {"of": "train.txt", "witout": "val.txt"}}}, "did you mean 'without'"),
        ({"crop": [0, 0, 0, 4]}, "crop"),
        ({"crop": "all"}, "crop"),
        ({"scene": SCENE | {"point": "p/{id}.npy"}}, "unknown key 'scene.point'; did you mean 'points'"),
        ({"scene": {"boxes": "b/{id}.json"}}, "'scene.points' is missing"),
        ({"scene": {"points": "p.npy"}}, "scene.points is 'p.npy'; it must hold {id}"),
        ({"scene": SCENE | {"boxes": "b/{id}/{view}.json"}}, "scene.boxes is"),
        ({"scene": SCENE | {"classes": []}}, "scene.classes: is missing"),
        ({"scene": SCENE | {"classes": ["bed", "sofa", "bed"]}}, "scene.classes: 'bed' stands there twice"),
        ({"scene": {"points": "p/{id}.npy", "instance": "i/{id}.npy"}}, "scene.boxes: is missing"),
        ({"scene": SCENE, "crop": [0, 1, 0, 2]}, "crop: cannot go together with scene"),
        ({"root": "nowhere"}, "root"),
    ],
)
def test_a_wrong_key_is_one_line_with_file_and_advice(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        write(tmp_path, **changes)
    assert str(tmp_path / "dataset.yaml") in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scenes_may_come_without_images(tmp_path: Path) -> None:
    (tmp_path / "points").mkdir()
    np.save(tmp_path / "points/a.npy", np.ones((3, 6), np.float32))
    folder = write(tmp_path, modalities={}, target=None, scene=SCENE)
    assert folder.scene.classes == ("bed", "sofa")
    assert folder.read_cloud("a").points.tolist() == [[1.0] * 6] * 3
    assert folder.read_cloud("a").box is None
    assert folder.scene_path("a", "boxes") == tmp_path / "boxes/a.json"
    with pytest.raises(UserError, match=r"dataset\.yaml: has no scene\.camera; add its file pattern"):
        folder.read_views("a")
    with pytest.raises(UserError, match=r"dataset\.yaml: has no scene; add"):
        _ = write(tmp_path).scene


@pytest.mark.parametrize("content", ["a: [", "- 1", "", "name: x\n", "a: b: c"])
def test_broken_yaml_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.yaml").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.yaml"):
        Folder(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Folder(tmp_path / "other.yaml")


def test_unknown_names_list_what_is_known(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(UserError, match="no split 'test'; known: fit, train, val"):
        folder.ids("test")
    with pytest.raises(UserError, match="no modality 'deph'; did you mean 'depth'"):
        folder.read("a", ["deph"])
    with pytest.raises(UserError, match="has no target"):
        write(tmp_path, target=None).read_target("a")
    with pytest.raises(UserError, match=r"z\.png: no such file"):
        folder.read("z", ["rgb"])


@pytest.mark.parametrize("ids", ["a\na\n", "../a\n", "/etc/passwd\n", "\n"])
def test_bad_lists_of_ids_are_refused(tmp_path: Path, ids: str) -> None:
    folder = write(tmp_path)
    (tmp_path / "val.txt").write_text(ids)
    with pytest.raises(UserError, match="val"):
        folder.ids("val")


def test_sizes_that_differ_name_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path)
    Image.fromarray(np.ones((2, 5), np.uint16)).save(tmp_path / "depth/b.png")
    with pytest.raises(UserError, match=r"b\.png.*2x5"):
        folder.read("b", ["rgb", "depth"])


def test_only_prepared_folders_can_be_verified(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MANIFEST"):
        write(tmp_path).verify()


def test_default_colours_are_distinct() -> None:
    assert len({tuple(colour) for colour in default_palette(254).tolist()}) > 240
    assert len({tuple(colour) for colour in default_palette(40).tolist()}) == 40
    assert IGNORE == 255


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_real_nyudv2_example() -> None:
    folder = Folder(EXAMPLE)
    assert {split: len(folder.ids(split)) for split in ("train", "fit", "dev_train", "dev_val")} == {
        "train": 795,
        "fit": 730,
        "dev_train": 140,
        "dev_val": 65,
    }
    assert len(folder.classes) == 40
    for id in folder.ids("dev_val")[:3]:
        frame, target = folder.read(id, ["rgb", "depth"]), folder.read_target(id)
        assert target.shape == frame["rgb"].shape[1:] == frame["depth"].shape[1:] == (468, 625)
        assert 0.3 < frame["depth"].min() < frame["depth"].max() <= 10
        assert set(target.unique().tolist()) <= {*range(40), IGNORE}
