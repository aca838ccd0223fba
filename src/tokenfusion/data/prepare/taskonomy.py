"""Taskonomy: views of any buildings, in folders or archives -> the on-disk format, one modality per domain."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from tokenfusion.data.prepare.archive import Staging, encode_image, track
from tokenfusion.data.prepare.members import read_members
from tokenfusion.data.prepare.views import View, Views, find_views, split_views
from tokenfusion.errors import UserError, nearest
from tokenfusion.manifest import file_sha256

INVALID = 65535  # stored depth where there is no surface


class Domain(NamedTuple):
    """How a domain's png is stored, and the modality that it becomes."""

    modality: str
    bits: int
    channels: int
    kind: str
    scale: float | None = None
    range: tuple[float, float] | None = None


# near = one step of the file, far = all of them: translation's coding of depth becomes the released ln(1 + stored)
DEPTH = (16, 1, "depth", 1 / 512, (1 / 512, 128.0))
DOMAINS = {
    "rgb": Domain("rgb", 8, 3, "rgb"),
    "normal": Domain("normal", 8, 3, "normal"),  # x right, y down, z ahead, towards the camera: as in rooms
    "depth_zbuffer": Domain("depth", *DEPTH),
    "depth_euclidean": Domain("depth_euclidean", *DEPTH),
    "reshading": Domain("shade", 8, 1, "gray"),  # the file repeats it in three channels
    "edge_texture": Domain("edge_texture", 16, 1, "gray", 1 / 11355),  # 1 as in the released code
    "edge_occlusion": Domain("edge_occlusion", 16, 1, "gray", 1 / 11584),  # 1 as in the released code
    "keypoints2d": Domain("keypoints2d", 16, 1, "gray", 1 / 2048),  # the files use a small part of their 16 bits
    "keypoints3d": Domain("keypoints3d", 16, 1, "gray", 1 / 65535),
    "principal_curvature": Domain("curvature", 8, 3, "curvature"),
}


class Flaw(NamedTuple):
    """Why a view cannot be used: a reason to count, and where it shows."""

    reason: str
    where: str


class BadImageError(Exception):
    """An image that cannot be used; the first argument is the reason to count, the second tells more."""


