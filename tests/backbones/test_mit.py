"""The Mix Transformer alone: sizes, parts, equality with an independent implementation."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenfusion.backbones.mit import DEPTHS, Attention, MiT, MixMLP, PatchEmbedding, mit, to_map, to_tokens

# millions of parameters without a classifier; the paper prints 3.4 13.1 24.2 44.0 60.8 81.4
MILLIONS = {"b0": 3.3, "b1": 13.2, "b2": 24.2, "b3": 44.1, "b4": 60.8, "b5": 81.4}


def _count(widths: tuple[int, ...], depths: tuple[int, ...]) -> int:
    """Parameters, added up layer by layer from the paper's description."""
    total, before = 0, 3
    for c, depth, reduction, kernel in zip(widths, depths, (8, 4, 2, 1), (7, 3, 3, 3), strict=True):
        embed = before * c * kernel**2 + c + 2 * c
        reduce = c * c * reduction**2 + c + 2 * c if reduction > 1 else 0
        attention = 4 * (c * c + c) + reduce
        mlp = (4 * c * c + 4 * c) + (4 * c * 9 + 4 * c) + (4 * c * c + c)
        total += embed + depth * (attention + mlp + 4 * c) + 2 * c
        before = c
    return total


@pytest.mark.parametrize("variant", sorted(DEPTHS))
def test_parameter_count_is_the_published_one(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)  # the numbers themselves take seconds
    monkeypatch.setattr(importlib.import_module("tokenfusion.backbones.mit"), "initialise", lambda module: None)
    network = mit(variant)
    count = sum(p.numel() for p in network.parameters())
    widths = (32, 64, 160, 256) if variant == "b0" else (64, 128, 320, 512)
    assert count == _count(widths, DEPTHS[variant])
    assert round(count / 1e6, 1) == MILLIONS[variant]
    assert network.dims == list(widths)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (70, 101), (33, 127)])
def test_shapes_of_the_pyramid(small_mit, size: tuple[int, int]) -> None:
    maps = small_mit().eval()(torch.randn(2, 3, *size))
    expected, rows, columns = [], *size
    for stage, width in enumerate((8, 16, 20, 32)):
        stride = 4 if stage == 0 else 2
        rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
        expected.append((2, width, rows, columns))
    assert [tuple(m.shape) for m in maps] == expected


def test_other_numbers_of_channels_and_unknown_variants() -> None:
    assert MiT((8, 16, 20, 32), (1, 1, 1, 1), channels=1)(torch.randn(1, 1, 32, 32))[0].shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="b0, b1, b2, b3, b4, b5, not 'b9'"):
        mit("b9")


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_a_drop_path_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="drop_path is .*; wanted 0 or more, and less than 1"):
        MiT((8, 16, 20, 32), (1, 1, 1, 1), drop_path=rate)


def test_token_and_map_are_inverse_and_in_row_order() -> None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    tokens = to_tokens(image)
    assert tokens[0, 1 * 4 + 2].tolist() == image[0, :, 1, 2].tolist()
    assert torch.equal(to_map(tokens, (3, 4)), image)
    assert to_map(tokens.contiguous(), (3, 4)).is_contiguous(memory_format=torch.channels_last)


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [1, 2])
def test_attention_is_softmax_over_the_reduced_map(shake, reduction: int) -> None:
    attention = shake(Attention(12, 3, reduction).double())
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    context = x
    if reduction > 1:
        image = x.transpose(1, 2).reshape(2, 12, 4, 6)
        context = attention.norm(attention.sr(image).flatten(2).transpose(1, 2))
        assert context.shape == (2, 6, 12)
    q, k, v = attention.q(x), *attention.kv(context).split(12, -1)
    heads = [
        (q[..., h : h + 4] @ k[..., h : h + 4].transpose(1, 2) / 2).softmax(-1) @ v[..., h : h + 4] for h in (0, 4, 8)
    ]
    torch.testing.assert_close(attention(x, (4, 6)), attention.proj(torch.cat(heads, -1)), rtol=1e-10, atol=1e-11)


