"""The bench measures what it says, at a size that takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tokenfusion.bench import _in_child, _peak, bench, contestant
from tokenfusion.contestants import race
from tokenfusion.recipe import read_recipe

SMALL = ["model.backbone.variant=b0", "model.head.width=32"]


def test_bench_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("tokenfusion.bench._in_child", lambda function, *arguments: function(*arguments))
    result = bench("nyudv2-mit-b2", SMALL, size=(64, 96), rounds=2, batch=1)
    assert list(result["rows"]) == ["fused", "unfused", "transformers", "fused bf16"]
    fused, unfused = result["rows"]["fused"], result["rows"]["unfused"]
    assert fused["parameters"] > unfused["parameters"]  # the score networks
    assert fused["gflop"] > unfused["gflop"] > 0
    assert result["ratios"]["forward: fused / unfused"] == fused["seconds"] / unfused["seconds"]
    assert len(result["ratios"]) == 4
    assert all(row["seconds"] >= row["fastest"] > 0 for row in result["rows"].values())


XS = ["model.generator.variant=xs", "model.discriminator.variant=xs"]


def test_translation_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"training step": 30.0, "released schedule": 40.0}  # so small ones cannot be told in this process
    monkeypatch.setattr("tokenfusion.bench._in_child", lambda _, *arguments: peaks.get(arguments[2], 10.0))
    result = bench("taskonomy-shade-texture-to-rgb-ti", XS, size=(64, 64), rounds=1)
    rows, ratios = result["rows"], result["ratios"]
    assert list(rows) == ["fused", "unfused", "fused bf16", "training step", "released schedule"]
    assert result["training_batch"] == 1
    assert rows["fused"]["gflop"] > rows["unfused"]["gflop"] > 0
    assert rows["training step"]["parameters"] == rows["released schedule"]["parameters"] > rows["fused"]["parameters"]
    assert (
        rows["training step"]["gflop"] is rows["training step"]["peak_mb"] is rows["fused"]["training_peak_mb"] is None
    )
    assert list(ratios) == [
        "forward: fused / unfused",
        "forward: fused bf16 / fused fp32",
        "training step / released schedule",
        "training memory: training step / released schedule",
    ]
    own, released = rows["training step"], rows["released schedule"]
    assert ratios["training step / released schedule"] == own["seconds"] / released["seconds"]
    assert ratios["training memory: training step / released schedule"] == 0.75


TINY = ["model.points.points=[64, 32, 16, 8]", "model.points.proposals=16", "data.points=256",
        "model.image.detections=8", "data.image=[64, 96]"]  # fmt: skip


def test_detection_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenfusion.bench._in_child", lambda _, *arguments: 30.0 if arguments[2] == "fused" else 20.0)
    result = bench("toy-detection3d", TINY, rounds=1)
    rows, ratios = result["rows"], result["ratios"]
    assert result["size"] == [64, 96]  # of the recipe's own images
    assert list(rows) == ["fused", "unfused", "fused bf16"]
    assert rows["fused"]["parameters"] > rows["unfused"]["parameters"]  # the score networks
    assert rows["fused"]["gflop"] == rows["fused bf16"]["gflop"] > rows["unfused"]["gflop"] > 0
    assert rows["fused bf16"]["training_peak_mb"] is None
    assert ratios["forward: fused / unfused"] == rows["fused"]["seconds"] / rows["unfused"]["seconds"]
    assert ratios["forward: fused bf16 / fused fp32"] == rows["fused bf16"]["seconds"] / rows["fused"]["seconds"]
    assert ratios["training memory: fused / unfused"] == 1.5
    assert len(ratios) == 3


@pytest.mark.parametrize("name", ["fused", "unfused"])
def test_detection_trains_both_networks_on_points_that_the_images_show(name: str) -> None:
    entry = contestant("toy-detection3d", [*TINY, "fuser.threshold=1.0"], name, (64, 96), 2, training=True)
    shown = []
    entry.model.register_forward_hook(lambda *found: shown.append(found[-1].visible))
    entry.step()
    (visible,) = shown
    assert visible.shape == (2, 32)
    assert 0.3 < visible.double().mean() < 1  # so that there is something to exchange
    without = {n for n, p in entry.model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert not [n for n in without if n.startswith(("points.backbone.", "image.vit.blocks.", "points.decoder"))]


def test_bf16_detection_keeps_coordinates() -> None:
    outputs = [contestant("toy-detection3d", TINY, name, (64, 96)).step() for name in ("fused", "fused bf16")]
    full, half = (output.points for output in outputs)  # type: ignore[attr-defined]
    torch.testing.assert_close(half.seeds.xyz, full.seeds.xyz, rtol=0, atol=0)
    assert half.seeds.features.dtype is torch.bfloat16 or not torch.equal(half.seeds.features, full.seeds.features)


def test_both_schedules_are_the_same_mathematics() -> None:
    """One step from the same weights: both optimisers are given the same gradients, in the same order."""
    changes = [*XS, "model.generator.drop_path=0", "model.discriminator.drop_path=0"]
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name in ("training step", "released schedule"):
        entry = contestant("taskonomy-shade-texture-to-rgb-ti", changes, name, (64, 64), 2, training=True)
        task, names = entry.model, {id(p): key for key, p in entry.model.named_parameters()}
        steps = seen.setdefault(name, [])

        def keep(
            optimizer: Any, *_: Any, names: dict[int, str] = names, steps: list[dict[str, torch.Tensor]] = steps
        ) -> None:
            given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            steps.append({names[id(p)]: p.grad.detach().clone() for p in given})

        handle = register_optimizer_step_pre_hook(keep)
        try:
            entry.step()
        finally:
            handle.remove()
        assert [next(iter(step)).split(".")[0] for step in steps] == ["discriminator", "model"]
        assert {key for step in steps for key in step} == set(dict(task.named_parameters()))
    for phase, (ours, theirs) in enumerate(zip(*seen.values(), strict=True)):
        assert ours.keys() == theirs.keys()
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        # the generator's goes through a discriminator that a step of Adam has moved: there noise near zero takes sides
        tolerance = (1e-5, 1e-3)[phase] * largest
        for key, gradient in ours.items():
            torch.testing.assert_close(
                gradient, theirs[key], rtol=1e-3, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_flops_against_a_count_by_hand() -> None:
    """The first score network at 64 x 96 of MiT-B0: 2 modalities, 384 tokens, 32 -> 32 -> 16 -> 8 -> 2."""
    from tokenfusion.bench import _gflop

    with_scores = _gflop(contestant("nyudv2-mit-b2", SMALL, "fused", (64, 96)))
    without = _gflop(contestant("nyudv2-mit-b2", SMALL, "unfused", (64, 96)))
    tokens, total = 16 * 24, 0
    for width, blocks, scale in ((32, 2, 1), (64, 2, 4), (160, 2, 16), (256, 2, 64)):
        per_token = width * width + width * width // 2 + width // 2 * width // 4 + width // 4 * 2
        total += 2 * 2 * blocks * (tokens // scale) * per_token
    assert with_scores - without == pytest.approx(total / 1e9, rel=1e-9)


def test_memory_is_taken_in_a_fresh_process() -> None:
    held = torch.zeros(2**26)  # 256 MB of this process are none of the contestant's
    peak = _in_child(_peak, "nyudv2-mit-b2", SMALL, "fused", (256, 256), 1, True)
    assert 5 < peak < 200  # megabytes
    del held


def test_only_a_mit_races_against_segformer() -> None:
    assert race(read_recipe("nyudv2-vit-s-small", [])).forward == ("fused", "unfused", "fused bf16")
