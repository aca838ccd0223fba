"""Prepare, train, evaluate, predict as functions, and load() for a finished run."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from tokenfusion.backbones import saved
from tokenfusion.backbones.weights import local_folder
from tokenfusion.components import explain, read_yaml, write_text
from tokenfusion.data.folder import DatasetSpec
from tokenfusion.errors import UserError, nearest
from tokenfusion.tasks.runs import device_of, judged_folder, load_run, save_weights
from tokenfusion.train import FitResult

TASKS = {name: f"tokenfusion.tasks.{name}" for name in ("segmentation", "translation", "detection3d")}


DATASETS = {
    "nyudv2": "NYUDv2, 795 + 654 images, 40 classes, from nyu_depth_v2_labeled.mat, splits.mat, classMapping40.mat",
    "sunrgbd": "SUN RGB-D, 5,285 + 5,050 images, 37 classes, from SUNRGBD.zip and SUNRGBDtoolbox.zip, unpacked; "
    "or, with --task detection3d, its scenes with boxes of 10 classes",
    "taskonomy": "Taskonomy, any buildings, all domains that are images, from folders or archives as downloaded",
    "scannet": "ScanNet v2, 1,201 + 312 scans with boxes of 18 classes and views, from scans/ and scannet_frames_25k/",
    "rooms": "procedural rooms, drawn on the spot from a seed",
}
PREPARATIONS = {"sunrgbd": {"segmentation": "sunrgbd", "detection3d": "sunrgbd_boxes"}}  # where tasks want other files


class Recipe(Protocol):
    """What all recipes have."""

    task: str
    seed: int
    fuser: dict[str, Any]
    data: Any
    evaluation: Any
    train: Any

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class _AnyRecipe(BaseModel):
    task: str


def task_package(task: str) -> Any:
    """The package of a task: ``Recipe``, ``modalities_of``, ``model_of``, ``train``, ``judge``, ``predictor``."""
    return importlib.import_module(TASKS[task])


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe that a run folder holds.

    Raises:
        UserError: where the folder is no run, or its recipe.yaml is damaged.
    """
    file = run / "recipe.yaml"
    if not file.is_file():
        reason = "not a run folder (no recipe.yaml)" if run.exists() else "no such folder"
        raise UserError(f"{run}: {reason}; wanted the --out of `tokenfusion train`")
    task = read_yaml(file, _AnyRecipe).task
    if task not in TASKS:
        raise UserError(f"{file}: task is {task!r}; {nearest(task, TASKS)}")
    return read_yaml(file, task_package(task).Recipe)


