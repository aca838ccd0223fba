"""Which views there are: buildings told from domains in any layout, official lists, and a split by points."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenfusion.data.prepare.views import View, find_views, split_views
from tokenfusion.errors import UserError

DOMAINS = ("rgb", "normal", "depth_zbuffer")


def image(point: int, view: int = 0, domain: str = "rgb") -> str:
    return f"point_{point}_view_{view}_domain_{domain}.png"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{0}/{1}", "x/y"),  # buildings of two folders, and no folder of a domain
        ("{domain}/{0}", "x"),
        ("{0}/{domain}", "x"),
        ("data/{0}_{domain}", "x"),
        ("{domain}__{0}/deep", "x/deep"),
        ("{0}-{domain}/{domain}", "x"),
        ("{domain}/{0}_{domain}/{domain}", "x"),
    ],
)
def test_buildings_are_told_from_domains(tmp_path: Path, pattern: str, name: str) -> None:
    for building in (("x", "y"), ("almena", "z")):
        for domain in DOMAINS:
            touch(tmp_path, f"{pattern.format(*building, domain=domain)}/{image(7, 2, domain)}")
    found = find_views(tmp_path, DOMAINS)
    assert len(found.images) == 6
    views = {view for view, _ in found.images}
    assert views == {View(name, 7, 2), View(name.replace("x", "almena").replace("y", "z"), 7, 2)}
    assert {view.id for view in views} >= {f"{name}/point_7_view_2"}


@pytest.mark.parametrize("place", [".", "{domain}", "data/{domain}", "almena_{domain}/almena/{domain}"])
def test_a_single_building_has_no_name(tmp_path: Path, place: str) -> None:
    touch(tmp_path, *(f"{place.format(domain=domain)}/{image(7, 2, domain)}" for domain in DOMAINS))
    assert {view.id for view, _ in find_views(tmp_path, DOMAINS).images} == {"point_7_view_2"}


def test_figures_json_and_other_domains_are_no_data(tmp_path: Path) -> None:
    other = [
        image(1, 2, "depth_zbuffer2"),
        image(1, 2, "semantic"),
        "point_1_view_2_domain_rgb.json",
        "._" + image(1, 2),
    ]
    touch(tmp_path, image(1, 2), *other)
    assert list(find_views(tmp_path, DOMAINS).images) == [(View("", 1, 2), "rgb")]
    with pytest.raises(UserError, match=r"no point_P_view_V_domain_D\.png in it, .*github\.com/alexsax"):
        find_views(tmp_path, ("normal",))


def test_an_image_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, f"rgb/{image(1)}", image(1))
    with pytest.raises(UserError, match=r"holds point_1_view_0_domain_rgb\.png twice \(.*; .*\); keep one"):
        find_views(tmp_path, DOMAINS)


def test_points_are_split_by_a_hash_and_never_apart(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{b}/{image(point, view)}" for b in "ab" for point in range(60) for view in range(3)))
    splits = split_views(find_views(tmp_path, DOMAINS))
    points = {name: {(view.building, view.point) for view in views} for name, views in splits.items()}
    assert not points["train"] & points["val"]
    assert len(splits["train"]) + len(splits["val"]) == 360
    assert 25 <= len(points["val"]) <= 55  # a third of 120
    assert splits["train"] == sorted(splits["train"])
    touch(tmp_path, f"a/{image(60)}")  # one more point moves no other
    again = split_views(find_views(tmp_path, DOMAINS))
    assert {(v.building, v.point) for v in again["val"]} - points["val"] <= {("a", 60)}


def test_both_splits_have_a_point_where_there_are_two(tmp_path: Path) -> None:
    for point in range(12):
        folder = touch(tmp_path / str(point), image(point), image(point, 1))
        assert split_views(find_views(folder, DOMAINS)) == {
            "train": [View("", point, 0), View("", point, 1)],
            "val": [],
        }
        splits = split_views(find_views(touch(folder, image(point + 1)), DOMAINS))
        assert all(splits.values())


def test_official_lists_go_before_the_hash(tmp_path: Path) -> None:
    touch(tmp_path, *(f"rgb/{image(point)}" for point in range(5)))
    pattern = "{{domain}}/point_{}_view_0_domain_{{domain}}.png"
    (tmp_path / "train_domain.txt").write_text("\n".join(pattern.format(point) for point in (3, 1)))  # no last newline
    with pytest.raises(UserError, match=r"holds one official list, but not val_domain\.txt"):
        split_views(find_views(tmp_path, DOMAINS))
    (tmp_path / "val_domain.txt").write_text(pattern.format(9) + "\n")  # not in the source: for the caller to judge
    splits = split_views(find_views(tmp_path, DOMAINS))
    assert splits == {"train": [View("", 3, 0), View("", 1, 0)], "val": [View("", 9, 0)]}
    wrong = {"": "empty", "rgb/1.png\n": "line 1 is 'rgb/1.png', no view", pattern.format(3): "listed before"}
    for text, reason in wrong.items():
        (tmp_path / "val_domain.txt").write_text(text)
        with pytest.raises(UserError, match=rf"val_domain\.txt: .*{reason}"):
            split_views(find_views(tmp_path, DOMAINS))
    (tmp_path / "val_domain.txt").write_text(pattern.format(4))
    touch(tmp_path, f"almena/rgb/{image(2)}")
    with pytest.raises(UserError, match=r"for one building, but there are 2"):
        split_views(find_views(tmp_path, DOMAINS))


def test_real_lists_have_1000_and_500_views(real_data: Path, tmp_path: Path) -> None:
    for file in (real_data / "splits" / "taskonomy").iterdir():
        (tmp_path / file.name).symlink_to(file)
    splits = split_views(find_views(touch(tmp_path, image(1)), DOMAINS))
    assert {name: len(views) for name, views in splits.items()} == {"train": 1000, "val": 500}
    points = [{view.point for view in views} for views in splits.values()]
    assert not points[0] & points[1]
