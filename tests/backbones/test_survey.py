"""A network that cannot be fused is told what its blocks lack."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenfusion


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1)


def test_an_attention_without_an_mlp_is_named() -> None:
    said = (
        r"no transformer blocks \(encoder\.layers\.0, of class TransformerEncoderLayer, has .*self_attn, but no MLP: "
    )
    with pytest.raises(tokenfusion.UserError, match=said):
        tokenfusion.fuse(Encoder(), ["a", "b"], example=torch.zeros(2, 3, 32, 32))


def test_without_any_attention_there_is_nothing_to_name() -> None:
    with pytest.raises(tokenfusion.UserError, match=r"\(no module with an attention and an MLP\)"):
        tokenfusion.fuse(nn.Sequential(nn.Conv2d(3, 4, 3)), ["a", "b"], example=torch.zeros(2, 3, 32, 32))


def test_a_parallel_block_is_called_one() -> None:
    network = timm.create_model("vit_base_patch16_xp_224", img_size=32, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(tokenfusion.UserError, match=r"in pieces \(attn_out_proj, mlp_act\), as parallel blocks do"):
        tokenfusion.fuse(network, ["a", "b"])