def prepare(
    dataset: str, source: str | Path | None, out: str | Path, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write an official archive (or rooms) in the one on-disk format; returns counts and SHA-256 sums.

    Args:
        dataset: a key of ``DATASETS``.
        source: folder with the official files, at any depth; None for rooms.
        out: new folder; it appears when everything is written.
        options: further arguments of that data set's ``tokenfusion.data.prepare.DATASET.prepare``, for example
            ``{"depth": "raw"}`` or ``{"domains": ["rgb", "normal"], "on_bad": "skip"}``; and ``task``, where a data set
            is prepared in another way for it: sunrgbd for "detection3d" (``tokenfusion.data.prepare.sunrgbd_boxes``).
    """
    if dataset not in DATASETS:
        raise UserError(f"no data set named {dataset!r}; {nearest(dataset, DATASETS)}")
    options = dict(options or {})
    module = _preparation(dataset, options.pop("task", None))
    write = importlib.import_module(f"tokenfusion.data.prepare.{module}").prepare
    known = [name for name in inspect.signature(write).parameters if name not in ("out", "progress", "expected")]
    given = {**({} if source is None else {"source": Path(source)}), **options}
    for name in given:
        if name not in known:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in known)
            raise UserError(f"--{name.replace('_', '-')} is no option of prepare {dataset}; it takes --out, {flags}")
    if "source" in known and source is None:
        raise UserError(f"prepare {dataset} wants --source: {DATASETS[dataset]}")
    return dict(write(out=Path(out), **given))


def _preparation(dataset: str, task: str | None) -> str:
    """The module of ``tokenfusion.data.prepare`` that writes a data set for a task."""
    modules = PREPARATIONS.get(dataset, {})
    if task is None:
        return dataset
    if task not in modules:
        wanted = nearest(task, modules) if modules else f"prepare {dataset} takes no --task"
        raise UserError(f"--task is {task!r}; {wanted}")
    return modules[task]


def prepare_rooms(
    out: str | Path, train: int = 400, val: int = 100, height: int = 96, width: int = 128, seed: int = 0
) -> dict[str, int]:
    """Draw procedural rooms into a new folder; returns counts."""
    from tokenfusion.data.prepare import rooms

    return rooms.prepare(Path(out), train, val, height, width, seed)


def train(recipe: Recipe, out: str | Path, trust: bool = False) -> FitResult:
    """Train a recipe into a run folder, or go on where the folder holds checkpoints; ends with metrics.json and samples.

    Args:
        recipe: from :func:`tokenfusion.recipe.read_recipe`.
        out: the run folder.
        trust: build components outside of tokenfusion.
    """
    result: FitResult = task_package(recipe.task).train(recipe, Path(out), trust)
    if result.is_first:
        evaluate(out, trust=trust)
    return result


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    checkpoint: str = "last",
    trust: bool = False,
    to: str | Path | None = None,
) -> dict[str, Any]:
    """Judge a run on a split; writes and returns the content of ``metrics.json``.

    Where the run is judged on its own split, in its own way, with every input as it is, ``samples/`` are written too.

    Args:
        run: a run folder.
        data: another data set than the recipe's.
        split: the recipe's validation split unless said otherwise.
        evaluation: keys of the recipe's section ``evaluation`` that shall have other values this time, for example
            ``{"features": "inception", "feature_weights": "weights.pth"}`` or ``{"missing": ["depth"]}``.
        checkpoint: ``"last"`` or ``"best"`` (best on the validation split during training).
        trust: build components outside of tokenfusion.
        to: a file to write in place of the run's ``metrics.json``; the run stays as it is.
    """
    run, recipe = Path(run), recipe_of(Path(run))
    file = run / "metrics.json" if to is None else Path(to)
    if file.is_dir():
        raise UserError(f"{file}: a folder; wanted the file that the figures are written to, such as {file}/dark.json")
    model, dataset, state = _loaded(run, recipe, checkpoint, trust, device_of(recipe.train))
    folder, protocol = judged_folder(run, recipe.data.root, data), _protocol(recipe, evaluation)
    is_own = data is None and split in (None, recipe.data.val) and checkpoint == "last"
    is_plain = to is None and protocol is None and recipe.evaluation.are_plain
    split = split or recipe.data.val
    judge = task_package(recipe.task).judge
    figures, write_samples = judge(model, dataset, recipe, folder, split, protocol or recipe.evaluation, trust)
    content = {
        "task": recipe.task,
        "dataset": folder.name,
        "data": folder.fingerprint(),
        "split": split,
        **figures,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": checkpoint,
        "step": state["step"],
    }
    if evaluation:
        content["evaluation"] = dict(evaluation)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1))
    if is_own and is_plain:
        write_samples(run / "samples")
    return content


def _protocol(recipe: Recipe, changes: Mapping[str, Any] | None) -> BaseModel | None:
    """The recipe's way to judge, changed; None where nothing changes."""
    if not changes:
        return None
    own: BaseModel = recipe.evaluation
    try:
        return type(own).model_validate({**own.model_dump(), **changes})
    except ValidationError as error:
        raise UserError(f"evaluation: {explain(error, type(own))}") from None


def predict(
    run: str | Path,
    out: str | Path,
    files: Mapping[str, str | Path] | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> list[Path]:
    """Predict on single files (``{"rgb": "a.jpg", "depth": "a.png"}``) or on a data set folder; returns what was written."""
    recipe = recipe_of(Path(run))
    model, dataset, _ = _loaded(Path(run), recipe, checkpoint, trust, device_of(recipe.train))
    written: list[Path] = task_package(recipe.task).predictor(model, dataset, recipe).run(files, data, split, Path(out))
    return written


def example_of(run: str | Path) -> str:
    """What single files look like on the command line, for the task of a run."""
    return str(task_package(recipe_of(Path(run)).task).EXAMPLE)


def load(
    path: str | Path,
    checkpoint: str = "last",
    trust: bool = False,
    network: nn.Module | Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The model of a run folder, or a fused network that was saved, in eval mode.

    Args:
        path: a run folder (the ``--out`` of ``train`` or of ``convert``), what ``save_pretrained()`` of fused networks wrote,
            or the hub id of an uploaded one; told apart by their files.
        checkpoint: ``"last"`` or ``"best"``, of a run.
        trust: build components outside of tokenfusion.
        network: of a saved network that cannot be built from its name: a fresh one, as it was given to :func:`fuse`; of
            separate networks those that cannot, ``{"audio": network}``.

    Example: ``tokenfusion.load("runs/nyu")({"rgb": rgb, "depth": depth}).ensemble``
    """
    run = local_folder(str(path))
    if saved.is_saved(run):
        return saved.load(run, network, trust)
    recipe = recipe_of(run)
    return _loaded(run, recipe, checkpoint, trust, "cpu")[0]


def _loaded(
    run: Path, recipe: Recipe, checkpoint: str, trust: bool, device: str
) -> tuple[nn.Module, DatasetSpec, dict[str, Any]]:
    """A run's model in eval mode, the description of its data, the checkpoint's state."""
    package = task_package(recipe.task)

    def build(spec: DatasetSpec) -> nn.Module:
        model: nn.Module = package.model_of(recipe, spec, run / "dataset.yaml", trust)
        return model

    return load_run(run, package.modalities_of(recipe), build, checkpoint, device)


def save(recipe: Recipe, dataset: DatasetSpec, tensors: Mapping[str, Tensor], out: str | Path) -> None:
    """Write weights from elsewhere, in the names of the recipe's model, as a run folder."""
    out = Path(out)
    model = task_package(recipe.task).model_of(recipe, dataset, out / "dataset.yaml", False)
    save_weights(model, tensors, cast("BaseModel", recipe), dataset, out)
