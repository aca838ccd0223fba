"""The loop: resume to the bit, phases, logging, validation, what stops a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.toy import Adversaries, Regression, Samples, settings

from tokenfusion.errors import UserError
from tokenfusion.manifest import lock_folder, unlock_folder
from tokenfusion.train import ParameterGroup, fit, load_model, loop
from tokenfusion.train.checkpoint import Checkpoints


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    content = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in content if line["split"] == split]


def last(run: Path) -> dict[str, Tensor]:
    found = Checkpoints(run).newest()
    assert found is not None
    return {**found.model, **found.optimizer}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class StopError(Exception):
    """Stands in for a kill, inside one process."""


def stopping(evaluate: Callable[[Any], Any], step: int, per_call: int) -> Callable[[Any], Any]:
    calls = 0

    def stop(engine: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls * per_call == step:
            raise StopError
        return evaluate(engine)

    return stop


def test_one_training_at_a_time_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE_S", 0.2)
    other = lock_folder(tmp_path, "training in this folder")
    with pytest.raises(UserError, match="another process is training in this folder right now; wait for it to end"):
        fit(Regression(), Samples(), tmp_path, settings(), progress="silent")
    assert list(tmp_path.iterdir()) == []
    unlock_folder(other)
    fit(Regression(), Samples(), tmp_path, settings(), progress="silent")
    unlock_folder(lock_folder(tmp_path, "training in this folder"))  # is free again


@pytest.mark.parametrize("kind", [Regression, Adversaries])
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_run_ends_at_the_same_bits(tmp_path: Path, kind: type, workers: int) -> None:
    train = settings(workers=workers, clip_norm=1.0, warmup_steps=2)
    fit(kind(), Samples(), tmp_path / "whole", train, seed=1, progress="silent")
    task = kind()
    with pytest.raises(StopError):
        fit(task, Samples(), tmp_path / "cut", train, seed=1, progress="silent", evaluate=stopping(lambda _: {}, 8, 4))
    fit(kind(), Samples(), tmp_path / "cut", train, seed=1, progress="silent")
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert lines(tmp_path / "whole", "train") == lines(tmp_path / "cut", "train")


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    for name, seed, state in (("a", 1, 0), ("b", 1, 99), ("c", 2, 0)):
        torch.manual_seed(state)  # the caller's generator has no say
        fit(Regression(), Samples(), tmp_path / name, settings(), seed=seed, progress="silent")
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert not torch.equal(last(tmp_path / "a")["model.0.weight"], last(tmp_path / "c")["model.0.weight"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = fit(Regression(), Samples(), tmp_path, settings(), progress="silent")
    log = (tmp_path / "metrics.jsonl").read_bytes()
    again = fit(Regression(), Samples(), tmp_path, settings(), progress="silent")
    assert again == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_log_lines(tmp_path: Path) -> None:
    task = Regression()
    result = fit(task, Samples(), tmp_path, settings(lr=0.012, warmup_steps=0), progress="silent")
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train] == [3, 6, 9, 12]
    assert set(train[0]) == {
        "step", "split", "loss/square", "loss/size", "loss/total", "lr", "exchange/stage1.0/rgb"
    }  # fmt: skip
    assert train[0]["lr"] == pytest.approx(0.012 * (1 - 2 / 12))
    assert train[0]["loss/total"] == pytest.approx(train[0]["loss/square"] + train[0]["loss/size"])
    assert task.watched == 4
    val = lines(tmp_path, "val")
    assert [line["step"] for line in val] == [4, 8, 12]
    assert result.steps == 12
    assert result.best == min(line["val/error"] for line in val)
    assert result.metrics == {"val/error": val[-1]["val/error"]}


def test_losses_in_the_log_are_means_since_the_last_line(tmp_path: Path) -> None:
    fit(Regression(), Samples(), tmp_path / "each", settings(log_every=1), progress="silent")
    fit(Regression(), Samples(), tmp_path / "few", settings(log_every=6), progress="silent")
    each = [line["loss/total"] for line in lines(tmp_path / "each", "train")]
    few = [line["loss/total"] for line in lines(tmp_path / "few", "train")]
    assert few == pytest.approx([sum(each[:6]) / 6, sum(each[6:]) / 6])


def test_best_checkpoint_is_the_best_one(tmp_path: Path) -> None:
    figures = iter([{"val/error": value} for value in (math.nan, 1.0, 3.0, math.nan)])
    train = settings(eval_every=3)
    result = fit(Regression(), Samples(), tmp_path, train, progress="silent", evaluate=lambda _: next(figures))
    state = load_model(tmp_path, "best")[1]
    assert (state["step"], state["best"], result.best) == (6, 1.0, 1.0)
    assert load_model(tmp_path)[1]["step"] == 12
    assert lines(tmp_path, "val")[-1]["val/error"] is None
    again = fit(Regression(), Samples(), tmp_path, train, progress="silent")
    assert math.isnan(again.metrics["val/error"])


def test_unknown_monitor(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'val/error'.*did you mean 'val/eror'"):
        fit(Regression(), Samples(), tmp_path, settings(), progress="silent", evaluate=lambda _: {"val/eror": 1.0})


def test_weights_are_loaded_by_the_names_of_the_task(tmp_path: Path) -> None:
    task = Regression()
    fit(task, Samples(), tmp_path, settings(), progress="silent")
    tensors, _ = load_model(tmp_path)
    assert_same(tensors, dict(task.state_dict()))
    assert "model.1.running_mean" in tensors
    assert torch.equal(tensors["twin.weight"], tensors["model.0.weight"])


def test_each_phase_trains_its_own_network_once_per_step(tmp_path: Path) -> None:
    seen: list[tuple[str, bool, bool]] = []

    class Watched(Adversaries):
        def losses(self, batch: Any, outputs: Tensor, phase: str) -> dict[str, Tensor]:
            networks = (self.discriminator, self.generator)
            seen.append((phase, *(next(n.parameters()).requires_grad for n in networks)))
            return super().losses(batch, outputs, phase)

    task = Watched()
    fit(task, Samples(), tmp_path, settings(steps=3), progress="silent")
    assert task.forwards == 3
    assert seen == [("discriminator", True, False), ("generator", False, True)] * 3
    assert all(p.requires_grad and p.grad is None for p in task.parameters())
    line = lines(tmp_path, "train")[0]
    assert {"loss/discriminator/real", "loss/discriminator/total", "loss/generator/gan", "loss/generator/l1"} <= set(
        line
    )


def test_two_phases_equal_the_plain_alternation(tmp_path: Path) -> None:
    task, plain = Adversaries(), Adversaries()
    for network in (task, plain):
        network.generator[2].p = 0.0
    train = settings(steps=4, batch_size=20, lr=0.01, weight_decay=0.0, optimizer="adam", schedule="constant")
    fit(task, Samples(), tmp_path, train, progress="silent")
    optimizers = {p: torch.optim.Adam(getattr(plain, p).parameters(), lr=0.01) for p in plain.phases}
    for step in range(4):
        data = Samples()
        data.set_epoch(step)
        batch = torch.utils.data.default_collate([data[i] for i in range(20)])
        outputs = plain(batch)
        for phase, optimizer in optimizers.items():
            optimizer.zero_grad()
            sum(plain.losses(batch, outputs, phase).values()).backward()
            optimizer.step()
    for trained, expected in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(trained, expected, atol=1e-5)


def test_a_task_is_told_the_step_after_a_restart_too(tmp_path: Path) -> None:
    class Counting(Regression):
        def begin(self, step: int) -> None:
            steps.append(step)

    steps: list[int] = []
    for end in (2, 5):
        fit(Counting(), Samples(), tmp_path, settings(steps=end, checkpoint_every=1), progress="silent")
    assert steps == [0, 1, 2, 3, 4]


def test_pieces_equal_the_whole_batch(tmp_path: Path) -> None:
    double = torch.float64
    for name, pieces in (("whole", 1), ("pieces", 4)):
        task = Regression(dropout=0.0, norm=False, dtype=double)
        fit(task, Samples(dtype=double), tmp_path / name, settings(accumulate=pieces), progress="silent")
    whole, pieces_ = last(tmp_path / "whole"), last(tmp_path / "pieces")
    assert all(torch.allclose(whole[k], pieces_[k], rtol=0, atol=1e-12) for k in whole)
    with pytest.raises(UserError, match="accumulate is 2"):
        fit(Adversaries(), Samples(), tmp_path / "gan", settings(accumulate=2), progress="silent")


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path: Path, where: str) -> None:
    class Bad(Regression):
        steps = 0

        def losses(self, batch: Any, outputs: Tensor, phase: str) -> dict[str, Tensor]:
            losses = super().losses(batch, outputs, phase)
            self.steps += 1
            if where == "loss" and self.steps == 8:
                losses["size"] = losses["size"] / 0
            if where == "weight" and self.steps == 10:  # the gradient is not finite, the loss is
                losses["size"] = losses["size"] + (outputs.mean() * 0).sqrt()
            return losses

    message = r"step 8: the loss is not finite \(loss/size, loss/total" if where == "loss" else "step 10: the weights"
    with pytest.raises(UserError, match=message):
        fit(
            Bad(),
            Samples(),
            tmp_path,
            settings(log_every=50, eval_every=8 if where == "loss" else 0),
            progress="silent",
        )
    assert lines(tmp_path, "val") == []
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert found.state["step"] == 5


def test_frozen_part_stays_frozen_after_validation(tmp_path: Path) -> None:
    class Frozen(Regression):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.model[1].eval()
            return self

    task = Frozen()
    fit(task, Samples(), tmp_path, settings(), progress="silent")
    assert task.training
    assert not task.model[1].training
    assert torch.equal(task.model[1].running_mean, torch.zeros(8))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes(tmp_path: Path, precision: str) -> None:
    seen: list[Tensor] = []

    class Typed(Regression):
        def losses(self, batch: Any, outputs: Tensor, phase: str) -> dict[str, Tensor]:
            seen.extend((outputs, batch["x"]))
            return super().losses(batch, outputs, phase)

    train = settings(precision=precision, clip_norm=1.0)
    fit(Typed(), Samples(), tmp_path / "whole", train, progress="silent")
    assert {t.dtype for t in seen[::2]} == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {t.dtype for t in seen[1::2]} == {torch.float32}
    with pytest.raises(StopError):
        fit(Regression(), Samples(), tmp_path / "cut", train, progress="silent", evaluate=stopping(lambda _: {}, 8, 4))
    fit(Regression(), Samples(), tmp_path / "cut", train, progress="silent")
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    state = load_model(tmp_path / "whole")[1]
    assert ("scale" in state["scaler"]) == (precision == "fp16")
    assert load_model(tmp_path / "whole")[0]["model.0.weight"].dtype == torch.float32


def test_fp16_overflow_leaves_the_step_out(tmp_path: Path) -> None:
    class Huge(Regression):
        def losses(self, batch: Any, outputs: Tensor, phase: str) -> dict[str, Tensor]:
            return {name: value.float() * 1e34 for name, value in super().losses(batch, outputs, phase).items()}

    task, before = Huge(), Regression()
    fit(task, Samples(), tmp_path, settings(steps=2, precision="fp16", eval_every=0), progress="silent")
    assert torch.equal(task.model[0].weight, before.model[0].weight)
    assert load_model(tmp_path)[1]["scaler"]["scale"] < 65536


def test_another_model_or_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Regression(), Samples(), tmp_path, settings(), progress="silent")
    fit(Regression(), Samples(), tmp_path, settings(lr=0.5, workers=1), progress="silent")
    assert "with other settings than before: train.lr\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="step-00000012: not of this model"):
        fit(Adversaries(), Samples(), tmp_path, settings(), progress="silent")
    with pytest.raises(UserError, match=r"beyond train.steps = 6"):
        fit(Regression(), Samples(), tmp_path, settings(steps=6), progress="silent")


def test_training_goes_on_from_bare_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``convert`` writes them: no optimiser, step 0."""
    start = {name: value + 1 for name, value in Regression().state_dict().items()}
    Checkpoints(tmp_path).save(0, start, {}, {"step": 0})
    task = Regression()
    fit(task, Samples(), tmp_path, settings(steps=1, lr=1e-9), progress="silent")
    assert torch.allclose(task.model[0].weight, start["model.0.weight"])
    assert capsys.readouterr().err == ""


def test_plain_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Regression(), Samples(), tmp_path, settings())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 3/12  loss/total " in captured.err
    assert "step 4/12  validation  val/error " in captured.err
    assert captured.err.count("\n") == 7


def test_every_parameter_belongs_to_one_group(tmp_path: Path) -> None:
    class Forgetful(Regression):
        def parameter_groups(self, phase: str) -> list[ParameterGroup]:
            return super().parameter_groups(phase)[:1]

    class Twice(Regression):
        def parameter_groups(self, phase: str) -> list[ParameterGroup]:
            return [*super().parameter_groups(phase), ParameterGroup("again", self.extra.parameters())]

    with pytest.raises(ValueError, match=r"extra.weight \(and 1 more\) asks for a gradient"):
        fit(Forgetful(), Samples(), tmp_path, settings(), progress="silent")
    with pytest.raises(ValueError, match=r"extra.weight is in two parameter groups"):
        fit(Twice(), Samples(), tmp_path, settings(), progress="silent")
    frozen = Forgetful()
    frozen.extra.requires_grad_(False)
    fit(frozen, Samples(), tmp_path, settings(), progress="silent")
    assert isinstance(frozen.extra, nn.Linear)
