"""What holds for the repository as a whole: sizes, paths, hosts, the lock and the versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2 * 2**20
PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)", re.MULTILINE)
# Written with brackets so that these lines do not find themselves.
MACHINE_PATH = re.compile(r"(?<![\w.}~-])/(?:work|root|home|Users|opt|tmp|mnt)/\w")
REGISTRY = re.compile(
    r"pypi[.](?:org|python)|pythonhosted[.]|download[.]pytorch|anaconda[.]org|index[-]url|trusted[-]host|find[-]links"
)
TOOLS = ("requirements.lock", "Makefile", ".ci/run", ".pre-commit-config.yaml")


@cache
def _files() -> list[Path]:
    """Every file that is tracked or would be: what git lists, without what it ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def _found(pattern: re.Pattern[str]) -> list[str]:
    """``file:line: text`` for every match of the pattern in the repository's text."""
    hits = []
    for path in _files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if pattern.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return hits


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _pins() -> dict[str, str]:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = [(canonicalize_name(match["name"]), match["version"]) for match in PIN.finditer(lock)]
    assert len(found) == len(dict(found)), "a package is pinned twice"
    return dict(found)


def test_no_file_is_large() -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in _files()}
    assert not {str(path): size for path, size in sizes.items() if size > LARGEST}


def test_no_machine_path() -> None:
    assert not _found(MACHINE_PATH)


def test_no_registry_host() -> None:
    assert not _found(REGISTRY)


@pytest.mark.parametrize("name", TOOLS)
def test_tools_name_no_host(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "DATA = '/" + "home/someone/data'"),
        (MACHINE_PATH, "cd /" + "tmp/x"),
        (REGISTRY, "--extra-index" + "-url=somewhere"),
        (REGISTRY, "https://pypi" + ".org/simple"),
    ],
)
def test_patterns_find(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/page", "$HOME/tmp/x", "runs/home/a", "~/home/data"])
def test_machine_path_spares(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_lock_covers_the_project() -> None:
    project, pins = _project(), _pins()
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *chain.from_iterable(extras.values()))]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name == project["name"]:  # an extra that is the sum of others
            assert requirement.extras <= set(extras)
            continue
        assert name in pins, f"{requirement} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(pins[name]), f"requirements.lock has {pins[name]}, not {requirement}"


def test_lock_is_hashed() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(_pins())
    bare = [entry.split()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    assert not bare


def test_versions_agree() -> None:
    version = _project()["version"]
    heading = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert heading is not None
    assert heading[1] == version == citation["version"]


def test_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert _project()["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_continuous_integration_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
