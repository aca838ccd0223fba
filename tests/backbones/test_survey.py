"""A network that cannot be fused is told what its blocks lack."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenfusion

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


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


def test_random_masking_is_refused() -> None:
    """Every stream would keep other patches: token i of one and token i of the other would be different places."""
    config = transformers.ViTMAEConfig(**SMALL, image_size=32, patch_size=8)
    with pytest.raises(tokenfusion.UserError, match="ViTMAEModel draws which tokens its blocks are given"):
        tokenfusion.fuse(transformers.ViTMAEModel(config), ["a", "b"])
    whole = transformers.ViTMAEConfig(**SMALL, image_size=32, patch_size=8, mask_ratio=0.0, hidden_dropout_prob=0.1)
    with pytest.raises(tokenfusion.UserError, match="draws which tokens"):  # in another order still
        tokenfusion.fuse(transformers.ViTMAEModel(whole), ["a", "b"])


def test_blocks_that_are_left_out_by_chance_are_refused() -> None:
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), layerdrop=0.1
    )
    example = torch.zeros(2, 400)
    with pytest.raises(tokenfusion.UserError, match=r"Wav2Vec2Model leaves whole blocks out .*0\.1.* set layerdrop=0"):
        tokenfusion.fuse(transformers.Wav2Vec2Model(config), ["a", "b"], example=example)


def test_norms_of_weights_are_no_norms() -> None:
    network = timm.create_model("test_vit", num_classes=5, img_size=48)
    network.head = nn.utils.parametrizations.weight_norm(network.head)
    network.patch_embed.proj = nn.utils.parametrizations.spectral_norm(network.patch_embed.proj)
    model = tokenfusion.fuse(network, ["a", "b"]).train()
    model({name: torch.randn(2, 3, 48, 48) for name in ("a", "b")}).outputs["a"].sum().backward()
    assert network.head.parametrizations.weight.original0.grad is not None


def test_blocks_that_are_not_fused_are_told() -> None:
    small = {"embed_dim": 16, "depth": 4, "num_heads": 2, "global_attn_indexes": (1, 3), "window_size": 4}
    network = timm.create_model(
        "samvit_base_patch16_224", img_size=80, **small
    )  # windows of 4 do not divide a map of 5
    model = tokenfusion.fuse(network, ["a", "b"])
    assert len(model.survey.blocks) == 2
    assert model.account[0].startswith("2 of 4 blocks are not fused: blocks.0, the first, has an attention branch of")