def test_attention_to_a_given_context_under_a_mask(shake) -> None:
    attention = shake(Attention(8, 2, 2).double())
    x, context = torch.randn(2, 16, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    y = attention(x, (4, 4), context=context, mask=mask)
    torch.testing.assert_close(y[:1], attention(x[:1], (4, 4), context=context[:1, [0, 1, 3]]), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(y[1:], attention(x[1:], (4, 4), context=context[1:]), rtol=1e-10, atol=1e-11)


def test_mlp_is_convolved_by_depth(shake) -> None:
    mlp = shake(MixMLP(4, 16).double())
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    hidden = mlp.fc1(x).transpose(1, 2).reshape(2, 16, 3, 4)
    hidden = F.conv2d(hidden, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=16)
    activated = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = mlp.fc2(activated.flatten(2).transpose(1, 2))
    torch.testing.assert_close(mlp(x, (3, 4)), expected, rtol=1e-10, atol=1e-11)


def test_patch_embedding_is_a_strided_convolution_and_a_norm(shake) -> None:
    embed = shake(PatchEmbedding(3, 8, 7, 4).double())
    image = torch.randn(2, 3, 30, 41, dtype=torch.float64)
    tokens, grid = embed(image)
    assert grid == (8, 11)
    patches = F.conv2d(image, embed.proj.weight, embed.proj.bias, stride=4, padding=3)
    torch.testing.assert_close(tokens, embed.norm(patches.flatten(2).transpose(1, 2)), rtol=1e-10, atol=1e-11)


def test_norms_have_the_released_epsilon() -> None:
    assert {module.eps for module in mit("b0").modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_start_of_the_weights() -> None:
    network = mit("b0")
    fc1 = network.stages[3].blocks[0].mlp.fc1
    assert abs(fc1.weight.std().item() - 0.02) < 0.001
    assert fc1.bias.abs().max() == 0
    dwconv = network.stages[3].blocks[0].mlp.dwconv.weight
    assert abs(dwconv.std().item() - math.sqrt(2 / 9)) < 0.02
    patches = network.stages[0].embed.proj.weight
    assert abs(patches.std().item() - math.sqrt(2 / (49 * 32))) < 0.002
    assert network.stages[0].embed.norm.weight.min() == 1


def test_stochastic_depth_rises_linearly_over_all_blocks(small_mit) -> None:
    rates = [block.drop.p for stage in small_mit(drop_path=0.2).stages for block in stage.blocks]
    torch.testing.assert_close(rates, [0.0, 0.05, 0.1, 0.15, 0.2])
    assert mit("b0").stages[3].blocks[1].drop.p == pytest.approx(0.1)


def test_stochastic_depth_acts_in_training_alone(small_mit) -> None:
    network, image = small_mit(drop_path=0.9), torch.randn(8, 3, 64, 64)
    assert not torch.equal(network(image)[3], network(image)[3])
    network.eval()
    assert torch.equal(network(image)[3], network(image)[3])


def test_gradients_reach_every_parameter(small_mit, shake) -> None:
    network = shake(small_mit()).eval()
    sum((m * torch.randn_like(m)).sum() for m in network(torch.randn(1, 3, 64, 96))).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not missing


# ---- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "depths"),
    [((32, 64, 160, 256), (2, 2, 2, 2)), ((64, 128, 320, 512), (1, 2, 1, 1))],
    ids=["b0", "b2-like"],
)
def test_equals_transformers(shake, tmp_path, widths: tuple[int, ...], depths: tuple[int, ...]) -> None:
    """On any image size. Its layers have the norms' epsilon at 1e-5, ours (and its configuration) at 1e-6."""
    transformers = pytest.importorskip("transformers")
    from tokenfusion.backbones.keys import from_mit
    from tokenfusion.backbones.weights import load_into, read_checkpoint

    config = transformers.SegformerConfig(hidden_sizes=list(widths), depths=list(depths), drop_path_rate=0.0)
    theirs = shake(transformers.SegformerModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    mine = MiT(widths, depths).eval()
    report = load_into(mine, from_mit(read_checkpoint(tmp_path)))
    assert not report.random
    assert not report.unused
    assert not report.copied
    for size in ((64, 96), (70, 101)):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = theirs(image, output_hidden_states=True).hidden_states
            maps = mine(image)
        assert len(expected) == 4
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_epsilon_of_transformers_makes_no_visible_difference(shake) -> None:
    """Weights that were trained with 1e-5 in some norms can be used with 1e-6."""
    a, b = shake(MiT((32, 64, 160, 256), (1, 1, 1, 1))).eval(), shake(MiT((32, 64, 160, 256), (1, 1, 1, 1))).eval()
    for module in b.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    image = torch.randn(1, 3, 64, 64)
    for x, y in zip(a(image), b(image), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
        assert not torch.equal(x, y)


def test_names_say_what_things_are(small_mit) -> None:
    """Checkpoints live by these names."""
    names = {re.sub(r"\d+", "#", name) for name in small_mit().state_dict()}
    expected = {"embed.proj", "embed.norm", "norm"} | {
        f"blocks.#.{part}"
        for part in (
            *("norm#", "attention.q", "attention.kv", "attention.proj", "attention.sr", "attention.norm"),
            *("mlp.fc#", "mlp.dwconv"),
        )
    }
    assert names == {f"stages.#.{part}.{leaf}" for part in expected for leaf in ("weight", "bias")}
