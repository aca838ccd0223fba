"""Every family of timm is fused, or refused with a reason; the important ones in their variants, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import foreign_rules as rules
from families import HEADER, OTHERS, TRANSFORMERS, Small, build, family_of, hugging_face, network_of, row

from tokenfusion import UserError
from tokenfusion.backbones.foreign import call
from tokenfusion.backbones.survey import survey

REFUSED = {"mobilevit": "works on", "tnt": "works on"}  # attention among the pixels of a patch
FUSED = {family: small for family, small in TRANSFORMERS.items() if family not in REFUSED}
PREFIX = {  # tokens beside the map, where there are any; with another number further back, both
    "beit": [1], "coat": [1], "convit": [0, 1], "crossvit": [1], "deit": [2], "eva": [1], "naflexvit": [4], "pit": [1],
    "vision_transformer": [1], "vision_transformer_hybrid": [1], "xcit": [0, 1],
}  # fmt: skip
ALIGNED = {
    *("cait", "convit", "deit", "eva", "vision_transformer", "vision_transformer_hybrid", "vitamin"),
}
NOT_BY_ROW = {"hiera", "nest"}
NO_STEM = {"crossvit", "csatv2", "fastvit", "gemma4_vit", "naflexvit"}  # several see the image, or none does
UNITED = {
    "crossvit",
    "deit",
    "metaformer",
    "naflexvit",
    "pit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vitamin",
}
JOINED = UNITED | {"cait"}  # whose heads talk behind the softmax, so that streams cannot be united
SLOW = {"maxxvit", "metaformer", "mvitv2", "nest", "nextvit", "volo"}  # cannot be made small


def vit(name: str, size: int = 64, **arguments: object) -> Small:
    return Small(name, size, {"embed_dim": 48, "depth": 3, "num_heads": 4, **arguments}, True)


VARIANTS = [  # network, tokens beside the map, alignment
    (vit("vit_small_patch14_dinov2", 56), 1, True),
    (vit("vit_small_patch14_reg4_dinov2", 56), 5, True),
    (vit("vit_small_patch16_dinov3"), 5, False),
    (vit("deit_tiny_patch16_224"), 1, True),
    (vit("deit3_small_patch16_224"), 1, True),
    (vit("beitv2_base_patch16_224"), 1, False),
    (vit("eva_giant_patch14_224", 56), 1, True),
    (vit("vit_base_patch16_clip_224"), 1, True),
    (vit("vit_base_patch16_siglip_224"), 0, True),
    (vit("samvit_base_patch16", global_attn_indexes=[0, 1, 2]), 0, True),
    (vit("vit_relpos_medium_patch16_cls_224"), 1, False),
    (Small("coat_tiny", 64, {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1}, True), 1, False),
    (
        Small("twins_pcpvt_small", 64, {"embed_dims": (20, 32, 48, 64), "depths": (1,) * 4, "num_heads": (1, 2, 3, 4)}),
        0,
        False,
    ),
    (vit("qwen3_vit_88m_enc", 96), 0, False),
    (vit("gemma4_vit_167m_enc", 96, head_dim=12, intermediate_size=96), 0, False),
    (Small("mobilevitv2_050", 64, {}), 0, False),
]


def small(network: Small) -> tuple[nn.Module, torch.Tensor]:
    return rules.shaken(build(network)), torch.zeros(2, 3, network.size, network.size)


def test_no_family_of_timm_is_left_out() -> None:
    walked = {*TRANSFORMERS, *map(family_of, OTHERS)}
    assert walked == set(map(family_of, timm.list_models()))
    assert len(walked) == len(TRANSFORMERS) + len(OTHERS)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FUSED])
def test_family(family: str) -> None:
    network, example = small(FUSED[family])
    plans = rules.check_all(network, example).survey.blocks
    assert sorted({plan.prefix for plan in plans}) == PREFIX.get(family, [0])
    assert {plan.grid is None for plan in plans} == {family in NOT_BY_ROW}
    assert rules.alignment_adds_to_the_right_tokens(network, example) == (family in ALIGNED)
    assert rules.union_of_equal_streams_is_one(network, example) == (family in UNITED)
    assert rules.bottleneck_tokens_join_in(network, example) == (family in JOINED)
    if family != "vision_transformer_hybrid":  # its convolution standardises its weights anew
        assert rules.other_channels_answer_to_grey(network, example) == (family not in NO_STEM)


@pytest.mark.parametrize(("network", "prefix", "is_aligned"), VARIANTS, ids=[v[0].name for v in VARIANTS])
def test_variant(network: Small, prefix: int, is_aligned: bool) -> None:
    module, example = small(network)
    model = rules.check_all(module, example)
    assert {plan.prefix for plan in model.survey.blocks} == {prefix}
    assert rules.alignment_adds_to_the_right_tokens(module, example) == is_aligned


@pytest.mark.parametrize("has_class", [False, True])
def test_mvit_with_and_without_class_token(has_class: bool) -> None:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    cfg = MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=24, use_cls_token=has_class, use_abs_pos=has_class)
    network, example = rules.shaken(MultiScaleVit(cfg, img_size=(64, 64), num_classes=5)), torch.zeros(2, 3, 64, 64)
    survey_ = rules.check_all(network, example).survey
    assert [(plan.prefix, plan.grid) for plan in survey_.blocks] == [(has_class, (16, 16)), (has_class, (8, 8))]
    assert set(survey_.skipped.values()) == {"changes the number or the width of its tokens"}
    assert rules.alignment_adds_to_the_right_tokens(network, example) == has_class


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family(family: str) -> None:
    network, example = small(TRANSFORMERS[family])
    with pytest.raises(UserError, match=REFUSED[family]):
        survey(network, example, lambda x: call(network, x))


@pytest.mark.parametrize("name", OTHERS)
def test_networks_without_transformer_blocks_are_told(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(UserError, match="no transformer blocks"):
        survey(network, torch.zeros(2, 3, 64, 64), lambda x: call(network, x))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Small("gcresnet33ts", 64, {}), "attention branch of another shape"),
        (vit("vit_small_patch16_18x2_224"), "0 attentions in a row"),
    ],
    ids=["context", "parallel"],
)
def test_what_only_looks_like_a_transformer_is_told(network: Small, reason: str) -> None:
    module, example = small(network)
    with pytest.raises(UserError, match=reason):
        survey(module, example, lambda x: call(module, x))


PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["vision_transformer", "deit", "crossvit", "edgenext", "convit"])
def test_the_page_says_what_is_found(family: str) -> None:
    cells = row(TRANSFORMERS[family].name, *network_of(family))
    assert "| " + " | ".join((family, *cells)) + " |" in PAGE.splitlines()


def cells(name: str) -> dict[str, str]:
    """A family's row by column; without a family, as Hugging Face's rows have none, the row of a network."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    ]
    found = next(row[-len(HEADER) :] for row in rows if row[0] == name)
    return dict(zip(HEADER, found, strict=True))


