"""Separate networks, of different widths and depths, in lockstep: before every step they exchange tokens (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.column import Column, Stream
from tokenfusion.backbones.foreign import answer_of, example_of, weight_of
from tokenfusion.backbones.held import check_unfused
from tokenfusion.backbones.hub import FusedModel, FusedOutput
from tokenfusion.backbones.survey import is_norm
from tokenfusion.errors import UserError
from tokenfusion.fusion.allocation import partners, present_partners
from tokenfusion.fusion.crossing import Exchange, NoExchange
from tokenfusion.fusion.exchange import ExchangeRates, exchange_rates
from tokenfusion.fusion.fusers import Entry
from tokenfusion.fusion.modality import presence
from tokenfusion.fusion.projection import grid_index, pair_layers, projection_net

Index = Tensor | Callable[[Mapping[str, Any]], Tensor]  # int64 [N] or [B, N], or what makes it from the inputs
Pair = tuple[str, str]  # receiver, giver
ExchangeFactory = Callable[[int, int], Exchange]  # (dim, seed)


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
        nets = [nn.Identity() if self.is_identity else projection_net(giver.dim, receiver.dim) for _ in range(steps)]
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


class _Meeting:
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


class FusedStreams(FusedModel):
    """Separate networks, one per modality, whose streams exchange tokens before every step (Sec. 3.4).

    There are as many steps as the shallowest network has blocks; the blocks of deeper ones are spread over them. Before a
    step a token that scores below the threshold is replaced by h of its stand-in (Eq. 2, 6), and the normed tokens are
    weighed by their scores before attention (Eq. 4); a substituted token brings its score along.

    Args:
        networks: ``{"rgb": vit, "audio": ast}``: of timm, of Hugging Face, or any module whose blocks have an attention and
            an MLP. They are used, not copied.
        exchange: makes what decides, from (dim, seed).
        projection: which of the giver's tokens stands in for each of the receiver's: ``{(receiver, giver): index}`` with an
            index of int64 ``[N]`` or ``[B, N]``, -1 = none, or a function of the inputs that makes it (a camera per sample).
            Pairs that are left out do not exchange. None: all inputs are pictures of the same area, patch over patch.
        example: inputs ``[B, ...]`` by name, of networks that are neither of timm nor of Hugging Face.
        alignment: each network's own position embedding is re-added before every step but the first, its gradient stopped.
        mlp: h is an MLP between streams of equal width and grid too; it always is where these differ.
        seed: of the group allocation with more than two modalities, and of what a method draws.

    Shape: ``{name: input} -> FusedOutput``, whose scores are ``[1, B, N]``, one per step and receiving stream, in the order
    of :meth:`block_names`. Names that are left out are missing modalities; ``present`` bool ``[M, B]`` says the same per
    sample.

    Raises:
        UserError: where a network is a pyramid, or does not fit; where a projection is missing or has another shape.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        exchange: ExchangeFactory,
        projection: Mapping[Pair, Index] | None = None,
        example: Mapping[str, Tensor] | None = None,
        alignment: bool = False,
        mlp: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(tuple(networks))
        _check_networks(networks)
        self.seed = seed
        self._check_names(projection or {})
        given = example or {}
        self.columns: list[Column] = []
        try:
            for name, network in networks.items():
                at = given[name] if name in given else example_of(network)
                self.columns.append(Column(name, network, at, alignment))
            self._connect(networks, exchange, projection, mlp)
        except BaseException:
            for column in self.columns:
                column.release(networks[column.name])
            raise

    def _connect(
        self,
        networks: Mapping[str, nn.Module],
        exchange: ExchangeFactory,
        projection: Mapping[Pair, Index] | None,
        mlp: bool,
    ) -> None:
        """What decides before every step, and the ways between the streams."""
        seed = self.seed
        self.networks = nn.ModuleDict(networks)
        self.steps = min(column.depth for column in self.columns)
        self.pairs = [pair_layers(column.depth, self.steps) for column in self.columns]
        some = exchange(self.columns[0].dim, seed)
        if not isinstance(some, Exchange):
            raise UserError(
                f"separate networks exchange by an Exchange of tokenfusion.fusion.crossing; got {type(some).__name__}"
            )
        maps = {} if isinstance(some, NoExchange) else self._maps(projection)
        self.givers: dict[int, list[int]] = {}  # receiver -> givers, by number
        for receiver, giver in maps:
            self.givers.setdefault(receiver, []).append(giver)
        self.exchanges = nn.ModuleList(
            nn.ModuleDict({str(m): exchange(self.columns[m].dim, seed + m) for m in self.givers})
            for _ in range(self.steps)
        )
        self._check_norms()
        self.bridges = nn.ModuleDict(
            {
                f"{r}_{g}": Bridge(self.columns[r], self.columns[g], index, self.steps, mlp)
                for (r, g), index in maps.items()
            }
        )
        for network in networks.values():
            self.take_over_checkpointing(network)
        weights = [weight_of(network) for network in networks.values()]
        for exchanges in self.exchanges:
            for m, own in cast("nn.ModuleDict", exchanges).items():
                own.to(weights[int(m)])
        for receiver, giver in maps:
            self.bridge(receiver, giver).nets.to(weights[giver])
        self.answers_agree = len({column.answer for column in self.columns}) == 1
        self.account += [f"{c.name}: {c.depth} blocks of width {c.dim} in {self.steps} steps" for c in self.columns]
        for receiver, giver in maps:
            how = "as they are" if self.bridge(receiver, giver).is_identity else "through an MLP"
            self.account.append(f"{self.modalities[receiver]} takes tokens of {self.modalities[giver]} {how}")

    def _check_names(self, projection: Mapping[Pair, Index]) -> None:
        for pair in projection:
            if len(pair) != 2 or any(name not in self.modalities for name in pair) or pair[0] == pair[1]:
                raise UserError(
                    f"projection: {pair!r} is no pair of a receiver and another giver; "
                    f"wanted two of {', '.join(self.modalities)}"
                )

    def _maps(self, projection: Mapping[Pair, Index] | None) -> dict[tuple[int, int], Index | None]:
        """Index maps by (receiver, giver); receivers and givers in the order of the modalities."""
        if projection is None:
            return self._laid_over()
        numbers = {name: m for m, name in enumerate(self.modalities)}
        return dict(sorted(((numbers[to], numbers[source]), index) for (to, source), index in projection.items()))

    def _laid_over(self) -> dict[tuple[int, int], Index | None]:
        """Every stream gives to every other, patch over patch."""
        count = range(len(self.columns))
        other = next((c for c in self.columns if c.grid is None or c.example.dim() != 4), None)
        if other is not None and len(count) > 1:
            raise UserError(
                f"{other.name}: {other.kind} works on no picture that others could be laid over; give projection="
                "{(receiver, giver): index}, see tokenfusion.fusion.projection: grid_index, time_index, camera_index"
            )
        return {(receiver, giver): None for receiver in count for giver in count if receiver != giver}

    def _check_norms(self) -> None:
        """The paper's rule weighs normed tokens: what scores wants a norm before attention."""
        for receiver in self.givers:
            column = self.columns[receiver]
            for blocks in self.pairs[receiver]:
                place = column.places[blocks.start]
                if self._exchange(0, receiver).threshold is not None and place.plan.parts.norm is None:
                    raise UserError(
                        f"{column.name}: block {place.plan.name} ({type(place.block).__name__}) has no norm before its "
                        "attention, where tokens are weighed by their scores"
                    )

    def _exchange(self, step: int, receiver: int) -> Exchange:
        return cast("Exchange", cast("nn.ModuleDict", self.exchanges[step])[str(receiver)])

    def bridge(self, receiver: int, giver: int) -> Bridge:
        """The way between two streams, by number."""
        return cast("Bridge", self.bridges[f"{receiver}_{giver}"])

    @property
    def threshold(self) -> float | None:
        """Theta of the exchange, None where it does not score."""
        return next((self._exchange(0, receiver).threshold for receiver in self.givers), None)

    def _scored(self) -> list[tuple[int, str]]:
        """Streams and blocks of the scores, in their order."""
        scored = []
        for step in range(self.steps if self.threshold is not None else 0):
            for receiver in self.givers:
                column, block = self.columns[receiver], self.pairs[receiver][step].start
                scored.append((receiver, f"{column.name}.{column.places[block].plan.name}"))
        return scored

    def block_names(self) -> list[str]:
        """The blocks before which tokens are scored, ``rgb.blocks.0``, in the order of ``FusedOutput.scores``."""
        return [name for _, name in self._scored()]

    def rates(
        self, scores: Sequence[Tensor], present: Tensor | None = None, donors: Sequence[Tensor] | None = None
    ) -> dict[str, ExchangeRates]:
        """Exchange rates per scored block, of ``[1]`` stream each.

        Args:
            scores, present, donors: of the output. Without ``donors`` all tokens are taken to have a worthy stand-in.
        """
        rates, theta = {}, cast("float", self.threshold)
        for at, ((receiver, name), own) in enumerate(zip(self._scored(), scores, strict=True)):
            there = None if present is None else present[receiver : receiver + 1]
            donor = torch.ones_like(own) if donors is None else donors[at]
            rates[name] = exchange_rates(own, donor, theta, there, donor >= 0)
        return rates

    def freeze(self, private: bool = False) -> None:
        """Keep the networks' weights; their norms go on learning unless ``private`` is true."""
        self.networks.requires_grad_(False)
        for module in self.networks.modules():
            if not private and is_norm(module):
                module.requires_grad_(True)

    def forward(self, inputs: Mapping[str, Any], present: Tensor | None = None) -> FusedOutput:
        self.check_checkpointing()
        given, present = self._complete(inputs, present)
        streams = [
            Stream(column, self.networks[column.name], x, None if present is None else present[m])
            for m, (column, x) in enumerate(zip(self.columns, given, strict=True))
        ]
        meeting = _Meeting(self, inputs, streams, present)
        scores: list[Tensor] = []
        donors: list[Tensor] = []
        for step in range(self.steps):
            entries = self._meet(step, streams, meeting, scores, donors)
            for stream, pairs, entry in zip(streams, self.pairs, entries, strict=True):
                stream.advance(pairs[step], entry, self.recomputes)
        called = [stream.replay() for stream in streams]
        penalised = [torch.where(donor >= 0, score, 0) for score, donor in zip(scores, donors, strict=True)]
        self._scores = penalised if self.training else None
        answers = [answer_of(answer) for _, answer in called]
        named = {name: called[m] for m, name in enumerate(self.modalities) if name in inputs}
        return FusedOutput(
            {name: features for name, (features, _) in named.items()},
            {name: answer for name, (_, answer) in named.items()},
            self.ensemble(torch.stack(answers), present) if self.answers_agree else None,
            scores,
            present,
            donors,
        )

    def _complete(self, inputs: Mapping[str, Any], present: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """An input for every network, zeros where a modality is missing, and which are present, ``[M, B]``."""
        known = {name: inputs[name] for name in self.modalities if name in inputs}
        others = [name for name in inputs if name not in known]
        takes_more = any(cast("Bridge", bridge).find is not None for bridge in self.bridges.values())
        if not known or (others and not takes_more):
            raise ValueError(f"inputs must be some of {', '.join(self.modalities)}; got {', '.join(inputs) or 'none'}")
        some = next(iter(known.values()))
        for name, x in known.items():
            if len(x) != len(some):
                raise ValueError(f"{name} has {len(x)} samples, {next(iter(known))} has {len(some)}")
        present = presence(self.modalities, inputs, present, len(some), some.device)
        given = []
        for m, column in enumerate(self.columns):
            x = known[column.name] if column.name in known else self._zeros(column, len(some), some.device)
            if present is not None:  # whatever a broken sensor sent, NaN too, goes no further
                x = torch.where(present[m].view(-1, *[1] * (x.dim() - 1)), x, 0)
            given.append(x)
        return given, present

    def _zeros(self, column: Column, batch: int, device: torch.device) -> Tensor:
        """A missing input, of the dtype that the network's weights have by now."""
        dtype = column.example.dtype
        if dtype.is_floating_point:
            parameters = self.networks[column.name].parameters()
            dtype = next((p.dtype for p in parameters if p.is_floating_point()), dtype)
        return torch.zeros(batch, *column.example.shape[1:], dtype=dtype, device=device)

    def _meet(
        self, step: int, streams: Sequence[Stream], meeting: _Meeting, scores: list[Tensor], donors: list[Tensor]
    ) -> list[Entry]:
        """What every stream goes on with: scored, exchanged (Eq. 6), aligned, and weighed by (Eq. 4)."""
        seen = [stream.tokens() for stream in streams]
        maps = [x[:, stream.column.prefix :] for x, stream in zip(seen, streams, strict=True)]
        own = {m: self._score(step, m, maps[m], streams[m].present, meeting.has[m]) for m in self.givers}
        entries = []
        for m, stream in enumerate(streams):
            x, weight = seen[m], None
            if m in self.givers:
                x, weight, donor = self._take(step, m, x, maps, own, meeting)
                if donor is not None:
                    scores.append(cast("Tensor", own[m])[None])
                    donors.append(donor[None])
            position = stream.position() if step else None
            entries.append(Entry((x if position is None else x + position)[None], None, weight))
        return entries

    def _score(self, step: int, m: int, tokens: Tensor, present: Tensor | None, has: Tensor) -> Tensor | None:
        scores = self._exchange(step, m).score(tokens, has)
        if scores is None or present is None:
            return scores
        return torch.where(has & ~present.unsqueeze(-1), 0, scores)  # a missing modality is uninformative everywhere

    def _take(
        self, step: int, m: int, x: Tensor, maps: list[Tensor], own: dict[int, Tensor | None], meeting: _Meeting
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One stream's tokens ``[B, prefix + N, C]``, their weights ``[1, ...]``, the stand-ins' scores ``[B, N]``."""
        exchange, has, scores, prefix = self._exchange(step, m), meeting.has[m], own[m], self.columns[m].prefix
        stand_in = meeting.gather(m, maps[m], maps.__getitem__, lambda giver: self.bridge(m, giver).nets[step])
        taken = exchange.take(maps[m], stand_in, has, scores)
        x = torch.cat([x[:, :prefix], taken], 1) if prefix else taken
        if scores is None:
            return x, None, None

        def brought(giver: int) -> Tensor:
            score = own.get(giver)  # a stream that only gives is not scored
            return maps[giver].new_ones(*maps[giver].shape[:2], 1) if score is None else score.unsqueeze(-1)

        donor = meeting.gather(m, torch.full_like(scores, -1).unsqueeze(-1), brought)
        weight = exchange.take(scores.unsqueeze(-1), donor, has, scores).squeeze(-1)
        return x, F.pad(weight, (prefix, 0), value=1.0)[None], donor.squeeze(-1).detach()


def _check_networks(networks: Mapping[str, nn.Module]) -> None:
    if not networks or any("." in name or not name for name in networks):
        raise ValueError(f"modalities must be names without dots, at least one; got {list(networks)}")
    if len({id(network) for network in networks.values()}) < len(networks):
        raise UserError("one network for several modalities is shared: fuse(network, [names])")
    for network in networks.values():
        check_unfused(network)
