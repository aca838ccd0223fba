"""Networks of Hugging Face keep to the same rules, and their heads answer per modality."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import foreign_rules as rules
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tokenfusion.backbones.foreign import example_of
from tokenfusion.fusion import TokenFusion

VIT: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
IMAGE = {**VIT, "image_size": 64, "patch_size": 16}
DINO = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
YOLOS = {**VIT, "image_size": [64, 96], "patch_size": 16, "num_detection_tokens": 10}
SEGFORMER = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64, "decoder_hidden_size": 32}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

Make = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Make, list[int], bool]] = {  # network, tokens beside the map, alignment
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), [1], True),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**IMAGE)), [2], True),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), [1], True),
    "dinov2 with registers": (lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)), [5], True),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE, num_register_tokens=4)), [5], False),
    "segformer": (lambda: hf.SegformerModel(hf.SegformerConfig(**SEGFORMER)), [0], False),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), [0], False),
    "swinv2": (lambda: hf.Swinv2Model(hf.Swinv2Config(**SWIN)), [0], False),
    "yolos": (lambda: hf.YolosModel(hf.YolosConfig(**YOLOS, use_mid_position_embeddings=False)), [11], True),
    "yolos, positions in every layer": (lambda: hf.YolosModel(hf.YolosConfig(**YOLOS)), [11], True),
    "ast": (lambda: hf.ASTModel(hf.ASTConfig(**VIT, max_length=64, num_mel_bins=32)), [2], True),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**IMAGE)), [1], False),
    "pvtv2": (lambda: hf.PvtV2Model(hf.PvtV2Config(image_size=64, depths=[1, 1, 1, 1])), [0], False),
    "hiera": (
        lambda: hf.HieraModel(hf.HieraConfig(image_size=[224, 224], embed_dim=24, depths=[1, 2, 2, 2])),
        [0],
        False,
    ),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)), [1], True),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**IMAGE)), [0], True),
}


UNITED = set(NETWORKS) - {"dinov3", "segformer", "swin", "swinv2", "pvtv2", "hiera"}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    make, prefix, is_aligned = NETWORKS[name]
    network = rules.shaken(make())
    example = example_of(network)
    plans = rules.check_all(network, example).survey.blocks
    assert sorted({plan.prefix for plan in plans}) == prefix
    assert {plan.grid is None for plan in plans} == {name == "hiera"}
    assert rules.alignment_adds_to_the_right_tokens(network, example) == is_aligned
    assert rules.union_of_equal_streams_is_one(network, example) == (name in UNITED)


def test_spectrograms_stand_by_frequency_and_time() -> None:
    network = NETWORKS["ast"][0]()
    model = rules.fused(network, example_of(network), rules.NoFusion)
    assert model.survey.blocks[0].grid == (2, 5), "32 bins in 2 patches, 64 frames in 5"


HEADS: dict[str, tuple[Make, dict[str, tuple[int, ...]]]] = {
    "classification": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_labels=5)),
        {"logits": (2, 5)},
    ),
    "segmentation": (
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**SEGFORMER, num_labels=5)),
        {"logits": (2, 5, 16, 16)},
    ),
    "detection": (
        lambda: hf.YolosForObjectDetection(hf.YolosConfig(**YOLOS, num_labels=5)),
        {"logits": (2, 10, 6), "pred_boxes": (2, 10, 4)},
    ),
}


@pytest.mark.parametrize("task", HEADS)
@torch.no_grad()
def test_heads_answer_per_modality(task: str) -> None:
    make, shapes = HEADS[task]
    network = rules.shaken(make())
    example = example_of(network)
    x = rules.inputs(example)
    out = rules.fused(network, example, functools.partial(TokenFusion, threshold=0.5))(x)
    assert list(out.outputs) == ["rgb", "depth"]
    for answer in out.outputs.values():
        assert {name: tuple(answer[name].shape) for name in shapes} == shapes
    logits: list[Tensor] = [answer.logits for answer in out.outputs.values()]
    torch.testing.assert_close(out.ensemble, (logits[0] + logits[1]) / 2)
    assert not torch.equal(*logits)
    unfused = rules.fused(network, example, rules.NoFusion)(x)
    for name, stream in x.items():
        for value, wanted in ((unfused.outputs[name][key], network(stream)[key]) for key in shapes):
            rules.assert_near(value, wanted)
