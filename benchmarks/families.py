"""Which networks can be fused: walks the families of timm and of Hugging Face and writes docs/families.md.

python benchmarks/families.py > docs/families.md
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
import transformers
from timm.models import _registry
from torch import nn

from tokenfusion import UserError
from tokenfusion.backbones.foreign import answer_of, call, example_of, position_of
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.misfit import misfit
from tokenfusion.backbones.plan import BlockPlan
from tokenfusion.backbones.survey import survey
from tokenfusion.fusion import Bottleneck, ChannelExchange, Concat, Fuser, NoFusion, TokenFusion


class Small(NamedTuple):
    """A network of timm, and what makes it small enough for tests."""

    name: str
    size: int  # of the input
    arguments: dict[str, Any]
    is_sized: bool = False  # the constructor wants the size


def _small(name: str, size: int = 64, **arguments: Any) -> Small:
    return Small(name, size, arguments)


def _sized(name: str, size: int = 64, **arguments: Any) -> Small:
    return Small(name, size, arguments, True)


def _vit(name: str, size: int = 64, **arguments: Any) -> Small:
    return _sized(name, size, **{"embed_dim": 48, "depth": 3, "num_heads": 4, **arguments})


# One network of every family of timm (its module) that has transformer blocks.
TRANSFORMERS: dict[str, Small] = {
    "beit": _vit("beit_base_patch16_224"),
    "cait": _vit("cait_xxs24_224"),
    "coat": _sized("coat_lite_tiny", embed_dims=(16, 24, 32, 40), serial_depths=(1, 1, 1, 1)),
    "convit": _vit("convit_tiny", embed_dim=12, local_up_to_layer=2),
    "crossvit": _sized(
        *("crossvit_tiny_240", 96), embed_dim=[24, 48], depth=[[1, 2, 0]] * 2, num_heads=[2, 2], img_scale=(1.0, 2 / 3)
    ),
    "csatv2": _small("csatv2", 128, dims=(24, 24, 32, 48), depths=(1, 1, 2, 3), transformer_depths=(0, 0, 1, 2)),
    "davit": _small("davit_tiny", embed_dims=(24, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1)),
    "deepseek_vit": _vit("deepseek_vit_412m", 84),
    "deit": _vit("deit_tiny_distilled_patch16_224"),
    "edgenext": _small("edgenext_xx_small", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    "efficientformer": _small("efficientformer_l1", 224, depths=(1, 1, 1, 3), embed_dims=(16, 24, 32, 48), num_vit=2),
    "efficientformer_v2": _sized("efficientformerv2_s0"),
    "eva": _vit("eva02_tiny_patch14_224", 56),
    "fastvit": _small("fastvit_mci0", layers=(1, 1, 1, 2), embed_dims=(16, 32, 32, 64)),
    "gcvit": _sized("gcvit_xxtiny", embed_dim=20),
    "gemma4_vit": _vit("gemma4_vit_167m", 96, head_dim=12, intermediate_size=96),
    "hiera": _small("hiera_tiny_224", 224, embed_dim=16, stages=(1, 2, 2, 2)),
    "hieradet_sam2": _small("sam2_hiera_tiny", 128, embed_dim=16, stages=(1, 2, 3, 2), global_att_blocks=(4,)),
    "levit": _sized("levit_128s"),
    "lowformer": _small("lowformer_b0"),
    "maxxvit": _sized("coatnet_pico_rw_224"),
    "metaformer": _small("caformer_s18"),
    "mobilevit": _small("mobilevit_xxs"),
    "mvitv2": _sized("mvitv2_tiny"),
    "naflexvit": _vit("naflexvit_base_patch16_gap"),
    "nest": _sized("nest_tiny", 96),
    "nextvit": _small("nextvit_small"),
    "pit": _sized("pit_ti_224", base_dims=(12, 12, 12), depth=(1, 2, 1)),
    "pvt_v2": _small("pvt_v2_b0", embed_dims=(20, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
    "qwen3_vit": _vit("qwen3_vit_88m", 96),
    "swiftformer": _small("swiftformer_xs", layers=[1, 1, 1, 1]),
    "swin_transformer": _sized(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    "swin_transformer_v2": _sized(
        "swinv2_tiny_window8_256", embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    "swin_transformer_v2_cr": _sized("swinv2_cr_tiny_224", embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "tiny_vit": _small("tiny_vit_5m_224", embed_dims=(20, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4)),
    "tnt": _small("tnt_s_legacy_patch16_224", 224, embed_dim=48, inner_dim=12, depth=2, num_heads_outer=4),
    "twins": _small("twins_svt_small", embed_dims=(20, 32, 48, 64), depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4)),
    "visformer": _sized("visformer_tiny", embed_dim=48, depth=(1, 2, 2)),
    "vision_transformer": _sized("test_vit"),
    "vision_transformer_hybrid": _vit("vit_tiny_r_s16_p8_224", 256),
    "vision_transformer_relpos": _sized("test_vit_relpos"),
    "vision_transformer_sam": _vit("samvit_base_patch16_224", global_attn_indexes=[0, 1, 2]),
    "vitamin": _sized("vitamin_small_224", depth=3),
    "volo": _sized("volo_d1_224"),
    "xcit": _vit("xcit_nano_12_p8_224", 48),
}


# One network of every other family: convolutions, MLPs, state spaces, or attention in blocks without an MLP.
OTHERS = [
    "halonet_h1", "test_byobnet", "convmixer_768_32", "test_convnext", "cpubone_nano", "cs3darknet_focus_s",
    "cspnext_tiny", "densenet121", "dla46x_c", "dpn48b", "test_efficientnet", "efficientvim_m1", "efficientvit_b0",
    "efficientvit_m0", "fasternet_t0", "focalnet_tiny_srf", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0",
    "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4",
    "lcnetv2_small", "test_mambaout", "gmlp_ti16_224", "mobilenetv4_hybrid_medium", "mobilenetv5_base",
    "nasnetalarge", "test_nfnet", "pnasnet5large", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1",
    "res2next50", "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18",
    "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "tresnet_m", "vgg11", "ese_vovnet19b_slim_dw",
    "legacy_xception", "xception41",
]  # fmt: skip


def family_of(name: str) -> str:
    """timm's module of a network."""
    return _registry._model_to_module[name]


