"""A run's model as one file for other programs: ONNX, or torch's own exported program (pt2)."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tokenfusion import api
from tokenfusion.data.folder import DatasetSpec
from tokenfusion.errors import UserError, nearest, require
from tokenfusion.fusion.scores import ScorePredictor
from tokenfusion.graphs import FACTS, Graph, Tensors, of_detection, of_images
from tokenfusion.tasks.runs import recorded_dataset

# How far the file's outputs may be from the model's, as a share of the largest value where that is above 1.
TOLERANCES = {"onnx": 1e-4, "pt2": 1e-5}
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


class Exported(NamedTuple):
    """What was written."""

    path: Path
    facts: dict[str, Any]  # what the file holds beside the network, for those who feed it
    difference: float  # the largest between the file's outputs and the model's, on random inputs


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
    describe = of_detection if recipe.task == "detection3d" else of_images
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
    """Let what scores give these, one call after the other; yields the list of what had been found."""
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
