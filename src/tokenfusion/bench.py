"""Time, memory, parameters and FLOPs of a recipe's model, as ratios to the unfused streams and to transformers."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.api import task_package
from tokenfusion.components import TARGET
from tokenfusion.errors import UserError, require
from tokenfusion.recipe import read_recipe

NO_FUSION = {TARGET: "tokenfusion.fusion.NoFusion"}
PEER = "transformers"


class Contestant(NamedTuple):
    """One model in the race; ``step`` runs a forward pass and, in training mode, a backward pass."""

    model: nn.Module
    step: Callable[[], object]


class Row(NamedTuple):
    """What was measured of one contestant."""

    seconds: float  # forward: median over the rounds
    fastest: float
    peak_mb: float  # forward, beyond the loaded model
    training_peak_mb: float | None  # forward + backward; of the two that are compared
    parameters: int
    gflop: float  # forward, attention included


def bench(
    recipe_name: str, overrides: list[str], size: tuple[int, int] = (480, 640), rounds: int = 7, batch: int = 2
) -> dict[str, Any]:
    """Race the recipe's model against the same streams unfused and transformers' SegFormer on one image after the other.

    Every round runs each contestant once, so that a noisy machine disturbs all alike; figures are ratios of medians.
    Memory is taken in a fresh process per contestant. Training peaks are of one forward and backward pass at ``batch``.

    Args:
        recipe_name, overrides: see :func:`tokenfusion.recipe.read_recipe`.
        size: (rows, columns) of the input.
        rounds: timed rounds, after one that is not counted.
        batch: batch size of the training pass; the forward pass runs at 1.
    """
    recipe = read_recipe(recipe_name, overrides)
    if min(size) < 32:
        raise UserError(f"--size is {size[0]}x{size[1]}; at least 32x32 is wanted")
    if recipe.task != "segmentation":
        raise UserError(f"{recipe_name}: bench knows segmentation only, this recipe is {recipe.task}")
    names = ["fused", "unfused", PEER, "fused bf16"] if _has_peer() else ["fused", "unfused", "fused bf16"]
    arguments = {name: (recipe_name, overrides, name, size) for name in names}
    seconds = _race({name: contestant(*arguments[name]) for name in names}, rounds)
    rows = {}
    for name in names:
        peak = _in_child(_peak, *arguments[name], 1, False)
        training = _in_child(_peak, *arguments[name], batch, True) if name in ("fused", PEER) else None
        parameters, gflop = _size(contestant(*arguments[name]))
        rows[name] = Row(statistics.median(seconds[name]), min(seconds[name]), peak, training, parameters, gflop)
    return {
        "recipe": recipe_name,
        "size": list(size),
        "training_batch": batch,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "rows": {name: row._asdict() for name, row in rows.items()},
        "ratios": _ratios(rows),
    }


def contestant(
    recipe_name: str, overrides: list[str], name: str, size: tuple[int, int], batch: int = 1, training: bool = False
) -> Contestant:
    """Build one model with its inputs; the same seed for all."""
    recipe = read_recipe(recipe_name, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    modalities = list(recipe.data.modalities)
    inputs = {m: torch.randn(batch, 3, *size, device=device) for m in modalities}
    target = torch.randint(0, 40, (batch, *size), device=device)
    if name == PEER:
        return _peer(recipe, inputs, target, training, device)
    package = task_package(recipe.task)
    if name == "unfused":
        recipe = recipe.model_copy(update={"fuser": NO_FUSION})  # type: ignore[attr-defined]
    model = package.build_model(recipe, 40).to(device).train(training)
    if name == "fused bf16":
        model, inputs = model.bfloat16(), {m: x.bfloat16() for m, x in inputs.items()}
    if not training:
        return Contestant(model, lambda: model(inputs))
    task = package.SegmentationTask(model, recipe)
    sample = package.Batch([""] * batch, inputs, target)

    def step() -> None:
        sum(task.losses(sample, task(sample), "model").values()).backward()

    return Contestant(model, step)


def _peer(recipe: Any, inputs: dict[str, Tensor], target: Tensor, training: bool, device: torch.device) -> Contestant:
    """transformers' SegFormer of the same size, on one modality after the other; in training both losses, one backward."""
    library = require("transformers", "hf")
    from tokenfusion.backbones.mit import DEPTHS, WIDTHS

    variant = recipe.model.backbone["variant"]
    config = library.SegformerConfig(
        depths=list(DEPTHS[variant]),
        hidden_sizes=list(WIDTHS.get(variant, (64, 128, 320, 512))),
        decoder_hidden_size=recipe.model.head.get("width", 256),
        num_labels=40,
    )
    model = library.SegformerForSemanticSegmentation(config).to(device).train(training)
    if not training:
        return Contestant(model, lambda: [model(x).logits for x in inputs.values()])
    return Contestant(model, lambda: sum(model(x, labels=target).loss for x in inputs.values()).backward())


def _has_peer() -> bool:
    try:
        require("transformers", "hf")
    except UserError:
        return False
    return True


def _race(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for index in range(rounds + 1):
            for name, entry in contestants.items():
                start = time.perf_counter()
                entry.step()
                _wait()
                if index:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _size(entry: Contestant) -> tuple[int, float]:
    """Parameters and GFLOP (2 x multiply-adds); plain attention, since counters do not see the fused kernels."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        entry.step()
    return sum(p.numel() for p in entry.model.parameters()), counter.get_total_flops() / 1e9


def _peak(
    recipe_name: str, overrides: list[str], name: str, size: tuple[int, int], batch: int, training: bool
) -> float:
    """Megabytes that a pass takes beyond the loaded model; runs in a process of its own."""
    small = contestant(recipe_name, overrides, name, (64, 64), batch, training)
    small.step()  # what libraries set up on their first call is there before the measurement begins
    del small
    entry = contestant(recipe_name, overrides, name, size, batch, training)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(entry, training)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    except OSError:
        raise UserError("bench takes memory from Linux's /proc/self, which cannot be used here") from None
    before_kb = _status("VmRSS")
    _run(entry, training)
    return (_status("VmHWM") - before_kb) / 2**10


def _run(entry: Contestant, training: bool) -> None:
    with torch.inference_mode(not training):
        entry.step()
    _wait()


def _status(key: str) -> int:
    """A value of /proc/self/status, in kB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def _in_child(function: Callable[..., float], *arguments: object) -> float:
    """Run in a spawned process: nothing that this one holds is counted."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, _threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)


def _threads(number: int) -> None:
    torch.set_num_threads(number)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _ratios(rows: dict[str, Row]) -> dict[str, float]:
    """The figures to compare across machines; the goal stands behind each name in the documentation."""
    fused, half = rows["fused"], rows["fused bf16"]
    ratios = {"forward: fused / unfused": fused.seconds / rows["unfused"].seconds}
    peer = rows.get(PEER)
    if peer is not None:
        ratios[f"forward: fused / {PEER}"] = fused.seconds / peer.seconds
        ratios[f"forward: fused bf16 / {PEER} fp32"] = half.seconds / peer.seconds
        if fused.training_peak_mb and peer.training_peak_mb:
            ratios[f"training memory: fused / {PEER}"] = fused.training_peak_mb / peer.training_peak_mb
    return ratios
