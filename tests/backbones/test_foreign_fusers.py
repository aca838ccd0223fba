"""Every fuser inside foreign networks: on a plain ViT all of them, elsewhere those that fit, the others with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from every_fuser import SCORING, SPECS
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.dense import DenseBackbone
from tokenfusion.backbones.foreign import answer_of
from tokenfusion.fusion import ChannelExchange, Context, Fuser, NoFusion

NAMES = ("rgb", "depth", "thermal")
WORDS = sorted(SPECS)


def images(modalities: int = 2, size: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, 3, size, size, generator=generator) for name in NAMES[:modalities]}


def vit(**changes: Any) -> nn.Module:
    return timm.create_model("test_vit", **{"num_classes": 5, "img_size": 48, "depth": 3, **changes})


def swin() -> nn.Module:
    small = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **small)


@pytest.fixture
def fused(shake) -> Callable[..., tokenfusion.FusedNetwork]:
    """``fused(word, network, modalities)``: generic weights, in evaluation."""

    def make(word: str, network: nn.Module | None = None, modalities: int = 2) -> tokenfusion.FusedNetwork:
        return shake(tokenfusion.fuse(network or vit(), NAMES[:modalities], SPECS[word], seed=3)).eval()

    return make


# ---- what all promise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("word", WORDS)
def test_on_a_plain_transformer(fused, word: str, modalities: int) -> None:
    model, x = fused(word, modalities=modalities), images(modalities)
    out = model(x)
    assert out.ensemble.shape == (2, 5)
    assert out.ensemble.isfinite().all()
    scores = word in SCORING and (word != "mended" or modalities > 1)
    assert [s.shape for s in out.scores] == [(modalities, 2, 9)] * (3 if scores else 0)
    assert torch.equal(model(x).ensemble, out.ensemble)
    lone = model({name: image[1:] for name, image in x.items()})
    torch.testing.assert_close(lone.ensemble, out.ensemble[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", sorted(set(WORDS) - {"none"}))
def test_streams_answer_to_each_other(fused, word: str) -> None:
    model, x = fused(word), images()
    other = model({**x, "depth": x["depth"].flip(-1)})
    assert (answer_of(model(x).outputs["rgb"]) - answer_of(other.outputs["rgb"])).abs().max() > 1e-4


@pytest.mark.parametrize("word", WORDS)
def test_missing_modalities(fused, word: str) -> None:
    """Left out, or sent as NaN and said to be missing; and a sample without any stream harms nobody."""
    model, x = fused(word, modalities=3), images(3)
    present = torch.tensor([[True, True], [False, False], [True, True]])
    broken = {**x, "depth": torch.full_like(x["depth"], float("nan"))}
    missing = model({name: image for name, image in x.items() if name != "depth"})
    assert missing.ensemble.isfinite().all()
    assert torch.equal(missing.ensemble, model(broken, present).ensemble)
    nobody = model(x, torch.tensor([[True, False]] * 3))
    assert nobody.ensemble.isfinite().all()
    torch.testing.assert_close(nobody.ensemble[0], model(x).ensemble[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", WORDS)
def test_every_parameter_is_used(fused, word: str) -> None:
    """What processes that share a model ask for; recomputed in the backward pass, the same gradients."""
    model = fused(word).train()
    found = []
    for recomputes in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recomputes)
        torch.manual_seed(0)
        out = model(images())
        answers = [answer_of(y).square().mean() for y in out.outputs.values()]
        (sum(answers) + out.ensemble.square().mean() + model.sparsity()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_saved_and_read_again(fused, tmp_path: Path, word: str) -> None:
    model, x = fused(word, timm.create_model("test_vit", num_classes=5, img_size=48)), images()
    model.save_pretrained(tmp_path / "fused")
    again = tokenfusion.FusedNetwork.from_pretrained(tmp_path / "fused")
    assert torch.equal(again(x).ensemble, model(x).ensemble)
    assert again.recipe["fuser"]["_target_"] == model.recipe["fuser"]["_target_"]


# ---- who fits where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_on_windows(fused, word: str) -> None:
    """Swin attends inside windows, and works on a map: there is no set of tokens to add to."""
    reasons = {
        "concat": "it attends inside windows",
        "bottleneck": "it works on a map, beside which no tokens can stand",
    }
    if word in reasons:
        with pytest.raises(tokenfusion.UserError, match=rf"does not fit block .*{reasons[word]}"):
            fused(word, swin())
        return
    model = fused(word, swin())
    out = model({name: image for name, image in images(size=64).items() if name == "rgb"})
    assert out.ensemble.isfinite().all()
    assert model(images(size=64)).ensemble.isfinite().all()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, "attends inside windows, to a pooled map"),
        (
            "beit_base_patch16_224",
            {"embed_dim": 48, "depth": 1, "num_heads": 4},
            "works on a fixed number of tokens only",
        ),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}, "on a map"),
    ],
)
def test_bottleneck_tokens_want_blocks_that_treat_tokens_as_a_set(name: str, arguments: dict, reason: str) -> None:
    with pytest.raises(tokenfusion.UserError, match=f"Bottleneck does not fit block .*{reason}"):
        tokenfusion.fuse(timm.create_model(name, num_classes=0, **arguments), NAMES, "bottleneck")


class _ByRow(nn.Module):
    """An MLP that knows where its tokens stand."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * torch.linspace(1, 2, x.shape[1]).unsqueeze(-1)


