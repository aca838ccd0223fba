"""What streams share (Table 8): counts, equal starts, layers that learn apart, networks that cannot be divided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.dense import DenseBackbone
from tokenfusion.backbones.foreign import call, timm_network
from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mirror import MirroredMiT
from tokenfusion.backbones.mit import MiT
from tokenfusion.backbones.sharing import OwnLayer, Sharing, check_divisible, divide
from tokenfusion.backbones.survey import is_norm
from tokenfusion.errors import UserError
from tokenfusion.fusion import Concat, NoFusion, PerModality, TokenFusion
from tokenfusion.train import by_decay

NAMES = ("rgb", "depth", "heat")
THETA = partial(TokenFusion, threshold=0.5)
DIRECT = ("cls_token", "pos_embed", "reg_token", "relative_position_bias_table", "embeddings.")  # belong to no layer


def vit(**changes: Any) -> nn.Module:
    made = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": (28, 42), "dynamic_img_size": True, **changes}
    return timm_network("vit_small_patch14_dinov2", **made)


def swin() -> nn.Module:
    sizes = {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64, "window_size": 2}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes)


def dinov2() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, int]]] = {
    "mit": (lambda: MiT((8, 16), (1, 2), drop_path=0.0), FusedBackbone, (32, 64)),
    "mirror": (lambda: MirroredMiT((16, 16, 16, 16, 16), (1, 1, 1, 1, 1), drop_path=0.0), FusedBackbone, (32, 64)),
    "vit": (vit, DenseBackbone, (28, 42)),
    "swin": (swin, DenseBackbone, (64, 64)),
    "hf-dinov2": (dinov2, DenseBackbone, (28, 28)),
}


def fused(name: str, sharing: Sharing, modalities: int = 2, fuser: Any = THETA, **options: Any) -> Any:
    make, kind, _ = NETWORKS[name]
    return kind(drawn(make), NAMES[:modalities], fuser, sharing=sharing, **options)


def images(name: str, modalities: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {m: torch.randn(2, 3, *NETWORKS[name][2], generator=generator) for m in NAMES[:modalities]}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def held_directly(network: nn.Module) -> int:
    return sum(
        p.numel() for n, p in network.named_parameters() if any(part in n for part in DIRECT) and "proj" not in n
    )


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_how_many_parameters_there_are(name: str, modalities: int) -> None:
    single = drawn(NETWORKS[name][0])
    norms = sum(count(m) for m in single.modules() if is_norm(m))
    trunks = {s: fused(name, s, modalities) for s in ("default", "shared", "unshared")}  # type: ignore[arg-type]
    counts = {s: count(f.network if isinstance(f, DenseBackbone) else f.backbone) for s, f in trunks.items()}
    assert counts["shared"] == count(single)
    assert counts["default"] == count(single) + (modalities - 1) * norms
    assert counts["unshared"] == modalities * count(single) - (modalities - 1) * held_directly(single)
    assert len({count(f.fusers) for f in trunks.values()}) == 1, "score networks are the same"
    if isinstance(trunks["shared"], DenseBackbone):
        assert (
            count(trunks["unshared"].norms)
            == count(trunks["default"].norms)
            == modalities * count(trunks["shared"].norms)
        )


@pytest.mark.parametrize("fuser", [NoFusion, THETA])
@pytest.mark.parametrize("name", NETWORKS)
def test_before_training_they_answer_alike(name: str, fuser: Any) -> None:
    answers = []
    for sharing in ("default", "shared", "unshared"):
        torch.manual_seed(2)
        answers.append(fused(name, sharing, fuser=fuser).eval()(images(name)))  # type: ignore[arg-type]
    for other in answers[1:]:
        for ours, theirs in zip([*answers[0].maps, *answers[0].scores], [*other.maps, *other.scores], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def step(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Both streams are asked for something."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(m.sin().sum() for m in model.train()(inputs).maps).backward()
    optimizer.step()


@pytest.mark.parametrize("name", NETWORKS)
def test_unshared_layers_learn_apart(name: str) -> None:
    model = fused(name, "unshared", fuser=NoFusion)
    own = [m for m in model.modules() if isinstance(m, OwnLayer)]
    assert all(torch.equal(a, b) for m in own for a, b in zip(m[0].parameters(), m[1].parameters(), strict=True))
    step(model, images(name))
    apart = [not torch.equal(a, b) for m in own for a, b in zip(m[0].parameters(), m[1].parameters(), strict=True)]
    assert sum(apart) > 0.8 * len(apart), "a network's last norm, and keys' biases, learn nothing from maps"


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unshared_stream_is_a_network_of_its_own(name: str) -> None:
    """Each answers with its own copies alone."""
    make, _, _ = NETWORKS[name]
    model, inputs = fused(name, "unshared", fuser=NoFusion).eval(), images(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, OwnLayer):
                for parameter in module[1].parameters():
                    parameter.mul_(0.7)
        single = drawn(make).eval()
        for module in single.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) or is_norm(module) or "LayerScale" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(0.7)
        maps = model(inputs).maps
        before = fused(name, "default", fuser=NoFusion).eval()(inputs).maps
        after = fused_from(single, name)(inputs).maps
    for ours, first, second in zip(maps, before, after, strict=True):
        torch.testing.assert_close(ours[0], first[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], second[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first[1], second[1], atol=1e-3)


def fused_from(network: nn.Module, name: str) -> Any:
    return NETWORKS[name][1](network, NAMES[:2], NoFusion).eval()


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_modality_and_checkpoints(name: str, sharing: Sharing) -> None:
    first = fused(name, sharing).eval()
    features = first({"rgb": images(name)["rgb"]})
    assert all(m.isfinite().all() for m in features.maps)
    assert all((scores[1] == 0).all() for scores in features.scores)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    second = fused(name, sharing).eval()
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(second(images(name)).maps, first(images(name)).maps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mit", "mirror", "vit"])
def test_single_modal_weights_fill_every_copy(name: str, tmp_path: Path, shake) -> None:
    single = shake(drawn(NETWORKS[name][0]))
    torch.save(single.state_dict(), tmp_path / "single.pth")
    wanted = fused_from(copy.deepcopy(single), name)(images(name)).maps
    for sharing in ("shared", "unshared"):
        model = fused(name, sharing, fuser=NoFusion).eval()  # type: ignore[arg-type]
        account = model.load(str(tmp_path / "single.pth"))
        assert "0 left random, 0 unused" in account
        for ours, theirs in zip(model(images(name)).maps, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_what_is_frozen_and_what_decays(sharing: Sharing) -> None:
    model = fused("vit", sharing, frozen=1)
    model.rest()
    frozen = [n for n, p in model.network.named_parameters() if not p.requires_grad]
    assert any(n.startswith("blocks.0.") for n in frozen)
    assert not any(n.startswith(("blocks.1.", "blocks.2.")) and ".norm" in n for n in frozen)
    groups = {group.role: list(group.params) for group in by_decay("backbone", model.trunk)}
    learning = [p for p in model.trunk.parameters() if p.requires_grad]
    assert sum(len(params) for params in groups.values()) == len(learning)
    norms = [m for m in model.trunk.modules() if isinstance(m, nn.LayerNorm)]
    own = {id(p) for m in norms for p in m.parameters() if p.requires_grad}
    assert {id(p) for p in groups["backbone norms"]} == own


class Reads(nn.Module):
    """An attention that reads its layer's weights and does not call it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        qkv = nn.functional.linear(x, self.inner.qkv.weight, self.inner.qkv.bias)
        return self.inner.proj(qkv.chunk(3, -1)[2])


