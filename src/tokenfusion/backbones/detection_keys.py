"""Key map: the names in published Group-Free-3D checkpoints -> those of our detector of points."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from tokenfusion.backbones.keys import substitutes
from tokenfusion.backbones.weights import LoadReport, StateDict, load_into
from tokenfusion.errors import UserError

Target = str | Callable[[re.Match[str]], str]
PARTS = ("backbone_net.", "points_obj_cls.", "proposal_head.", "prediction_heads.", "decoder.", "decoder_")
TWICE = (
    "decoder_self_posembeds.",
    "decoder_cross_posembeds.",
)  # second names of what stands inside decoder.{i} as well


def _moved(target: str, by: int) -> Callable[[re.Match[str]], str]:
    """``target`` with the match's groups, the last of them a number that is moved."""
    return lambda match: target.format(*match.groups()[:-1], int(match.groups()[-1]) + by)


_name = substitutes(
    [
        (r"^backbone_net\.sa(\d)\.mlp_module\.layer", _moved("backbone.down.{}.layers.", -1)),
        (r"^backbone_net\.fp(\d)\.mlp\.layer", _moved("backbone.up.{}.layers.", -1)),
        (r"\.conv\.", ".linear."),
        (r"\.bn\.bn\.", ".norm."),
        (r"^points_obj_cls\.conv3\.", "kps.score."),
        (r"^points_obj_cls\.", "kps."),
        (r"^proposal_head\.", "heads.0."),
        (r"^prediction_heads\.(\d+)\.", _moved("heads.{}.", 1)),
        (r"^(kps|heads\.\d+)\.conv(\d)\.", _moved("{}.hidden.{}.linear.", -1)),
        (r"^(kps|heads\.\d+)\.bn(\d)\.", _moved("{}.hidden.{}.norm.", -1)),
        (r"\.objectness_scores_head\.", ".objectness."),
        (r"\.sem_cls_scores_head\.", ".classify."),
        (r"\.size_pred_head\.", ".size."),
        (r"\.(center)_residual_head\.", r".\1."),
        (r"\.((?:heading|size)_(?:class|residual))_head\.", r".\1."),
        (r"^decoder_(key|query)_proj\.", r"decoder_\1."),
        (r"_posembed\.position_embedding_head\.0\.", "_position.hidden.linear."),
        (r"_posembed\.position_embedding_head\.1\.", "_position.hidden.norm."),
        (r"_posembed\.position_embedding_head\.3\.", "_position.out."),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.multihead_attn\.", ".cross_attention."),
        (r"\.in_proj_", ".qkv."),
        (r"\.out_proj\.", ".proj."),
        (r"^(decoder\.\d+)\.linear(\d)\.", r"\1.fc\2."),
    ]
)


def load_groupfree(network: nn.Module, source: StateDict) -> LoadReport:
    """Load a detector of points from a published file or from our own names; heads of other classes or bins stay random."""
    ours = source if any(key.startswith("backbone.down.") for key in source) else from_groupfree(source)
    state = network.state_dict()
    fits = {
        key: value
        for key, value in ours.items()
        if not (key.startswith("heads.") and key in state and state[key].shape != value.shape)
    }
    return load_into(network, fits)


def from_groupfree(source: StateDict) -> StateDict:
    """A published Group-Free-3D checkpoint to the names of ``GroupFree``; 1x1 convolutions become matrices.

    Raises:
        UserError: where a key is not part of that layout.
    """
    for key in source:
        if not key.startswith(PARTS):
            raise UserError(f"key {key!r} is not part of the Group-Free-3D layout; wanted {', '.join(PARTS[:4])} ...")
    return {
        _name(key): value.flatten(1) if value.dim() > 2 else value
        for key, value in source.items()
        if not key.startswith(TWICE)
    }
