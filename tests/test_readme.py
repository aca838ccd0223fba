"""The README's commands and Python lines run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_commands_and_python_run_as_printed(tmp_path: Path) -> None:
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    ours = [shlex.split(line) for line in commands if line.startswith("tokenfusion ")]
    assert {words[1] for words in ours} == {"prepare", "train", "eval", "predict", "report"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in ours:
        command = [sys.executable, "-m", "tokenfusion.cli", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr[-2000:])
    for path in ("runs/first/report.html", "predictions/000042_overlay.png", "predictions/rgb-alone/000042.png",
                 "predictions/colour/000042.png", "predictions/boxes/000042.json", "predictions/boxes/000042_boxes.png",
                 "predictions/boxes/000042_above.png"):  # fmt: skip
        assert (tmp_path / path).is_file()
    code = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "blocks.0 {'rgb': " in done.stdout
    assert "torch.Size([1, 13, 24, 32])" in done.stdout


def test_shell_lines_outside_of_commands_are_known() -> None:
    """Lines that are not run here name real targets and verbs."""
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text.split("## Install")[0])) <= targets | {"it"}
    recipes = {path.stem for path in (README.parent / "src" / "tokenfusion" / "recipes").glob("*.yaml")}
    named = set(
        re.findall(r"`((?:nyudv2|sunrgbd)-mit-b\d[\w-]*|(?:sunrgbd|scannet)-l[\w-]+|toy-\w+|taskonomy-[\w-]+)`", text)
    )
    pairs = re.findall(r"`((?:[a-z]+-)*to-[a-z]+)`", text)
    assert len(pairs) == 5  # Table 1; of Table 7 the inputs are named
    inputs = re.search(r"and (`depth`[^.]*) to `rgb`", text, re.DOTALL)
    assert inputs
    pairs += [f"{name}-to-rgb" for name in re.findall(r"`([a-z-]+)`", inputs[1])]
    named |= {f"taskonomy-{pair}-{size}" for pair in pairs for size in ("ti", "s")}
    assert {name for name in recipes if re.match("taskonomy-|(sunrgbd|scannet)-l|toy-", name)} <= named
    assert named
    assert not re.findall(r"^[A-Z]{4,}$", text, re.MULTILINE), "a placeholder"
    assert named <= recipes
