"""The bench measures what it says, at a size that takes seconds."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.bench import _in_child, _peak, bench, contestant

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
