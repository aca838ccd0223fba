"""Files found in folders, tars and zips, and read in the order in which they lie."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from tokenfusion.data.prepare.members import find_members, read_members
from tokenfusion.errors import UserError

CONTENT = {"rgb/b.png": b"one", "a.png": b"two" * 9000, "deep/er/c.png": b"three"}


def tar(path: Path, content: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def zip_(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def is_png(name: str) -> bool:
    return name.endswith(".png")


def test_folders_and_archives_of_every_kind_hold_the_same(tmp_path: Path) -> None:
    write(tmp_path / "plain", {**CONTENT, "rgb/notes.txt": b"no image"})
    tar(tmp_path / "one.tar", CONTENT)
    tar(tmp_path / "two.tar.gz", CONTENT, "w:gz")
    tar(tmp_path / "three.tgz", CONTENT, "w:gz")
    zip_(tmp_path / "four.zip", {**CONTENT, "empty/": b""})
    members = find_members(tmp_path, is_png)
    assert len(members) == 15
    for member, data in zip(members, read_members(members), strict=True):
        place, *folders = member.folders
        assert place in ("plain", "one", "two", "three", "four")
        assert data == CONTENT["/".join([*folders, member.file])]
    some = [member for member in members if member.file != "b.png"]  # what is not asked for is passed over
    assert sorted(map(len, read_members(some))) == [5] * 5 + [27000] * 5


def test_one_archive_may_be_the_source(tmp_path: Path) -> None:
    (member,) = find_members(tar(tmp_path / "x_rgb.tar", {"rgb/b.png": b"1"}), is_png)
    assert member.folders == ("x_rgb", "rgb")
    assert str(member).endswith("x_rgb.tar: rgb/b.png")


def test_names_never_leave_their_folder(tmp_path: Path) -> None:
    (member,) = find_members(zip_(tmp_path / "evil.zip", {"../../etc/b.png": b"1"}), is_png)
    assert member.folders == ("evil", "etc")


def test_a_linked_folder_is_looked_into(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", CONTENT)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "rgb").symlink_to(tmp_path / "elsewhere")
    assert len(find_members(tmp_path / "source", is_png)) == 3


def test_damaged_archives_are_named_and_damaged_members_are_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        find_members(tmp_path / "nowhere", is_png)
    for path in (
        tar(tmp_path / "a.tar", CONTENT),
        tar(tmp_path / "b.tgz", CONTENT, "w:gz"),
        zip_(tmp_path / "c.zip", CONTENT),
    ):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"x" * 700):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{path.name}: cannot be read as an archive .*again") as caught:
                find_members(path, is_png)
            assert "\n" not in str(caught.value)
    path = zip_(tmp_path / "d.zip", CONTENT)
    data = bytearray(path.read_bytes())
    data[data.index(b"rgb/b.png") + len("rgb/b.png") + 1] ^= 0xFF  # inside the first member's content
    path.write_bytes(data)
    assert list(read_members(find_members(path, is_png))) == [b"", *list(CONTENT.values())[1:]]
