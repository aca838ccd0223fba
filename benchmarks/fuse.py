"""What fusing costs: two streams of one network, or of two, fused by TokenFusion, against the same streams unfused.

    python benchmarks/fuse.py
    python benchmarks/fuse.py --networks vit_small_patch16_224 --rounds 9 --batch 2
    python benchmarks/fuse.py --device cuda --batch 32 --rounds 20

Every round runs each contestant once, so that a noisy machine disturbs all alike. Time on the CPU is the process's own, on one
thread, since other programs may share the machine; on a GPU it is the clock's, until the device has ended. A figure is the
median over the rounds of the ratio within a round. Memory of training is what a step holds at most: parameters, their
gradients, and what the forward pass keeps for the backward pass, every storage counted once.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor

import tokenfusion

PAIR = "vit_small_patch16_224+vit_tiny_patch16_224"  # separate networks of two widths
NETWORKS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", PAIR)
CONTESTANTS = {"unfused": "none", "fused": "tokenfusion", "fused, paper": "tokenfusion-paper"}
MODALITIES = ("rgb", "depth")
GOAL = 1.25
Model = tokenfusion.FusedNetwork | tokenfusion.FusedStreams


def build(network: str, fuser: str) -> Model:
    torch.manual_seed(0)
    own = [timm.create_model(name) for name in network.split("+")]
    if own[1:]:
        return tokenfusion.fuse(dict(zip(MODALITIES, own, strict=True)), fuser=fuser)
    return tokenfusion.fuse(own[0], MODALITIES, fuser)


def contestants(network: str) -> dict[str, Model]:
    """Separate networks have one rule, the paper's, and one word for it."""
    fusers = {name: fuser for name, fuser in CONTESTANTS.items() if "+" not in network or fuser != "tokenfusion-paper"}
    return {name: build(network, fuser) for name, fuser in fusers.items()}


def loss(model: Model, images: dict[str, Tensor]) -> Tensor:
    out = model(images)
    return sum((y.square().mean() for y in (*out.outputs.values(), out.ensemble)), 1e-3 * model.sparsity())


def forward(model: Model, images: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model.eval()(images)


def step(model: Model, images: dict[str, Tensor]) -> None:
    model.train().zero_grad()
    loss(model, images).backward()


def training_bytes(model: Model, images: dict[str, Tensor]) -> int:
    model.train().zero_grad()
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(model, images)
    activations = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in parameters)
    return 2 * sum(parameters.values()) + activations


def now(device: torch.device) -> float:
    """Seconds: the process's own on the CPU, the clock's once a GPU has done all it was asked."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def race(run: Callable[..., None], models: dict[str, Model], images, rounds: int) -> dict[str, list]:
    """Seconds of every round, after one that is not counted."""
    device = next(iter(images.values())).device
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + 1):
        for name, model in models.items():
            gc.collect()
            start = now(device)
            run(model, images)
            if index:
                seconds[name].append(now(device) - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["unfused"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, batch {arguments.batch}, goal {GOAL}")
    print(f"{'network':32} {'':14} {'forward':>16} {'training step':>16} {'training memory':>20}")
    for network in arguments.networks:
        models = {name: model.to(arguments.device) for name, model in contestants(network).items()}
        images = {name: torch.randn(arguments.batch, 3, 224, 224, device=arguments.device) for name in MODALITIES}
        ahead = race(forward, models, images, arguments.rounds)
        steps = race(step, models, images, arguments.rounds)
        memory = {name: training_bytes(model, images) for name, model in models.items()}
        for name in models:
            figures = [f"{statistics.median(s[name]):7.3f} s {ratio(s, name):6.3f}" for s in (ahead, steps)]
            held = f"{memory[name] / 2**20:9.0f} MB {memory[name] / memory['unfused']:6.3f}"
            print(f"{network:32} {name:14} {figures[0]:>16} {figures[1]:>16} {held:>20}", flush=True)


if __name__ == "__main__":
    main()