def build(small: Small, classes: int = 5) -> nn.Module:
    """The small network, in evaluation mode."""
    sized = {"img_size": small.size} if small.is_sized else {}
    return timm.create_model(small.name, num_classes=classes, **sized, **small.arguments).eval()


# Of these the depth is real and the width is small: they are made for large images.
LARGE = ("deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit")

WIDTH = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViT": WIDTH,
    "DeiT": WIDTH,
    "Dinov2": {"hidden_size": 96, "num_attention_heads": 4, "image_size": 224, "patch_size": 14},
    "Dinov2WithRegisters": {"hidden_size": 96, "num_attention_heads": 4, "image_size": 224, "patch_size": 14},
    "DINOv3ViT": {**WIDTH, "num_register_tokens": 4},
    "Beit": WIDTH,
    "CLIPVision": WIDTH,
    "SiglipVision": WIDTH,
    "Yolos": {**WIDTH, "image_size": [256, 432]},
    "AST": WIDTH,
    "Segformer": {},
    "PvtV2": {},
    "Swin": {},
    "Swinv2": {},
    "Hiera": {},
}

HEADER = (
    "network",
    "blocks fused",
    "stages",
    "beside the map",
    "map",
    "paper's rule",
    "concat",
    "bottleneck",
    "channels",
    "alignment re-adds",
    "other channels at",
    "not fused",
)


def network_of(family: str) -> tuple[nn.Module, torch.Tensor]:
    """A family's representative as it is published, without its weights, and an example of its input."""
    small = TRANSFORMERS[family]
    if family in LARGE:
        arguments = {key: value for key, value in small.arguments.items() if key != "depth"}
        network = build(small._replace(arguments=arguments))
        return network, torch.zeros(2, 3, small.size, small.size)
    network = timm.create_model(small.name).eval()
    return network, example_of(network)


def hugging_face(name: str) -> tuple[nn.Module, torch.Tensor]:
    config = getattr(transformers, f"{name}Config")(**HUGGING_FACE[name])
    network = getattr(transformers, f"{name}Model")(config).eval()
    return network, example_of(network)


def row(name: str, network: nn.Module, example: torch.Tensor) -> tuple[str, ...]:
    """What a table says of a network that can be fused.

    Raises:
        UserError: of one that cannot.
    """
    seen = survey(network, example, lambda x: answer_of(call(network, x)[1], len(x)))
    plans = seen.blocks
    blocks = [network.get_submodule(plan.name) for plan in plans]
    fits = [fit(plans, blocks, make) for make in FITTED]  # before fusing: private norms want rows of all streams
    FusedNetwork(network, ["a", "b"], NoFusion, example)
    position = position_of(network, plans)
    maps = list(dict.fromkeys("x".join(map(str, plan.grid)) if plan.grid else "not by row" for plan in plans))
    return (
        f"`{name}`",
        f"{len(plans)} of {len(plans) + len(seen.skipped)}",
        str(plans[-1].stage + 1),
        ", ".join(map(str, sorted({plan.prefix for plan in plans}))),
        maps[0] if len(maps) == 1 else f"{maps[0]} to {maps[-1]}",
        *fits,
        f"`{position.name}`" if position is not None else "",
        f"`{seen.stem}`" if seen.stem is not None else "",
        "; ".join(f"{n}: {why}" for why, n in Counter(seen.skipped.values()).items()),
    )


