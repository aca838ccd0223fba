"""A run's model as one file for other programs: ONNX, or torch's own exported program (pt2)."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from tokenfusion import api
from tokenfusion.data.folder import DatasetSpec
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError, nearest, require
from tokenfusion.fusion.scores import ScorePredictor
from tokenfusion.tasks.runs import recorded_dataset

# How far the file's outputs may be from the model's, as a share of the largest value where that is above 1.
TOLERANCES = {"onnx": 1e-4, "pt2": 1e-5}
FACTS = "tokenfusion"  # the key of ONNX's metadata; in pt2 an extra file of this name and .json
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
Tensors = dict[str, Tensor]


class Exported(NamedTuple):
    """What was written."""

    path: Path
    facts: dict[str, Any]  # what the file holds beside the network, for those who feed it
    difference: float  # the largest between the file's outputs and the model's, on random inputs


class Graph(NamedTuple):
    """What goes into a file."""

    network: nn.Module  # {name: tensor} -> {name: tensor}
    draw: Callable[[int], Tensors]  # batch -> random inputs
    holds: dict[str, str]  # what each output is, in order
    facts: dict[str, Any]
    batch: int | None  # None: any


def export(
    run: str | Path,
    format: str,
    out: str | Path,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> Exported:
    """Write a run's model as a file that is checked against the model before it appears.

    The network takes normalised tensors by modality; see docs/runs.md for names, shapes and what the file says about them.

    Args:
        run: a run folder.
        format: ``"onnx"``, or ``"pt2"``: what ``torch.export.load`` reads.
        out: the file; its name ends in ``.onnx`` or ``.pt2``.
        height, width: of the images, fixed in the file; without them those that the run is evaluated with.
        batch: a fixed batch size; None leaves it open, or is 1 in 3D detection.
        checkpoint: ``"last"`` or ``"best"``.
        trust: build components outside of tokenfusion.

    Raises:
        UserError: where the model cannot be written in this format, or the file does not give the model's outputs; there
            is no file then.
    """
    run, out = Path(run), Path(out)
    _check_arguments(format, out, {"--height": height, "--width": width, "--batch": batch})
    recipe = api.recipe_of(run)
    if format == "onnx" and recipe.task == "detection3d":
        raise UserError(f"{run}: a detector searches its points with operators that ONNX lacks; wanted --format pt2")
    model, dataset = api.load(run, checkpoint, trust), recorded_dataset(run)
    describe = _detection if recipe.task == "detection3d" else _images
    graph = describe(model, dataset, recipe, _size(run, recipe, dataset, height, width), batch)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as stage, torch.no_grad(), _quiet():
        file = Path(stage) / out.name
        program = _traced(graph, run)
        graph.facts["outputs"] = _outputs(program, graph.holds)
        write, read = {"onnx": (_write_onnx, _read_onnx), "pt2": (_write_pt2, _read_pt2)}[format]
        try:
            write(program, graph, file)
            difference = _check(graph, read(file), TOLERANCES[format], f"{run}: its model as {format}")
        except UserError:
            raise
        except Exception as error:  # converters and runtimes raise many kinds; each means "not this model"
            raise UserError(f"{run}: its model cannot be written as {format} ({_reason(error)})") from error
        file.replace(out)
    return Exported(out, graph.facts, difference)


def _check_arguments(format: str, out: Path, numbers: Mapping[str, int | None]) -> None:
    if format not in TOLERANCES:
        raise UserError(f"--format is {format!r}; {nearest(format, TOLERANCES)}")
    if out.suffix != f".{format}" or out.is_dir():
        raise UserError(f"{out}: wanted a file name that ends in .{format}, as --format says")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first")
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; wanted 1 or more")
    for library in LIBRARIES if format == "onnx" else ():
        require(library, "export")


def _size(
    run: Path, recipe: api.Recipe, dataset: DatasetSpec, height: int | None, width: int | None
) -> tuple[int, int]:
    """Rows and columns of the images: as given, else those of evaluation, else those of the training crop."""
    data, usual = recipe.data, None
    if recipe.task == "detection3d":
        usual = data.image
    elif data.resize is not None:
        usual = data.resize
    elif dataset.crop is not None:
        top, bottom, left, right = dataset.crop
        usual = (bottom - top, right - left)
    else:
        usual = data.crop
    if usual is None and (height is None or width is None):
        raise UserError(f"{run / 'recipe.yaml'}: fixes no size of the images; say --height and --width")
    rows, columns = usual or (0, 0)
    return height or rows, width or columns


# ---- what the tasks put into a file --------------------------------------------------------------------------------


class Segments(nn.Module):
    """``{modality: [B, 3, H, W]} -> {"ensemble", "logits/<modality>": [B, K, H, W], "scores/<block>": [M, B, N]}``.

    Logits are enlarged to the images' size as in evaluation.
    """

    def __init__(self, model: Any, upsample: str) -> None:
        super().__init__()
        self.model, self.upsample = model, upsample

    def forward(self, inputs: Tensors) -> Tensors:
        found, size = self.model(inputs), next(iter(inputs.values())).shape[-2:]
        maps = {"ensemble": found.ensemble, **_named("logits", found.logits)}
        maps = {n: F.interpolate(x, size=size, mode=self.upsample, align_corners=False) for n, x in maps.items()}
        return {**maps, **_scores(self.model, found.scores)}


class Translates(nn.Module):
    """``{modality: [B, 3, H, W]} -> {"ensemble", "images/<modality>": [B, 3, H, W], "scores/<block>": [M, B, N]}``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        found = self.model(inputs)
        return {"ensemble": found.ensemble, **_named("images", found.images), **_scores(self.model, found.scores)}