def prepare(
    source: Path,
    out: Path,
    domains: Sequence[str] = (),
    on_bad: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> dict[str, int | str]:
    """Write the views below ``source`` to ``out``; return counts.

    Ids are ``point_P_view_V``, below their building where there are several. Where the authors' lists lie in the source
    as well, their views are the splits; else a hash sends about a third of the points to val, and never one point to
    both. Where there is no surface depth becomes 0 = missing, a normal black = none, curvature flat. One image is in
    memory at a time.

    Args:
        source: a folder with files ``point_P_view_V_domain_D.png`` below it, in folders or in .tar, .tar.gz and .zip
            archives of any layout; or one such archive.
        out: the new folder; it appears only when everything is written.
        domains: names of ``DOMAINS``; by default those that at least half of the views have.
        on_bad: "stop" at views that lack a domain or have an unusable image, or "skip": leave them out and count them.

    Errors: UserError that names the first such file and the number of views.
    """
    if on_bad not in ("stop", "skip"):
        raise UserError(f"--on-bad is {on_bad!r}; choose stop or skip")
    for name in domains:
        if name not in DOMAINS:
            raise UserError(f"--domains: no domain {name!r}; {nearest(name, DOMAINS)}")
    found = find_views(source, DOMAINS)
    splits = split_views(found)
    views = [view for those in splits.values() for view in those]
    chosen = [name for name in DOMAINS if name in domains] or _usual_domains(found, views)
    flaws = _find_gaps(found, views, chosen)
    _judge(flaws, views, on_bad)
    with Staging(out) as staging:
        flaws |= _write_images(staging, found, set(views) - flaws.keys(), chosen, progress)
        _judge(flaws, views, on_bad)
        kept = {split: [view.id for view in those if view not in flaws] for split, those in splits.items()}
        left_out = dict(Counter(flaw.reason for flaw in flaws.values()))
        staging.json("source.json", _account(found, chosen, flaws, left_out))
        staging.dataset(_description(chosen), {split: ids for split, ids in kept.items() if ids})
    counts = {"views": len(views) - len(flaws), **{split: len(ids) for split, ids in kept.items()}}
    return {**counts, "domains": " ".join(chosen), **{f"left out, {reason}": n for reason, n in left_out.items()}}


def _usual_domains(found: Views, views: list[View]) -> list[str]:
    """Those that at least half of the views in the source have: one view's extra domain is no reason to drop the rest."""
    present = sum(any((view, name) in found.images for name in DOMAINS) for view in views)
    counts = Counter(name for view in views for name in DOMAINS if (view, name) in found.images)
    return [name for name in DOMAINS if counts[name] * 2 >= present > 0]


def _find_gaps(found: Views, views: list[View], chosen: list[str]) -> dict[View, Flaw]:
    flaws = {}
    for view in views:
        lacking = [name for name in chosen if (view, name) not in found.images]
        if not chosen or len(lacking) == len(chosen):
            flaws[view] = Flaw("not in the source", f"{found.source}: has no image of {view.id}")
        elif lacking:
            flaws[view] = Flaw(f"without {lacking[0]}", f"{found.source}: has no {lacking[0]} of {view.id}")
    return flaws


def _judge(flaws: dict[View, Flaw], views: list[View], on_bad: str) -> None:
    if flaws and (on_bad == "stop" or len(flaws) == len(views)):
        advice = "leave them out with --on-bad skip, take other --domains or download them again"
        where = next(iter(flaws.values())).where
        raise UserError(f"{where}; {len(flaws)} of {len(views)} views cannot be used: {advice}")


def _write_images(
    staging: Staging, found: Views, views: set[View], chosen: list[str], progress: bool
) -> dict[View, Flaw]:
    """Write what is good, in the order of the files; of views with a flaw nothing stays."""
    todo = [(view, name, member) for (view, name), member in found.images.items() if view in views and name in chosen]
    flaws: dict[View, Flaw] = {}
    sizes: dict[View, tuple[int, ...]] = {}
    written: dict[View, list[str]] = {view: [] for view in views}
    contents = read_members([member for _, _, member in todo])
    for (view, name, member), data in zip(track(todo, "taskonomy", progress), contents, strict=True):
        if view in flaws:
            continue
        try:
            png, size = convert(data, name)
            if sizes.setdefault(view, size) != size:
                raise BadImageError("sizes differ", f"is {_by(size)}, but the view's other images {_by(sizes[view])}")
        except BadImageError as error:
            flaws[view] = Flaw(error.args[0], f"{member}: {error.args[1]}")
        else:
            written[view].append(f"{DOMAINS[name].modality}/{view.id}.png")
            staging.write(written[view][-1], png)
    for view in flaws:
        for file in written[view]:
            staging.remove(file)
    return flaws


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def convert(data: bytes, name: str) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of a domain's png -> those of the modality's, and (height, width). What needs no change is not touched.

    Errors: BadImageError where it is damaged, stored otherwise than the domain's files are, or depth without a surface.
    """
    domain = DOMAINS[name]
    pixels = _read(data, domain)
    result = pixels
    if domain.kind == "depth":
        result = np.where(pixels == INVALID, 0, pixels).astype(np.uint16)
        if not result.any():
            raise BadImageError("no depth", "holds no depth at all")
    elif domain.kind == "normal":  # middle grey stands where there is no surface, and would point somewhere
        length = np.linalg.norm(pixels / np.float32(127.5) - 1, axis=2, keepdims=True)
        result = np.where(length < 0.5, 0, pixels).astype(np.uint8)
    elif domain.kind == "curvature":  # black stands where there is no surface; 127 is zero; blue is always 0
        nothing = ~pixels.any(axis=2, keepdims=True)
        result = np.where(nothing, [127, 127, 0], pixels).astype(np.uint8)
    elif domain.kind == "gray" and pixels.ndim == 3:
        result = pixels[:, :, 0]
    is_same = np.array_equal(result, pixels)
    return data if is_same else encode_image(np.ascontiguousarray(result), ".png"), pixels.shape[:2]


def _read(data: bytes, domain: Domain) -> np.ndarray:
    """[H, W] or [H, W, 3] as stored: one channel may stand there three times."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image)
    except Exception:  # decoders answer damage with a dozen different exceptions
        raise BadImageError("damaged", "cannot be read as png, it is damaged") from None
    bits = 8 if pixels.dtype == np.uint8 else 16
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    repeats = domain.channels == 1 and channels == 3 and (pixels == pixels[:, :, :1]).all()
    if (
        bits != domain.bits
        or not (repeats or channels == domain.channels)
        or image.mode == "P"
        or pixels.max() > INVALID
    ):
        came = f"{image.mode} with {channels} channel(s) of {bits} bits"
        raise BadImageError("stored otherwise", f"is {came}, wanted {domain.channels} of {domain.bits} bits")
    return pixels.astype(np.uint8 if bits == 8 else np.uint16)


def _account(found: Views, chosen: list[str], flaws: dict[View, Flaw], left_out: dict[str, int]) -> dict[str, Any]:
    """What the data set was made from: splits, domains, archives with their sums, and what was left out."""
    archives = sorted({member.archive for member in (*found.images.values(), *found.lists.values()) if member.archive})
    lists = {member.file: next(read_members([member])) for member in found.lists.values()}
    return {
        "dataset": "taskonomy",
        "domains": chosen,
        "split": "official lists" if found.lists else "hash of building and point",
        **{f"sha256 {name}": hashlib.sha256(data).hexdigest() for name, data in lists.items()},
        **{f"sha256 {path.name}": file_sha256(path) for path in archives},
        "left out": left_out,
        "left out views": {view.id: flaw.reason for view, flaw in flaws.items()},
    }


def _description(chosen: list[str]) -> dict[str, Any]:
    modalities = {}
    for domain in (DOMAINS[name] for name in chosen):
        entry: dict[str, Any] = {"kind": domain.kind, "files": f"{domain.modality}/{{id}}.png"}
        entry |= {"scale": domain.scale} if domain.scale else {}
        modalities[domain.modality] = entry | ({"range": list(domain.range)} if domain.range else {})
    return {"name": "taskonomy", "modalities": modalities}
