"""Networks of Hugging Face are asked for images of any size, and bit for bit as before for their own."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import tokenfusion
from tokenfusion.backbones.dense import DenseBackbone
from tokenfusion.backbones.foreign import answer_of, call, example_of
from tokenfusion.fusion import NoFusion

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
SIZED = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**VIT, image_size=32)),
    "vit with a head": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, image_size=32, num_labels=3)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**VIT, image_size=32)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT, image_size=32)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT, image_size=32)),
}
FREE = {
    "yolos": lambda: hf.YolosModel(hf.YolosConfig(**VIT, image_size=[32, 32], num_detection_tokens=3)),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ),
}


@pytest.mark.parametrize("name", [*SIZED, *FREE])
@pytest.mark.parametrize("size", [(48, 32), (32, 64)])
@torch.no_grad()
def test_images_of_another_size(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = {**SIZED, **FREE}[name]().eval()
    x = {key: torch.randn(2, 3, *size) for key in "ab"}
    more = {"interpolate_pos_encoding": True} if name in SIZED else {}
    wanted = {key: answer_of(network(value, **more)) for key, value in x.items()}
    got = tokenfusion.fuse(network, ["a", "b"], NoFusion).eval()(x).outputs
    for key in "ab":
        torch.testing.assert_close(answer_of(got[key]), wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_nothing_is_asked_at_its_own_size(name: str) -> None:
    network = SIZED[name]().eval()
    asked: list[dict] = []
    network.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    x = torch.randn(2, 3, 32, 32)
    got = answer_of(call(network, x)[1])
    assert list(asked[0]) == ["pixel_values"]
    assert torch.equal(got, answer_of(network(x)))


@torch.no_grad()
def test_separate_networks_at_another_size() -> None:
    torch.manual_seed(0)
    model = tokenfusion.fuse({"a": SIZED["vit"](), "b": FREE["dinov2"]()}).eval()
    out = model({"a": torch.randn(1, 3, 48, 64), "b": torch.randn(1, 3, 48, 64)})
    assert [tuple(s.shape) for s in out.scores] == [(1, 1, 48)] * 2
    assert all(s.isfinite().all() for s in out.scores)


@torch.no_grad()
def test_it_compiles_at_another_size() -> None:
    torch.compiler.reset()
    model = tokenfusion.fuse(SIZED["vit"](), ["a", "b"]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = {key: torch.randn(1, 3, 48, 32) for key in "ab"}
    torch.testing.assert_close(compiled(x).ensemble, model(x).ensemble)


def test_dense_maps_say_what_a_network_of_one_size_wants() -> None:
    network = hf.ViTModel(hf.ViTConfig(**VIT, image_size=(32, 48)))  # positions of squares alone are resampled
    backbone = DenseBackbone(network, ["a", "b"], NoFusion)
    backbone.check_size((3, 32, 48))
    with pytest.raises(
        tokenfusion.UserError, match=r"of 64x48 pixels.*wanted 32x48, the image_size of its config.json"
    ):
        backbone.check_size((3, 64, 48))


def test_dense_maps_of_any_size() -> None:
    backbone = DenseBackbone(SIZED["vit"](), ["a", "b"], NoFusion).eval()
    backbone.check_size((3, 40, 56))
    maps = backbone({key: torch.randn(1, 3, 40, 56) for key in "ab"}).maps
    assert {tuple(x.shape[-2:]) for x in maps} == {(5, 7)}


def test_signals_whose_length_no_config_tells_want_an_example() -> None:
    config = hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7
    )
    with pytest.raises(tokenfusion.UserError, match=r"Wav2Vec2Model: its config does not tell.*example="):
        example_of(hf.Wav2Vec2Model(config))
    spectrograms = hf.ASTConfig(**{**VIT, "patch_size": 16}, max_length=64, num_mel_bins=32)
    assert example_of(hf.ASTModel(spectrograms)).shape == (2, 64, 32)
