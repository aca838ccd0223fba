"""Frames: alignment, padding, functions of (seed, epoch, index), in workers too; targets that are images."""

from __future__ import annotations

import os
import pickle
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from tokenfusion.data.augment import Augment
from tokenfusion.data.folder import IGNORE, Folder
from tokenfusion.data.frames import Batch, Frame, Frames, collate
from tokenfusion.data.inputs import from_tanh
from tokenfusion.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "nyuv2"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Six frames 24x32 whose red channel, depth and label are the same blocks: alignment can be read off."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "depth", "label"):
        (tmp_path / name).mkdir()
    for index in range(6):
        block = np.kron(rng.integers(0, 5, (3, 4)), np.ones((8, 8), int)).astype(np.uint8)
        rgb = np.dstack([block * 50, np.full_like(block, 100), np.full_like(block, 200)])
        Image.fromarray(rgb).save(tmp_path / f"rgb/{index}.png")
        Image.fromarray((block.astype(np.uint16) + 1) * 1000).save(tmp_path / f"depth/{index}.png")
        Image.fromarray(block).save(tmp_path / f"label/{index}.png")
    (tmp_path / "train.txt").write_text("".join(f"{index}\n" for index in range(6)))
    content = {
        "name": "blocks",
        "modalities": {name: {"kind": name, "files": name + "/{id}.png"} for name in ("rgb", "depth")},
        "target": {"files": "label/{id}.png"},
        "classes": list("abcde"),
        "splits": {"train": "train.txt"},
    }
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(content))
    return Folder(tmp_path)


def same(a: Frame, b: Frame) -> bool:
    assert a.target is not None
    assert b.target is not None
    inputs = a.inputs.keys() == b.inputs.keys() and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
    return a.id == b.id and inputs and torch.equal(a.target, b.target)


def test_without_augmentation_the_frame_is_the_file(folder: Folder) -> None:
    frames = Frames(folder, "train", ["depth", "rgb"])
    assert len(frames) == 6
    frame = frames[2]
    assert (frame.id, list(frame.inputs)) == ("2", ["depth", "rgb"])
    assert frame.target is not None
    assert torch.equal(frame.target, folder.read_target("2"))
    assert torch.allclose(frame.inputs["depth"][1], (frame.target + 1) / 5)
    resized = Frames(folder, "train", ["rgb", "depth"], resize=(12, 16))[2]
    assert resized.inputs["rgb"].shape == (3, 12, 16)
    assert resized.target is not None
    assert resized.target.shape == (24, 32)  # evaluation judges at the native size


@pytest.mark.parametrize("crop", [(24, 32), (16, 40), (60, 60), None])
@pytest.mark.parametrize("resize", [None, (48, 64)])
def test_all_modalities_and_the_target_move_together(
    folder: Folder, crop: tuple[int, int] | None, resize: tuple[int, int] | None
) -> None:
    frames = Frames(folder, "train", ["rgb", "depth"], Augment(crop=crop, resize=resize), seed=3)
    for index in range(6):
        _, inputs, target, _ = frames[index]
        assert target is not None
        if crop is not None:
            assert inputs["rgb"].shape == inputs["depth"].shape == (3, *crop)
        assert target.shape == inputs["depth"].shape[1:] == inputs["rgb"].shape[1:]
        inside = target != IGNORE
        assert inside.any()
        depth_m = inputs["depth"][0] * 5
        assert torch.allclose(depth_m[inside], target[inside] + 1.0)
        assert (depth_m[~inside] == 0).all()
        red = inputs["rgb"][0] * 58.395 + 123.675
        assert (red - target * 50.0)[inside].abs().median() < 2  # only block borders are blended


def test_padding_is_mean_for_rgb_zero_for_depth_and_ignore_for_the_target(folder: Folder) -> None:
    _, inputs, target, _ = Frames(folder, "train", ["rgb", "depth"], Augment(crop=(80, 80), scale=(1, 1)))[0]
    assert target is not None
    outside = target == IGNORE
    assert int((~outside).sum()) == 24 * 32
    assert inputs["rgb"][:, outside].abs().max() < 0.01  # the mean, rounded to a byte
    assert (inputs["depth"][:, outside] == 0).all()


