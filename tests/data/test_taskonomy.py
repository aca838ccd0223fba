"""Taskonomy from small sources in every layout: values, splits, damage; and from real views."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion import api
from tokenfusion.data.folder import Folder
from tokenfusion.data.image import measured
from tokenfusion.data.inputs import to_tanh
from tokenfusion.data.prepare.taskonomy import DOMAINS, prepare
from tokenfusion.errors import UserError

SIZE = (6, 8)
USUAL = ("rgb", "normal", "depth_zbuffer", "reshading", "edge_texture")
Source = dict[str, bytes]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(domain: str, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """As the official files: a hole at the first pixel, where depth is 65535, normals grey and curvature black."""
    rng = np.random.default_rng(seed)
    if domain.startswith("depth"):
        depth = rng.integers(1, 9000, size, dtype=np.uint16)
        depth[0, 0] = 65535
        return depth
    if DOMAINS[domain].bits == 16:
        return rng.integers(0, 60000, size, dtype=np.uint16)
    colours = rng.integers(1, 100, (*size, 3), dtype=np.uint8)
    if domain == "reshading":
        colours[:] = colours[:, :, :1]
    if domain == "normal":
        colours[0, 0] = 128
    if domain == "principal_curvature":
        colours[:, :, 2] = 0
        colours[0, 0] = 0
    return colours


def name(point: int, domain: str, view: int = 0) -> str:
    return f"point_{point}_view_{view}_domain_{domain}.png"


def views(points: range, domains: tuple[str, ...] = USUAL, folder: str = "{domain}/") -> Source:
    return {
        folder.format(domain=domain) + name(point, domain): png(pixels(domain, point))
        for domain in domains
        for point in points
    }


def as_folder(place: Path, source: Source) -> Path:
    for file, data in source.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(data)
    return place


def as_tar(place: Path, source: Source, suffix: str = ".tar", mode: str = "w") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for domain in {file.split("/")[0] for file in source}:  # an archive per domain, as downloaded
        with tarfile.open(place / f"almena_{domain}{suffix}", mode) as archive:  # type: ignore[call-overload]
            for file, data in source.items():
                if file.startswith(f"{domain}/"):
                    info = tarfile.TarInfo(file)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return place


def as_gz(place: Path, source: Source) -> Path:
    return as_tar(place, source, ".tar.gz", "w:gz")


def as_zip(place: Path, source: Source) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / "sample-master.zip", "w") as archive:
        for file, data in source.items():
            archive.writestr(f"sample-master/{file}", data)
    return place


def refuse(source: Path, out: Path, text: str, **options: object) -> None:
    with pytest.raises(UserError, match=text) as caught:
        prepare(source, out, progress=False, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))


def test_every_domain_becomes_its_modality(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source", views(range(3), tuple(DOMAINS)))
    counts = prepare(source, tmp_path / "out", progress=False)
    folder = Folder(tmp_path / "out")
    assert counts == {"views": 3, "train": 1, "val": 2, "domains": " ".join(DOMAINS)}
    assert folder.verify() == 3 * len(DOMAINS) + 4
    assert [*folder.modalities] == [domain.modality for domain in DOMAINS.values()]
    assert not folder.has_target
    for id in folder.ids("train") + folder.ids("val"):
        point = int(id.split("_")[1])
        raw = folder.read(id, list(folder.modalities))
        want = {domain: torch.from_numpy(pixels(domain, point).astype(np.float32)) for domain in DOMAINS}
        depth = torch.where(want["depth_zbuffer"] == 65535, 0, want["depth_zbuffer"] / 512)
        assert torch.equal(raw["depth"][0], depth)
        assert torch.equal(raw["depth_euclidean"], raw["depth"])
        assert torch.equal(raw["rgb"], want["rgb"].permute(2, 0, 1))
        assert torch.allclose(raw["shade"][0], want["reshading"][:, :, 0] / 255)
        assert torch.allclose(raw["edge_texture"][0], want["edge_texture"] / 11355)
        assert torch.allclose(raw["edge_occlusion"][0], want["edge_occlusion"] / 11584)
        assert raw["curvature"][:2, 0, 0].tolist() == [0, 0]
        assert torch.allclose(raw["curvature"][:, 1], (want["principal_curvature"][1] - 127).T / 128)
        for modality in ("depth", "normal"):
            known = measured(raw[modality], folder.modalities[modality])
            assert not known[0, 0]
            assert known.sum() == known.numel() - 1
        assert (to_tanh(raw["depth"], folder.modalities["depth"])[0] + 1).max() / 2 < np.log1p(9000) / 11.09
    rgb = folder.image_path("point_1_view_0", "rgb").read_bytes()
    assert rgb == (source / "rgb" / name(1, "rgb")).read_bytes()  # what needs no change keeps its bytes


@pytest.mark.parametrize("write", [as_folder, as_tar, as_gz, as_zip])
def test_every_layout_gives_the_same_data_set(tmp_path: Path, write: Callable[[Path, Source], Path]) -> None:
    content = views(range(4))
    prepare(as_folder(tmp_path / "plain", content), tmp_path / "wanted", progress=False)
    content |= {f"rgb/{name(0, 'rgb')[:-4]}2.png": b"a figure", "rgb/point_0_view_0_domain_rgb.json": b"{}"}
    prepare(write(tmp_path / "source", content), tmp_path / "out", progress=False)
    for path in (tmp_path / "wanted").rglob("*"):
        if path.is_file() and path.name not in ("MANIFEST.sha256", "source.json"):
            assert (tmp_path / "out" / path.relative_to(tmp_path / "wanted")).read_bytes() == path.read_bytes()
    account = json.loads((tmp_path / "out" / "source.json").read_text())
    archives = [path.name for path in (tmp_path / "source").iterdir() if path.is_file()]
    assert sorted(key for key in account if key.startswith("sha256 ")) == sorted(f"sha256 {file}" for file in archives)


def test_two_buildings_are_folders_of_ids(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source", views(range(3), folder="almena/{domain}/"))
    as_folder(source, views(range(1, 4), folder="{domain}/cauthron/"))
    counts = prepare(source, tmp_path / "out", progress=False)
    folder = Folder(tmp_path / "out")
    ids = folder.ids("train") + folder.ids("val")
    assert counts["views"] == len(ids) == 6
    assert {"almena/point_0_view_0", "cauthron/point_3_view_0"} <= set(ids)
    assert folder.read("cauthron/point_3_view_0", ["rgb", "depth"])["depth"].shape == (1, *SIZE)


def test_domains_are_those_of_most_views_or_those_asked_for(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source", views(range(3)) | views(range(1), ("keypoints2d",)))
    (source / "normal" / name(2, "normal")).unlink()
    counts = prepare(source, tmp_path / "a", on_bad="skip", progress=False)
    assert counts["domains"] == " ".join(USUAL)
    assert counts["left out, without normal"] == 1
    counts = prepare(source, tmp_path / "b", ["edge_texture", "rgb"], progress=False)
    assert [*Folder(tmp_path / "b").modalities] == ["rgb", "edge_texture"]
    assert counts["views"] == 3
    refuse(source, tmp_path / "c", r"--domains: no domain 'nromal'; did you mean 'normal'", domains=["nromal"])
    refuse(
        source, tmp_path / "c", r"has no keypoints2d of point_[12]_view_0; 2 of 3 views", domains=["rgb", "keypoints2d"]
    )
    refuse(source, tmp_path / "c", r"--on-bad is 'ignore'; choose stop or skip", on_bad="ignore")


def damage(domain: str) -> dict[str, tuple[bytes, str]]:
    """Bytes in place of a domain's png, and the reason that is counted."""
    whole = png(pixels(domain, size=(64, 64)))
    other = np.uint8 if DOMAINS[domain].bits == 16 else np.uint16
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(jpeg, format="JPEG")
    return {
        "truncated": (whole[: len(whole) // 2], "damaged"),
        "empty": (b"", "damaged"),
        "jpeg": (jpeg.getvalue(), "damaged"),
        "bits": (png(np.ones(SIZE, other)), "stored otherwise"),
        "size": (png(pixels(domain, size=(8, 6))), "sizes differ"),
    }


@pytest.mark.parametrize("domain", ["rgb", "depth_zbuffer", "reshading"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "jpeg", "bits", "size"])
@pytest.mark.parametrize("write", [as_folder, as_gz])
def test_damage_stops_or_is_left_out(
    tmp_path: Path, domain: str, kind: str, write: Callable[[Path, Source], Path]
) -> None:
    content = views(range(4))
    content[f"{domain}/{name(2, domain)}"], reason = damage(domain)[kind]
    source, out = write(tmp_path / "source", content), tmp_path / "out"
    blamed = r"domain_\w+" if kind == "size" else f"domain_{domain}"
    refuse(source, out, rf"point_2_view_0_{blamed}\.png: .*; 1 of 4 views cannot be used: .*--on-bad skip")
    counts = prepare(source, out, on_bad="skip", progress=False)
    assert (counts["views"], counts[f"left out, {reason}"]) == (3, 1)
    folder = Folder(out)
    assert sorted(folder.ids("train") + folder.ids("val")) == [f"point_{point}_view_0" for point in (0, 1, 3)]
    assert folder.verify() == 3 * len(USUAL) + 4
    assert not list(out.rglob("point_2*"))
    account = json.loads((out / "source.json").read_text())
    assert account["left out views"] == {"point_2_view_0": reason}


def test_depth_without_a_surface_and_coloured_shade_cannot_be_used(tmp_path: Path) -> None:
    content = views(range(4))
    content[f"depth_zbuffer/{name(1, 'depth_zbuffer')}"] = png(np.full(SIZE, 65535, np.uint16))
    content[f"reshading/{name(3, 'reshading')}"] = png(pixels("rgb"))
    source = as_folder(tmp_path / "source", content)
    refuse(source, tmp_path / "out", r"point_1_view_0_domain_depth_zbuffer\.png: holds no depth at all; 2 of 4 views")
    counts = prepare(source, tmp_path / "out", on_bad="skip", progress=False)
    assert counts["left out, no depth"] == counts["left out, stored otherwise"] == 1


def test_lists_choose_the_views(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source", views(range(6)))
    (source / "depth_zbuffer" / name(5, "depth_zbuffer")).write_bytes(b"not listed, so not looked at")
    for split, points in {"train": (4, 0, 77), "val": (2,)}.items():
        lines = [f"{{domain}}/point_{point}_view_0_domain_{{domain}}.png" for point in points]
        (source / f"{split}_domain.txt").write_text("\n".join(lines))
    refuse(source, tmp_path / "out", r"source: has no image of point_77_view_0; 1 of 4 views cannot be used")
    counts = prepare(source, tmp_path / "out", on_bad="skip", progress=False)
    assert [counts[key] for key in ("views", "train", "val", "left out, not in the source")] == [3, 2, 1, 1]
    folder = Folder(tmp_path / "out")
    assert folder.ids("train") == ["point_4_view_0", "point_0_view_0"]
    assert json.loads((folder.root / "source.json").read_text())["split"] == "official lists"
    (source / "train_domain.txt").write_text("rgb/point_88_view_0_domain_rgb.png")
    (source / "val_domain.txt").write_text("rgb/point_99_view_0_domain_rgb.png")
    refuse(source, tmp_path / "none", r"has no image of point_88_view_0; 2 of 2 views", on_bad="skip")


def test_options_belong_to_their_data_set(tmp_path: Path) -> None:
    for dataset, options, text in (
        (
            "taskonomy",
            {"depth": "raw"},
            r"--depth is no option of prepare taskonomy; it takes --out, --source, --domains",
        ),
        ("nyudv2", {"on_bad": "skip"}, "--on-bad is no option of prepare nyudv2"),
        ("rooms", {"domains": ["rgb"]}, "--domains is no option of prepare rooms"),
        ("taskonomy", {"seed": 1}, "--seed is no option"),
    ):
        with pytest.raises(UserError, match=text):
            api.prepare(dataset, None if dataset == "rooms" else tmp_path, tmp_path / "out", options)
    with pytest.raises(UserError, match="prepare taskonomy wants --source"):
        api.prepare("taskonomy", None, tmp_path / "out")
    with pytest.raises(UserError, match="--source is no option of prepare rooms"):
        api.prepare("rooms", tmp_path, tmp_path / "out")


def test_real_views(real_data: Path, tmp_path: Path) -> None:
    """Two buildings whose domains differ; ceilings face down, floors up, as in rooms; holes agree."""
    counts = api.prepare("taskonomy", real_data / "taskonomy_like", tmp_path / "out")
    assert (counts["views"], counts["train"] + counts["val"]) == (4, 4)
    folder = Folder(tmp_path / "out")
    assert [*folder.modalities] == ["rgb", "normal", "depth", "shade", "edge_texture", "edge_occlusion", "keypoints3d"]
    raw = folder.read("taskonomy/point_202_view_5", ["depth", "normal", "shade", "edge_texture"])
    assert torch.equal(
        measured(raw["depth"], folder.modalities["depth"]), measured(raw["normal"], folder.modalities["normal"])
    )
    assert 0.9 < raw["depth"][raw["depth"] > 0].min() < raw["depth"].max() < 9
    assert raw["edge_texture"].max() < 1
    for id in folder.ids("train") + folder.ids("val"):
        x, y, z = folder.read(id, ["normal"])["normal"]
        assert y[:20].mean() > 0.2 > -0.2 > y[-20:].mean() if "point_12" not in id else y[-20:].mean() < -0.2
        assert z.mean() < -0.2  # towards the camera
        assert x.abs().mean() > 0.1