class _OnePlusNorm(nn.LayerNorm):
    """A norm that scales by one plus its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def test_bottleneck_tokens_are_refused_where_the_mlp_knows_places() -> None:
    network = vit()
    network.blocks[1].mlp = _ByRow(network.blocks[1].mlp)
    with pytest.raises(tokenfusion.UserError, match=r"block blocks\.1 .*: it tells its tokens where they stand"):
        tokenfusion.fuse(network, NAMES, "bottleneck")
    tokenfusion.fuse(network, NAMES, "concat")


@pytest.mark.parametrize("word", ["channel", "token+channel"])
@pytest.mark.parametrize("norm", [nn.LayerNorm(64, elementwise_affine=False), _OnePlusNorm(64), nn.Identity()])
def test_channels_want_a_norm_that_scales_them(word: str, norm: nn.Module) -> None:
    network = vit()
    network.blocks[1].norm1 = norm
    reason = (
        "has no norm" if isinstance(norm, nn.Identity) else "has a norm before its attention that scales no channels"
    )
    with pytest.raises(tokenfusion.UserError, match=rf"does not fit block blocks\.1 \(Block\): it {reason}"):
        tokenfusion.fuse(network, NAMES, word)
    tokenfusion.fuse(network, NAMES, "average")


# ---- what each is --------------------------------------------------------------------------------------------------


def test_bottleneck_tokens_run_through_the_whole_block(fused) -> None:
    """By hand: every stream's tokens and its copy of the bottleneck's through timm's block, copies averaged in between."""
    model, x = fused("bottleneck"), images()
    seen: list[tuple[Tensor, Tensor]] = []
    for place in model.network.blocks:
        place.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
        carried = torch.zeros(2, 4, 64)
        for index, ((given, gave), fuser) in enumerate(zip(seen, model.fusers, strict=True)):
            z, copies = carried + fuser.offset, []
            for m in range(2):
                block = copy.deepcopy(model.network.blocks[index].block)
                block.norm1, block.norm2 = block.norm1[m], block.norm2[m]
                for module in block.modules():
                    module._forward_hooks.clear()
                    module._forward_pre_hooks.clear()
                whole = block(torch.cat([given[2 * m : 2 * m + 2], z], 1))
                torch.testing.assert_close(gave[2 * m : 2 * m + 2], whole[:, :10])
                copies.append(whole[:, 10:])
            carried = torch.stack(copies).mean(0)


def test_bottleneck_tokens_are_carried_over_blocks_that_do_not_fuse(shake) -> None:
    model = shake(tokenfusion.fuse(vit(), NAMES[:2], "bottleneck", blocks=[0, 2])).eval()
    x = images()
    other = model({**x, "depth": x["depth"].flip(-1)})
    assert (answer_of(model(x).outputs["rgb"]) - answer_of(other.outputs["rgb"])).abs().max() > 1e-4


def test_cross_attention_starts_as_the_network_alone(shake) -> None:
    network = shake(vit())
    x = images()
    models = [tokenfusion.fuse(copy.deepcopy(network), NAMES[:2], word).eval() for word in ("cross-attention", "none")]
    outputs = [model(x).outputs for model in models]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in x)


