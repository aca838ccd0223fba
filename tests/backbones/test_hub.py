"""Foreign networks fused as they are: what the adapter promises on one small ViT."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.fusion import TokenFusion

THETA = functools.partial(TokenFusion, threshold=0.5)


def vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=48, **changes).eval()


def images(*names: str, channels: int = 3, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, channels, 48, 48, generator=generator) for name in names}


def test_unfused_it_is_the_network_on_the_stacked_batch_bit_for_bit() -> None:
    network, x = vit(), images("rgb", "depth")
    expected = copy.deepcopy(network)(torch.cat([x["rgb"], x["depth"]]))
    model = tokenfusion.fuse(network, ["rgb", "depth"], "none").eval()
    assert model.network is network, "the model given is the model used"
    out = model(x).outputs
    assert torch.equal(torch.cat([out["rgb"], out["depth"]]), expected)


def test_streams_exchange_and_prefix_tokens_stay() -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    x = images("rgb", "depth")
    out = model(x)
    assert len(out.scores) == 6
    assert out.scores[0].shape == (2, 2, 9)
    other = model({**x, "depth": 2 * x["depth"]})
    assert (out.outputs["rgb"] - other.outputs["rgb"]).abs().max() > 1e-5


def test_channels_of_ones_own() -> None:
    model = tokenfusion.fuse(vit(), {"rgb": 3, "depth": 1, "ms": 13}, "none").eval()
    assert len(model.account) == 2
    x = {**images("rgb"), **images("depth", channels=1), **images("ms", channels=13)}
    grey = x["depth"].expand(-1, 3, -1, -1)
    torch.testing.assert_close(model(x).outputs["depth"], vit()(grey), rtol=1e-4, atol=1e-5)


def test_a_missing_modality_is_left_out() -> None:
    model: FusedNetwork = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    x = images("rgb", "depth")
    out = model({"rgb": x["rgb"]})
    assert list(out.outputs) == ["rgb"]
    broken = {"rgb": x["rgb"], "depth": torch.full_like(x["depth"], float("nan"))}
    same = model(broken, torch.tensor([[True, True], [False, False]]))
    torch.testing.assert_close(same.ensemble, out.ensemble)


def test_convolutions_are_told() -> None:
    with pytest.raises(tokenfusion.UserError, match="no transformer blocks"):
        tokenfusion.fuse(timm.create_model("test_resnet"), ["rgb", "depth"])


def test_adapted_stems_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenfusion.fuse(vit(), {"rgb": 3, "depth": 1}, "none")
    assert "depth: 1 channel; patch_embed.proj starts from the weights of 3 channels" in caplog.text


@pytest.mark.parametrize("options", [{"fuser": "concat"}, {"fuser": THETA, "blocks": [12]}])
def test_a_network_that_cannot_be_fused_stays_as_it_is(options: dict) -> None:
    network = timm.create_model("test_vit_relpos", num_classes=5, img_size=48).eval()
    names, x = list(network.state_dict()), images("rgb")["rgb"]
    expected = network(x)
    with pytest.raises(tokenfusion.UserError, match=r"block|blocks"):
        tokenfusion.fuse(network, {"rgb": 3, "depth": 1}, **options)
    assert list(network.state_dict()) == names
    assert torch.equal(network(x), expected)