def test_the_shorter_side_is_not_scaled_below_its_limit(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb"], Augment(crop=None, scale=(0.1, 0.2), shorter=12))
    assert frames[0].inputs["rgb"].shape == (3, 12, 16)


def test_items_depend_on_seed_epoch_and_index_only(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb", "depth"], Augment(crop=(16, 16), jitter=0.2), seed=5)
    first = [frames[index] for index in range(6)]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = [frames[index] for index in reversed(range(6))][::-1]
    assert torch.equal(torch.get_rng_state(), before)  # no draw from the global generator
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    frames.set_epoch(1)
    assert not any(same(first[index], frames[index]) for index in range(6))
    frames.set_epoch(0)
    assert same(first[3], frames[3])
    other = Frames(folder, "train", ["rgb", "depth"], Augment(crop=(16, 16), jitter=0.2), seed=6)
    assert not same(first[3], other[3])


def test_the_epoch_reaches_persistent_workers(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb"], Augment(crop=(16, 16)), seed=5)
    loader = DataLoader(
        frames,
        batch_size=3,
        num_workers=1,
        persistent_workers=True,
        collate_fn=collate,
        multiprocessing_context="fork",
    )
    for epoch in (0, 7):
        frames.set_epoch(epoch)
        for number, batch in enumerate(loader):
            alone = collate([frames[index] for index in range(3 * number, 3 * number + 3)])
            assert batch.ids == alone.ids
            assert torch.equal(batch.inputs["rgb"], alone.inputs["rgb"]), f"epoch {epoch}"


def test_the_epoch_reaches_workers_that_got_a_pickled_copy(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb"], Augment(crop=(16, 16)), seed=5)
    copy = pickle.loads(ForkingPickler.dumps(frames))  # what the spawn and forkserver methods do
    frames.set_epoch(7)
    assert same(copy[3], frames[3])


def test_collate_stacks_and_names_frames_that_differ(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb", "depth"])
    batch = collate([frames[0], frames[1]])
    assert isinstance(batch, Batch)
    assert batch.ids == ["0", "1"]
    assert batch.inputs["depth"].shape == (2, 3, 24, 32)
    assert batch.target is not None
    assert batch.target.shape == (2, 24, 32)
    smaller = Frame("small", {"rgb": torch.zeros(3, 4, 4), "depth": torch.zeros(3, 4, 4)}, None)
    with pytest.raises(UserError, match=r"'0'.*'small'"):
        collate([frames[0], smaller])
    assert collate([smaller]).target is None


def test_missing_files_and_sizes_are_found_early(folder: Folder) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder.target_path("1"))
    with pytest.raises(UserError, match=r"label/1\.png: the target is 5x5"):
        Frames(folder, "train", ["rgb"])[1]
    folder.image_path("4", "depth").unlink()
    with pytest.raises(UserError, match=r"depth/4\.png: no such file; split 'train' lacks 1 of 18"):
        Frames(folder, "train", ["rgb", "depth"])
    assert len(Frames(folder, "train", ["rgb"])) == 6  # what is not asked for need not be there


@pytest.fixture
def scenes(tmp_path: Path) -> Folder:
    """Four frames 24x32 for translation: depth and normal hold the same blocks as rgb, and holes in the same places."""
    rng = np.random.default_rng(1)
    for name in ("rgb", "depth", "normal"):
        (tmp_path / name).mkdir()
    for index in range(4):
        block = np.kron(rng.integers(1, 5, (3, 4)), np.ones((8, 8), int))
        hole = (np.kron(rng.integers(0, 4, (6, 8)), np.ones((4, 4), int)) == 0)[:, :, None]
        Image.fromarray(np.dstack([block * 50] * 3).astype(np.uint8)).save(tmp_path / f"rgb/{index}.png")
        Image.fromarray(np.where(hole[:, :, 0], 0, block * 1000).astype(np.uint16)).save(
            tmp_path / f"depth/{index}.png"
        )
        normal = np.dstack([block * 60, np.full_like(block, 128), np.full_like(block, 20)])
        Image.fromarray(np.where(hole, 0, normal).astype(np.uint8)).save(tmp_path / f"normal/{index}.png")
    (tmp_path / "train.txt").write_text("0\n1\n2\n3\n")
    modalities = {name: {"kind": name, "files": name + "/{id}.png"} for name in ("rgb", "depth", "normal")}
    content = {"name": "scenes", "modalities": modalities, "splits": {"train": "train.txt"}}
    content |= {"target": {"files": "label/{id}.png"}, "classes": ["a"]}  # there are no labels: they are not wanted
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(content))
    return Folder(tmp_path)


def test_a_target_modality_comes_in_the_range_of_tanh_with_its_validity(scenes: Folder) -> None:
    frame = Frames(scenes, "train", ["rgb", "normal"], target="depth")[1]
    assert list(frame.inputs) == ["rgb", "normal"]
    raw = scenes.read("1", ["rgb", "normal", "depth"])
    assert torch.allclose(frame.inputs["rgb"], raw["rgb"] / 127.5 - 1, atol=1e-6)
    assert torch.allclose(frame.inputs["normal"], raw["normal"], atol=1e-6)
    assert frame.target is not None
    assert frame.valid is not None
    assert frame.target.shape == (3, 24, 32)
    assert (frame.valid.shape, frame.valid.dtype) == ((1, 24, 32), torch.bool)
    assert torch.equal(frame.valid, raw["depth"] > 0)
    assert 0 < frame.valid.sum() < 24 * 32
    back = from_tanh(frame.target, scenes.modalities["depth"])
    assert torch.allclose(back, raw["depth"], atol=1e-4)


@pytest.mark.parametrize("target", ["depth", "normal", "rgb"])
@pytest.mark.parametrize("augment", [None, Augment(crop=(40, 40), scale=(0.8, 1.2), flip=0.5)])
def test_inputs_target_and_validity_move_together(scenes: Folder, target: str, augment: Augment | None) -> None:
    others = [name for name in ("rgb", "depth", "normal") if name != target]
    frames = Frames(scenes, "train", others, augment, seed=2, resize=None if augment else (12, 20), target=target)
    for index in range(4):
        frame = frames[index]
        assert frame.target is not None
        assert frame.valid is not None
        coded = {**frame.inputs, target: frame.target}
        images = {name: from_tanh(image, scenes.modalities[name]) for name, image in coded.items()}
        size = augment.crop if augment else (12, 20)
        assert all(image.shape[1:] == size for image in images.values())
        assert frame.valid.shape == (1, *(size or ()))
        known = images["depth"][0] > 0
        assert torch.equal(images["normal"].norm(dim=0) > 0.5, known)
        inside = (images["rgb"][0] - 123.675).abs() > 1.0  # padding is the mean
        assert torch.equal(frame.valid[0], known) if target != "rgb" else bool((frame.valid[0] >= known).all())
        if augment is not None and target == "rgb":
            assert (frame.valid[0] == inside).float().mean() > 0.97  # resampled colours may be near the mean
        level = (images["rgb"][0] / 50)[known]
        assert (images["depth"][0][known] - level).abs().mean() < 0.25  # 1.2 where they had moved apart


def test_a_flip_turns_the_target_normals(scenes: Folder) -> None:
    plain = Frames(scenes, "train", ["rgb"], Augment(scale=(1, 1), flip=0.0), target="normal")[0]
    flipped = Frames(scenes, "train", ["rgb"], Augment(scale=(1, 1), flip=1.0), target="normal")[0]
    assert plain.target is not None
    assert flipped.target is not None
    assert plain.valid is not None
    assert flipped.valid is not None
    assert torch.equal(flipped.valid, plain.valid.flip(-1))
    assert torch.equal(flipped.inputs["rgb"], plain.inputs["rgb"].flip(-1))
    mirrored = plain.target.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert torch.allclose(flipped.target, mirrored, atol=1e-6)
    assert flipped.target[0].min() < -0.2  # x was there to be turned


def test_translation_frames_are_functions_of_seed_epoch_and_index(scenes: Folder) -> None:
    frames = Frames(scenes, "train", ["rgb"], Augment(crop=(16, 16)), seed=5, target="depth")
    first = [frames[index] for index in range(4)]
    assert all(same(first[index], frames[index]) for index in reversed(range(4)))
    frames.set_epoch(1)
    assert not any(same(first[index], frames[index]) for index in range(4))
    batch = collate(first)
    assert batch.target is not None
    assert batch.valid is not None
    assert batch.target.shape == (4, 3, 16, 16)
    assert batch.valid.shape == (4, 1, 16, 16)


def test_targets_that_cannot_be_are_refused_at_once(scenes: Folder) -> None:
    with pytest.raises(UserError, match=r"data\.target is 'rgb', which is among data\.modalities"):
        Frames(scenes, "train", ["rgb", "depth"], target="rgb")
    with pytest.raises(UserError, match="no modality 'normals'; did you mean 'normal'"):
        Frames(scenes, "train", ["rgb"], target="normals")
    with pytest.raises(UserError, match=r"augment\.jitter is 0\.1, but it would recolour the target 'rgb'"):
        Frames(scenes, "train", ["depth"], Augment(jitter=0.1), target="rgb")
    scenes.image_path("2", "normal").unlink()
    with pytest.raises(UserError, match=r"normal/2\.png: no such file; split 'train' lacks 1 of 8 files"):
        Frames(scenes, "train", ["rgb"], target="normal")


def test_segmentation_has_no_validity_map(folder: Folder) -> None:
    frames = Frames(folder, "train", ["rgb"])
    assert frames[0].valid is None
    assert collate([frames[0], frames[1]]).valid is None


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_real_pipes_translate_to_normals() -> None:
    folder = Folder(EXAMPLE.parent / "pipes")
    train, val = folder.ids("train"), folder.ids("val")
    assert (len(train), len(val), len({*train, *val})) == (40, 10, 50)
    augment = Augment(crop=(96, 160), scale=(1, 1), flip=0.0)
    frames = Frames(folder, "train", ["rgb", "depth"], augment, target="normal")
    assert all(folder.image_path(id, name).is_file() for id in val for name in folder.modalities)
    z = torch.stack([frame.target[2].mean() for frame in (frames[i] for i in range(5)) if frame.target is not None])
    assert (z > 0.5).all()  # towards the camera


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_a_real_pair_is_read_and_augmented_quickly() -> None:
    frames = Frames(Folder(EXAMPLE), "dev_val", ["rgb", "depth"], Augment(crop=(480, 640)))
    frames[0]
    best = float("inf")
    for index in range(1, 9):
        start = time.thread_time()  # of this thread: a busy machine does not count
        assert frames[index].inputs["rgb"].shape == (3, 480, 640)
        best = min(best, time.thread_time() - start)
    assert best < 0.06  # 10-15 ms on an idle core; this only catches a lost fast path
