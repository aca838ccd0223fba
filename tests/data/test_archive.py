"""The atomic writer, the manifest and the readers of foreign archives."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenfusion.data.folder import Folder
from tokenfusion.data.prepare import archive
from tokenfusion.data.prepare.archive import MANIFEST, Staging, find_file, open_hdf5, read_mat, track, verify_manifest
from tokenfusion.errors import UserError

scipy_io = pytest.importorskip("scipy.io")
h5py = pytest.importorskip("h5py")

DESCRIPTION = {"name": "tiny", "modalities": {"rgb": {"kind": "rgb", "files": "rgb/{id}.png"}}}


def fill(staging: Staging) -> None:
    staging.image("rgb/1.png", np.full((4, 6, 3), 7, np.uint8))
    staging.array("points/1.npy", np.ones((3, 6), np.float32))
    staging.json("camera/1.json", {"K": [1, 2]})
    staging.dataset(DESCRIPTION, {"train": ["1"]})


def test_a_written_folder_is_whole_readable_and_verified(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    with Staging(out) as staging:
        fill(staging)
        (staging.path / "extra.bin").write_bytes(b"written by other means")
        assert not out.exists()
        assert staging.path.name.startswith(".data.partial-")
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    folder = Folder(out)
    assert folder.ids("train") == ["1"]
    assert (folder.read("1", ["rgb"])["rgb"] == 7).all()
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    listed = [line.split("  ")[1] for line in (out / MANIFEST).read_text().splitlines()]
    assert sorted([*listed, MANIFEST]) == files
    assert folder.verify() == len(listed) == 6
    check = subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=out, capture_output=True)
    assert check.returncode == 0


def test_a_file_that_was_taken_back_is_in_no_manifest(tmp_path: Path) -> None:
    with Staging(tmp_path / "data") as staging:
        fill(staging)
        staging.write("rgb/2.png", b"damaged")
        staging.remove("rgb/2.png")
        staging.write("rgb/3.png", b"first")
        staging.remove("rgb/3.png")
        staging.write("rgb/3.png", b"second")
    assert sorted(path.name for path in (tmp_path / "data/rgb").iterdir()) == ["1.png", "3.png"]
    assert verify_manifest(tmp_path / "data") == 6


def test_verify_names_what_changed_or_is_missing(tmp_path: Path) -> None:
    with Staging(tmp_path / "data") as staging:
        fill(staging)
    image = tmp_path / "data/rgb/1.png"
    flipped = bytearray(image.read_bytes())
    flipped[-20] ^= 1
    image.write_bytes(flipped)
    with pytest.raises(UserError, match=r"rgb/1\.png has changed \(1 of 5"):
        verify_manifest(tmp_path / "data")
    image.unlink()
    with pytest.raises(UserError, match=r"rgb/1\.png is missing"):
        verify_manifest(tmp_path / "data")
    for line in ("no manifest", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64}  /etc/passwd"):
        (tmp_path / "data" / MANIFEST).write_text(line + "\n")
        with pytest.raises(UserError, match="no line of a manifest"):
            verify_manifest(tmp_path / "data")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_interruption_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), Staging(tmp_path / "data") as staging:  # noqa: PT012
        fill(staging)
        raise failure("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("data", "file"):
        with pytest.raises(UserError, match=f"{name}: exists"), Staging(tmp_path / name):
            pass
    assert (tmp_path / "data/mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    with Staging(tmp_path / "empty") as staging:
        fill(staging)
    assert Folder(tmp_path / "empty").ids("train") == ["1"]


def write_half(out: Path, ready: Any) -> None:
    with Staging(out) as staging:
        staging.write("a.txt", "half")
        ready.send("ready")
        ready.recv()  # for ever


def test_a_killed_writer_leaves_a_hidden_folder_that_the_next_call_removes(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=write_half, args=(tmp_path / "data", there), daemon=True)
    child.start()
    assert here.recv() == "ready"
    with pytest.raises(UserError, match="another process"), Staging(tmp_path / "data"):
        pass
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1
    assert leftovers[0].name.startswith(".data.partial-")
    with Staging(tmp_path / "data") as staging:
        assert not leftovers[0].exists()
        fill(staging)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert Folder(tmp_path / "data").verify() == 5


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Staging(tmp_path / "file" / "data"):
        pass

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"), Staging(tmp_path / "data") as staging:
        fill(staging)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_stay_inside_and_are_written_once(tmp_path: Path) -> None:
    with Staging(tmp_path / "data") as staging:
        for name in ("../a", "/a", "", MANIFEST):
            with pytest.raises(ValueError, match="plain relative name"):
                staging.write(name, "x")
        staging.write("a", "x")
        with pytest.raises(ValueError, match="already"):
            staging.write("a", "y")


def test_find_file_takes_the_highest_and_refuses_two(tmp_path: Path) -> None:
    for place in ("a/b/x.mat", "c/y.mat", "d/y.mat", "e/x.mat/keep"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert find_file(tmp_path, "x.mat", "ask for it") == tmp_path / "a/b/x.mat"
    with pytest.raises(UserError, match=r"holds y\.mat 2 times"):
        find_file(tmp_path, "y.mat", "ask for it")
    with pytest.raises(UserError, match=r"holds no z\.mat.*ask for it"):
        find_file(tmp_path, "z.mat", "ask for it")
    with pytest.raises(UserError, match="no such file or folder"):
        find_file(tmp_path / "nowhere", "z.mat", "ask for it")


def test_read_mat_returns_plain_values_and_only_the_fields_asked_for(tmp_path: Path) -> None:
    records = np.array([("a", 1.0), ("b", 2.0)], dtype=[("path", object), ("box", object)])
    content = {"index": np.array([[1], [2]]), "words": np.array(["x", "yz"], dtype=object), "records": records}
    scipy_io.savemat(tmp_path / "m.mat", content)
    came = read_mat(tmp_path / "m.mat", ["index", "words", "records"], ("path",))
    assert came == {"index": [1, 2], "words": ["x", "yz"], "records": [{"path": "a"}, {"path": "b"}]}
    with pytest.raises(UserError, match="holds index, words, records, but not nothing"):
        read_mat(tmp_path / "m.mat", ["nothing"])


@pytest.mark.parametrize("keep", [0, 100, 300])
def test_damaged_archives_are_user_errors(tmp_path: Path, keep: int) -> None:
    scipy_io.savemat(tmp_path / "m.mat", {"index": np.arange(1000)})
    with h5py.File(tmp_path / "h.mat", "w") as file:
        file["a"] = np.arange(1000)
    for name in ("m.mat", "h.mat"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.mat: cannot be read as a MATLAB 5 file"):
        read_mat(tmp_path / "m.mat", ["index"])
    with pytest.raises(UserError, match=r"h\.mat: cannot be read as HDF5"):
        open_hdf5(tmp_path / "h.mat")


def test_a_reader_that_dies_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive.inspect, "getsource", lambda _: "import os; os.abort()")
    with pytest.raises(UserError, match="died with status -6"):
        read_mat(tmp_path / "m.mat", ["index"])


def test_progress_passes_every_item_and_speaks_ten_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(100), "counting")) == list(range(100))
    lines: list[Any] = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1].startswith("counting 100/100")
    assert list(track([], "nothing")) == []
    assert list(track([1], "silent", show=False)) == [1]
    assert capsys.readouterr().err == ""