@pytest.mark.parametrize("family", FUSED)
def test_the_page_says_who_takes_unions_and_bottleneck_tokens(family: str) -> None:
    told = cells(family)
    assert (told["concat"] == "yes") == (family in UNITED)
    assert (told["bottleneck"] == "yes") == (family in JOINED)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "Beit", "CLIPVision", "AST", "DINOv3ViT"])
def test_the_page_says_who_of_hugging_face_does(name: str) -> None:
    network, example = hugging_face(name)
    told = cells(f"`{name}Model`")
    assert (told["concat"] == "yes") == rules.union_of_equal_streams_is_one(rules.shaken(network), example)
    assert (told["bottleneck"] == "yes") == rules.bottleneck_tokens_join_in(network, example)


def test_the_page_lists_every_family() -> None:
    told = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")]
    fused, refused = len(FUSED), len(OTHERS) + len(REFUSED)
    assert {*FUSED, *REFUSED, *map(family_of, OTHERS)} <= set(told)
    assert f"## timm: {fused} families" in PAGE
    assert f"## timm: refused, {refused} families" in PAGE


@pytest.mark.parametrize(("family", "order"), [("davit", "first"), ("swin_transformer", "last")])
def test_a_map_as_wide_as_its_channels_are_many(family: str, order: str) -> None:
    network, example = small(TRANSFORMERS[family]._replace(size=96))
    first = rules.check_all(network, example).survey.blocks[0]
    assert (first.parts.order, first.grid, first.dim) == (order, (24, 24), 24)
