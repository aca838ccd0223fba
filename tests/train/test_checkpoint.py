"""Checkpoints: what is written comes back; damage, a full disk and a kill in between are noticed."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenfusion.errors import UserError
from tokenfusion.train import load_model
from tokenfusion.train.checkpoint import Checkpoints, read

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.sha256")


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    shared = torch.arange(12.0).view(3, 4) * value
    return {"a": shared, "twin": shared, "rows": shared[1:], "across": shared.t(), "count": torch.tensor(3)}


def filled(run: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(run, keep)
    for step in steps:
        checkpoints.save(step, tensors(step), {"model/a/exp_avg": torch.ones(2) * step}, {"step": step})
    return checkpoints


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flipped" else content[: len(content) // 2])


@pytest.fixture
def _small_files() -> Iterator[None]:
    """Files of this process cannot grow beyond 200 bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    found = filled(tmp_path, 7).newest()
    assert found is not None
    assert found.model.keys() == tensors().keys()
    assert all(torch.equal(found.model[name], value) for name, value in tensors(7).items())
    assert found.optimizer["model/a/exp_avg"].tolist() == [7, 7]
    assert found.state == {"step": 7}
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(FILES)


def test_manifest_is_as_sha256sum_writes_it(tmp_path: Path) -> None:
    filled(tmp_path, 7)
    folder = tmp_path / "checkpoints" / "step-00000007"
    for line in (folder / "MANIFEST.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    filled(tmp_path, 5, 10, 15, 20, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_one_is_named_and_skipped(
    tmp_path: Path, file: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = filled(tmp_path, 5, 10)
    damage(tmp_path / "checkpoints" / "step-00000010" / file, how)
    found = checkpoints.newest()
    assert found is not None
    assert found.state["step"] == 5
    printed = capsys.readouterr().err
    assert "step-00000010" in printed
    assert file in printed
    assert printed.count("\n") == 1
    checkpoints.save(6, tensors(), {}, {"step": 6})
    assert names(tmp_path) == ["damaged-step-00000010", "step-00000005", "step-00000006"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step-00000005"
    whole = (folder / "MANIFEST.sha256").read_bytes()
    for place in range(0, len(whole) * 8, 7):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (folder / "MANIFEST.sha256").write_bytes(content)
        with pytest.raises(UserError, match="step-00000005"):
            read(folder)


def test_missing_file(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000005" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer.safetensors: cannot be read \(No such file"):
        read(tmp_path / "checkpoints" / "step-00000005")


def test_all_damaged(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 5, 10)
    for step in (5, 10):
        damage(tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json", "flipped")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoints.newest()
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        load_model(tmp_path)


def test_none_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).newest() is None
    with pytest.raises(UserError, match="no checkpoint there"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="best: no such checkpoint"):
        load_model(tmp_path, "best")


def test_load_model_of_a_run_or_of_one_checkpoint(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 5, 10)
    checkpoints.save_best(tensors(3), {"step": 3})
    assert load_model(tmp_path)[1] == {"step": 10}
    assert load_model(tmp_path, "best")[1] == {"step": 3}
    assert load_model(tmp_path / "checkpoints" / "step-00000005")[1] == {"step": 5}
    assert load_model(tmp_path / "checkpoints" / "best")[0]["a"][0, 1] == 3
    damage(tmp_path / "checkpoints" / "best" / "model.safetensors", "flipped")
    with pytest.raises(UserError, match=r"best/model.safetensors: damaged"):
        load_model(tmp_path, "best")


@pytest.mark.usefixtures("_small_files")
def test_full_disk_of_a_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-00000005: the checkpoint cannot be written \(File too large\)"):
        filled(tmp_path, 5)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failure_leaves_earlier_checkpoints(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = filled(tmp_path, 5, 10)
    checkpoints.save_best(tensors(3), {"step": 3})
    original, calls = getattr(os, call), 0

    def fails(*arguments: int | Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.save_best(tensors(4), {"step": 4})
    monkeypatch.undo()
    assert names(tmp_path) == ["best", "step-00000005", "step-00000010"]
    assert load_model(tmp_path, "best")[1] == {"step": 3}


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written"):
        filled(tmp_path, 5)


def test_what_a_kill_leaves_behind(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000005", folder / ".tmp-step-00000010")  # before its rename
    checkpoints.save_best(tensors(3), {"step": 3})
    os.rename(folder / "best", folder / ".old-best")  # between the two renames
    assert load_model(tmp_path, "best")[1] == {"step": 3}
    found = checkpoints.newest()
    assert found is not None
    assert found.state["step"] == 5
    assert names(tmp_path) == ["best", "step-00000005"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    Checkpoints(tmp_path).save(5, tensors(8), {}, {"step": 5, "again": True})
    assert load_model(tmp_path)[1]["again"]
    assert names(tmp_path) == ["step-00000005"]
