"""What training and shipping ask of a fused network: compilers, exports, precisions, processes, adapters, copies."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo
from backbones import processes
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.foreign import answer_of
from tokenfusion.components import FUSERS
from tokenfusion.fusion.fusers import Fuser
from tokenfusion.fusion.modality import PerModality

THETA = {"_target_": "tokenfusion.fusion.TokenFusion", "threshold": 0.5}
FUSE_PAGE = Path(__file__).parents[2] / "docs" / "fuse.md"
ONCE = "skip_fwd_side_effects_in_bwd_under_checkpoint"
WORDS = {**FUSERS, "tokenfusion": THETA, "tokenfusion-paper": {**THETA, "rule": "paper"}}


def images(channels: dict[str, int] | None = None, batch: int = 2, size: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = channels or {"rgb": 3, "depth": 3}
    return {name: torch.randn(batch, n, size, size, generator=generator) for name, n in channels.items()}


@pytest.fixture
def fused(shake) -> Callable[..., tokenfusion.FusedNetwork]:
    """``fused(fuser, modalities)``: a tiny ViT of generic weights."""

    def make(fuser: Any = THETA, modalities: Any = ("rgb", "depth"), **options: Any) -> tokenfusion.FusedNetwork:
        network = timm.create_model("test_vit", num_classes=5, img_size=48, depth=2)
        return shake(tokenfusion.fuse(network, modalities, fuser, **options))

    return make


def loss(model: tokenfusion.FusedNetwork, out: Any) -> Tensor:
    answers = [*map(answer_of, out.outputs.values()), out.ensemble]
    return sum((y.square().mean() for y in answers), 0.1 * model.sparsity())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: tokenfusion.FusedNetwork, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """A training step's gradients; its dropout and random exchange are drawn from one seed."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss(model, (model if run is None else run)(images())).backward()
    return gradients(model)


class Named(nn.Module):
    """For exporters, which want tensors in and tensors out."""

    def __init__(self, model: tokenfusion.FusedNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.model({"rgb": rgb, "depth": depth})
        return out.ensemble, out.outputs["rgb"], out.outputs["depth"]


# Compilers and exports


LONG = {"average", "bottleneck", "channel", "concat", "gating", "random"}  # of what the others have too


@pytest.mark.parametrize("word", [pytest.param(word, marks=pytest.mark.slow if word in LONG else ()) for word in WORDS])
def test_compiled_as_one_graph(fused, word: str) -> None:
    model = fused(WORDS[word]).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()).ensemble, model(images()).ensemble)
    plain, traced = step(model), step(model, compiled)
    assert plain.keys() == traced.keys()
    if word != "random":  # compiled code draws from the seed in its own way
        torch.testing.assert_close(traced, plain)


def test_compiled_with_a_missing_modality(fused) -> None:
    model = fused().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    present = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), present).ensemble, model(images(), present).ensemble)
        only = {"rgb": images()["rgb"]}
        torch.testing.assert_close(compiled(only).ensemble, model(only).ensemble)


def test_hugging_face_compiled(shake) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=48, patch_size=16, num_labels=4)
    model = shake(tokenfusion.fuse(transformers.ViTForImageClassification(config), ["rgb", "depth"], THETA)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()).ensemble, model(images()).ensemble)
    torch.testing.assert_close(step(model, compiled), step(model))


@pytest.mark.parametrize("word", WORDS)
def test_exported_by_torch(fused, word: str) -> None:
    model, inputs = Named(fused(WORDS[word])).eval(), images()
    program = torch.export.export(model, tuple(torch.zeros_like(x) for x in inputs.values()))
    torch.testing.assert_close(program.module()(*inputs.values()), model(*inputs.values()))


