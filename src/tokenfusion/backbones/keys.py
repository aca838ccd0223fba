"""Key maps: the names in published checkpoints -> ours, for one network of each layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from tokenfusion.backbones.weights import StateDict
from tokenfusion.errors import UserError


def substitutes(rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> Callable[[str], str]:
    """What renames a key by regular expressions, one after the other."""
    compiled = [(re.compile(pattern), target) for pattern, target in rules]

    def rename(key: str) -> str:
        for pattern, target in compiled:
            key = pattern.sub(target, key)
        return key

    return rename


def joined(tensors: StateDict, parts: Sequence[str], whole: str) -> StateDict:
    """Matrices whose names differ in one word become one, stacked in this order.

    Args:
        parts: such as ``.query.``, ``.key.``, ``.value.``.
        whole: what stands in their place, such as ``.qkv.``.

    Raises:
        UserError: where one of them is missing.
    """
    tensors = dict(tensors)
    for key in [key for key in tensors if parts[0] in key]:
        names = [key.replace(parts[0], part) for part in parts]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UserError(f"{key} is there, and {missing[0]} is missing: not a whole checkpoint")
        tensors[key.replace(parts[0], whole)] = torch.cat([tensors.pop(name) for name in names])
    return tensors


def _one_less(prefix: str) -> Callable[[re.Match[str]], str]:
    return lambda match: prefix.format(int(match.group(1)) - 1)


_segformer = substitutes(  # original mit_b*.pth, and what the released code keeps of it
    [
        (r"^patch_embed(\d)\.", _one_less("stages.{}.embed.")),
        (r"^block(\d)\.", _one_less("stages.{}.blocks.")),
        (r"^norm(\d)\.", _one_less("stages.{}.norm.")),
        (r"\.attn\.", ".attention."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    ]
)

_hf_segformer = substitutes(  # transformers' SegformerModel, with or without its task prefix
    [
        (r"^segformer\.", ""),
        (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.embed."),
        (r"^(stages\.\d\.embed)\.layer_norm\.", r"\1.norm."),
        (r"^encoder\.block\.(\d)\.", r"stages.\1.blocks."),
        (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
        (r"\.layer_norm_(\d)\.", r".norm\1."),
        (r"\.attention\.self\.query\.", ".attention.q."),
        (r"\.attention\.self\.layer_norm\.", ".attention.norm."),
        (r"\.attention\.self\.", ".attention."),
        (r"\.attention\.output\.dense\.", ".attention.proj."),
        (r"\.mlp\.dense1\.", ".mlp.fc1."),
        (r"\.mlp\.dense2\.", ".mlp.fc2."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    ]
)


def from_segformer(source: StateDict) -> StateDict:
    """Original ``mit_b*.pth`` (keys ``patch_embed1.proj.weight`` ...) to MiT names."""
    return {_segformer(key): value for key, value in source.items() if not key.startswith("head.")}


def from_hf_segformer(source: StateDict) -> StateDict:
    """transformers' SegformerModel to MiT names: key and value become one matrix; a head's entries are left as they are."""
    renamed = {_hf_segformer(key): value for key, value in source.items()}
    return joined(renamed, (".attention.key.", ".attention.value."), ".attention.kv.")


_hf_dinov2 = substitutes(  # transformers' Dinov2Model, with or without its task prefix -> timm's VisionTransformer
    [
        (r"^dinov2\w*\.", ""),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"^layernorm\.", "norm."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    ]
)


def from_hf_dinov2(source: StateDict) -> StateDict:
    """transformers' Dinov2Model to timm's names: query, key and value become one matrix; the mask token is left out."""
    renamed = {_hf_dinov2(key): value.float() for key, value in source.items() if not key.endswith("mask_token")}
    return joined(renamed, (".attn.query.", ".attn.key.", ".attn.value."), ".attn.qkv.")


def from_mit(source: StateDict) -> StateDict:
    """Any of the single-modal MiT layouts, told apart by its keys."""
    if any(key.startswith("stages.0.embed.") for key in source):
        return source
    if any(key.removeprefix("segformer.").startswith("encoder.patch_embeddings.") for key in source):
        return from_hf_segformer(source)
    if any(key.startswith("patch_embed1.") for key in source):
        return from_segformer(source)
    raise UserError(
        f"weights with keys such as {next(iter(source))!r} are no MiT checkpoint: wanted patch_embed1.* (mit_b*.pth) or "
        "encoder.patch_embeddings.* (Hugging Face)"
    )


_released = substitutes(  # keys of a fused backbone in the released segmentation files, after _segformer
    [
        (r"\.module\.", "."),
        (r"\.ln_(\d+)\.", r".\1."),
        (r"^score_predictor\.(\d)\.score_nets\.(\d)\.", r"fusers.\1.0.score.nets.\2."),
        (r"^stages\.", "backbone.stages."),
    ]
)

_released_head = {
    "linear_fuse.conv.weight": "head.fuse.weight",
    **{f"linear_fuse.bn.{n}": f"head.norm.{n}" for n in ("weight", "bias")},
    **{f"linear_fuse.bn.{n}": f"head.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")},
    **{f"linear_c{i + 1}.proj.{n}": f"head.projections.{i}.{n}" for i in range(4) for n in ("weight", "bias")},
    **{f"linear_pred.{n}": f"head.classify.{n}" for n in ("weight", "bias")},
}


def from_released_segmentation(source: StateDict) -> StateDict:
    """The released TokenFusion segmentation layout to the names of our fused segmenter."""
    ours: StateDict = {}
    for key, value in source.items():
        if key == "alpha":
            ours["ensemble.alpha"] = value
        elif key.startswith("encoder."):
            ours["backbone." + _released(_segformer(key.removeprefix("encoder.")))] = value
        elif key.removeprefix("decoder.") in _released_head:
            name = _released_head[key.removeprefix("decoder.")]
            ours[name] = value.flatten(1) if name == "head.fuse.weight" else value
        else:
            raise UserError(f"key {key!r} is not part of the released segmentation layout")
    return ours


_mirror = substitutes(  # the released translation layout, after the decoder's stages were renumbered
    [
        (r"\.module\.", "."),
        (r"\.lrnorm_(\d+)\.", r".\1."),
        (r"\.attn\.", ".attention."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
        (r"^score_predictor\.(\d)\.score_nets\.(\d)\.", r"backbone.fusers.\1.0.score.nets.\2."),
        (r"^patch_embed_(?:enc|dec)\.(\d)\.", r"backbone.backbone.stages.\1.embed."),
        (r"^block_(?:enc|dec)\.(\d)\.", r"backbone.backbone.stages.\1.blocks."),
        (r"^norm_(?:enc|dec)\.(\d)\.", r"backbone.backbone.stages.\1.norm."),
    ]
)
_mirror_head = {
    "alpha": "ensemble.alpha",
    **{f"patch_embed_dec.4.proj.module.{n}": f"head.expand.{n}" for n in ("weight", "bias")},
    **{f"project.module.{n}": f"head.project.{n}" for n in ("weight", "bias")},
}
_decoder = re.compile(r"^(patch_embed|block|norm)_dec\.(\d)\.")
ENCODER_STAGES = 5


def from_released_translation(source: StateDict) -> StateDict:
    """The released generator to the names of our fused translator; the norms that its upsampling never applies are left out."""
    ours: StateDict = {}
    for key, value in source.items():
        if key in _mirror_head:
            ours[_mirror_head[key]] = value
        elif not re.match(r"patch_embed_dec\.\d\.norm\.", key):
            ours[_mirror_name(_decoder.sub(lambda m: f"{m[1]}_dec.{int(m[2]) + ENCODER_STAGES}.", key), key)] = value
    return ours


def from_released_discriminator(source: StateDict) -> StateDict:
    """The released discriminator to the names of ours."""
    return {
        key.replace(".module.", ".") if key.startswith("project.") else _mirror_name(key, key): value
        for key, value in source.items()
    }


def _mirror_name(renumbered: str, key: str) -> str:
    name = _mirror(renumbered)
    if not name.startswith("backbone."):
        raise UserError(f"key {key!r} is not part of the released translation layout")
    return name
