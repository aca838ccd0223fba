"""Foreign networks as pyramids for dense heads: maps, sizes, weights in Hugging Face's names, what learns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenfusion.backbones.dense import DenseBackbone
from tokenfusion.backbones.foreign import call, resampled_table, timm_network
from tokenfusion.backbones.held import FusedBlock
from tokenfusion.errors import UserError
from tokenfusion.fusion import Average, NoFusion, TokenFusion

NAMES = ("rgb", "depth")
THETA = partial(TokenFusion, threshold=0.5)


def images(rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, rows, columns, generator=generator) for name in NAMES}


def small_vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    made = {"embed_dim": 48, "depth": 5, "num_heads": 4, "img_size": (28, 42), "dynamic_img_size": True, **changes}
    return timm_network("vit_small_patch14_dinov2", **made)


def test_a_column_gives_four_maps_of_one_size() -> None:
    backbone = DenseBackbone(small_vit(), NAMES, THETA)
    assert backbone.levels == [0, 1, 2, 4]
    features = backbone(images(28, 42))
    assert [list(x.shape) for x in features.maps] == [[2, 2, 48, 2, 3]] * 4
    assert len(features.scores) == 5


def test_a_pyramid_gives_one_map_per_stage() -> None:
    torch.manual_seed(0)
    network = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), embed_dim=24, num_classes=0)
    features = DenseBackbone(network, NAMES, NoFusion)(images(224, 224))
    assert [list(x.shape[2:]) for x in features.maps] == [[24, 56, 56], [48, 28, 28], [96, 14, 14], [192, 7, 7]]


def test_maps_are_the_networks_own_tokens_row_by_row() -> None:
    network = small_vit()
    blocks: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out))
    x = images(28, 42)
    call(network.eval(), x["rgb"])
    backbone = DenseBackbone(network, NAMES, NoFusion).eval()
    tokens = blocks[4][:, 1:]
    normed = nn.functional.layer_norm(tokens, (48,)).transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(backbone(x).maps[-1][0], normed, rtol=1e-4, atol=1e-4)


def test_images_between_two_sizes_are_resized_to_the_next_one() -> None:
    backbone = DenseBackbone(small_vit(), NAMES, THETA).eval()
    features = backbone(images(40, 60))
    assert features.maps[0].shape[-2:] == (3, 5)
    maps = backbone.score_maps(features.scores, (40, 60))
    assert {tuple(x.shape) for x in maps.values()} == {(2, 2, 3, 5)}
    assert list(maps) == [f"blocks.{i}" for i in range(5)]


def test_a_network_of_fixed_size_says_what_to_give() -> None:
    backbone = DenseBackbone(small_vit(dynamic_img_size=False), NAMES, NoFusion)
    backbone.check_size((3, 28, 42))
    with pytest.raises(UserError, match="takes no images of 56x42 pixels.*img_size"):
        backbone.check_size((3, 56, 42))


def test_what_the_maps_do_not_depend_on_does_not_learn() -> None:
    backbone = DenseBackbone(small_vit(), NAMES, Average)
    backbone.rest()
    still = [name for name, p in backbone.network.named_parameters() if not p.requires_grad]
    assert still
    assert all(name.startswith("norm.") for name in still), "the final norm stands behind the last map"
    loss = sum(x.square().mean() for x in backbone(images(28, 42)).maps)
    loss.backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_frozen_blocks_keep_their_weights_and_the_stem_with_them() -> None:
    backbone = DenseBackbone(small_vit(), NAMES, THETA, blocks=(3, 4), frozen=2)
    backbone.rest()
    learning = {name for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert learning
    assert all(name.startswith(("blocks.2.", "blocks.3.", "blocks.4.")) for name in learning)
    assert len(backbone(images(28, 42)).scores) == 2
    with pytest.raises(UserError, match="frozen=9"):
        DenseBackbone(small_vit(), NAMES, THETA, frozen=9)


def test_batch_norms_keep_what_they_know(tmp_path: Path) -> None:
    """Neither the look at the network before training nor loading loses the statistics of a pretrained one."""
    torch.manual_seed(0)
    source = timm.create_model(
        "tiny_vit_5m_224", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(1, 1, 1, 1)
    )
    for name, value in source.state_dict().items():
        if "running" in name:
            value += torch.rand_like(value)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    fresh = timm.create_model(
        "tiny_vit_5m_224", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(1, 1, 1, 1), num_classes=0
    )
    backbone = DenseBackbone(fresh, NAMES, NoFusion)
    assert " 0 left random" in backbone.load(str(tmp_path))
    backbone.train()
    backbone.check_size((3, 64, 64))
    backbone.rest()
    assert backbone.training
    name = next(name for name in source.state_dict() if name.endswith("running_mean"))
    means = [value for key, value in backbone.network.state_dict().items() if key.endswith("running_mean")]
    first, second = means[:2]
    torch.testing.assert_close(first, source.state_dict()[name])
    torch.testing.assert_close(second, source.state_dict()[name])


def test_a_network_of_one_channel_is_told() -> None:
    with pytest.raises(UserError, match="takes 1 channels"):
        DenseBackbone(small_vit(in_chans=1), NAMES, NoFusion)


@pytest.fixture(scope="module")
def dinov2() -> nn.Module:
    """Positions of a square image, as published."""
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=4, image_size=42, patch_size=14, mlp_ratio=4
    )
    network = transformers.Dinov2Model(config).eval()
    for p in network.parameters():  # layer scales and positions of a fresh network hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    return network


def test_weights_in_hugging_faces_names_give_the_same_tokens(dinov2: nn.Module, tmp_path: Path) -> None:
    dinov2.save_pretrained(tmp_path)
    backbone = DenseBackbone(small_vit(img_size=42), NAMES, NoFusion).eval()
    account = backbone.load(str(tmp_path))
    assert "0 left random, 0 unused" in account
    x = torch.randn(2, 3, 42, 42)
    expected = dinov2(x).last_hidden_state
    tokens = call(backbone.network, torch.cat([x, x]))[0]
    torch.testing.assert_close(tokens[:2], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[2:], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_to_the_networks_grid(dinov2: nn.Module, tmp_path: Path) -> None:
    dinov2.save_pretrained(tmp_path)
    backbone = DenseBackbone(small_vit(), NAMES, NoFusion)
    backbone.load(str(tmp_path))
    own = backbone.network.pos_embed
    assert own.shape == (1, 7, 48)
    torch.testing.assert_close(own[:, 0], dinov2.embeddings.position_embeddings[:, 0])


def test_resampling_keeps_a_ramp_and_the_class_row() -> None:
    rows = torch.arange(6.0).view(6, 1).expand(6, 6).flatten()
    table = torch.cat([torch.tensor([100.0]), rows]).view(1, 37, 1)
    small = resampled_table(table, 10, (3, 3))
    assert small[0, 0, 0] == 100
    torch.testing.assert_close(small[0, 1:, 0].view(3, 3)[1], torch.full((3,), 2.5))
    assert resampled_table(table, 37, (6, 6)) is table


def test_a_fused_network_is_found_by_its_blocks() -> None:
    backbone = DenseBackbone(small_vit(), NAMES, THETA)
    assert sum(isinstance(m, FusedBlock) for m in backbone.modules()) == 5


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [("vit_smal_patch14_dinov2", {}, "did you mean"), ("vit_small_patch14_dinov2", {"imgsize": 3}, "imgsize")],
)
def test_wrong_names_and_arguments_of_timm(name: str, arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        timm_network(name, **arguments)
