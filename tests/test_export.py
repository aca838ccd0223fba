"""A run's model as a file: equal to the model, described for those who feed it, or not there at all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.detection3d import small
from tasks.translation import nano
from tasks.walk import command

import tokenfusion
from tokenfusion import api, graphs
from tokenfusion import export as exporting
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError
from tokenfusion.export import export
from tokenfusion.fusion import TokenFusion
from tokenfusion.fusion.scores import ScorePredictor
from tokenfusion.recipe import FUSERS

SHORT = "{_target_: tokenfusion.backbones.mit.MiT, widths: [8], depths: [1]}"
FUSER = "fuser={_target_: tokenfusion.fusion.TokenFusion, threshold: 0.5}"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "rooms"
    api.prepare_rooms(out, train=1, val=1, height=32, width=64, seed=1)
    return out


@pytest.fixture(scope="module")
def saved(rooms: Path, tmp_path_factory: pytest.TempPathFactory, shake) -> Callable[..., Path]:
    """``saved(recipe)``: a run with generic weights, as if it were trained."""

    def save(recipe: Any) -> Path:
        run, spec = tmp_path_factory.mktemp("runs") / recipe.task, Folder(rooms).spec
        model = api.task_package(recipe.task).model_of(recipe, spec, run, False)
        api.save(recipe, spec, shake(model).state_dict(), run)
        return run

    return save


@pytest.fixture(scope="module")
def segmentation(rooms: Path, saved) -> Path:
    """Three streams: the longest way through the allocation."""
    words = [f"data.root={rooms}", "data.modalities=[rgb, depth, normal]", "data.resize=[32, 64]", FUSER]
    return saved(tokenfusion.read_recipe("toy-segmentation", [*words, f"model.backbone={SHORT}"]))


@pytest.fixture(scope="module")
def translation(rooms: Path, saved) -> Path:
    """rgb and an edge map become depth; 40 rows are padded inside."""
    generator = "{_target_: tokenfusion.backbones.mirror.MirroredMiT, widths: [16, 16], depths: [1, 1]}"
    return saved(nano.recipe(rooms, "depth", f"model.generator={generator}"))


@pytest.fixture(scope="module")
def detection(rooms: Path, saved) -> Path:
    return saved(small.recipe(rooms, "model.points.layers=1"))


def batch_of(names: list[str], count: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {name: torch.rand(count, 3, *size) * 2 - 1 for name in names}


def in_onnx(file: Path, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Outputs and facts of a file, as any program gets them that knows ONNX alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    names = [output.name for output in session.get_outputs()]
    facts = json.loads(session.get_modelmeta().custom_metadata_map["tokenfusion"])
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}, facts


def in_torch(file: Path, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    extra = {"tokenfusion.json": ""}
    program = torch.export.load(file, extra_files=extra)
    return program.module()(inputs), json.loads(extra["tokenfusion.json"])


READERS = {"onnx": (in_onnx, 1e-4), "pt2": (in_torch, 1e-5)}


@pytest.mark.parametrize("format", READERS)
def test_segmentation(segmentation: Path, tmp_path: Path, format: str) -> None:
    file = tmp_path / f"model.{format}"
    written = export(segmentation, format, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert written.difference <= READERS[format][1]
    names, model = ["rgb", "depth", "normal"], tokenfusion.load(segmentation)
    for count in (1, 4):  # any batch
        inputs = batch_of(names, count, (32, 64))
        found, facts = READERS[format][0](file, inputs)
        with torch.no_grad():
            output = model(inputs)
        streams = {"ensemble": output.ensemble, **{f"logits/{name}": x for name, x in output.logits.items()}}
        assert list(found) == [*streams, "scores/stage1.0"] == list(facts["outputs"])
        torch.testing.assert_close(found["scores/stage1.0"], output.scores[0], rtol=0, atol=READERS[format][1])
        for name, x in streams.items():
            wanted = torch.nn.functional.interpolate(x, size=(32, 64), mode="bilinear")
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=READERS[format][1])
    assert facts == written.facts
    assert facts["modalities"] == names
    assert facts["inputs"]["depth"]["shape"] == ["batch", 3, 32, 64]
    assert facts["inputs"]["depth"]["std"] == [0.85] * 3  # as the rooms' dataset.yaml says
    assert facts["inputs"]["depth"]["unit"] == "metres"
    assert facts["inputs"]["rgb"]["mean"] == [123.675, 116.28, 103.53]
    assert (facts["height"], facts["width"], facts["batch"], facts["threshold"]) == (32, 64, "any", 0.5)
    assert len(facts["classes"]) == 13
    assert facts["outputs"]["ensemble"]["shape"] == ["batch", 13, 32, 64]
    assert facts["outputs"]["scores/stage1.0"]["shape"] == [3, "batch", 128]


@pytest.mark.parametrize("format", READERS)
def test_translation(translation: Path, tmp_path: Path, format: str) -> None:
    file = tmp_path / f"model.{format}"
    export(translation, format, file, height=40, width=64, batch=2)
    inputs = batch_of(["rgb", "edge_occlusion"], 2, (40, 64))
    found, facts = READERS[format][0](file, inputs)
    with torch.no_grad():
        output = tokenfusion.load(translation)(inputs)
    scored = [f"scores/{name}" for name in tokenfusion.load(translation).backbone.block_names()]
    assert list(found) == ["ensemble", "images/rgb", "images/edge_occlusion", *scored]
    assert len(scored) == 3
    torch.testing.assert_close(found["ensemble"], output.ensemble, rtol=0, atol=READERS[format][1])
    for name, image in output.images.items():
        torch.testing.assert_close(found[f"images/{name}"], image, rtol=0, atol=READERS[format][1])
    assert facts["inputs"]["rgb"]["shape"] == [2, 3, 40, 64]
    assert facts["inputs"]["rgb"]["range"] == [0.0, 255.0]
    assert facts["target"]["formula"].startswith("2 * ln(1 + value / 1)")
    assert facts["batch"] == 2


def test_formulas_are_what_predict_does(rooms: Path) -> None:
    from math import log as ln

    from tokenfusion.data.inputs import normalise, to_tanh

    for spec in Folder(rooms).modalities.values():
        stored = spec.modality.stored
        facts, image = graphs._normalised(spec), torch.tensor([0.5]).expand(stored, 1, 1)
        value = [
            eval(facts["formula"], {"value": 0.5, "mean": m, "std": s})
            for m, s in zip(facts["mean"], facts["std"], strict=True)
        ]
        torch.testing.assert_close(normalise({"x": image}, {"x": spec})["x"].flatten(), torch.tensor(value))
        formula = graphs._coded(spec)["formula"].removesuffix(", clipped to -1..1")
        value = max(-1.0, min(1.0, eval(formula, {"ln": ln, "value": 0.5})))
        torch.testing.assert_close(to_tanh(image, spec).flatten(), torch.tensor([value] * 3))


def test_detection(detection: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    facts = export(detection, "pt2", file).facts
    scene = small.batch(1)
    inputs = {"points": scene.points, "rgb": scene.images, "projection": scene.projection}
    found, read = in_torch(file, inputs)
    model = tokenfusion.load(detection)
    with torch.no_grad():
        head = model(*inputs.values()).points.heads[-1]
        wanted = model.points.boxes(head), head.objectness.sigmoid(), head.class_scores.softmax(-1)
    torch.testing.assert_close(tuple(found.values()), wanted, rtol=0, atol=1e-5)
    assert read == facts
    assert list(found) == list(facts["outputs"]) == ["boxes", "objectness", "probabilities"]
    assert [list(x.shape) for x in found.values()] == [facts["outputs"][name]["shape"] for name in found]
    assert [list(x.shape) for x in inputs.values()] == [facts["inputs"][name]["shape"] for name in inputs]


def test_the_command_line_says_what_was_written(segmentation: Path, tmp_path: Path, capsys) -> None:
    words = ["export", segmentation, "--format", "pt2", "--out", tmp_path / "a.pt2", "--height", 32, "--width", 32]
    command(*words, "--batch", 1)
    out = capsys.readouterr().out
    for text in (
        "rgb [1 x 3 x 32 x 32]",
        "logits/depth [1 x 13 x 32 x 32]",
        "scores of 1 blocks",
        "(value - mean) / std, in metres",
        "written: ",
    ):
        assert text in out


MISTAKES = {
    "format": (["--format", "onix", "--out", "a.onnx"], "--format is 'onix'; did you mean 'onnx'?"),
    "name": (["--format", "onnx", "--out", "a.pt2"], "a.pt2: wanted a file name that ends in .onnx"),
    "folder": (["--format", "pt2", "--out", "none/a.pt2"], "there is no folder none"),
    "batch": (["--format", "pt2", "--out", "a.pt2", "--batch", "0"], "--batch is 0; wanted 1 or more"),
    "size": (["--format", "pt2", "--out", "a.pt2", "--height", "8"], "8x64 pixels is too small"),
    "checkpoint": (["--format", "pt2", "--out", "a.pt2", "--checkpoint", "first"], "wanted last or best"),
}


@pytest.mark.parametrize(("words", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    segmentation: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = command("export", segmentation, *words, code=2, capsys=capsys)
    assert text in message
    assert message.startswith("tokenfusion: ")
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_detector_is_no_onnx(detection: Path, tmp_path: Path, capsys) -> None:
    words = ["export", detection, "--format", "onnx", "--out", tmp_path / "a.onnx"]
    message = command(*words, code=2, capsys=capsys)
    assert len(message.splitlines()) == 1
    assert "--format pt2" in message
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_size_asks_for_it(translation: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.yaml: fixes no size of the images; say --height and --width"):
        export(translation, "pt2", tmp_path / "a.pt2")


@pytest.mark.parametrize("library", exporting.LIBRARIES)
def test_a_missing_library_names_the_extra(segmentation: Path, tmp_path: Path, monkeypatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}, which is not installed: pip install 'tokenfusion\[export\]'"):
        export(segmentation, "onnx", tmp_path / "a.onnx")


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_a_file_that_differs_from_the_model_is_not_written(
    segmentation: Path, tmp_path: Path, monkeypatch, value: float
) -> None:
    (tmp_path / "a.pt2").write_text("before")
    seen: list[graphs.Graph] = []

    def write(program: None, graph: graphs.Graph, file: Path) -> None:
        file.write_text("wrong")
        seen.append(graph)

    def read(file: Path) -> Callable[[graphs.Tensors], graphs.Tensors]:
        return lambda inputs: {name: x + value for name, x in seen[0].network(inputs).items()}

    monkeypatch.setattr(exporting, "_traced", lambda graph, run: None)
    monkeypatch.setattr(exporting, "_outputs", lambda program, holds: {})
    monkeypatch.setattr(exporting, "_write_pt2", write)
    monkeypatch.setattr(exporting, "_read_pt2", read)
    with pytest.raises(UserError, match="its model as pt2 gives outputs that differ by .*: not written"):
        export(segmentation, "pt2", tmp_path / "a.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "before"


def test_a_token_at_the_threshold_may_be_decided_otherwise(small_segmenter, images) -> None:
    """The model goes on with the file's scores, so that rounding is told from a wrong network."""
    model = small_segmenter(partial(TokenFusion, threshold=0.5))
    network = graphs.Segments(model, "bilinear")
    graph = graphs.Graph(network, lambda count: images(2, count), {}, {}, 2)

    def read(inputs: graphs.Tensors, less: float) -> graphs.Tensors:
        nets = [part for part in model.modules() if isinstance(part, ScorePredictor)]
        hooks = [net.register_forward_hook(lambda _, inputs, found: found - less) for net in nets]
        found = network(inputs)
        for hook in hooks:
            hook.remove()
        return found

    with torch.no_grad():
        at = float(network(images(2))["scores/stage1.0"][0, 0, 5])
        for fuser in model.modules():
            if isinstance(fuser, TokenFusion):
                fuser.threshold = at
        assert (read(images(2), 1e-6)["ensemble"] - network(images(2))["ensemble"]).abs().max() > 1e-3
        assert 0 < exporting._check(graph, partial(read, less=1e-6), 1e-5, "it") <= 2e-6
        with pytest.raises(UserError, match="it gives outputs that differ by 1.0e-03, above 1e-05"):
            exporting._check(graph, partial(read, less=1e-3), 1e-5, "it")


