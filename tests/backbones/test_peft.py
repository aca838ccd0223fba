"""Adapters of peft in fused networks: what learns beside them, and that all of it is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.foreign import answer_of

peft = pytest.importorskip("peft")

PAPER = {"_target_": "tokenfusion.fusion.TokenFusion", "threshold": 0.5, "rule": "paper"}
STREAMS = {"_target_": "tokenfusion.fusion.crossing.TokenExchange", "threshold": 0.5}
LORA = {"r": 2, "target_modules": ["attn.qkv", "attn.proj"]}
NORMS = ["norm1", "norm2", "norm"]


def vit(dim: int = 32, lora: bool = False) -> nn.Module:
    torch.manual_seed(dim)
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=dim, depth=2, num_heads=2, img_size=48, num_classes=5)
    return peft.inject_adapter_in_model(peft.LoraConfig(**LORA), network) if lora else network


def shared(lora: bool = False, fuser: Any = PAPER) -> nn.Module:
    return tokenfusion.fuse(vit(lora=lora), {"rgb": 3, "depth": 1}, fuser)


def separate(lora: bool = False) -> nn.Module:
    return tokenfusion.fuse({"rgb": vit(lora=lora), "depth": vit(48, lora)}, fuser=STREAMS)


KINDS = {"shared": shared, "separate": separate}


def images(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = {"rgb": 3, "depth": 1 if kind == "shared" else 3}
    return {name: torch.randn(2, n, 48, 48, generator=generator) for name, n in channels.items()}


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained(model: nn.Module, fused: nn.Module, x: dict[str, Tensor]) -> None:
    """Two steps, after which all that learns has moved: LoRA's first matrix waits for its second."""
    model.train()
    before = {name: p.detach().clone() for name, p in learning(model).items()}
    optimiser = torch.optim.SGD(learning(model).values(), 1.0)
    for _ in range(2):
        optimiser.zero_grad()
        out = model(x)
        answers = [*map(answer_of, out.outputs.values()), out.ensemble]
        sum((y.square().mean() for y in answers), fused.sparsity()).backward()
        optimiser.step()
    still = [name for name, p in learning(model).items() if torch.equal(p, before[name])]
    assert not still
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_the_adapters_go_on_learning_beside_all_that_is_private(kind: str) -> None:
    plain, model = KINDS[kind](), KINDS[kind](lora=True)
    plain.freeze()
    model.freeze()
    named = {name for name in learning(model) if "lora_" not in name}
    assert named == learning(plain).keys()
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapters
    assert adapters == learning(model).keys() - named
    model.freeze(private=True)
    assert adapters < learning(model).keys()
    assert not any("norm" in name for name in learning(model) if "network" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_around_a_fused_model_stay_when_it_is_frozen(kind: str) -> None:
    model = KINDS[kind]()
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    before = learning(adapted).keys()
    model.freeze()
    assert before
    assert before < learning(adapted).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_lora_before_fusing_all_that_learned_is_saved(kind: str, tmp_path: Path) -> None:
    model, x = KINDS[kind](lora=True), images(kind)
    model.freeze()
    trained(model, model, x)
    wanted = model(x).ensemble
    save_file(learning(model), tmp_path / "learned.safetensors")
    again = KINDS[kind](lora=True).eval()
    assert not torch.equal(again(x).ensemble, wanted)
    again.load_state_dict(load_file(tmp_path / "learned.safetensors"), strict=False)
    assert torch.equal(again(x).ensemble, wanted)


@pytest.mark.filterwarnings("ignore:loading will need network=")
def test_lora_before_fusing_is_saved_whole(tmp_path: Path) -> None:
    model, x = shared(lora=True), images("shared")
    model.freeze()
    trained(model, model, x)
    model.save_pretrained(tmp_path)
    other = vit(lora=True)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(tokenfusion.load(tmp_path, network=other)(x).ensemble, model(x).ensemble)


def test_lora_around_a_shared_network_norms_and_score_networks_are_in_its_file(shake: Callable, tmp_path: Path) -> None:
    base, x = shake(shared()).eval(), images("shared")
    model = copy.deepcopy(base)
    before = model(x).ensemble
    config = peft.LoraConfig(**LORA, modules_to_save=[*NORMS, "score", "ensemble"])
    adapted = peft.get_peft_model(model, config).eval()
    assert torch.equal(adapted(x).ensemble, before)
    trained(adapted, model, x)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(p.numel() for p in learning(adapted).values())
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(x).ensemble, adapted(x).ensemble)


KEPT = {
    "private norms": lambda: shared(),
    "shared norms": lambda: tokenfusion.fuse(vit(), ["rgb", "depth"], PAPER, sharing="shared"),
    "concat": lambda: tokenfusion.fuse(vit(), ["rgb", "depth"], "concat"),
    "separate": separate,
}


@pytest.mark.parametrize("copied", ["norm1", "attn"])
@pytest.mark.parametrize("kind", KEPT)
def test_fusers_see_the_layers_that_peft_trains_in_place_of_ours(shake: Callable, kind: str, copied: str) -> None:
    model = shake(KEPT[kind]()).eval()
    x = images("shared" if kind == "private norms" else "separate")
    before = {name: answer.clone() for name, answer in model(x).outputs.items()}
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["mlp.fc1"], modules_to_save=[copied])).eval()
    for name, answer in model(x).outputs.items():
        assert torch.equal(answer, before[name])


def test_scales_are_those_of_the_norms_that_peft_trains() -> None:
    model = shared(fuser="channel")
    peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["norm1"]))
    norm = model.network.blocks[0].block.norm1.modules_to_save["default"]
    nn.init.constant_(norm[1].weight, 3.0)
    assert model.scales()[0].mean(1).tolist() == [1.0, 3.0]
