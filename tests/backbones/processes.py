"""Two processes train one fused network, or one does: the parameters after three steps, for tests of both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tokenfusion
from tokenfusion.backbones.held import FusedBlock

STEPS, BATCH = 3, 4


def model(fuser: Any = None) -> tokenfusion.FusedNetwork:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5, img_size=48)
    fuser = fuser or {"_target_": "tokenfusion.fusion.TokenFusion", "threshold": 0.5}
    return tokenfusion.fuse(network, {"rgb": 3, "depth": 1}, fuser).double()


def separate() -> tokenfusion.FusedStreams:
    torch.manual_seed(0)
    networks = {
        name: timm.create_model("test_vit", num_classes=5, img_size=48, in_chans=n)
        for name, n in (("rgb", 3), ("depth", 1))
    }
    exchange = {"_target_": "tokenfusion.fusion.crossing.TokenExchange", "threshold": 0.5}
    return tokenfusion.fuse(networks, fuser=exchange, mlp=True).double()


MODELS = {"shared": model, "separate": separate}


def batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = {
        name: torch.randn(BATCH, n, 48, 48, generator=generator, dtype=torch.float64)
        for name, n in (("rgb", 3), ("depth", 1))
    }
    return images, torch.randint(5, (BATCH,), generator=generator)


def loss(fused: Any, out: Any, target: Tensor) -> Tensor:
    """Of every stream and of the ensemble, and the sparsity penalty."""
    answers = [*out.outputs.values(), out.ensemble]
    return sum((nn.functional.cross_entropy(y, target) for y in answers), 0.01 * fused.sparsity())


def train(way: str, kind: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """``way``: ``one``, ``ddp`` or ``fsdp``; ``kind``: ``shared`` or ``separate``; the whole state afterwards."""
    fused = MODELS[kind]()
    called: nn.Module = fused
    if way == "ddp":
        called = DistributedDataParallel(fused)
    if way == "fsdp":
        for module in fused.modules():
            if isinstance(module, FusedBlock):
                fully_shard(module)
        fully_shard(fused)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    for step in range(STEPS):
        images, target = batch(step)
        own = slice(rank, None, world)
        optimizer.zero_grad()
        out = called({name: x[own] for name, x in images.items()})
        loss(fused, out, target[own]).backward()
        optimizer.step()
    state = fused.state_dict()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}


def main(way: str, kind: str, rank: str, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=int(rank), world_size=2)
    state = train(way, kind, int(rank), 2)
    if rank == "0":
        torch.save(state, Path(out))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
