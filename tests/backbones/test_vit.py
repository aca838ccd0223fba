"""The plain vision transformer alone: sizes, parts, any image size, the contract of its blocks, DeiT checkpoints."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from every_fuser import MAKERS, SCORING
from torch import nn
from torch.nn import functional as F

from tokenfusion.backbones.vit import MLP, SIZES, Attention, ViT, ViTBlock, resampled, vit
from tokenfusion.backbones.yolos_keys import from_deit, load_deit
from tokenfusion.errors import UserError
from tokenfusion.fusion import NoFusion, make_private
from tokenfusion.fusion.fusers import Context

# parameters of the published classifiers, less their last layer
COUNTS = {"ti": 5_717_416 - 193_000, "s": 22_050_664 - 385_000, "b": 86_567_656 - 769_000}


@pytest.fixture
def small(shake) -> ViT:
    return shake(ViT(12, 2, 3, grid=(3, 4))).eval()


@pytest.mark.parametrize("variant", sorted(SIZES))
def test_parameter_count_is_the_published_one(variant: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in vit(variant).parameters()) == COUNTS[variant]


def test_unknown_variants_and_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="ti, s, b, not 'xl'"):
        vit("xl")
    with pytest.raises(ValueError, match="dim 10 .* heads, 3"):
        ViT(10, 1, 3)
    with pytest.raises(ValueError, match=r"grid \(0, 3\): wanted at least one row"):
        ViT(12, 1, 3, grid=(0, 3))


def test_pixels_beyond_the_last_whole_patch_are_not_seen(small: ViT) -> None:
    image = torch.randn(2, 3, 53, 75)
    tokens, grid = small.embed(image)
    assert grid == (3, 4)
    assert tokens.shape == (2, 1 + 12, 12)
    assert torch.equal(small(image), small(image[..., :48, :64]))
    assert not torch.equal(small(image), small(image[..., 5:, 11:]))


@pytest.mark.parametrize("size", [(16, 16), (48, 64), (33, 200)])
def test_any_size_of_at_least_one_patch(small: ViT, size: tuple[int, int]) -> None:
    tokens = small(torch.randn(1, 3, *size))
    assert tokens.shape == (1, 1 + (size[0] // 16) * (size[1] // 16), 12)
    assert tokens.isfinite().all()


def test_an_image_smaller_than_a_patch_is_refused(small: ViT) -> None:
    with pytest.raises(UserError, match=r"15x64 .*16x16"):
        small(torch.randn(1, 3, 15, 64))


# ---- positions -----------------------------------------------------------------------------------------------------


def test_positions_at_their_own_grid_are_as_learned(small: ViT) -> None:
    image = torch.randn(1, 3, 48, 64)
    patches = F.conv2d(image, small.patch_embed.proj.weight, small.patch_embed.proj.bias, stride=16)
    assert patches.shape[-2:] == (3, 4)
    expected = torch.cat([small.cls_token, patches.flatten(2).transpose(1, 2)], 1) + small.pos_embed
    torch.testing.assert_close(small.embed(image)[0], expected)


def test_positions_are_resampled_bicubically_and_the_class_token_keeps_its_own() -> None:
    position = torch.randn(2, 1 + 15, 4, dtype=torch.float64)
    result = resampled(position, (3, 5), (7, 4))
    assert torch.equal(result[:, 0], position[:, 0])
    image = position[:, 1:].transpose(1, 2).reshape(2, 4, 3, 5)
    expected = F.interpolate(image, size=(7, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(result[:, 1:], expected)
    assert torch.equal(resampled(position, (3, 5), (3, 5)), position)


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_attention_is_softmax_over_all_tokens(shake) -> None:
    attention = shake(Attention(12, 3).double())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(12, -1)
    heads = [
        (q[..., h : h + 4] @ k[..., h : h + 4].transpose(1, 2) / 2).softmax(-1) @ v[..., h : h + 4] for h in (0, 4, 8)
    ]
    torch.testing.assert_close(attention(x, (2, 3)), attention.proj(torch.cat(heads, -1)), rtol=1e-10, atol=1e-11)


def test_attention_to_a_given_context_under_a_mask(shake) -> None:
    attention = shake(Attention(8, 2).double())
    x, context = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x, (2, 3), context=attention.reduce(x, (2, 3))), attention(x, (2, 3)))
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    y = attention(x, (2, 3), context=context, mask=mask)
    torch.testing.assert_close(y[:1], attention(x[:1], (2, 3), context=context[:1, [0, 1, 3]]), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(y[1:], attention(x[1:], (2, 3), context=context[1:]), rtol=1e-10, atol=1e-11)


def test_mlp_has_the_exact_gelu(shake) -> None:
    mlp = shake(MLP(4, 16).double())
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    hidden = mlp.fc1(x)
    expected = mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(mlp(x, (1, 4)), expected, rtol=1e-10, atol=1e-11)


def test_stochastic_depth_rises_linearly_and_acts_in_training_alone() -> None:
    network, image = ViT(12, 3, 3, drop_path=0.9), torch.randn(16, 3, 32, 32)
    torch.testing.assert_close([block.drop.p for block in network.blocks], [0.0, 0.45, 0.9])
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


def test_start_of_the_weights_and_the_epsilon() -> None:
    network = vit("ti")
    fc1 = network.blocks[5].mlp.fc1
    assert abs(fc1.weight.std().item() - 0.02) < 0.001
    assert fc1.bias.abs().max() == 0
    assert abs(network.pos_embed.std().item() - 0.02) < 0.001
    assert 0 < network.cls_token.std() < 0.03
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_gradients_reach_every_parameter(small: ViT) -> None:
    tokens = small(torch.randn(2, 3, 64, 48))
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert not [name for name, p in small.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_bfloat16_autocast_and_tracing_without_a_graph_break(small: ViT) -> None:
    image = torch.randn(2, 3, 64, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(small(image), small(image).float(), rtol=0, atol=0.5)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), small(image))


# ---- the contract of blocks ----------------------------------------------------------------------------------------


@pytest.fixture
def streams(shake) -> tuple[ViTBlock, ViTBlock, torch.Tensor]:
    """A block, its copy with private norms, and two streams of a class token and a map of 2 x 3."""
    block = shake(ViTBlock(12, 3, 0.0)).eval()
    return block, make_private(copy.deepcopy(block), 2, (nn.LayerNorm,)).eval(), torch.randn(2, 4, 7, 12)


def test_without_fusion_a_block_with_private_norms_is_the_plain_block(streams) -> None:
    block, private, x = streams
    fused, scores = NoFusion(12, 2)(private, x, Context((2, 3), prefix=1))
    assert scores is None
    for own, expected in zip(fused, x, strict=True):
        torch.testing.assert_close(own, block(expected, (2, 3)))


@pytest.mark.parametrize("fuser", sorted(MAKERS))
@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
def test_every_fuser_runs_on_it(streams, shake, fuser: str, missing: bool) -> None:
    _, private, x = streams
    present = torch.tensor([[True] * 4, [True, False, True, True]]) if missing else None
    fuse = shake(MAKERS[fuser](12, 2)).eval()
    fused, scores = fuse(private, x, Context((2, 3), prefix=1, present=present))
    assert fused.shape == x.shape
    assert fused.isfinite().all()
    assert (scores is not None) == (fuser in SCORING)
    assert scores is None or scores.shape == (2, 4, 6), "the class token is not scored"


# ---- DeiT checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_equals_timm(shake, name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = shake(timm.create_model(name, num_classes=7)).eval()
    network = vit("ti").eval()
    report = load_deit(network, theirs.state_dict())
    assert not report.random
    assert not report.unused
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        if "distilled" in name:  # not the published classifier any more: one token is gone
            tokens = network.patch_embed(image)[0]
            expected = torch.cat([theirs.cls_token.expand(2, -1, -1), tokens], 1) + theirs.pos_embed[:, 1:]
            torch.testing.assert_close(network.embed(image)[0], expected)
        else:
            expected = theirs.forward_features(image)
            torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_positions_of_a_classifier_are_brought_to_the_networks_grid(small: ViT) -> None:
    source = {key.replace(".attention.", ".attn."): value for key, value in ViT(12, 2, 3).state_dict().items()}
    report = load_deit(small, {**source, "head.weight": torch.ones(5, 12), "head.bias": torch.ones(5)})
    assert not report.random
    assert not report.unused, "the classifier is left out"
    torch.testing.assert_close(small.pos_embed, resampled(source["pos_embed"], (14, 14), (3, 4)))
    assert torch.equal(small.blocks[1].attention.qkv.weight, source["blocks.1.attn.qkv.weight"])


def test_something_else_than_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match=r"'layer1.weight' are no DeiT checkpoint: pos_embed"):
        from_deit({"layer1.weight": torch.ones(1)}, (14, 14))
    with pytest.raises(UserError, match=r"pos_embed is \[7\]; wanted a tensor of 3 dimensions"):
        from_deit({"pos_embed": torch.ones(7)}, (14, 14))


def test_names_say_what_things_are(small: ViT) -> None:
    """Checkpoints live by these names."""
    names = {re.sub(r"\d+", "#", name) for name in small.state_dict()}
    parts = {"patch_embed.proj", "norm"} | {
        f"blocks.#.{part}" for part in ("norm#", "attention.qkv", "attention.proj", "mlp.fc#")
    }
    assert names == {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")} | {"cls_token", "pos_embed"}
