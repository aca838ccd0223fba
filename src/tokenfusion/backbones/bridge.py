"""Ways between the streams of separate networks: which token stands in for which, and who gives it (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenfusion.backbones.column import Column, Stream
from tokenfusion.errors import UserError
from tokenfusion.fusion.allocation import partners, present_partners
from tokenfusion.fusion.projection import grid_index, projection_net

if TYPE_CHECKING:
    from tokenfusion.backbones.lockstep import FusedStreams

Index = Tensor | Callable[[Mapping[str, Any]], Tensor]  # int64 [N] or [B, N], or what makes it from the inputs


class Bridge(nn.Module):
    """The way from one stream to another: which token stands in (Eq. 2, 3), and h before every step.

    Args:
        receiver, giver: the networks of both.
        index: of the giver's tokens, int64 ``[N]`` or ``[B, N]`` for the receiver's N, -1 where there is none; what makes it
            from the inputs; None: both grids cover the same picture.
        steps: how many there are.
        mlp: h is an MLP even where width and grid are equal.

    Raises:
        UserError: where the index has another type, shape or range.
    """

    index: Tensor | None

    def __init__(self, receiver: Column, giver: Column, index: Index | None, steps: int, mlp: bool) -> None:
        super().__init__()
        self.pair = receiver.name, giver.name
        if isinstance(index, Tensor):
            self._check(index, None, receiver.tokens)
            self._check_range(index, giver.tokens)
        elif index is not None and not callable(index):
            raise UserError(
                f"projection {self.pair}: wanted an int64 tensor or a function of the inputs; got {index!r}"
            )
        self.register_buffer("index", index if isinstance(index, Tensor) else None, persistent=False)
        self.find = None if isinstance(index, Tensor) else index
        self.is_identity = receiver.dim == giver.dim and receiver.grid == giver.grid and not mlp
        hidden = max(
            giver.dim // 4, 1
        )  # at the released code's whole width h costs as much as scores and exchange together
        make = nn.Identity if self.is_identity else partial(projection_net, giver.dim, receiver.dim, hidden)
        nets = [make() for _ in range(steps)]
        self.nets = nn.ModuleList(nets)

    def _check(self, index: Tensor, batch: int | None, tokens: int) -> None:
        fits = index.dim() in (1, 2) and index.shape[-1] == tokens and index.dtype == torch.int64
        if not fits or (index.dim() == 2 and batch is not None and len(index) != batch):
            raise UserError(
                f"projection {self.pair}: wanted int64 [{tokens}] or [{batch or 'B'}, {tokens}], a token of {self.pair[1]} "
                f"for each of {self.pair[0]}; got {str(index.dtype).removeprefix('torch.')} {list(index.shape)}"
            )

    def _check_range(self, index: Tensor, tokens: int) -> None:
        least, most = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
        if least < -1 or most >= tokens:
            raise UserError(
                f"projection {self.pair}: an index lies in {least}..{most}; wanted 0..{tokens - 1}, or -1 where "
                "there is no stand-in"
            )

    def index_for(self, inputs: Mapping[str, Any], receiver: Stream, giver: Stream) -> Tensor | None:
        """The giver's token for each of the receiver's: int64 ``[B, N]``, -1 = none; None: the same one."""
        size, device, index = receiver.size, receiver.x.device, self.index
        if index is None and self.find is None:
            same = receiver.grid == giver.grid
            return None if same else grid_index(receiver.grid, giver.grid, device).expand(size)
        if index is None:
            assert self.find is not None
            if any(name not in inputs for name in self.pair):  # a missing modality neither gives nor needs
                return torch.full(size, -1, device=device)
            index = self.find(inputs)
        self._check(index, *size)
        if index.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
            self._check_range(index, giver.size[1])
        return index.expand(size)


class Meeting:
    """Who may stand in for whom in one forward pass.

    Attributes:
        index: per (receiver, giver) the giver's token, int64 ``[B, N]``; None: the same one.
        shows: bool ``[B, N]``: the giver is the one allotted, is present, and has a stand-in.
        has: per receiver, bool ``[B, N]``: there is a stand-in.
    """

    def __init__(
        self, model: FusedStreams, inputs: Mapping[str, Any], streams: Sequence[Stream], present: Tensor | None
    ) -> None:
        self.givers = model.givers
        self.index: dict[tuple[int, int], Tensor | None] = {}
        self.shows: dict[tuple[int, int], Tensor] = {}
        self.has: dict[int, Tensor] = {}
        for receiver, givers in model.givers.items():
            size, device = streams[receiver].size, streams[receiver].x.device
            self.has[receiver] = torch.zeros(size, dtype=torch.bool, device=device)
            allotted = _allotted(model, receiver, size, present, device)
            for giver in givers:
                index = model.bridge(receiver, giver).index_for(inputs, streams[receiver], streams[giver])
                shows = (allotted == giver).expand(size)
                self.shows[receiver, giver] = shows if index is None else shows & (index >= 0)
                self.index[receiver, giver] = None if index is None else index.clamp(min=0)
                self.has[receiver] = self.has[receiver] | self.shows[receiver, giver]

    def gather(
        self, receiver: int, own: Tensor, of: Callable[[int], Tensor], h: Callable[[int], nn.Module] | None = None
    ) -> Tensor:
        """``own [B, N, C]``, replaced wherever there is a stand-in, from h of what each giver offers, ``[B, n, c]``."""
        for giver in self.givers[receiver]:
            taken, index, net = of(giver), self.index[receiver, giver], h(giver) if h else nn.Identity()
            is_fewer = index is not None and index.shape[1] < taken.shape[1]  # h sees the shorter row
            taken = taken if is_fewer else net(taken)
            if index is not None:
                taken = taken.gather(1, index.unsqueeze(-1).expand(-1, -1, taken.shape[2]))
            taken = net(taken) if is_fewer else taken
            own = torch.where(self.shows[receiver, giver].unsqueeze(-1), taken.to(own.dtype), own)
        return own


def _allotted(
    model: FusedStreams, receiver: int, size: tuple[int, int], present: Tensor | None, device: torch.device
) -> Tensor:
    """Which stream each token of a receiver is allotted to (Eq. 7): ``[N]``, or ``[B, N]`` where some are missing."""
    count, givers = len(model.columns), model.givers[receiver]
    partner = partners(count, size[1], model.seed, 0, device)
    if present is None and len(givers) == count - 1:
        return partner[receiver]
    connected = torch.tensor([m in givers for m in range(count)], device=device).unsqueeze(1).expand(-1, size[0])
    return present_partners(partner, connected if present is None else connected & present)[receiver]
