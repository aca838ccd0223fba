"""What the runs of all tasks have in common: the run folder's papers, its weights, the data that judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn

from tokenfusion.components import read_yaml, write_text
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.errors import UserError, first_line
from tokenfusion.train import WITHOUT_EFFECT_ON_WEIGHTS, Checkpoints, TrainSettings, load_model

Net = TypeVar("Net", bound=nn.Module)


class Judged(NamedTuple):
    """What a task has to say of a model on a split."""

    figures: dict[str, Any]  # for metrics.json
    write_samples: Callable[[Path], None]  # the pictures that the report shows, into a folder


# what may change when a run goes on
MAY_CHANGE = {("data", "root"), ("description",), ("train", "steps")} | {
    ("train", key) for key in WITHOUT_EFFECT_ON_WEIGHTS
}


def settle(recipe: BaseModel, dataset: DatasetSpec, out: Path) -> None:
    """Write recipe.yaml and dataset.yaml into a run folder.

    Raises:
        UserError: where it holds a run of another recipe or of data with other classes, or cannot be written.
    """
    if is_started(out) or (out / "metrics.json").is_file():  # figures stay where weights have been moved away
        _check_same(recipe, dataset, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "recipe.yaml", recipe.model_dump(mode="json"))
        _write(out / "dataset.yaml", dataset.model_dump(mode="json", exclude_unset=True))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def is_started(out: Path) -> bool:
    """Whether training goes on there."""
    return any((out / "checkpoints").glob("step-*"))


def _check_same(recipe: BaseModel, dataset: DatasetSpec, out: Path) -> None:
    old = read_yaml(out / "recipe.yaml", type(recipe)).model_dump(mode="json")
    different = [key for key in _differences(old, recipe.model_dump(mode="json")) if key not in MAY_CHANGE]
    if different:
        keys = ", ".join(".".join(key) for key in different[:5])
        raise UserError(f"{out}: holds a run of another recipe (different: {keys}); choose another --out")
    for key, was, now in zip(
        ("classes", "scene.classes"), _labels(recorded_dataset(out)), _labels(dataset), strict=True
    ):
        if was != now:
            raise UserError(f"{out}: this run knows other {key} than {dataset.name} has now; choose another --out")


def _labels(dataset: DatasetSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What labels mean: the classes of pixels, and those of boxes."""
    return tuple(entry.name for entry in dataset.classes), dataset.scene.classes if dataset.scene else ()


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Only where it says something new: of several processes the first has written it."""
    text = yaml.safe_dump(content, sort_keys=False)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)


def _differences(old: Any, new: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), (*place, key))]
    return [] if old == new else [place]


def recorded_dataset(run: Path) -> DatasetSpec:
    """The description of the data that a run was trained on."""
    return read_yaml(run / "dataset.yaml", DatasetSpec)


def load_run(
    run: Path,
    names: Sequence[str],
    build: Callable[[DatasetSpec], Net],
    checkpoint: str,
    device: str | torch.device,
) -> tuple[Net, DatasetSpec, dict[str, Any]]:
    """A run's model, kept as ``task.model``, in eval mode; the description of its data; the checkpoint's state.

    Args:
        names: the modalities that the recipe names.
        build: the recipe's fresh model.
        checkpoint: ``last`` or ``best``.

    Raises:
        UserError: where the run lacks a modality, there is no such checkpoint, or it does not fit the recipe.
    """
    dataset = recorded_dataset(run)
    missing = [name for name in names if name not in dataset.modalities]
    if missing:
        raise UserError(f"{run / 'dataset.yaml'}: has no modality {missing[0]!r}, which recipe.yaml names")
    model = build(dataset)
    state = _load_weights(model, run, checkpoint)
    return model.to(device).eval(), dataset, state


def _load_weights(model: nn.Module, run: Path, checkpoint: str) -> dict[str, Any]:
    if checkpoint not in ("last", "best"):
        raise UserError(f"--checkpoint is {checkpoint!r}; wanted last or best")
    tensors, state = load_model(run, "best" if checkpoint == "best" else "last")
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{run}: the checkpoint does not fit recipe.yaml ({first_line(error)})") from None
    return state


def save_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], recipe: BaseModel, dataset: DatasetSpec, out: Path
) -> None:
    """Write weights from elsewhere as a run folder.

    Raises:
        UserError: where they are not the whole of the model.
    """
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {first_line(error)}") from None
    settle(recipe, dataset, out)
    Checkpoints(out).save(0, {f"model.{name}": value for name, value in model.state_dict().items()}, {}, {"step": 0})


def device_of(settings: TrainSettings) -> str:
    """Where training judged the model too."""
    return "cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def judged_folder(run: Path, root: str, data: str | Path | None) -> Folder:
    """The data that a run is judged on: ``data``, or the recipe's own.

    Raises:
        UserError: where neither is there.
    """
    if data is None and not Path(root).exists():
        raise UserError(f"{run / 'recipe.yaml'}: data.root {root} is not found from here; say --data FOLDER")
    return Folder(data or root)
