"""fuse(): one model for several modalities out of single-modal networks, shared by the streams or separate."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, nn

from tokenfusion.backbones.bridge import Index
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.lockstep import EXCHANGE_GIVEN, ExchangeFactory, FusedStreams, Pair
from tokenfusion.backbones.sharing import Sharing
from tokenfusion.components import EXCHANGES, FUSER_GIVEN, FUSERS, TARGET, maker
from tokenfusion.errors import UserError, nearest
from tokenfusion.fusion.fusers import FuserFactory


class _Kind(NamedTuple):
    """What a fused model takes for a fuser."""

    takes: str  # in a sentence
    words: Mapping[str, dict[str, Any]]
    others: Mapping[str, dict[str, Any]]  # of the other kind


SHARED = _Kind("one shared network takes", FUSERS, EXCHANGES)
SEPARATE = _Kind("separate networks take", EXCHANGES, FUSERS)

Fusing = str | Mapping[str, Any] | None  # a word, a component, the default


@overload
def fuse(
    network: nn.Module,
    modalities: Sequence[str] | Mapping[str, int],
    fuser: Fusing | FuserFactory = None,
    *,
    example: Tensor | None = None,
    score_nets: Literal["stage", "block"] = "block",
    blocks: Sequence[int] | None = None,
    alignment: bool = False,
    sharing: Sharing = "default",
    seed: int = 0,
    trust: bool = False,
) -> FusedNetwork: ...


@overload
def fuse(
    network: Mapping[str, nn.Module],
    *,
    fuser: Fusing | ExchangeFactory = None,
    example: Mapping[str, Tensor] | None = None,
    projection: Mapping[Pair, Index] | None = None,
    mlp: bool = False,
    alignment: bool = False,
    seed: int = 0,
    trust: bool = False,
) -> FusedStreams: ...


def fuse(
    network: nn.Module | Mapping[str, nn.Module],
    modalities: Sequence[str] | Mapping[str, int] | None = None,
    fuser: Any = None,
    *,
    seed: int = 0,
    trust: bool = False,
    **options: Any,
) -> FusedNetwork | FusedStreams:
    """Make one model for several modalities out of single-modal networks, which are used, not copied.

    One network for aligned modalities is shared by their streams, with private norms. Several networks, one per modality, of
    any widths and depths, stay separate and exchange tokens in lockstep.

    Args:
        network: of timm, of Hugging Face, or any module whose blocks have an attention and an MLP; or one per modality:
            ``{"rgb": vit, "audio": ast}``.
        modalities: of a shared network: names of the streams; with channels where they differ from the network's:
            ``{"rgb": 3, "depth": 1}``.
        fuser: a word (``tokenfusion``, ``concat``, ``average``, ``random``, ``none``; of a shared network
            ``tokenfusion-paper``, ``mended``, ``gating``, ``bottleneck``, ``cross-attention``, ``channel`` and
            ``token+channel`` too), a component (``{"_target_": "tokenfusion.fusion.TokenFusion", "threshold": 0.02}``), or
            what makes a fuser from (dim, modalities, stage), for separate networks an exchange from (dim, seed). None:
            TokenFusion, theta 0.02, whose scores start at 0.95, so that a pretrained network is hardly weakened before they
            have learned; by the released rule in a shared network, by the paper's between separate ones.
        example: an input ``[B, ...]``, for modules that are neither of timm nor of Hugging Face; by name for several.
        score_nets, blocks, alignment, sharing: see :class:`~tokenfusion.backbones.hub.FusedNetwork`.
        projection, mlp: of separate networks, see :class:`~tokenfusion.backbones.lockstep.FusedStreams`.
        seed: of the group allocation with more than two modalities.
        trust: build fusers outside of tokenfusion.

    Raises:
        UserError: where the network has no block that can be fused, or the fuser does not fit; the block is named.

    Example: ``model = tokenfusion.fuse(timm.create_model("vit_small_patch14_dinov2", pretrained=True), ["rgb", "depth"])``
    """
    for given in network.values() if isinstance(network, Mapping) else [network]:
        if not isinstance(given, nn.Module):
            raise UserError(f"fuse() wants a network that is made, such as timm.create_model(name); got {given!r:.80}")
    if isinstance(network, Mapping):
        if modalities is not None:
            raise UserError("networks by modality name their modalities themselves; leave `modalities` out")
        return _fuse_streams(network, fuser, seed, trust, options)
    if modalities is None:
        raise UserError('fuse(network, modalities): wanted the names of the streams, such as ["rgb", "depth"]')
    _known(options, FusedNetwork)
    fuser = _component(fuser, SHARED)
    make = fuser
    if isinstance(fuser, Mapping):
        make = partial(maker(fuser, "fuser", FUSER_GIVEN, trust), seed=seed)
    elif seed and _takes_seed(fuser):
        make = partial(fuser, seed=seed)
    model = FusedNetwork(network, modalities, make, **options)
    for sentence in model.account:  # pretrained weights were adapted
        logging.getLogger("tokenfusion").warning(sentence)
    if isinstance(fuser, Mapping):
        model.recipe |= {"fuser": dict(fuser), "seed": seed}
    return model


def _takes_seed(make: Any) -> bool:
    """Whether what makes fusers can be given a seed, and has none yet."""
    if isinstance(make, partial) and "seed" in make.keywords:
        return False
    try:
        return "seed" in inspect.signature(make).parameters
    except (TypeError, ValueError):
        return False


def _component(fuser: Any, kind: _Kind) -> Any:
    """The component of a word, TokenFusion with scores that start at 0.95 for None; others as they are.

    Raises:
        UserError: of a word that the kind does not have, and of what the other kind takes.
    """
    if fuser is None:
        return {**kind.words["tokenfusion"], "init_bias": 3.0}
    if isinstance(fuser, str) and fuser not in kind.words:
        raise UserError(f"fuser is {fuser!r}; {kind.takes} {', '.join(kind.words)}")
    own, others = ({word[TARGET] for word in words.values()} for words in (kind.words, kind.others))
    if isinstance(fuser, Mapping) and fuser.get(TARGET) in others - own:
        raise UserError(f"fuser: {fuser[TARGET]} is of the other kind; {kind.takes} {', '.join(kind.words)}")
    return kind.words[fuser] if isinstance(fuser, str) else fuser


def _fuse_streams(
    networks: Mapping[str, nn.Module], fuser: Any, seed: int, trust: bool, options: Mapping[str, Any]
) -> FusedStreams:
    """Separate networks with an exchange by word, by component, or by what makes one."""
    _known(options, FusedStreams)
    fuser = _component(fuser, SEPARATE)
    make = maker(fuser, "fuser", EXCHANGE_GIVEN, trust) if isinstance(fuser, Mapping) else fuser
    model = FusedStreams(networks, make, seed=seed, **options)
    if isinstance(fuser, Mapping):
        model.recipe["fuser"] = dict(fuser)
    return model


def _known(options: Mapping[str, Any], kind: type[nn.Module]) -> None:
    """Raise a UserError where a kind of fused model has no such option."""
    elsewhere = ("network", "networks", "modalities", "fuser", "exchange", "seed")
    own = [name for name in inspect.signature(kind).parameters if name not in elsewhere]
    for name in options:
        if name not in own:
            what = "one shared network" if kind is FusedNetwork else "separate networks"
            raise UserError(f"fuse() of {what} takes no {name!r}; {nearest(name, own)}")
