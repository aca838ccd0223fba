"""Point clouds: every form gives the same rows, and damage is one line that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenfusion.data.cloud import read_cloud
from tokenfusion.errors import UserError

XYZ = np.array([[0.5, -1.25, 2.0], [3.0, 4.5, -0.125], [1.0, 1.0, 1.0], [-7.75, 0.25, 0.0]], np.float32)
RGB = np.array([[255, 0, 51], [0, 102, 255], [1, 2, 3], [250, 251, 252]], np.uint8)
ROWS = np.concatenate([XYZ, RGB / np.float32(255)], axis=1)
FACES = b"\x03" + np.array([0, 1, 2], "<i4").tobytes()


def ply(form: str, names: str = "x y z nx red green blue alpha quality") -> bytes:
    """Four vertices with properties that nobody asked for, and a face."""
    order = ">" if "big" in form else "<"
    kinds = {name: "uchar" if name in ("red", "green", "blue", "alpha") else "float" for name in names.split()}
    record = np.dtype([(name, order + ("u1" if kind == "uchar" else "f4")) for name, kind in kinds.items()])
    vertices = np.zeros(4, record)
    for columns, letters in ((XYZ, ("x", "y", "z")), (RGB, ("red", "green", "blue"))):
        for k, name in enumerate(letters):
            if name in kinds:
                vertices[name] = columns[:, k]
    header = [f"format {form} 1.0", "comment made by a test", "element vertex 4"]
    header += [f"property {kind} {name}" for name, kind in kinds.items()]
    header += ["element face 1", "property list uchar int vertex_indices"]
    start = "\n".join(["ply", *header, "end_header", ""]).encode()
    if form == "ascii":
        lines = [" ".join(f"{float(value):.9g}" for value in vertex) for vertex in vertices]
        return start + "\n".join([*lines, "3 0 1 2", ""]).encode()
    return start + vertices.tobytes() + FACES


def pcd(form: str, packed: str | None = "F") -> bytes:
    """Padding, a field of several numbers and a packed colour; or r, g, b apart."""
    bits = (RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).astype("<u4")
    fields: list[tuple[str, str, int]] = [
        ("x", "f4", 1),
        ("_", "u1", 4),
        ("y", "f4", 1),
        ("z", "f4", 1),
        ("n", "f4", 3),
    ]
    fields += [("rgb", "f4" if packed == "F" else "u4", 1)] if packed else [(name, "u1", 1) for name in "rgb"]
    record = np.dtype([(name, "<" + kind, (count,) if count > 1 else ()) for name, kind, count in fields])
    rows = np.zeros(4, record)
    for k, name in enumerate("xyz"):
        rows[name] = XYZ[:, k]
    if packed:
        rows["rgb"] = bits.view("<f4") if packed == "F" else bits
    else:
        for k, name in enumerate("rgb"):
            rows[name] = RGB[:, k]
    header = {
        "# .PCD v.7": "made by a test",
        "VERSION": ".7",
        "FIELDS": " ".join(name for name, _, _ in fields),
        "SIZE": " ".join(kind[1] for _, kind, _ in fields),
        "TYPE": " ".join(kind[0].upper() for _, kind, _ in fields),
        "COUNT": " ".join(str(count) for _, _, count in fields),
        "WIDTH": "2",
        "HEIGHT": "2",
        "POINTS": "4",
        "DATA": form,
    }
    start = "".join(f"{key} {value}\n" for key, value in header.items()).encode()
    if form == "binary":
        return start + rows.tobytes()
    lines = [" ".join(f"{value:.9g}" for field in row for value in np.ravel(field)) for row in rows.tolist()]
    return start + "\n".join([*lines, ""]).encode()


def npy(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, values)


def attempt(path: Path) -> np.ndarray | str:
    """The rows, or what the reader says; anything but a UserError fails the test."""
    try:
        return read_cloud(path).points.numpy()
    except UserError as error:
        return str(error)


def raw(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None  # type: ignore[return-value]


WHOLE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "npy": (".npy", npy(ROWS)),
    "npy of bytes' range": (".npy", npy(np.concatenate([XYZ, RGB], axis=1))),
    "npy of doubles": (".npy", npy(ROWS.astype(np.float64))),
    "bin": (".bin", raw(ROWS.astype("<f4").tobytes())),
    **{f"ply {form}": (".ply", raw(ply(form))) for form in ("ascii", "binary_little_endian", "binary_big_endian")},
    "pcd text": (".pcd", raw(pcd("ascii"))),
    "pcd binary": (".pcd", raw(pcd("binary"))),
    "pcd packed in a whole number": (".pcd", raw(pcd("binary", "U"))),
    "pcd text packed in a whole number": (".pcd", raw(pcd("ascii", "U"))),
    "pcd colours apart": (".pcd", raw(pcd("binary", None))),
}


@pytest.mark.parametrize("case", WHOLE)
def test_every_form_gives_the_same_rows(tmp_path: Path, case: str) -> None:
    suffix, write = WHOLE[case]
    path = tmp_path / f"cloud{suffix}"
    write(path)
    points = read_cloud(path).points.numpy()
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, ROWS, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["ascii", "binary_big_endian"])
def test_a_cloud_may_have_no_colours(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.ply").write_bytes(ply(form, "x y z quality"))
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply").points, XYZ)
    np.save(tmp_path / "b.npy", XYZ)
    np.testing.assert_array_equal(read_cloud(tmp_path / "b.npy").points, XYZ)


def test_a_bin_file_shows_its_width(tmp_path: Path) -> None:
    cloud = np.array([[-1, 2, 3], [1, -2, 3], [1, 2, -3], [0, 0, 4]], np.float32)
    for rows in (cloud, np.concatenate([cloud, np.full((4, 3), 0.5, np.float32)], 1), cloud[:3]):
        rows.tofile(tmp_path / "a.bin")
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.bin").points, rows)


def test_a_bin_file_has_the_columns_that_are_said(tmp_path: Path) -> None:
    for columns in (3, 4):
        rows = np.concatenate([XYZ, np.full((4, 1), 0.3, np.float32)], axis=1)[:, :columns]
        (tmp_path / "a.bin").write_bytes(rows.astype("<f4").tobytes())
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.bin", columns=columns).points, XYZ)
    with pytest.raises(UserError, match=r"a\.bin: 64 bytes are no rows of 6 float32 \(x y z r g b\); .* as \.npy"):
        read_cloud(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(XYZ.astype("<f4").tobytes())  # as rows of six the colours would be coordinates
    with pytest.raises(UserError, match=r"a\.bin: .*holds colours in -7\.75"):
        read_cloud(tmp_path / "a.bin", columns=6)


def test_a_bin_file_without_negative_coordinates_is_taken_for_rows_of_six_or_refused(tmp_path: Path) -> None:
    """As docs/data.md says; nothing tells x y z and x y z r g b apart there."""
    cloud = np.abs(XYZ)
    cloud.tofile(tmp_path / "a.bin")
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.bin").points[:, :3], cloud[::2])
    cloud[:3].tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="36 bytes are no rows of 6 float32"):
        read_cloud(tmp_path / "a.bin")
    (300 * cloud).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"holds colours in .* \(x y z r g b\); .*save others as \.npy"):
        read_cloud(tmp_path / "a.bin")


def test_the_suffix_may_be_written_in_capitals(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", XYZ)
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    np.testing.assert_array_equal(read_cloud(tmp_path / "A.NPY").points, XYZ)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (np.zeros((5, 4)), "holds float64 [5, 4], wanted [points, 3] or [points, 6]: real numbers x y z"),
        (np.zeros((1, 5, 3), np.float32), "holds float32 [1, 5, 3], wanted [points, 3]"),
        (np.zeros((5, 3), complex), "holds complex128 [5, 3], wanted [points, 3]"),
        (np.array([[0, 0, 0, 300.0, 0, 0]]), "holds colours in 0..300, wanted 0..1 or 0..255"),
        (np.array([[0, 0, 1e30]]), "a coordinate is 1e+30; wanted metres, none beyond 1e+06"),
        (np.array([[0, -5e6, 0]]), "a coordinate is 5e+06; wanted metres, none beyond 1e+06"),
    ],
)
def test_what_is_read_but_not_wanted_is_not_called_damage(tmp_path: Path, content: np.ndarray, text: str) -> None:
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(UserError) as caught:
        read_cloud(tmp_path / "a.npy")
    assert str(caught.value).startswith(f"{tmp_path / 'a.npy'}: {text}")
    assert "damaged" not in str(caught.value)


def test_points_before_other_elements_and_after_them(tmp_path: Path) -> None:
    """What stands before the vertices is stepped over; where its length is not known, that is said."""
    for form, extra in (("ascii", b"7 8\n"), ("binary_little_endian", np.array([7, 8], "<i2").tobytes())):
        head, body = ply(form, "x y z").split(b"end_header\n")
        head = head.replace(b"element vertex", b"element cam 1\nproperty short a\nproperty short b\nelement vertex")
        (tmp_path / "a.ply").write_bytes(head + b"end_header\n" + extra + body)
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply").points, XYZ)
    head, body = ply("binary_little_endian", "x y z").split(b"end_header\n")
    head = head.replace(b"element vertex", b"element cam 1\nproperty list uchar int a\nelement vertex")
    (tmp_path / "a.ply").write_bytes(head + b"end_header\n" + FACES + body)
    with pytest.raises(UserError, match="lists cam before its vertices"):
        read_cloud(tmp_path / "a.ply")


def test_points_that_are_not_finite_are_dropped_with_what_belongs_to_them(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[1, 2], rows[2, 4] = np.nan, np.inf
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "owner.npy", np.array([5, 6, 7, -1], np.int32))
    cloud = read_cloud(tmp_path / "a.npy", tmp_path / "owner.npy")
    np.testing.assert_array_equal(cloud.points, ROWS[[0, 3]])
    assert cloud.box is not None
    assert cloud.box.tolist() == [5, -1]
    np.save(tmp_path / "a.npy", np.full((4, 3), np.nan))
    with pytest.raises(UserError, match=r"a\.npy: its 4 points are NaN or infinite"):
        read_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.npy", np.zeros((0, 3)), "holds no points"),
        ("a.npy", np.zeros((5, 4)), r"holds float64 \[5, 4\], wanted \[points, 3\]"),
        ("a.npy", np.zeros(6), r"holds float64 \[6\]"),
        ("a.npy", np.array([["a", "b", "c"]]), "holds <U1"),
        ("a.npy", np.array([[0, 0, 0, 300.0, 0, 0]]), "colours in 0..300"),
        ("a.npy", np.array([[0, 0, 0, -0.5, 0, 0]]), "colours in -0.5..0"),
        ("a.npy", b"", "may be damaged"),
        ("a.bin", b"", "holds no points"),
        ("a.ply", b"solid", "no ply header"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "lists no vertices"),
        ("a.ply", b"ply\nelement vertex 0\nproperty float x\nend_header\n", "names no format"),
        ("a.ply", ply("ascii", "x y quality"), "has no z, its fields are x, y, quality"),
        ("a.ply", ply("ascii").replace(b"float nx", b"quad nx"), "its header holds 'property quad nx'"),
        ("a.ply", ply("ascii").replace(b"float nx", b"float x"), "names x twice"),
        ("a.ply", ply("ascii").replace(b"float nx", b"list uchar int nx"), "or lists among them"),
        ("a.ply", ply("ascii").replace(b"0.5 -1.25", b"0.5 much"), "could not convert|invalid"),
        ("a.ply", ply("binary_little_endian").replace(b"vertex 4", b"vertex 99999999999999"), "holds 4 of 99999"),
        ("a.pcd", b"x y z\n1 2 3\n", "no pcd header"),
        ("a.pcd", pcd("binary").replace(b"DATA binary", b"DATA binary_compressed"), "save it as ascii or binary"),
        ("a.pcd", pcd("binary").replace(b"POINTS 4", b"POINTS 5"), "holds 4 of 5 points"),
        ("a.pcd", pcd("ascii").replace(b"POINTS 4", b"POINTS five"), "header lacks or garbles"),
        ("a.pcd", pcd("ascii").replace(b"TYPE F U", b"TYPE F Q"), "field _ has type Q"),
        ("a.pcd", pcd("ascii").replace(b"FIELDS x", b"FIELDS k"), "has no x"),
        ("a.xyz", b"1 2 3", r"\.xyz is no kind of point cloud; known: \.npy \.ply \.pcd \.bin"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, name: str, content: bytes | np.ndarray, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(UserError, match=text) as caught:
        read_cloud(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_wrong_owners(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.npy: no such file"):
        read_cloud(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", XYZ)
    with pytest.raises(UserError, match=r"owner\.npy: no such file"):
        read_cloud(tmp_path / "a.npy", tmp_path / "owner.npy")
    for wrong in (np.zeros(3, int), np.zeros(4), np.zeros((4, 1), int)):
        np.save(tmp_path / "owner.npy", wrong)
        with pytest.raises(UserError, match=r"owner\.npy: holds .*, wanted whole numbers \[4\]"):
            read_cloud(tmp_path / "a.npy", tmp_path / "owner.npy")
    with pytest.raises(UserError, match="columns is 5"):
        read_cloud(tmp_path / "a.npy", columns=5)


@pytest.mark.parametrize("case", [case for case in WHOLE if "doubles" not in case])
def test_a_file_cut_anywhere_never_ends_in_anything_but_one_line(tmp_path: Path, case: str) -> None:
    """What a cut leaves either is an error, or all whole points before it and nothing else."""
    suffix, write = WHOLE[case]
    path = tmp_path / f"cloud{suffix}"
    write(path)
    data = path.read_bytes()
    refused = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        points = attempt(path)
        if isinstance(points, str):
            refused += 1
            assert points.startswith(str(path))
            assert "\n" not in points
            continue
        known = points[:, :3] if "text" in case else points  # its last number, the colour, may have lost digits
        np.testing.assert_allclose(known, ROWS[: len(points), : known.shape[1]], rtol=1e-6, atol=1e-7)
    assert refused > len(data) // 2


@pytest.mark.parametrize("case", ["npy", "ply ascii", "ply binary_big_endian", "pcd text", "pcd binary"])
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, case: str) -> None:
    suffix, write = WHOLE[case]
    path = tmp_path / f"cloud{suffix}"
    write(path)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        changed = data.copy()
        changed[rng.integers(0, len(data), 3)] ^= rng.integers(1, 256, 3).astype(np.uint8)
        path.write_bytes(changed.tobytes())
        points = attempt(path)
        assert points.startswith(str(path)) if isinstance(points, str) else np.isfinite(points).all()
        outcomes.add(type(points))
    assert outcomes == {np.ndarray, str}