def _named(what: str, entries: Mapping[str, Tensor]) -> Tensors:
    return {f"{what}/{name}": x for name, x in entries.items()}


def _scores(model: Any, scores: Sequence[Tensor]) -> Tensors:
    return _named("scores", dict(zip(model.backbone.block_names(), scores, strict=True)))


class Detects(nn.Module):
    """``{"points", "rgb", "projection"} -> {"boxes", "objectness", "probabilities"}`` of the last head, before suppression."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        found = self.model(inputs["points"], inputs.get("rgb"), inputs.get("projection")).points.heads[-1]
        boxes, probabilities = self.model.points.boxes(found), found.class_scores.softmax(-1)
        return {"boxes": boxes, "objectness": found.objectness.sigmoid(), "probabilities": probabilities}


def _images(model: Any, dataset: DatasetSpec, recipe: api.Recipe, size: tuple[int, int], batch: int | None) -> Graph:
    """Segmentation and translation: aligned images come in, maps of their size go out."""
    names, specs = model.modalities, dataset.modalities
    if recipe.task == "segmentation":
        network: nn.Module = Segments(model, recipe.evaluation.upsample)
        what, value, describe = "logits", "logits of the classes", _normalised
        more: dict[str, Any] = {"classes": [entry.name for entry in dataset.classes]}
    else:
        network, what, value, describe = Translates(model), "images", "an image in -1..1", _coded
        more = {"target": {"name": recipe.data.target, **_coded(specs[recipe.data.target])}}
    holds = dict.fromkeys(["ensemble", *(f"{what}/{name}" for name in names)], value)
    holds |= dict.fromkeys((f"scores/{name}" for name in model.backbone.block_names()), "scores of the tokens")
    facts = {
        **_head(recipe, model.backbone.threshold, size, batch),
        "modalities": list(names),
        "inputs": {name: {"shape": [batch or "batch", 3, *size], **describe(specs[name])} for name in names},
        **more,
    }

    def draw(count: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.rand(count, 3, *size, generator=generator) * 2 - 1 for name in names}

    return Graph(network, draw, holds, facts, batch)


def _detection(model: Any, dataset: DatasetSpec, recipe: api.Recipe, size: tuple[int, int], batch: int | None) -> Graph:
    """3D detection: a cloud comes in, with the images of its scene where the run has them."""
    data, has_images, batch = recipe.data, model.image is not None, batch or 1
    assert dataset.scene is not None, "a detection run has scenes"
    cloud = {"shape": [batch, data.points, 3], "unit": "metres", "axes": "upright, z is up"}
    inputs: dict[str, Any] = {"points": cloud}
    if has_images:
        inputs["rgb"] = {"shape": [batch, data.views, 3, *size], **_normalised(dataset.modalities["rgb"])}
        inputs["projection"] = {
            "shape": [batch, data.views, 3, 4],
            "holds": "K [R|t] from metres to pixels of the resized image; zeros = this view is missing",
        }
    holds = {
        "boxes": "centre, full sizes in metres, yaw in radians, counter-clockwise",
        "objectness": "a probability",
        "probabilities": "of the classes",
    }
    facts = {
        **_head(recipe, model.threshold, size, batch),
        "modalities": list(data.modalities),
        "inputs": inputs,
        "classes": list(dataset.scene.classes),
    }

    def draw(count: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        cloud = torch.rand(count, data.points, 3, generator=generator) * 4 - torch.tensor([2.0, -1.0, 2.0])
        if not has_images:
            return {"points": cloud}
        images = torch.randn(count, data.views, 3, *size, generator=generator)
        return {"points": cloud, "rgb": images, "projection": _camera(size).expand(count, data.views, 3, 4)}

    return Graph(Detects(model), draw, holds, facts, batch)


def _camera(size: tuple[int, int]) -> Tensor:
    """The projection [3, 4] of a camera at the origin that looks along y and sees a right angle."""
    rows, columns = size
    focal, u, v = columns / 2, (columns - 1) / 2, (rows - 1) / 2
    return torch.tensor([[focal, u, 0, 0], [0, v, -focal, 0], [0, 1.0, 0, 0]])


def _head(recipe: api.Recipe, threshold: float | None, size: tuple[int, int], batch: int | None) -> dict[str, Any]:
    facts = {FACTS: version("tokenfusion"), "task": recipe.task, "height": size[0], "width": size[1]}
    return {**facts, "batch": batch or "any", "threshold": threshold}


def _normalised(spec: ModalitySpec) -> dict[str, Any]:
    """How an image becomes an input of segmentation or detection: ``data.inputs.normalise`` in words."""
    kind = spec.modality
    facts: dict[str, Any] = {"kind": spec.kind, "unit": kind.unit, "formula": "(value - mean) / std"}
    facts |= {"mean": list(spec.mean or kind.mean), "std": list(spec.std or kind.std)}
    return facts if kind.missing is None else {**facts, "missing": {"value": 0.0, "input": 0.0}}


def _coded(spec: ModalitySpec) -> dict[str, Any]:
    """How an image becomes an input of translation, and its output an image: ``data.inputs.to_tanh`` in words."""
    low, high = spec.limits
    formula = f"2 * (value - {low:g}) / {high - low:g} - 1, clipped to -1..1"
    if spec.kind == "depth":
        formula = f"2 * ln(1 + value / {low:g}) / ln(1 + {high:g} / {low:g}) - 1, clipped to -1..1"
    facts: dict[str, Any] = {"kind": spec.kind, "unit": spec.modality.unit, "formula": formula, "range": [low, high]}
    return facts if spec.modality.missing is None else {**facts, "missing": {"value": 0.0, "input": -1.0}}


# ---- writing, reading, checking ------------------------------------------------------------------------------------


def _shapes(graph: Graph) -> tuple[dict[str, dict[int, Any]]] | None:
    """Which dimensions are left open."""
    if graph.batch is not None:
        return None
    batch = torch.export.Dim("batch", min=1)
    return ({name: {0: batch} for name in graph.facts["inputs"]},)


def _traced(graph: Graph, run: Path) -> ExportedProgram:
    try:
        inputs = graph.draw(graph.batch or 2)  # of a batch of one torch would take the size for fixed
        return torch.export.export(graph.network.eval().requires_grad_(False), (inputs,), dynamic_shapes=_shapes(graph))
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    except Exception as error:  # torch raises many kinds; each means "not this model"
        hint = ", or not for every batch size: try --batch 1" if graph.batch is None else ""
        raise UserError(f"{run}: its model cannot be traced ({_reason(error)}){hint}") from error


def _outputs(program: ExportedProgram, holds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Shape and content of each output."""
    nodes = {node.name: node for node in program.graph.nodes}
    shapes = [nodes[str(name)].meta["val"].shape for name in program.graph_signature.user_outputs]
    return {
        name: {"shape": [n if isinstance(n, int) else "batch" for n in shape], "holds": text}
        for (name, text), shape in zip(holds.items(), shapes, strict=True)
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _write_pt2(program: ExportedProgram, graph: Graph, file: Path) -> None:
    torch.export.save(program, file, extra_files={f"{FACTS}.json": json.dumps(graph.facts)})


def _read_pt2(file: Path) -> Callable[[Tensors], Tensors]:
    read: Callable[[Tensors], Tensors] = torch.export.load(file).module()
    return read


def _write_onnx(program: ExportedProgram, graph: Graph, file: Path) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=_shapes(graph),
        input_names=list(graph.facts["inputs"]),
        output_names=list(graph.holds),
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props[FACTS] = json.dumps(graph.facts)
    written.save(file)
    if len(list(file.parent.iterdir())) > 1:
        raise ValueError("its weights take more than the 2 GB of one file")


def _read_onnx(file: Path) -> Callable[[Tensors], Tensors]:
    session = require("onnxruntime", "export").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def read(inputs: Tensors) -> Tensors:
        found = session.run(names, {name: x.numpy() for name, x in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return read


def _check(graph: Graph, read: Callable[[Tensors], Tensors], tolerance: float, what: str) -> float:
    """The largest difference between a file's outputs and the model's, on random inputs.

    A score within rounding of the threshold may fall on its other side in another program, and that token is exchanged there
    or not. So the file's scores are compared with the model's block by block, and the model goes on with the file's.

    Raises:
        UserError: where it is above ``tolerance``.
    """
    largest = 0.0
    for batch in (1, 3) if graph.batch is None else (graph.batch,):
        inputs = graph.draw(batch)
        found = read(inputs)
        scores = [(name, x) for name, x in found.items() if name.startswith("scores/")]
        with _going_on_with(graph.network, [x for _, x in scores]) as own:
            wanted = graph.network(inputs)
        wanted |= {name: x for (name, _), x in zip(scores, own, strict=False)}
        difference = _difference(found, wanted)
        if not difference <= tolerance:
            raise UserError(f"{what} gives outputs that differ by {difference:.1e}, above {tolerance:g}: not written")
        largest = max(largest, difference)
    return largest


@contextmanager
def _going_on_with(network: nn.Module, scores: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let score networks give these scores, one call after the other; yields the list of what they had found themselves."""
    own: list[Tensor] = []

    def replace(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        own.append(found)
        return scores[len(own) - 1] if len(own) <= len(scores) else found

    hooks = [part.register_forward_hook(replace) for part in network.modules() if isinstance(part, ScorePredictor)]
    try:
        yield own
    finally:
        for hook in hooks:
            hook.remove()


def _difference(found: Tensors, wanted: Tensors) -> float:
    """As a share of an output's largest value where that is above 1; infinite where something is missing or not finite."""
    if list(found) != list(wanted) or any(found[name].shape != x.shape for name, x in wanted.items()):
        return float("inf")
    shares = [(found[n] - x).abs().max() / x.abs().max().clamp(min=1) for n, x in wanted.items()]
    return float(torch.stack(shares).nan_to_num(nan=float("inf")).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters report every step; what matters is whether the file is right."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", *LIBRARIES, "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