FITTED: list[Callable[[int], Fuser]] = [
    lambda dim: TokenFusion(dim, 2, rule="paper"),
    lambda dim: Concat(dim, 2),
    lambda dim: Bottleneck(dim, 2),
    lambda dim: ChannelExchange(dim, 2),
]


def fit(plans: Sequence[BlockPlan], blocks: Sequence[nn.Module], fuser: Callable[[int], Fuser]) -> str:
    """Whether a fuser fits the blocks; of those that it does not fit, how many and why."""
    reasons = [misfit(fuser(plan.dim), plan, block) for plan, block in zip(plans, blocks, strict=True)]
    why = Counter(re.split(r" \(|, where|, which", reason)[0] for reason in reasons if reason)
    told = "; ".join(f"{n if len(why) > 1 or n < len(blocks) else 'no'}: {reason}" for reason, n in why.items())
    return told or "yes"


def refused() -> Iterator[tuple[str, str, str]]:
    """Family, network and reason of those that cannot be fused and have no transformer blocks."""
    for name in OTHERS:
        with torch.device("meta"):
            network = timm.create_model(name)
        try:
            survey(network, torch.zeros(2, 3, 64, 64), network)
        except UserError as error:
            yield family_of(name), f"`{name}`", str(error).partition("; ")[0].partition(" has ")[2]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


PAGE = """# Networks that can be fused

`tokenfusion.fuse(network, ...)` takes a network as it is, looks once at how it runs, and fuses the blocks in which it finds
one attention and one MLP. This page is that look at one network of every family of timm, and at the usual ones of Hugging
Face. `tests/backbones/test_families.py` and `test_huggingface.py` hold small ones of each to the promises: without fusion a
network's own bits, norms that are private to their stream, streams that exchange, missing modalities left out.

- No fusion, average, random, gating, cross-attention, mended and TokenFusion as released fit every block that is fused.
  _Paper's rule_: it weighs what a norm gives to attention. _Concat_: it wants an attention that treats its tokens as a set and
  is given nothing else. _Bottleneck_: the whole block has to. _Channels_ (and token+channel): that norm has to scale channels.
- _Beside the map_: class, register and detection tokens, which are never scored or exchanged.
- _Map_: rows and columns in the first and the last stage. Where it stands _not by row_ (by window, by mask unit), all is
  fused, but there are no pictures of scores, no dense heads and no alignment.
- _Alignment re-adds_: the absolute embedding of the first block's map. Where there is none, the layers are told positions by
  themselves (relative, rotary, windows, convolutions), or the embedding has another form; nothing is re-added.
- _Other channels at_: the one convolution that sees the image. Where there is none, every modality needs the network's
  channels.
- _Not fused_: blocks that run on every stream for itself, and why. At other image sizes it can be others, where windows do not
  divide the map; `model.account` tells.
- A family is judged by one of its networks, those that are refused too; others of it may differ. `fuse()` tells.

{large}

Written by `python benchmarks/families.py > docs/families.md` with timm {timm}, transformers {transformers}, torch {torch}.

## timm: {fused} families

{families}

## timm: refused, {refused} families

{others}

## Hugging Face

{hugging_face}
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    fused, others = [], list(refused())
    for family in TRANSFORMERS:
        network, example = network_of(family)
        try:
            fused.append((family, *row(TRANSFORMERS[family].name, network, example)))
            print(fused[-1], file=sys.stderr)
        except UserError as error:
            others.append((family, f"`{TRANSFORMERS[family].name}`", str(error).partition(": ")[2]))
    hugging = [row(f"{name}Model", *hugging_face(name)) for name in HUGGING_FACE]
    print(
        PAGE.format(
            large=f"The rows of {', '.join(LARGE)} are of small widths and images; their depth is real.",
            timm=timm.__version__,
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            fused=len(fused),
            refused=len(others),
            families=table(("family", *HEADER), fused),
            others=table(("family", "network", "reason"), sorted(others)),
            hugging_face=table(HEADER, hugging),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