class Turned(nn.Module):
    """Calls its layer on rows in another order than they came in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flip(0)).flip(0)


@pytest.mark.parametrize("how", ["reads", "turned"])
def test_networks_that_cannot_be_divided_say_so_and_stay_whole(how: str) -> None:
    network = vit()
    for block in network.blocks:
        if how == "reads":
            block.attn = Reads(block.attn)
        else:
            block.mlp.fc1 = Turned(block.mlp.fc1)
    x = torch.randn(2, 3, 28, 42)
    before = call(network.eval(), x)[1]
    with pytest.raises(UserError, match="layers of VisionTransformer cannot be divided.*choose default or shared"):
        DenseBackbone(network, NAMES[:2], NoFusion, sharing="unshared")
    assert torch.equal(call(network, x)[1], before)
    assert not any(isinstance(m, PerModality) for m in network.modules())
    DenseBackbone(network, NAMES[:2], NoFusion)


def test_other_mistakes() -> None:
    with pytest.raises(UserError, match="unites the streams in a shared attention"):
        fused("vit", "unshared", fuser=Concat)
    with pytest.raises(ValueError, match="sharing must be"):
        fused("mit", "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fused once"):
        divide(divide_twice(), 2, "shared", (nn.LayerNorm,))


def divide_twice() -> nn.Module:
    network = MiT((8, 16), (1, 1))
    divide(network, 2, "default", (nn.LayerNorm,))
    return network


def test_concat_of_an_unshared_pyramid() -> None:
    """Each stream makes its own keys and values of all streams' tokens."""
    outputs = []
    for sharing in ("default", "unshared"):
        outputs.append(fused("mit", sharing, fuser=Concat).eval()(images("mit")).maps[-1])  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_fuse_divides_too_and_saves_it(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=5, img_size=48)
    model = tokenfusion.fuse(network, {"rgb": 3, "depth": 1}, sharing="unshared").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = tokenfusion.load(tmp_path)
    x = {"rgb": torch.randn(1, 3, 48, 48), "depth": torch.randn(1, 1, 48, 48)}
    torch.testing.assert_close(again(x).ensemble, model(x).ensemble)
    assert count(again) == count(model)
    model.freeze()
    learning = {id(p) for p in model.network.parameters() if p.requires_grad}
    norms = [m for m in model.network.modules() if isinstance(m, OwnLayer) and is_norm(m[0])]
    adapted = model.network.patch_embed.proj.convs["1"]
    assert learning == {id(p) for m in [*norms, adapted] for p in m.parameters()}
    copy.deepcopy(model)


def test_what_is_tried_is_a_copy() -> None:
    network = vit()
    before = copy.deepcopy(network.state_dict())
    check_divisible(network, 2, torch.zeros(2, 3, 28, 42))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
