"""Checkpoints of image networks in YOLOS's, transformers' and DeiT's names, brought to ours."""

from __future__ import annotations

import math
import re

from torch import Tensor

from tokenfusion.backbones.keys import joined, substitutes
from tokenfusion.backbones.vit import ViT, resampled
from tokenfusion.backbones.weights import LoadReport, StateDict, load_into
from tokenfusion.backbones.yolos import VARIANTS, Yolos
from tokenfusion.errors import UserError
from tokenfusion.fusion.fusers import Grid

HEADS = {"class_embed": "class_head", "class_labels_classifier": "class_head"} | {
    "bbox_embed": "box_head",
    "bbox_predictor": "box_head",
}
_from_hf = substitutes(  # transformers' names -> published ones, below the prefixes vit. and backbone.
    [
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.detection_tokens$", "det_token"),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.(interpolation\.)?mid_position_embeddings$", "mid_pos_embed"),
        (r"^encoder\.layer\.", "blocks."),
        (r"^layernorm\.", "norm."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ]
)


def from_yolos(source: StateDict) -> StateDict:
    """A published YOLOS file (``backbone.cls_token``, ``class_embed.layers.0.weight`` ...) to the names of our Yolos.

    Its position embeddings hold those of the detection tokens as their last rows; ours are tensors of their own.

    Raises:
        UserError: where a key is missing or unknown, or a tensor of tokens or positions has other dimensions.
    """
    detections = _detections(source, "backbone.det_token")
    ours: StateDict = {}
    for key, value in source.items():
        name = key.removeprefix("backbone.")
        if name == "pos_embed":
            value = _of_dims(key, value, 3)
            ours["vit.pos_embed"], ours["det_pos_embed"] = value[:, :-detections], value[:, -detections:]
        elif name == "mid_pos_embed":  # [blocks - 1, 1, tokens, C]
            flat = _of_dims(key, value, 4).flatten(0, 1)
            ours["mid_pos_embed"], ours["mid_det_pos_embed"] = flat[:, :-detections], flat[:, -detections:]
        elif name == "det_token":
            ours["det_token"] = value
        else:
            ours[_head(key) if key == name else "vit." + name.replace(".attn.", ".attention.")] = value
    return ours


def from_hf_yolos(source: StateDict) -> StateDict:
    """transformers' YolosForObjectDetection to the names of our Yolos: query, key and value become one matrix."""
    published: StateDict = {}
    for key, value in source.items():
        if not key.startswith("vit."):
            published[key] = value
            continue
        published["backbone." + _from_hf(key.removeprefix("vit."))] = value
    return from_yolos(joined(published, (".attn.query.", ".attn.key.", ".attn.value."), ".attn.qkv."))


def from_deit(source: StateDict, grid: Grid) -> StateDict:
    """A DeiT classifier (its own or timm's file) to the names of our ViT, its positions resampled to ``grid``.

    The classifier is left out, and of a distilled network the distillation token and the first row of its positions, as in
    YOLOS.
    """
    ours = {
        key.replace(".attn.", ".attention."): value
        for key, value in source.items()
        if not key.startswith(("head.", "head_dist.")) and key != "dist_token"
    }
    if "pos_embed" not in ours:
        raise UserError(
            f"weights with keys such as {next(iter(source))!r} are no DeiT checkpoint: pos_embed is missing"
        )
    position = _of_dims("pos_embed", ours["pos_embed"], 3)
    side = math.isqrt(position.shape[1] - 1)
    if side**2 != position.shape[1] - 1:
        position = position[:, 1:]
        side = math.isqrt(position.shape[1] - 1)
    ours["pos_embed"] = resampled(position, (side, side), grid)
    return ours


def load_deit(network: ViT, source: StateDict) -> LoadReport:
    """Start a ViT (a Yolos's ``vit``) from a DeiT classifier."""
    return load_into(network, from_deit(source, network.grid))


def load_detector(network: Yolos, source: StateDict) -> LoadReport:
    """Load a Yolos from any of the layouts, told apart by their keys; a DeiT leaves what is for detection random.

    Where the checkpoint has another number of classes, the last layer of the class head stays random.

    Raises:
        UserError: where the layout is unknown or another tensor has another shape than the network's.
    """
    if "patch_embed.proj.weight" in source:
        report = load_deit(network.vit, source)
        loaded, copied = ([f"vit.{name}" for name in names] for names in (report.loaded, report.copied))
        return LoadReport(loaded, copied, sorted(network.state_dict().keys() - set(loaded)), report.unused)
    if "vit.patch_embed.proj.weight" in source:
        ours = dict(source)
    elif "vit.embeddings.detection_tokens" in source:
        ours = from_hf_yolos(source)
    elif "backbone.det_token" in source:
        ours = from_yolos(source)
    else:
        raise UserError(
            f"weights with keys such as {next(iter(source))!r} are no YOLOS or DeiT checkpoint: wanted backbone.det_token "
            "(YOLOS), vit.embeddings.* (Hugging Face) or patch_embed.* (DeiT)"
        )
    state = network.state_dict()
    last = [key for key in ours if key.startswith("class_head.4.") and ours[key].shape != state[key].shape]
    return load_into(network, {key: value for key, value in ours.items() if key not in last})


def variant_of(tensors: StateDict) -> str:
    """Which of the YOLOS networks tensors in our names belong to, by width and number of blocks.

    Raises:
        UserError: where they belong to none.
    """
    blocks = {int(found.group(1)) for key in tensors if (found := re.match(r"vit\.blocks\.(\d+)\.", key))}
    width = tensors["vit.cls_token"].shape[-1] if "vit.cls_token" in tensors else 0
    for variant, (size, _, _) in VARIANTS.items():
        if (size.dim, size.depth) == (width, len(blocks)):
            return variant
    raise UserError(f"{len(blocks)} blocks of width {width} are none of YOLOS {', '.join(VARIANTS)}")


def _detections(source: StateDict, name: str) -> int:
    if name not in source:
        raise UserError(f"weights with keys such as {next(iter(source))!r} are no YOLOS checkpoint: {name} is missing")
    return _of_dims(name, source[name], 3).shape[1]


def _of_dims(name: str, value: Tensor, dims: int) -> Tensor:
    """The tensor, which has so many dimensions and nothing empty among them."""
    if value.dim() != dims or 0 in value.shape:
        raise UserError(f"{name} is {list(value.shape)}; wanted a tensor of {dims} dimensions, as in YOLOS and DeiT")
    return value


def _head(key: str) -> str:
    """``class_embed.layers.1.weight`` -> ``class_head.2.weight``: between two layers stands a ReLU."""
    found = re.fullmatch(r"(\w+)\.layers\.(\d)\.(weight|bias)", key)
    if found is None or found.group(1) not in HEADS:
        raise UserError(f"key {key!r} is not part of the YOLOS layout")
    return f"{HEADS[found.group(1)]}.{2 * int(found.group(2))}.{found.group(3)}"