def test_gating_starts_as_the_average(shake) -> None:
    network = shake(vit())
    x = images(3)
    models = [tokenfusion.fuse(copy.deepcopy(network), NAMES, word).eval() for word in ("gating", "average")]
    torch.testing.assert_close(*(model(x).ensemble for model in models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [vit, swin])
def test_channels_are_swapped_in_what_the_norm_gives(shake, make: Callable[[], nn.Module]) -> None:
    """A threshold that nothing reaches, and one that nothing falls below."""
    network, x = shake(make()), images(size=64 if make is swin else 48)
    seen: dict[float, list[Tensor]] = {}
    for theta in (0.0, float("inf")):
        model = tokenfusion.fuse(
            copy.deepcopy(network), NAMES[:2], {"_target_": "tokenfusion.fusion.ChannelExchange", "threshold": theta}
        ).eval()
        given = seen.setdefault(theta, [])
        place = model.survey.blocks[0]
        attention = model.network.get_submodule(place.name).block.get_submodule(place.parts.attention)
        attention.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0]))
        out = model(x)
    plain, swapped = (seen[theta][0].unflatten(0, (2, -1)) for theta in (0.0, float("inf")))
    kept = plain[:, :, :1] if make is vit else None  # the class token
    if kept is not None:
        assert torch.equal(swapped[:, :, :1], kept)
        plain, swapped = plain[:, :, 1:], swapped[:, :, 1:]
    assert torch.equal(swapped, plain.flip(0))
    assert out.ensemble.isfinite().all()


def test_scales_are_the_private_norms_own(fused) -> None:
    model = fused("channel")
    scales = model.scales()
    assert [s.shape for s in scales] == [(2, 64)] * 3
    norm = model.network.blocks[1].block.norm1
    assert torch.equal(scales[1], torch.stack([norm[0].weight, norm[1].weight]))
    tokenfusion.fusion.scale_penalty(scales).backward()
    assert torch.equal(norm[0].weight.grad, norm[0].weight.sign())
    assert fused("tokenfusion").scales() == []


def test_scales_of_a_dense_backbone_and_of_some_blocks() -> None:
    backbone = DenseBackbone(vit(num_classes=0), NAMES[:2], ChannelExchange, blocks=[1])
    assert len(backbone.scales()) == 1
    assert backbone.scales()[0].shape == (2, 64)


def test_a_fuser_that_blocks_share_is_told_which_of_them_runs() -> None:
    """Random exchange draws by it; Spy is no fusion otherwise."""
    drawn: list[int] = []

    class Spy(Fuser):
        def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
            drawn.append(ctx.block)
            return attended

    model = tokenfusion.fuse(vit(), NAMES[:2], Spy, score_nets="stage").eval()
    assert len(model.fusers) == 1
    plain = tokenfusion.fuse(vit(), NAMES[:2], NoFusion).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images()).ensemble, plain(images()).ensemble)
    assert drawn == [0, 1, 2]


class Named(nn.Module):
    """Attention that is called by name alone, its tokens last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x)


def test_attention_that_is_given_its_tokens_by_name(shake) -> None:
    network = vit()
    for block in network.blocks:
        block.attn = Named(block.attn)
        block.forward = _by_name.__get__(block)
    plain, named = (shake(tokenfusion.fuse(n, NAMES[:2], "concat")).eval() for n in (vit(), network))
    named.load_state_dict({k.replace(".attn.", ".attn.inner."): v for k, v in plain.state_dict().items()})
    torch.testing.assert_close(named(images()).ensemble, plain(images()).ensemble)


def _by_name(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    x = x + block.attn(mask=None, x=block.norm1(x))
    return x + block.mlp(block.norm2(x))


class Fixed(nn.Module):
    """Attention that asserts its number of tokens and says no more."""

    def __init__(self, inner: nn.Module, tokens: int) -> None:
        super().__init__()
        self.inner, self.tokens = inner, tokens

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        if x.shape[1] != self.tokens:
            raise AssertionError
        return self.inner(x)


def test_an_assertion_without_words_is_a_reason_too() -> None:
    network = vit()
    for block in network.blocks:
        block.attn = Fixed(block.attn, network.pos_embed.shape[1])
    with pytest.raises(tokenfusion.UserError, match=r"a fixed number of tokens only \(AssertionError\)"):
        tokenfusion.fuse(network, NAMES[:2], "concat")
