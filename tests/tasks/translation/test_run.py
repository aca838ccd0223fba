"""What may befall a run: a kill, several processes, few bits, a collapsed generator, numbers that explode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tasks.translation.nano import recipe, words
from tasks.walk import PATIENCE, check_same_bits, command, kill_at, lines, newest, start

import tokenfusion
from tokenfusion import api
from tokenfusion.tasks.runs import recorded_dataset


def test_killed_in_the_middle_ends_at_the_same_bits(rooms: Path, tmp_path: Path) -> None:
    changes = ["train.steps=10", "train.eval_every=5", "data.drop_modality=0.3"]
    api.train(recipe(rooms, "normal", *changes), tmp_path / "whole")
    kill_at(start("toy-translation", words(rooms, "normal", *changes), tmp_path / "cut"), tmp_path / "cut", 4, 10)
    assert api.train(recipe(rooms, "normal", *changes), tmp_path / "cut").steps == 10
    check_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert {name.split("/")[0] for name in newest(tmp_path / "cut").optimizer} == {"discriminator", "generator"}


@pytest.mark.slow
def test_killed_again_and_again(rooms: Path, tmp_path: Path) -> None:
    changes = ["train.steps=40", "train.checkpoint_every=3", "train.eval_every=10"]
    api.train(recipe(rooms, "depth", *changes), tmp_path / "whole")
    for goal in (3, 9, 21, 30):
        process = start("toy-translation", words(rooms, "depth", *changes), tmp_path / "cut")
        kill_at(process, tmp_path / "cut", goal, 40)
    api.train(recipe(rooms, "depth", *changes), tmp_path / "cut")
    check_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_equal_one(rooms: Path, tmp_path: Path) -> None:
    """A target without holes: the mean over measured pixels is then one over equal shares."""
    changes = ["model.generator.drop_path=0", "train.batch_size=4", "train.steps=3", "train.log_every=1"]
    api.train(recipe(rooms, "rgb", *changes), tmp_path / "one")
    process = start(
        "toy-translation", words(rooms, "rgb", *changes, "train.devices=2", "train.accelerator=cpu"), tmp_path / "two"
    )
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    for split in ("train", "val"):
        for first, second in zip(lines(tmp_path / "one", split), lines(tmp_path / "two", split), strict=True):
            # donor_below is a mean of each process's ratio; kid_std is null, for all images are in the one subset
            names = [n for n, value in first.items() if value is not None and not n.startswith("donor_below")]
            assert [second[n] for n in names] == pytest.approx([first[n] for n in names], rel=2e-3, abs=2e-3), names
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert two.state["devices"] == 2
    for phase in ("discriminator", "generator"):  # moments hold the gradients: a sum in place of a mean would show
        names = [name for name in one.optimizer if name.startswith(phase) and name.endswith("exp_avg")]
        first, second = (torch.cat([c.optimizer[name].flatten() for name in names]) for c in (one, two))
        assert (first - second).norm() < 0.01 * first.norm()
    own = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert lines(tmp_path / "two", "val")[-1]["ensemble/mae"] == pytest.approx(own["streams"]["ensemble"]["mae"])


FEW_BITS = [("bf16", 2), pytest.param("fp16", 12, marks=pytest.mark.slow)]  # fp16 first finds its scale


@pytest.mark.parametrize(("precision", "steps"), FEW_BITS)
def test_few_bits(precision: str, steps: int, rooms: Path, tmp_path: Path) -> None:
    changes = [f"train.precision={precision}", f"train.steps={steps}", "train.checkpoint_every=0"]
    api.train(recipe(rooms, "depth", *changes), tmp_path)
    checkpoint = newest(tmp_path)
    assert all(x.dtype == torch.float32 for name, x in checkpoint.model.items() if "position" not in name)
    assert {name.split("/")[0] for name in checkpoint.optimizer} == {"discriminator", "generator"}
    judged = json.loads((tmp_path / "metrics.json").read_text())["streams"]["ensemble"]
    assert judged["mae"] == lines(tmp_path, "val")[-1]["ensemble/mae"], "judged in full precision, both times"
    assert all(torch.isfinite(x).all() for x in checkpoint.model.values() if x.is_floating_point())


def collapsed(run: Path, out: Path) -> Path:
    """The run, but with a generator whose last layer sees nothing."""
    made = api.recipe_of(run)
    weights = tokenfusion.load(run).state_dict()
    weights["head.project.weight"] = torch.zeros_like(weights["head.project.weight"])
    api.save(made, recorded_dataset(run), weights, out)  # type: ignore[arg-type]
    return out


def test_a_collapsed_generator_is_told(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((run / "metrics.json").read_text())["collapsed"] == []
    dead = collapsed(run, tmp_path / "dead")
    message = command("eval", dead, capsys=capsys)
    assert "the generated images of rgb, depth, ensemble are constant" in message
    content = json.loads((dead / "metrics.json").read_text())
    assert content["collapsed"] == ["rgb", "depth", "ensemble"]
    assert all(row["contrast"] < 1e-6 for row in content["streams"].values())
    weights = f"model.weights={dead / 'checkpoints' / 'step-00000000'}"
    arguments = [*words(rooms, "normal", weights, "train.lr=1e-12", "train.steps=1"), "--out", tmp_path / "run"]
    message = command("train", "toy-translation", *arguments, capsys=capsys)
    assert message.count("the generator has collapsed") == 2, "in training, and when the run is judged"


def test_a_run_starts_from_another_runs_generator(run: Path, rooms: Path, tmp_path: Path) -> None:
    weights = f"model.weights={run / 'checkpoints' / 'step-00000004'}"
    api.train(recipe(rooms, "normal", weights, "train.lr=1e-12", "train.steps=1"), tmp_path)
    first, second = tokenfusion.load(run).state_dict(), tokenfusion.load(tmp_path).state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def test_numbers_that_explode_end_the_run_in_one_line(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(rooms, "normal", "train.lr=1e30", "train.warmup_steps=0", "train.checkpoint_every=1")
    message = command("train", "toy-translation", *arguments, "--out", tmp_path / "run", code=2, capsys=capsys)
    last = message.splitlines()[-1]
    assert last.startswith("tokenfusion: step ")
    assert "not finite" in last
    assert "lower train.lr" in last
    assert "Traceback" not in message


def test_a_run_is_lengthened(rooms: Path, tmp_path: Path) -> None:
    api.train(recipe(rooms, "shade", "train.steps=1"), tmp_path)
    assert api.train(recipe(rooms, "shade", "train.steps=2"), tmp_path).steps == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 2
