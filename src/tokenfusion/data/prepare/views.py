"""Taskonomy's views: which images a source holds of which view, and how views are split for training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tokenfusion.data.prepare.members import Member, find_members, read_members
from tokenfusion.errors import UserError

LISTS = {"train_domain.txt": "train", "val_domain.txt": "val"}  # of the authors' repository
IMAGE = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")
LINE = re.compile(r"(?:.*/)?point_(\d+)_view_(\d+)_domain_.*\.png")
ADVICE = "they are in https://github.com/alexsax/taskonomy-sample-model-1"


class View(NamedTuple):
    """What one camera sees; ``building`` is "" where the source holds only one."""

    building: str
    point: int
    view: int

    @property
    def id(self) -> str:
        name = f"point_{self.point}_view_{self.view}"
        return f"{self.building}/{name}" if self.building else name


class Views(NamedTuple):
    """What was found: the image of each view and domain, in the order in which the files lie; and official lists."""

    source: Path
    images: dict[tuple[View, str], Member]
    lists: dict[str, Member]


def find_views(source: Path, domains: Container[str]) -> Views:
    """Look for ``point_P_view_V_domain_D.png`` and for the official lists, in folders and archives.

    Files of other domains are passed over: ``depth_zbuffer2`` and the like are figures, not data.

    Errors: UserError where there is no image, or one of them twice.
    """
    members = find_members(source, lambda name: name in LISTS or _domain(name) in domains)
    places = {member: _place(member) for member in members if member.file not in LISTS}
    if not places:
        raise UserError(
            f"{source}: no point_P_view_V_domain_D.png in it, below it or in .tar, .tar.gz or .zip archives there; {ADVICE}"
        )
    shared = takewhile(lambda folders: len(set(folders)) == 1, zip(*set(places.values()), strict=False))
    common = len(list(shared))  # folders that all share name no building
    images: dict[tuple[View, str], Member] = {}
    lists: dict[str, Member] = {}
    for member in members:
        match = IMAGE.fullmatch(member.file)
        if match is None:
            other = lists.setdefault(LISTS[member.file], member)
        else:
            view = View("/".join(places[member][common:]), int(match[1]), int(match[2]))
            other = images.setdefault((view, match[3]), member)
        if other is not member:
            raise UserError(f"{source}: holds {member.file} twice ({other}; {member}); keep one")
    return Views(source, images, lists)


def _domain(name: str) -> str | None:
    match = IMAGE.fullmatch(name)
    return match[3] if match else None


def _place(member: Member) -> tuple[str, ...]:
    """The folders without the domain's name: rgb/almena, almena/rgb and almena_rgb.tar are all ("almena",)."""
    name = re.compile(rf"(?:(.*?)[_.-]+)?{_domain(member.file)}(?:[_.-]+(.*))?")
    places = []
    for folder in member.folders:
        match = name.fullmatch(folder)
        places.append("_".join(part for part in match.groups() if part) if match else folder)
    return tuple(place for place in places if place)


def split_views(found: Views) -> dict[str, list[View]]:
    """The official lists' views where the lists were found; else a fixed split of all views by their points.

    Errors: UserError where one list lacks, a line names no view, or there are several buildings, which lists do not name.
    """
    views = sorted({view for view, _ in found.images})
    if not found.lists:
        return _split_points(views)
    for file, split in LISTS.items():
        if split not in found.lists:
            raise UserError(f"{found.source}: holds one official list, but not {file}; add it, or take both away")
    buildings = sorted({view.building for view in views})
    if len(buildings) > 1:
        raise UserError(
            f"{found.source}: the lists {' and '.join(LISTS)} are for one building, but there are {len(buildings)} "
            f"({', '.join(buildings[:3])}); take the lists away, or all buildings but one"
        )
    splits: dict[str, list[View]] = {split: [] for split in LISTS.values()}
    seen: set[View] = set()
    for split, views in splits.items():
        member = found.lists[split]
        lines = next(read_members([member])).decode(errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            match = LINE.fullmatch(line.strip())
            view = View("", int(match[1]), int(match[2])) if match else None
            if view is None or view in seen:
                raise UserError(
                    f"{member}: line {number} is {line[:80]!r}, {'a view listed before' if view else 'no view'}; "
                    "wanted {domain}/point_407_view_2_domain_{domain}.png, each view once"
                )
            seen.add(view)
            views.append(view)
        if not views:
            raise UserError(f"{member}: is empty or damaged; {ADVICE}")
    return splits


def _split_points(views: list[View]) -> dict[str, list[View]]:
    """A hash sends about a third of the points to val, and at least one to each side where there are two."""
    point_of = {view: f"{view.building}/{view.point}" for view in views}
    draws = {point: _draw(point) for point in set(point_of.values())}
    in_order = sorted(draws, key=draws.__getitem__)
    third = sum(draw < 1 / 3 for draw in draws.values())
    val = set(in_order[: min(max(third, 1), len(draws) - 1)])
    train = [view for view in views if point_of[view] not in val]
    return {"train": train, "val": [view for view in views if point_of[view] in val]}


def _draw(text: str) -> float:
    """A fixed number in 0..1 that looks random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
