"""Tokens beside a map, class and register tokens, are found by standing still whatever the input is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.survey import survey
from tokenfusion.fusion import TokenFusion

ALL = partial(TokenFusion, threshold=1.0, rule="paper")


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = timm.layers.Attention(dim, num_heads=2)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(self.norm1(x))  # in place, as some networks write it
        return x + self.mlp(self.norm2(x))


class Linears(nn.Module):
    """Patches of 8 pixels by unfolding, without a convolution; tokens of its own before and behind them."""

    def __init__(self, before: int = 1, behind: int = 0, size: int = 32, dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Linear(3 * 64, dim)
        self.before, self.behind = (nn.Parameter(torch.randn(1, n, dim)) for n in (before, behind))
        self.place = nn.Parameter(torch.randn(1, before + (size // 8) ** 2 + behind, dim))
        self.blocks = nn.Sequential(Block(dim), Block(dim))
        self.head = nn.Linear(dim, 5)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        before, behind = (own.expand(len(x), -1, -1) for own in (self.before, self.behind))
        return self.head(self.blocks(self.mix(torch.cat([before, tokens, behind], 1) + self.place)).mean(1))


class Told(Linears):
    num_prefix_tokens = 0


class Mixed(Linears):
    """Its class token has looked at the patches before the first block sees it, and the patches at it."""

    num_prefix_tokens = 1

    def mix(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def plans(network: nn.Module, example: Tensor) -> list[Any]:
    return survey(network, example, network).blocks


@pytest.mark.parametrize(("before", "behind"), [(1, 0), (5, 0), (0, 2), (1, 2), (0, 0)])
def test_tokens_before_and_behind_the_map_without_a_convolution(before: int, behind: int) -> None:
    found = plans(Linears(before, behind), torch.zeros(2, 3, 32, 32))
    assert [(p.prefix, p.suffix, p.grid) for p in found] == [(before + behind, behind, (4, 4))] * 2


@pytest.mark.parametrize(("before", "behind"), [(1, 0), (1, 2)])
@torch.no_grad()
def test_they_are_not_exchanged(before: int, behind: int) -> None:
    model = tokenfusion.fuse(Linears(before, behind), ["a", "b"], ALL, example=torch.zeros(2, 3, 32, 32)).eval()
    seen: list[Tensor] = []
    first = model.network.get_submodule("blocks.0").block
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))

    def marked(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + torch.tensor([100.0, -100.0]).view(2, 1, 1)

    model.network.patches.register_forward_hook(marked)
    out = model({"a": torch.randn(1, 3, 32, 32), "b": torch.randn(1, 3, 32, 32)})
    assert out.scores[0].shape == (2, 1, 16)
    network = model.network
    for tokens, sign in zip(seen[0] - network.place, (-1, 1), strict=True):
        torch.testing.assert_close(tokens[:before], network.before[0])
        torch.testing.assert_close(tokens[before + 16 :], network.behind[0])
        assert (sign * tokens[before : before + 16] > 50).all(), "the other stream's"


def test_the_class_token_of_videos() -> None:
    config = transformers.VivitConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, num_frames=4
    )
    network = transformers.VivitModel(config)
    model = tokenfusion.fuse(network, ["a", "b"], ALL, example=torch.zeros(2, 4, 3, 32, 32)).eval()
    assert [(plan.prefix, plan.grid) for plan in model.survey.blocks] == [(1, None)]
    out = model({name: torch.randn(1, 4, 3, 32, 32) for name in "ab"})
    assert out.scores[0].shape == (2, 1, 8), "2 of 4 frames, in 4 patches each"


def test_a_network_that_tells_is_believed() -> None:
    """Its first row stands still; it says that it has no tokens beside its map, which 4 x 4 tokens then are not."""

    class Bare(Told):
        def mix(self, x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)

    assert [(p.prefix, p.grid) for p in plans(Bare(before=0), torch.zeros(2, 3, 32, 32))] == [(0, (4, 4))] * 2


def test_tokens_that_are_mixed_before_the_first_block_are_those_that_the_network_tells() -> None:
    assert [(p.prefix, p.grid) for p in plans(Mixed(), torch.zeros(2, 3, 32, 32))] == [(1, (4, 4))] * 2


def test_whole_numbers_do_not_tell() -> None:
    """Rows of one example are equal, so that all of their tokens are; a table's first row is a token like others."""
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    network = transformers.BertModel(config)
    example = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    assert [plan.prefix for plan in survey(network, example, network).blocks] == [0]


def test_numbers_that_choose_a_row_are_shown_as_they_are() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks = nn.Embedding(4, 16), nn.Sequential(Block(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.table(x.long()))

    network = Table()
    example = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    assert [(plan.prefix, plan.grid) for plan in survey(network, example, network).blocks] == [(0, None)]