def test_what_cannot_be_traced_or_written_is_one_line(segmentation: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(UserError, match=r"cannot be written as pt2 \(RuntimeError: no such operator\)"):
        export(segmentation, "pt2", tmp_path / "a.pt2", batch=1)
    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(UserError, match=r"cannot be traced \(RuntimeError: no such operator\), or not for every batch"):
        export(segmentation, "pt2", tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fuser", FUSERS)
def test_every_fuser_becomes_onnx(rooms: Path, saved, tmp_path: Path, fuser: str) -> None:
    words = [f"data.root={rooms}", "data.modalities=[rgb, depth, normal]", "data.resize=[32, 64]", f"fuser={fuser}"]
    words += [f"model.backbone={SHORT.replace('[8]', '[8, 16]').replace('[1]', '[1, 1]')}", "model.alignment=true"]
    run = saved(tokenfusion.read_recipe("toy-segmentation", [*words, "evaluation.upsample=bicubic"]))
    assert export(run, "onnx", tmp_path / "a.onnx").difference <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("format", READERS)
@pytest.mark.parametrize("head", ["SegFormerHead, width: 32", "LinearHead"])
def test_a_network_of_timm_is_exported(rooms: Path, saved, tmp_path: Path, head: str, format: str) -> None:
    network = "{_target_: tokenfusion.backbones.foreign.timm_network, name: test_vit, img_size: [32, 64]}"
    words = [f"data.root={rooms}", "data.resize=[32, 64]", FUSER, f"model.backbone={network}"]
    words += [f"model.head={{_target_: tokenfusion.tasks.segmentation.head.{head}}}"]
    run = saved(tokenfusion.read_recipe("toy-segmentation", words))
    read, most = READERS[format]
    assert export(run, format, tmp_path / f"a.{format}").difference <= most
    found, _ = read(tmp_path / f"a.{format}", batch_of(["rgb", "depth"], 1, (32, 64)))
    assert found["ensemble"].shape == (1, 13, 32, 64)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor wants a compiler")
def test_the_model_compiles_as_one_graph(segmentation: Path) -> None:
    """``backend="eager"`` is in the tests of the backbones; this is what a user's ``torch.compile(model)`` does."""
    torch._dynamo.reset()
    model, inputs = tokenfusion.load(segmentation), batch_of(["rgb", "depth", "normal"], 2, (32, 64))
    with torch.no_grad():
        found, wanted = torch.compile(model, fullgraph=True)(inputs), model(inputs)
    torch.testing.assert_close(found.ensemble, wanted.ensemble, rtol=1e-4, atol=1e-5)
