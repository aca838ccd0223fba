"""Who may import whom, read from the source; and heavy libraries stay out of ``import tokenfusion``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "tokenfusion"
FILES = sorted(SRC.rglob("*.py"))
EVERYTHING = {path.name for path in SRC.iterdir() if path.is_dir()} | {path.stem for path in SRC.glob("*.py")}
ROOMS: dict[str, set[str]] = {
    **{
        name: set()
        for name in ("errors", "manifest", "components", "fusion", "data", "train", "report", "recipes", "studies")
    },
    "backbones": {"fusion", "components"},
    "tasks": {"fusion", "backbones", "data", "train", "components", "report"},
    "api": {"tasks", "train", "backbones", "fusion", "data", "components"},
    "networks": {"backbones", "components", "fusion"},
    "recipe": {"api", "components"},
    "contestants": {"api", "recipe", "backbones", "components", "data", "train", "tasks"},
    "bench": {"contestants", "recipe"},
    "study": {"api", "recipe", "report", "components", "train", "data", "tasks"},
    "convert": {"api", "recipe", "backbones", "data"},
    "export": {"api", "data", "fusion", "graphs", "tasks"},
    "graphs": {"api", "data"},
    "tables": {"report"},
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": {"cli"},
}
OF_EVERYONE = ("errors", "manifest")
HEAVY = {
    "transformers",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
    "scipy",
    "h5py",
    "torchmetrics",
    "torch_fidelity",
}
SHARED = {  # several homes, for ends that have no code in common
    "matplotlib": {"report/plots.py", "tasks/translation/released.py"},  # charts; the released way to draw images
    "scipy": {"data/prepare/archive.py", "tasks/detection3d/losses2d.py"},  # MATLAB files; matching
    # the peer of a race; the yardstick's network; networks to be fused
    "transformers": {"contestants.py", "tasks/translation/dinov2.py", "backbones/foreign.py"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported name with its dots, inside functions as well: ``from a import b`` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(SRC).with_suffix("").parts
    return parts[:2] if parts[0] == "tasks" else parts[:1]


def allowed(path: Path, name: str) -> bool:
    own, parts = room(path), tuple(name.split(".")[1:])
    if parts[0] in OF_EVERYONE:
        return True
    if parts[0] not in EVERYTHING:  # a name of the package itself
        return own[0] in ("cli", "__init__")
    same_task = len(own) == 1 or parts[1:2] == own[1:2] or not (SRC / "tasks" / parts[1]).is_dir()
    return (parts[0] == own[0] and same_task) or (parts[0] != own[0] and parts[0] in ROOMS[own[0]])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_rooms_import_what_the_table_allows(path: Path) -> None:
    assert room(path)[0] in ROOMS, "a new room: give it a line in the table"
    ours = [name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "tokenfusion"]
    assert not [name for name in ours if not allowed(path, name)]


@pytest.mark.parametrize("path", sorted((SRC / "fusion").glob("*.py")), ids=lambda path: path.name)
def test_the_paper_needs_torch_alone(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert roots <= {"torch", "tokenfusion"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    """``if TYPE_CHECKING`` may name them; module level otherwise may not."""

    class TopLevel(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    roots = {name.split(".")[0] for name in imports(TopLevel().visit(ast.parse(path.read_text())))}
    assert not roots & HEAVY


def test_each_heavy_library_lives_in_one_file() -> None:
    """Named in an import or asked for by ``require("library.module", ...)``."""
    homes: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = [
            *imports(tree),
            *(
                node.args[0].value
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("require")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ),
        ]
        for name in names:
            if name.split(".")[0] in HEAVY:
                homes.setdefault(name.split(".")[0], set()).add(str(path.relative_to(SRC)))
    assert not {library: files for library, files in homes.items() if len(files) > 1 and files != SHARED.get(library)}


def test_the_package_imports_without_any_heavy_library() -> None:
    code = "import sys, tokenfusion; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert "tokenfusion" in loaded
    assert not loaded & {*HEAVY, "numba"}