@pytest.mark.parametrize("word", ["tokenfusion", "tokenfusion-paper"])
def test_onnx(fused, tmp_path: Path, word: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = Named(fused(WORDS[word])).eval(), images()
    torch.onnx.export(model, tuple(inputs.values()), tmp_path / "fused.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    for ours, theirs in zip(model(**inputs), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


# Precision, memory, processes


def test_bf16_autocast_trains(fused) -> None:
    model = fused().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
        total = loss(model, out)
    total.backward()
    found = gradients(model)
    assert out.outputs["rgb"].dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in found.values())
    assert len(found) == len(list(model.parameters()))


def saved_bytes(model: tokenfusion.FusedNetwork) -> int:
    """Memory that a forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(model.train(), model(images(batch=4)))
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)


@pytest.mark.parametrize("word", ["tokenfusion", "tokenfusion-paper", "concat", "bottleneck", "cross-attention"])
def test_recomputing_blocks_saves_memory_and_changes_nothing(fused, word: str) -> None:
    model = fused(WORDS[word])
    plain, much = step(model), saved_bytes(model)
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model), plain, rtol=0, atol=0)
    assert saved_bytes(model) < 0.5 * much


@pytest.mark.skipif(not hasattr(torch._dynamo.config, ONCE), reason="torch cannot be told to leave side effects out")
@pytest.mark.parametrize("word", ["tokenfusion", "tokenfusion-paper"])
def test_recomputed_blocks_compile_as_one_graph(fused, word: str) -> None:
    assert f"torch._dynamo.config.{ONCE} = True" in FUSE_PAGE.read_text(encoding="utf-8")
    model = fused(WORDS[word])
    plain = step(model)
    model.set_grad_checkpointing()
    torch.compiler.reset()
    with torch._dynamo.config.patch({ONCE: True}):
        traced = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(traced, plain)


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path: Path, way: str, kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", processes.__file__, way, kind]
    places = [str(tmp_path / "meeting"), str(tmp_path / "state.pt")]
    both = [
        subprocess.Popen([*command, rank, *places], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    for process in both:
        assert process.communicate(timeout=300)[1] is not None
        assert process.returncode == 0, way
    two, one = torch.load(tmp_path / "state.pt", weights_only=True), processes.train("one", kind)
    assert two.keys() == one.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-12
    start = processes.MODELS[kind]().state_dict()
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3, "it learned"


# Weights


def test_every_weight_has_one_name(fused) -> None:
    model = fused(modalities={"rgb": 3, "depth": 1})
    state = model.state_dict()
    places = [x.data_ptr() for x in state.values()]
    assert len(set(places)) == len(places)
    other = fused(modalities={"rgb": 3, "depth": 1})
    nn.init.zeros_(other.network.head.weight)
    other.load_state_dict(state, strict=True)
    x = images({"rgb": 3, "depth": 1})
    assert torch.equal(other.eval()(x).ensemble, model.eval()(x).ensemble)


def _stored(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _stored])
def test_copies_of_a_model_in_training_are_models_of_their_own(fused, way: Callable) -> None:
    model = fused()
    step(model)
    other = way(model)
    torch.testing.assert_close(step(other), step(model), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert model.eval()(images()).ensemble.abs().max() > 0.01
    assert other.eval()(images()).ensemble.abs().max() == 0


def test_frozen_it_learns_what_is_private(fused) -> None:
    model = fused(modalities={"rgb": 3, "depth": 1})
    model.freeze()
    private = [m for m in model.modules() if isinstance(m, PerModality | Fuser)]
    private.append(model.network.patch_embed.proj.convs["1"])  # depth's; the network's own stays as it is
    wanted = {id(p) for m in [*private, model.ensemble] for p in m.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    loss(model.train(), model(images({"rgb": 3, "depth": 1}))).backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == wanted
    model.freeze(private=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for m in (model.fusers, model.ensemble) for p in m.parameters()
    }


def test_lora_trains_its_adapters_alone(fused) -> None:
    peft = pytest.importorskip("peft")
    model = fused().eval()
    before = model(images()).ensemble
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"]))
    assert torch.equal(adapted.eval()(images()).ensemble, before)
    adapted.train()
    loss(model, adapted(images())).backward()
    assert gradients(adapted)
    assert all("lora_" in name for name in gradients(adapted))
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0).step()
    assert not torch.allclose(adapted.eval()(images()).ensemble, before, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(adapted(images()).ensemble, before)


# Maps for dense heads


@pytest.mark.parametrize(
    ("name", "arguments", "size", "blocks", "shapes", "last"),
    [
        ("test_vit", {"img_size": 48}, 48, [1, 3, -1], [(64, 3, 3)] * 3, "norm"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
            64,
            [0, 1, 2, 3],
            [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)],
            "norm",
        ),
        (
            "pvt_v2_b0",
            {"depths": (1, 1, 1, 1)},
            96,
            [0, 1, 2, 3],
            [(32, 24, 24), (64, 12, 12), (160, 6, 6), (256, 3, 3)],
            "stages.3.norm",
        ),
    ],
)
def test_maps_of_a_pyramid_are_those_of_the_forward_pass(shake, name, arguments, size, blocks, shapes, last) -> None:
    model = shake(tokenfusion.fuse(timm.create_model(name, **arguments), ["rgb", "depth"], THETA)).eval()
    x = images(size=size)
    with torch.no_grad():
        maps, scores, present = model.pyramid(x, blocks)
        out = model(x)
        tokens = model.network.get_submodule(last)(maps[-1].flatten(0, 1).permute(0, 2, 3, 1)).unflatten(0, (2, 2))
    assert [tuple(m.shape) for m in maps] == [(2, 2, *shape) for shape in shapes]
    assert present is None
    torch.testing.assert_close(scores, out.scores, rtol=0, atol=0)
    for stream, features in zip(tokens, out.features.values(), strict=True):
        if name == "pvt_v2_b0":
            features = features.permute(0, 2, 3, 1)
        if name == "test_vit":
            features = features[:, 1:].unflatten(1, (3, 3))
        torch.testing.assert_close(features, stream)
