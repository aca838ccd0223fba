"""Time, memory, parameters and FLOPs of a recipe's model, as ratios to what it is measured against."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.contestants import PEER, RELEASED_STEP, SIZES, STEP, Contestant, contestant, race
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe


class Row(NamedTuple):
    """What was measured of one contestant; what does not apply is None."""

    seconds: float  # of a forward pass, or of a training step: median over the rounds
    fastest: float
    peak_mb: float | None  # forward, beyond the loaded model
    training_peak_mb: float | None  # forward + backward; of those that are compared
    parameters: int
    gflop: float | None  # forward, attention included


def bench(
    recipe_name: str,
    overrides: list[str],
    size: tuple[int, int] | None = None,
    rounds: int = 7,
    batch: int | None = None,
) -> dict[str, Any]:
    """Race the recipe's model against the same streams unfused, and what else its task is measured against.

    Segmentation: transformers' SegFormer on one image after the other. Translation: whole training steps, ours and as the
    released code orders them. Detection: the networks alone; what is searched for in a cloud comes from the loader. Every
    round runs each contestant once, so that a noisy machine disturbs all alike; figures are ratios of medians. Memory is
    taken in a fresh process per contestant.

    Args:
        recipe_name, overrides: see :func:`tokenfusion.recipe.read_recipe`.
        size: (rows, columns) of the input; the task's usual one otherwise.
        rounds: timed rounds, after one (training: three) that are not counted.
        batch: batch size in training; otherwise 1 for translation, 2 for the others. The forward pass runs at 1.
    """
    recipe = read_recipe(recipe_name, overrides)
    size = size or SIZES.get(recipe.task) or recipe.data.image
    if min(size) < 32:
        raise UserError(f"--size is {size[0]}x{size[1]}; at least 32x32 is wanted")
    batch = batch or (1 if recipe.task == "translation" else 2)
    entries = race(recipe)

    def enter(name: str, training: bool) -> Contestant:
        return contestant(recipe_name, overrides, name, size, batch if training else 1, training)

    seconds = {
        **_race({name: enter(name, False) for name in entries.forward}, rounds, False),
        **_race({name: enter(name, True) for name in entries.steps}, rounds, True),
    }
    rows = {}
    for name in dict.fromkeys((*entries.forward, *entries.steps)):
        peak = training = gflop = None
        if name in entries.forward:
            peak = _in_child(_peak, recipe_name, overrides, name, size, 1, False)
            gflop = _gflop(enter(name, False))
        if name in entries.memory:
            training = _in_child(_peak, recipe_name, overrides, name, size, batch, True)
        parameters = sum(p.numel() for p in enter(name, name in entries.steps).model.parameters())
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


def _race(contestants: dict[str, Contestant], rounds: int, training: bool) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm = 3 if training else 1  # optimisers and gradients first find their memory
    for index in range(rounds + warm):
        for name, entry in contestants.items():
            start = time.perf_counter()
            _run(entry, training)
            if index >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gflop(entry: Contestant) -> float:
    """GFLOP (2 x multiply-adds) of a forward pass; plain attention, since counters do not see the fused kernels."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        entry.step()
    return counter.get_total_flops() / 1e9


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
    unfused, peer, released = rows["unfused"], rows.get(PEER), rows.get(RELEASED_STEP)
    ratios = {"forward: fused / unfused": fused.seconds / unfused.seconds}
    if peer is None:
        ratios["forward: fused bf16 / fused fp32"] = half.seconds / fused.seconds
    else:
        ratios[f"forward: fused / {PEER}"] = fused.seconds / peer.seconds
        ratios[f"forward: fused bf16 / {PEER} fp32"] = half.seconds / peer.seconds
        if fused.training_peak_mb and peer.training_peak_mb:
            ratios[f"training memory: fused / {PEER}"] = fused.training_peak_mb / peer.training_peak_mb
    if released is not None:
        own = rows[STEP]
        ratios[f"{STEP} / {RELEASED_STEP}"] = own.seconds / released.seconds
        if own.training_peak_mb and released.training_peak_mb:
            ratios[f"training memory: {STEP} / {RELEASED_STEP}"] = own.training_peak_mb / released.training_peak_mb
    if fused.training_peak_mb and unfused.training_peak_mb:
        ratios["training memory: fused / unfused"] = fused.training_peak_mb / unfused.training_peak_mb
    return ratios
