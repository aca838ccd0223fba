"""Separate networks, of different widths and depths, in lockstep: before every step they exchange tokens (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.bridge import Bridge, Index, Meeting
from tokenfusion.backbones.column import Column, Stream
from tokenfusion.backbones.foreign import answer_of, example_of, weight_of
from tokenfusion.backbones.fused_model import FusedModel, FusedOutput, keep_weights
from tokenfusion.backbones.held import check_unfused
from tokenfusion.backbones.survey import is_norm
from tokenfusion.components import component_of
from tokenfusion.errors import UserError
from tokenfusion.fusion.crossing import Exchange, NoExchange
from tokenfusion.fusion.exchange import ExchangeRates, exchange_rates
from tokenfusion.fusion.fusers import Entry
from tokenfusion.fusion.modality import check_named, check_tensors, presence, silenced
from tokenfusion.fusion.projection import pair_layers

Pair = tuple[str, str]  # receiver, giver
ExchangeFactory = Callable[[int, int], Exchange]  # (dim, seed)
EXCHANGE_GIVEN = ("dim", "seed")  # arguments that the program supplies


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
            index of int64 ``[N]`` or ``[B, N]``, -1 = none, or a function of the inputs that makes it (a camera per sample);
            None: patch over patch. Pairs that are left out do not exchange. Without any projection all inputs are pictures
            of the same area, laid over each other.
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
        projection: Mapping[Pair, Index | None] | None = None,
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
        self.recipe = {"seed": seed, "fuser": component_of(exchange), "alignment": alignment, "mlp": mlp}

    def _connect(
        self,
        networks: Mapping[str, nn.Module],
        exchange: ExchangeFactory,
        projection: Mapping[Pair, Index | None] | None,
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
        self.exchanges = nn.ModuleList()
        for step in range(self.steps):
            first = seed + step * len(self.columns)  # no two draw alike
            self.exchanges.append(
                nn.ModuleDict({str(m): exchange(self.columns[m].dim, first + m) for m in self.givers})
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

    def _check_names(self, projection: Mapping[Pair, Index | None]) -> None:
        for pair in projection:
            if len(pair) != 2 or any(name not in self.modalities for name in pair) or pair[0] == pair[1]:
                raise UserError(
                    f"projection: {pair!r} is no pair of a receiver and another giver; "
                    f"wanted two of {', '.join(self.modalities)}"
                )

    def _maps(self, projection: Mapping[Pair, Index | None] | None) -> dict[tuple[int, int], Index | None]:
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

    def ways(self) -> list[Bridge]:
        """All ways between two streams, each with its ``pair`` of names."""
        return [cast("Bridge", bridge) for bridge in self.bridges.values()]

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
        """Keep the networks' weights; their norms go on learning unless ``private`` is true, peft's LoRA always."""
        keep_weights(self.networks)
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
        meeting = Meeting(self, inputs, streams, present)
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
        check_named(self.modalities, inputs)
        known = {name: inputs[name] for name in self.modalities if name in inputs}
        others = [name for name in inputs if name not in known]
        takes_more = any(bridge.find is not None for bridge in self.ways())
        if not known or (others and not takes_more):
            raise ValueError(f"inputs must be some of {', '.join(self.modalities)}; got {', '.join(inputs) or 'none'}")
        check_tensors(known)
        some = next(iter(known.values()))
        batch = some.shape[0]
        for name, x in known.items():
            if x.shape[0] != batch:  # no len(): an export would take it for a constant
                raise ValueError(f"{name} has {x.shape[0]} samples, {next(iter(known))} has {batch}")
        present = presence(self.modalities, inputs, present, batch, some.device)
        given = []
        for m, column in enumerate(self.columns):
            x = known[column.name] if column.name in known else self._zeros(column, batch, some.device)
            column.check_channels(x)
            given.append(silenced(x, None if present is None else present[m]))
        return given, present

    def _zeros(self, column: Column, batch: int, device: torch.device) -> Tensor:
        """A missing input, of the dtype that the network's weights have by now."""
        dtype = column.example.dtype
        if dtype.is_floating_point:
            parameters = self.networks[column.name].parameters()
            dtype = next((p.dtype for p in parameters if p.is_floating_point()), dtype)
        return torch.zeros(batch, *column.example.shape[1:], dtype=dtype, device=device)

    def _meet(
        self, step: int, streams: Sequence[Stream], meeting: Meeting, scores: list[Tensor], donors: list[Tensor]
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
        self, step: int, m: int, x: Tensor, maps: list[Tensor], own: dict[int, Tensor | None], meeting: Meeting
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
    taken = [name for name in networks if hasattr(nn.ModuleDict, name)]
    if taken:
        raise UserError(
            f"{taken[0]!r} cannot name a modality: a ModuleDict has an attribute of that name; choose another"
        )
    if len({id(network) for network in networks.values()}) < len(networks):
        raise UserError("one network for several modalities is shared: fuse(network, [names])")
    for network in networks.values():
        check_unfused(network)
