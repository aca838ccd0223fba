"""Runs that are judged with inputs missing or worse: figures, protocols, files, and what does not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tasks.walk import command, digests, lines

import tokenfusion
from tokenfusion import UserError, api
from tokenfusion.data import Folder
from tokenfusion.tasks.segmentation.inference import Evaluation, infer
from tokenfusion.tasks.segmentation.metrics import confusion_matrix, segmentation_scores
from tokenfusion.tasks.segmentation.task import frames

DARK = {"rgb": {"kind": "dark", "amount": 0.9}, "depth": {"kind": "holes", "amount": 0.3}}
SMALL = [
    "model.backbone={_target_: tokenfusion.backbones.mit.MiT, widths: [8, 16, 20, 32], depths: [1, 1, 1, 1]}",
    "data.crop=[32, 64]",
    "train.steps=4",
    "train.batch_size=2",
    "train.lr=2e-3",
    "train.warmup_steps=1",
    "train.eval_every=0",
]


def trained(rooms: Path, out: Path, *more: str) -> Path:
    api.train(tokenfusion.read_recipe("toy-segmentation", [f"data.root={rooms}", *SMALL, *more]), out)
    return out


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(rooms, tmp_path_factory.mktemp("runs") / "plain")


def ensemble(run: Path, to: Path, **evaluation: object) -> dict[str, float]:
    found = api.evaluate(run, evaluation=evaluation, to=to)
    assert json.loads(to.read_text()) == found
    return dict(found["streams"]["ensemble"])


@pytest.mark.parametrize(("given", "missing"), [(("rgb", "depth"), ()), (("rgb",), ("depth",)), (("depth",), ("rgb",))])
def test_every_subset_is_judged_as_the_model_given_no_more(
    run: Path, rooms: Path, tmp_path: Path, given: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    model, recipe, folder = tokenfusion.load(run), api.recipe_of(run), Folder(rooms)
    matrix = torch.zeros(13, 13, dtype=torch.int64)
    for frame in frames(recipe, folder, "val"):  # type: ignore[arg-type]
        seen = infer(model, {name: frame.inputs[name] for name in given}, frame.target.shape, Evaluation())  # type: ignore[arg-type, union-attr]
        matrix += confusion_matrix(frame.target, seen.predictions["ensemble"], 13)  # type: ignore[arg-type]
    found = api.evaluate(run, evaluation={"missing": missing}, to=tmp_path / "a.json")
    assert found["streams"]["ensemble"]["miou"] == segmentation_scores(matrix).miou
    assert list(found["streams"]) == list(found["per_class"]) == [*given, "ensemble"]
    assert ("without" in found["protocol"]) == bool(missing)
    assert all(rates[name] == 0 for rates in found["exchange"].values() for name in missing), "no stream, no exchange"


def test_judging_leaves_the_run_as_it_is_and_repeats(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = ensemble(run, tmp_path / "deep" / "first.json", degrade=DARK)
    assert ensemble(run, tmp_path / "second.json", degrade=DARK) == first
    assert first != json.loads((run / "metrics.json").read_text())["streams"]["ensemble"]
    assert (
        ensemble(run, tmp_path / "plain.json") == json.loads((run / "metrics.json").read_text())["streams"]["ensemble"]
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert api.evaluate(run, evaluation={"degrade": DARK}, to=tmp_path / "a.json")["protocol"].endswith(
        "fp32, rgb with dark 0.9, depth with holes 0.3"
    )


def test_training_judges_by_the_recipes_conditions_and_predict_does_not(rooms: Path, run: Path, tmp_path: Path) -> None:
    keys = "evaluation={degrade: {rgb: {kind: noise, amount: 0.5}}, missing: [depth]}"
    noisy = trained(rooms, tmp_path / "noisy", keys)
    in_training, in_eval = lines(noisy, "val")[-1], api.evaluate(noisy)
    assert {k: v for k, v in in_training.items() if "/" in k and not k.startswith(("exchange", "donor"))} == {
        f"{stream}/{k}": v for stream, row in in_eval["streams"].items() for k, v in row.items()
    }
    assert not (noisy / "samples").exists(), "samples are of plain judgements"
    assert [path.name for path in (run / "samples").glob("index.json")] == ["index.json"]
    weights = tokenfusion.load(run).state_dict()
    assert digests(tokenfusion.load(noisy).state_dict()) == digests(weights), "training itself is the same"
    for one, out in ((run, tmp_path / "a"), (noisy, tmp_path / "b")):
        api.predict(one, out, data=rooms, split="val")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_damaged_copy_of_the_files_gives_the_same_figures(run: Path, rooms: Path, tmp_path: Path) -> None:
    """Degraded in flight is as if the files had been so."""
    from PIL import Image

    copy = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    for path in (copy / "rgb").iterdir():
        Image.open(path).point(lambda value: round(value * 0.25)).save(path)
    found = api.evaluate(run, evaluation={"degrade": {"rgb": {"kind": "dark", "amount": 0.75}}}, to=tmp_path / "a.json")
    assert found["streams"] == api.evaluate(run, data=copy, to=tmp_path / "b.json")["streams"]


MISTAKES = {
    "every input": ("evaluation.missing=[rgb, depth]", "which is every input; leave one"),
    "no list": ("evaluation.missing=depth", "missing: wanted a list of names, as [depth]"),
    "an unknown modality": ("evaluation.degrade={dept: {kind: holes, amount: 0.1}}", "did you mean 'depth'?"),
    "a kind that does not fit": (
        "evaluation.degrade={depth: {kind: dark, amount: 0.1}}",
        "can have noise, shift, holes",
    ),
    "an unknown kind": (
        "evaluation.degrade={rgb: {kind: fog, amount: 0.1}}",
        "degrade.rgb.kind: Input should be 'noise'",
    ),
    "an unknown key": (
        "evaluation.degrade={rgb: {kind: dark, strength: 0.1}}",
        "wanted {kind: noise, shift, dark or holes",
    ),
    "no kind": ("evaluation.degrade={rgb: dark}", "wanted {kind: noise, shift, dark or holes"),
    "half a pixel": ("evaluation.degrade={rgb: {kind: shift, amount: 0.5}}", "a shift wants whole pixels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, wanted = MISTAKES[name]
    message = command("eval", run, change, "--to", tmp_path / "a.json", code=2, capsys=capsys)
    assert message.startswith("tokenfusion: evaluation")
    assert wanted in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "a.json").exists()


def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("evaluation.missing=[depth]", "evaluation.degrade.rgb={kind: shift, amount: 4}")
    command("eval", run, *arguments, "--to", tmp_path / "a.json", capsys=capsys)
    assert json.loads((tmp_path / "a.json").read_text())["protocol"].endswith("without depth, rgb with shift 4")
    message = command("eval", run, "--to", tmp_path, code=2, capsys=capsys)
    assert f"{tmp_path}: a folder; wanted the file" in message


def test_training_with_conditions_that_do_not_fit_does_not_start(rooms: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is every input"):
        trained(rooms, tmp_path / "run", "evaluation.missing=[rgb, depth]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_runs_that_share_otherwise(sharing: str, rooms: Path, run: Path, tmp_path: Path) -> None:
    """Trained, read again and judged; the head stays shared."""
    other = trained(rooms, tmp_path / "run", f"model.sharing={sharing}")
    own, default = (tokenfusion.load(path) for path in (other, run))
    sizes = [sum(p.numel() for p in m.backbone.backbone.parameters()) for m in (own, default)]  # type: ignore[union-attr]
    assert (sizes[0] < sizes[1]) == (sharing == "shared")
    assert own.head.state_dict().keys() == default.head.state_dict().keys()  # type: ignore[union-attr]
    logged = lines(other, "val")[-1]["ensemble/miou"]
    assert api.evaluate(other)["streams"]["ensemble"]["miou"] == logged
