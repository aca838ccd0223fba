"""docs/paper-map.md agrees with the equation tags in the source, and names only what exists."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "tokenfusion"
MAP = (ROOT / "docs" / "paper-map.md").read_text()
BUILT, _, NOT_BUILT = MAP.partition("## Not built yet")
PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def tags(text: str) -> set[int]:
    """Numbers of "Eq. 4", "Eq. 4, 5", "Eq. 2 and 3"."""
    found = re.findall(r"\bEqs?\. (\d+(?:(?:, | and )\d+)*)", text)
    return {int(number) for group in found for number in re.findall(r"\d+", group)}


def rows(text: str) -> dict[int, str]:
    return {int(m[1]): m[0] for m in re.finditer(r"^\| Eq\. (\d+) \|.*$", text, re.MULTILINE)}


def test_the_ten_equations_are_built_or_listed_as_not_built() -> None:
    assert not rows(BUILT).keys() & rows(NOT_BUILT).keys()
    assert rows(BUILT).keys() | rows(NOT_BUILT).keys() == set(range(1, 11))


def test_every_tag_in_the_source_is_in_the_map() -> None:
    tagged = {path: tags(path.read_text()) for path in SRC.rglob("*.py")}
    unknown = {path.name: numbers - rows(BUILT).keys() for path, numbers in tagged.items()}
    assert not {name: numbers for name, numbers in unknown.items() if numbers}
    assert set().union(*tagged.values()) == rows(BUILT).keys()


def test_every_file_of_the_map_carries_the_tag() -> None:
    for number, row in rows(BUILT).items():
        places = PLACE.findall(row)
        assert places, row
        for file, _ in places:
            assert number in tags((SRC / file).read_text()), f"{file} has no tag Eq. {number}"


def test_every_tagged_file_of_the_method_is_in_its_row() -> None:
    for path in (SRC / "fusion").glob("*.py"):
        for number in tags(path.read_text()):
            assert f"`fusion/{path.name}:" in rows(BUILT)[number], f"row Eq. {number} does not name {path.name}"


def test_every_place_exists() -> None:
    places = PLACE.findall(MAP)
    assert len(places) > 12
    for file, name in places:
        module = importlib.import_module("tokenfusion." + file.removesuffix(".py").replace("/", "."))
        assert functools.reduce(getattr, name.split("."), module).__module__ == module.__name__, f"{file}:{name}"


def test_tags_are_found_in_lists() -> None:
    assert tags("(Eq. 4, 5) and Eq. 10; Eqs. 2 and 3") == {2, 3, 4, 5, 10}
