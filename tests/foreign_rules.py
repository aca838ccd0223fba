"""What every foreign network that is fused must keep to; tests/backbones holds the networks to it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.backbones.foreign import answer_of, call
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.errors import UserError
from tokenfusion.fusion import Bottleneck, Concat, NoFusion, PerModality, TokenFusion

NAMES = ("rgb", "depth")


def shaken(network: nn.Module) -> nn.Module:
    """Weights that pass on what they are given, norms, biases and layer scales that count: what goes wrong inside is seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(0.2 * noise)
            elif name.endswith("weight"):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return network.eval()


def inputs(example: Tensor, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, *example.shape[1:], generator=generator) for name in NAMES}


def fused(network: nn.Module, example: Tensor, fuser: Any, **options: Any) -> FusedNetwork:
    model = FusedNetwork(copy.deepcopy(network), NAMES, fuser, example, **options)
    return model.eval()  # type: ignore[return-value]


def answer(network: nn.Module, x: Tensor) -> Tensor:
    return answer_of(call(network, x)[1])


def answers(model: FusedNetwork, x: dict[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
    return {name: answer_of(output) for name, output in model(x, present).outputs.items()}


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """Equal within 1e-5 of the largest answer: what float32 gives for another batch size."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@torch.no_grad()
def unfused_is_the_network(network: nn.Module, example: Tensor) -> FusedNetwork:
    """Without fusion: the network on the stacked batch bit for bit, and on each stream alone."""
    x = inputs(example)
    model = fused(network, example, NoFusion)
    got = answers(model, x)
    assert torch.equal(torch.cat(list(got.values())), answer(network, torch.cat(list(x.values()))))
    assert not torch.equal(got["rgb"], got["depth"])
    for name in NAMES:
        assert_near(got[name], answer(network, x[name]))
    return model


@torch.no_grad()
def norms_are_private(network: nn.Module, example: Tensor) -> None:
    """A stream with norms of its own is the single network with those norms, whatever the other stream is."""
    x = inputs(example)
    model, single = fused(network, example, NoFusion), copy.deepcopy(network)
    generator = torch.Generator().manual_seed(2)
    private = 0
    for name, module in model.network.named_modules():
        if not isinstance(module, PerModality):
            continue
        private += 1
        for parameter in module[1].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for plan in model.survey.blocks:
            name = name.replace(f"{plan.name}.block.", f"{plan.name}.") if name.startswith(plan.name) else name
        single.get_submodule(name).load_state_dict(module[1].state_dict())
    got = answers(model, x)
    assert private
    assert_near(got["depth"], answer(single, x["depth"]))
    assert_near(got["rgb"], answer(network, x["rgb"]))
    assert (answer(single, x["depth"]) - answer(network, x["depth"])).abs().max() > 1e-3


class _Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[:3])


@torch.no_grad()
def scores_of_one_change_nothing(network: nn.Module, example: Tensor) -> None:
    """TokenFusion that weighs every token by one and replaces none has the bits of no fusion, under both rules."""
    x = inputs(example)
    plain = fused(network, example, NoFusion)
    wanted = answers(plain, x)
    has_norms = all(plan.parts.norm is not None for plan in plain.survey.blocks)
    for rule in ("released", "paper") if has_norms else ("released",):
        model = fused(network, example, functools.partial(TokenFusion, rule=rule, threshold=0.0))
        for fuser in model.fusers:
            fuser.score = _Ones()
        got = answers(model, x)
        assert all(torch.equal(got[name], wanted[name]) for name in NAMES), rule


@torch.no_grad()
def streams_exchange(network: nn.Module, example: Tensor) -> None:
    """Where all tokens are exchanged, each stream answers to the other's input; every block scores its map's tokens."""
    x = inputs(example)
    seen: list[torch.Size] = []
    model = fused(network, example, functools.partial(TokenFusion, threshold=1.0))
    for fuser in model.fusers:
        fuser.score.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    out = model(x)
    plans = model.survey.blocks
    assert len(out.scores) == len(plans) == len(seen)
    for scores, given, plan in zip(out.scores, seen, plans, strict=True):
        assert scores.shape == given[:3]
        assert given[3] == plan.dim
        assert plan.grid is None or scores.shape == (2, 2, plan.grid[0] * plan.grid[1])
    changed = answers(model, {**x, "depth": x["depth"].flip(0)})["rgb"]
    before = answer_of(out.outputs["rgb"])
    assert (changed - before).abs().max() > 1e-5 * before.abs().max()


@torch.no_grad()
def a_missing_modality_is_left_out(network: nn.Module, example: Tensor) -> None:
    """Left out, or sent as NaN and said to be missing: the same finite answer."""
    x = inputs(example)
    model = fused(network, example, functools.partial(TokenFusion, threshold=0.5))
    alone = model({"rgb": x["rgb"]})
    broken = {**x, "depth": torch.full_like(x["depth"], float("nan"))}
    same = model(broken, torch.tensor([[True, True], [False, False]]))
    assert alone.ensemble.isfinite().all()
    assert torch.equal(same.ensemble, alone.ensemble)
    assert torch.equal(answer_of(same.outputs["rgb"]), answer_of(alone.outputs["rgb"]))


@torch.no_grad()
def alignment_adds_to_the_right_tokens(network: nn.Module, example: Tensor) -> bool:
    """What alignment re-adds at a token is what the network itself added there; False where nothing is re-added."""
    model = fused(network, example, NoFusion, alignment=True)
    place, first = model.position, model.survey.blocks[0]
    if place is None:
        return False
    assert first.grid is not None
    network, given = copy.deepcopy(network), []
    network.get_submodule(first.name).register_forward_pre_hook(lambda module, args: given.append(args[0]))
    x = inputs(example)["rgb"]
    tokens = first.grid[0] * first.grid[1]
    for at in (1, tokens - 2):
        given.clear()
        call(network, x)
        before = place.on(network, first.grid, first.prefix)
        table = network.get_parameter(place.name)
        rows = table.flatten(0, -2)
        rows[len(rows) - first.suffix - tokens + at] += torch.randn(
            first.dim, generator=torch.Generator().manual_seed(at)
        )
        call(network, x)
        moved = [(first.layout.tokens(given[1]) - first.layout.tokens(given[0]))[0]]
        moved.append(place.on(network, first.grid, first.prefix) - before)
        for change in moved:
            assert (change.abs().sum(-1) > 1e-6).nonzero().flatten().tolist() == [first.prefix + at]
    return True


@torch.no_grad()
def other_channels_answer_to_grey(network: nn.Module, example: Tensor) -> bool:
    """A stream of one channel is the network on a grey image; False where no convolution alone sees the input."""
    model = fused(network, example, NoFusion)
    if model.survey.stem is None:
        return False
    model = FusedNetwork(copy.deepcopy(network), {"rgb": 3, "depth": 1}, NoFusion, example).eval()  # type: ignore[arg-type]
    x = inputs(example)
    grey = x["depth"][:, :1]
    got = answers(model, {"rgb": x["rgb"], "depth": grey})
    wanted = answer(network, grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(got["depth"], wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))
    return True


@torch.no_grad()
def union_of_equal_streams_is_one(network: nn.Module, example: Tensor) -> bool:
    """Attention over two equal streams is attention over one; False where concat does not fit the blocks."""
    x = inputs(example)["rgb"]
    try:
        model = fused(network, example, Concat)
    except UserError:
        return False
    got, wanted = answers(model, {"rgb": x, "depth": x}), answer(network, x)
    torch.testing.assert_close(got["rgb"], wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))
    other = answers(model, {"rgb": x, "depth": x.flip(0)})["rgb"]
    assert (other - got["rgb"]).abs().max() > 1e-5 * wanted.abs().max()
    return True


@torch.no_grad()
def bottleneck_tokens_join_in(network: nn.Module, example: Tensor) -> bool:
    """Streams meet in tokens that run beside their own; False where they do not fit the blocks."""
    x = inputs(example)
    try:
        model = fused(network, example, Bottleneck)
    except UserError:
        return False
    got = answers(model, x)["rgb"]
    assert got.shape == answer(network, x["rgb"]).shape
    changed = answers(model, {**x, "depth": x["depth"].flip(0)})["rgb"]
    assert (changed - got).abs().max() > 1e-5 * got.abs().max()
    return True


def check_all(network: nn.Module, example: Tensor) -> FusedNetwork:
    """All of the above; gives the unfused model, whose survey the test may look at."""
    model = unfused_is_the_network(network, example)
    norms_are_private(network, example)
    scores_of_one_change_nothing(network, example)
    streams_exchange(network, example)
    a_missing_modality_is_left_out(network, example)
    return model


__all__ = ["alignment_adds_to_the_right_tokens", "check_all", "inputs", "shaken"]
