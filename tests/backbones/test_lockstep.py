"""Separate networks in lockstep: unfused each is itself; fused they exchange exactly what the scores and the maps say."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch._dynamo
import transformers
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.foreign import answer_of, call
from tokenfusion.backbones.held import FusedBlock
from tokenfusion.backbones.lockstep import FusedStreams
from tokenfusion.fusion import TokenFusion, exchange_rates, partners
from tokenfusion.fusion.crossing import TokenExchange
from tokenfusion.fusion.projection import camera_index, grid_index, time_index

SMALL = {"num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5}
EVERYTHING = {"_target_": "tokenfusion.fusion.crossing.TokenExchange", "threshold": 1.0}
HALF = {"_target_": "tokenfusion.fusion.crossing.TokenExchange", "threshold": 0.5}
ONCE = "skip_fwd_side_effects_in_bwd_under_checkpoint"
ALL, NONE = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)


def vit(dim: int = 32, depth: int = 2, size: int = 48, **changes) -> nn.Module:
    torch.manual_seed(dim)
    arguments = {"num_classes": 5, "img_size": size, "num_heads": 2, **changes}
    return timm.create_model("vit_tiny_patch16_224", embed_dim=dim, depth=depth, **arguments).eval()


def ast() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ASTConfig(hidden_size=24, num_hidden_layers=3, max_length=56, num_mel_bins=36, **SMALL)
    return transformers.ASTForAudioClassification(config).eval()


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=3, image_size=48, **SMALL)
    return transformers.ViTForImageClassification(config).eval()


def dinov2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=42, patch_size=14, num_labels=5
    )
    return transformers.Dinov2ForImageClassification(config).eval()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(size: int = 48) -> dict[str, Tensor]:
    return {"rgb": drawn(2, 3, 48, 48), "depth": drawn(2, 3, size, size, seed=2)}


def watch(model: FusedStreams, name: str) -> list[Tensor]:
    """What the first block of a stream is given."""
    seen: list[Tensor] = []
    place = model.columns[model.modalities.index(name)].places[0]
    place.block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def stem(network: nn.Module, x: Tensor) -> Tensor:
    """The input of the first block of a ViT of timm."""
    seen: list[Tensor] = []
    handle = network.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(x)
    handle.remove()
    return seen[0]


# ---- each network keeps its own forward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, ast, hf_vit, dinov2])
@pytest.mark.parametrize("partner", [vit, lambda: vit(48, 5)])
def test_unfused_every_network_is_itself_bit_for_bit(
    make: Callable[[], nn.Module], partner: Callable[[], nn.Module]
) -> None:
    model = tokenfusion.fuse({"one": make(), "rgb": partner()}, fuser="none").eval()
    x = {"one": drawn(2, *model.columns[0].example.shape[1:]), "rgb": drawn(2, 3, 48, 48)}
    out = model(x)
    for name, network in (("one", make()), ("rgb", partner())):
        features, answer = call(network, x[name])
        assert torch.equal(answer_of(out.outputs[name]), answer_of(answer))
        assert features is None or torch.equal(answer_of(out.features[name]), answer_of(features))
    assert out.scores == []
    assert model.rates(out.scores) == {}
    with torch.no_grad():
        expected = (answer_of(out.outputs["one"]) + out.outputs["rgb"]) / 2
    torch.testing.assert_close(out.ensemble, expected)


def test_theta_zero_and_scores_of_one_are_the_networks_too() -> None:
    exchange = functools.partial(TokenExchange, threshold=0.0, init_bias=100.0)
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)}, fuser=exchange).eval()
    x = pictures()
    out = model(x)
    torch.testing.assert_close(out.outputs["depth"], vit(48, 3)(x["depth"]))


class Pair(nn.Module):
    """A block that answers with a tuple and is told something new in every layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm(x)) + shift
        return x + self.mlp(x), shift


class Own(nn.Module):
    """A network of one's own; ``between`` is what it does to the tokens between two blocks."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.head, self.between = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 5), between
        self.blocks = nn.ModuleList(Pair(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        told = []
        for number, block in enumerate(self.blocks):
            x, more = block(x if number == 0 else self.between(x), torch.full((8,), float(number)))
            told.append(more)
        return self.head(x.mean(1)) + torch.stack(told).sum()


def test_tuples_and_further_arguments_of_blocks_are_kept() -> None:
    network, x = Own().eval(), pictures()
    expected = network(x["depth"])
    example = {"depth": torch.zeros(2, 3, 48, 48)}
    model = tokenfusion.fuse({"rgb": vit(), "depth": network}, fuser="none", example=example).eval()
    assert torch.equal(model(x).outputs["depth"], expected)


@pytest.mark.parametrize("between", [lambda x: x + 0, lambda x: x.mul_(1), torch.relu])
def test_networks_that_do_more_between_their_blocks_are_refused(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(tokenfusion.UserError, match="^depth: Own does more between its blocks"):
        tokenfusion.fuse({"depth": Own(between)}, fuser="none", example={"depth": torch.zeros(2, 3, 48, 48)})


def test_pyramids_are_refused_with_the_block() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(
        tokenfusion.UserError, match=r"depth: SwinTransformer is a pyramid, at block layers\.1\.blocks\.0 .*24 -> 48"
    ):
        tokenfusion.fuse({"rgb": vit(), "depth": swin})


# ---- what is exchanged -------------------------------------------------------------------------------------------------


def test_exactly_the_tokens_below_theta_are_replaced_by_the_projected_ones() -> None:
    """Eq. 6 before the first step, of another width and grid."""
    networks = {"rgb": vit(), "depth": vit(48, 3, 64)}
    plain, x = copy.deepcopy(networks), pictures(64)
    model = tokenfusion.fuse(networks, fuser=HALF).eval()
    seen = watch(model, "rgb")
    out = model(x)
    own, others = stem(plain["rgb"], x["rgb"]), stem(plain["depth"], x["depth"])
    below = out.scores[0][0] < 0.5
    assert below.any()
    assert not below.all()
    stand_in = model.bridge(0, 1).nets[0](others[:, 1:])[:, grid_index((3, 3), (4, 4))]
    expected = torch.where(below.unsqueeze(-1), stand_in, own[:, 1:])
    torch.testing.assert_close(seen[0][:, 1:], expected)
    assert torch.equal(seen[0][:, :1], own[:, :1]), "the class token is never exchanged"
    assert out.scores[0].shape == (1, 2, 9)
    assert out.scores[1].shape == (1, 2, 16)


def test_a_substituted_token_brings_its_score_along() -> None:
    """Eq. 4: the normed tokens of the first block are weighed by scores, a stand-in by its own."""
    networks = {"rgb": vit(), "depth": vit()}
    model = tokenfusion.fuse(networks, fuser=HALF).eval()
    block, normed, weighed = model.columns[0].places[0].block, [], []
    block.norm1.register_forward_hook(lambda module, args, output: normed.append(output), prepend=True)
    block.attn.register_forward_pre_hook(lambda module, args: weighed.append(args[0]))
    out = model(pictures())
    rgb, depth = out.scores[0][0], out.scores[1][0]
    weight = torch.where(rgb < 0.5, depth, rgb)
    assert torch.equal(out.donors[0][0], depth)
    torch.testing.assert_close(weighed[0][:, 1:], normed[0][:, 1:] * weight.unsqueeze(-1))
    assert torch.equal(weighed[0][:, 0], normed[0][:, 0])


def test_tokens_without_a_stand_in_are_neither_replaced_nor_weighed() -> None:
    index = torch.tensor([[0, 1, -1, 3, 4, -1, 6, 7, 8], [-1] * 9])
    networks = {"rgb": vit(), "depth": vit(48, 3)}
    plain, x = copy.deepcopy(networks), pictures()
    model = tokenfusion.fuse(networks, fuser=EVERYTHING, projection={("rgb", "depth"): index}).eval()
    seen = watch(model, "rgb")
    out = model(x)
    own = stem(plain["rgb"], x["rgb"])
    same = (seen[0] == own).all(-1)[:, 1:]
    assert torch.equal(same, index < 0), "at theta 1 all others are replaced"
    torch.testing.assert_close(out.outputs["rgb"][1], plain["rgb"](x["rgb"])[1])
    assert torch.equal(out.outputs["depth"], plain["depth"](x["depth"])), "depth receives nothing"
    assert (out.scores[0][0][index < 0] == 1).all()
    assert torch.equal(out.donors[0][0] < 0, index < 0)
    assert model.block_names() == ["rgb.blocks.0", "rgb.blocks.1"]
    rates = model.rates(out.scores, out.present, out.donors)
    assert rates["rgb.blocks.0"].exchanged.tolist() == [1.0], "of the tokens that have a stand-in"


def test_deeper_networks_spread_their_blocks_over_the_steps() -> None:
    model = tokenfusion.fuse({"rgb": vit(depth=2), "depth": vit(48, 5)}).eval()
    assert model.block_names() == ["rgb.blocks.0", "depth.blocks.0", "rgb.blocks.1", "depth.blocks.3"]
    assert model.account[1] == "depth: 5 blocks of width 48 in 2 steps"


def test_three_streams_take_from_the_one_allotted() -> None:
    networks = {"rgb": vit(32), "depth": vit(48), "normal": vit(40)}
    plain = copy.deepcopy(networks)
    x = {**pictures(), "normal": drawn(2, 3, 48, 48, seed=3)}
    model = tokenfusion.fuse(networks, fuser=EVERYTHING, seed=5).eval()
    seen = watch(model, "depth")
    model(x)
    offers = {g: model.bridge(1, g).nets[0](stem(plain[n], x[n])[:, 1:]) for g, n in ((0, "rgb"), (2, "normal"))}
    partner = partners(3, 9, 5)[1]
    assert set(partner.tolist()) == {0, 2}
    for token, giver in enumerate(partner.tolist()):
        torch.testing.assert_close(seen[0][:, 1 + token], offers[giver][:, token])


def test_pairs_that_are_left_out_do_not_exchange() -> None:
    networks = {"rgb": vit(32), "depth": vit(48), "normal": vit(40)}
    maps = {("rgb", "normal"): torch.arange(9), ("depth", "rgb"): torch.arange(9)}
    model = tokenfusion.fuse(networks, fuser=EVERYTHING, projection=maps).eval()
    x = {**pictures(), "normal": drawn(2, 3, 48, 48, seed=3)}
    seen = watch(model, "rgb")
    model(x)
    model({**x, "depth": 2 * x["depth"]})
    assert torch.equal(seen[0], seen[1])
    model({**x, "normal": 2 * x["normal"]})
    assert (seen[0] != seen[2]).any(-1)[:, 1:].all(), "all tokens are allotted to the one giver"


def test_a_camera_per_sample_comes_with_the_inputs() -> None:
    def find(inputs: dict[str, Tensor]) -> Tensor:
        return camera_index(inputs["points"], inputs["camera"], (48, 48), 16)

    camera = torch.tensor([[24.0, 24, 0, 0], [0, 24, -24, 0], [0, 1, 0, 0]]).expand(2, 3, 4)
    x = {**pictures(), "points": drawn(2, 9, 3) + torch.tensor([0.0, 3, 0]), "camera": camera}
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF, projection={("rgb", "depth"): find}).eval()
    out = model(x)
    assert torch.equal(out.donors[0][0] >= 0, find(x) >= 0)
    alone = model({"rgb": x["rgb"]})
    torch.testing.assert_close(alone.outputs["rgb"], vit()(x["rgb"]))
    with pytest.raises(ValueError, match="inputs must be some of rgb, depth; got rgb, camera"):
        tokenfusion.fuse({"rgb": vit(), "depth": vit(48)})({"rgb": x["rgb"], "camera": camera})


def test_h_is_the_identity_between_equals_unless_asked_for() -> None:
    networks = {"rgb": vit(), "depth": vit(), "wide": vit(48), "fine": vit(size=64)}
    model = tokenfusion.fuse(networks)
    alike = {pair for pair, bridge in model.bridges.items() if isinstance(bridge.nets[0], nn.Identity)}
    assert alike == {"0_1", "1_0"}
    assert "rgb takes tokens of depth as they are" in model.account
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit()}, mlp=True)
    assert not any(isinstance(bridge.nets[0], nn.Identity) for bridge in model.bridges.values())


def test_positions_are_re_added_before_every_step_but_the_first() -> None:
    networks = {"rgb": vit(depth=3), "depth": vit(48, 3)}
    plain, x = copy.deepcopy(networks["rgb"]), pictures()
    exchange = functools.partial(TokenExchange, threshold=0.0, init_bias=100.0)
    model = tokenfusion.fuse(networks, fuser=exchange, alignment=True).eval()
    tokens = stem(plain, x["rgb"])
    position = plain.pos_embed.detach().clone()
    position[:, 0] = 0
    for number, block in enumerate(plain.blocks):
        tokens = block(tokens + position if number else tokens)
    torch.testing.assert_close(model(x).outputs["rgb"], plain.forward_head(plain.norm(tokens)))


@pytest.mark.parametrize("word", ["average", "random", "concat"])
def test_other_ways_to_exchange(word: str) -> None:
    networks = {"rgb": vit(), "depth": vit()}
    plain, x = copy.deepcopy(networks), pictures()
    model = tokenfusion.fuse(networks, fuser=word).eval()
    seen = watch(model, "rgb")
    out = model(x)
    own, other = (stem(plain[name], x[name])[:, 1:] for name in ("rgb", "depth"))
    if word == "average":
        torch.testing.assert_close(seen[0][:, 1:], (own + other) / 2)
    elif word == "concat":  # it starts as the networks alone
        assert all(torch.equal(out.outputs[name], plain[name](x[name])) for name in plain)
        torch.nn.init.ones_(model.exchanges[0]["0"].merge.weight)
        model(x)
        torch.testing.assert_close(seen[1][:, 1:], (own + other).sum(-1, keepdim=True).expand_as(own))
    else:
        replaced = (seen[0][:, 1:] == other).all(-1)
        assert replaced.sum(1).tolist() == [3, 3], "30 % of 9"
        assert torch.equal(seen[0][:, 1:][~replaced], own[~replaced])
    assert model.threshold is None
    assert out.scores == []


# ---- missing modalities ------------------------------------------------------------------------------------------------


def test_a_missing_modality_is_left_out_whatever_it_sends() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)}, fuser=HALF).eval()
    x = pictures()
    out = model({"rgb": x["rgb"]})
    assert list(out.outputs) == ["rgb"]
    torch.testing.assert_close(out.outputs["rgb"], vit()(x["rgb"]))
    torch.testing.assert_close(out.ensemble, out.outputs["rgb"])
    assert (out.scores[1] == 0).all(), "the method fills it in"
    assert (out.donors[0] == -1).all(), "it is no donor"
    broken = {"rgb": x["rgb"], "depth": torch.full_like(x["depth"], float("nan"))}
    same = model(broken, torch.stack([ALL, NONE]))
    torch.testing.assert_close(same.ensemble, out.ensemble)
    rates = model.rates(out.scores, out.present, out.donors)
    assert all(rate.exchanged.tolist() == [0.0] for rate in rates.values())


def test_a_sample_that_lacks_a_modality_does_not_touch_the_others() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3), "normal": vit(40)}, fuser=HALF).train()
    x = {**pictures(), "normal": drawn(2, 3, 48, 48, seed=3)}
    whole = model(x)
    x["depth"] = x["depth"].clone()
    x["depth"][1] = float("nan")
    x["depth"].requires_grad_()
    out = model(x, torch.stack([ALL, torch.tensor([True, False]), ALL]))
    torch.testing.assert_close(out.outputs["rgb"][0], whole.outputs["rgb"][0])
    (out.outputs["rgb"].sum() + out.outputs["normal"].sum() + model.sparsity()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (x["depth"].grad[1] == 0).all()
    assert (x["depth"].grad[0] != 0).any()
    assert (out.donors[0][:, 1] >= 0).all(), "the third modality stands in for the second"


# ---- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_reach_projections_and_score_nets(recomputes: bool) -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)}, fuser=HALF).train()
    model.freeze(private=True)
    model.set_grad_checkpointing(recomputes)
    runs = watch(model, "depth")
    with pytest.raises(RuntimeError, match="forward pass in training mode"):
        model.sparsity()
    out = model(pictures())
    (sum(o.square().sum() for o in out.outputs.values()) + model.sparsity()).backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(runs) == 1 + recomputes
    assert learnt == {n for n, _ in model.named_parameters() if n.startswith(("bridges", "exchanges"))}


def test_fusing_leaves_every_modules_mode_alone() -> None:
    network = vit().train()
    network.blocks[1].eval()
    before = [module.training for module in network.modules()]
    tokenfusion.fuse({"rgb": network}, fuser="none")
    assert [m.training for m in network.modules() if not isinstance(m, FusedBlock)] == before


def test_frozen_networks_keep_learning_norms() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)})
    model.freeze()
    learning = {name for name, p in model.networks.named_parameters() if p.requires_grad}
    assert learning
    assert all("norm" in name for name in learning)


def test_sparsity_is_the_mean_score_of_tokens_that_have_a_stand_in() -> None:
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, -1, -1])
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF, projection={("rgb", "depth"): index})
    out = model.train()(pictures())
    expected = sum(score[..., :7].sum() for score in out.scores)
    torch.testing.assert_close(model.sparsity("sum"), expected)


def test_rates_of_full_maps_are_those_of_a_shared_network() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit()}, fuser=HALF).eval()
    out = model(pictures())
    both = torch.cat(out.scores[:2])
    expected = exchange_rates(both, both.flip(0), 0.5)
    rates = model.rates(out.scores, out.present, out.donors)
    for number, name in enumerate(("rgb.blocks.0", "depth.blocks.0")):
        assert rates[name].exchanged.tolist() == expected.exchanged[number : number + 1].tolist()
        assert rates[name].donor_below.tolist() == expected.donor_below[number : number + 1].tolist()


def test_copies_and_pickles_stand_alone() -> None:
    model = tokenfusion.fuse(
        {"rgb": vit(), "audio": ast()}, fuser=HALF, projection={("audio", "rgb"): torch.arange(15) % 9}
    )
    x = {"rgb": drawn(2, 3, 48, 48), "audio": drawn(2, 56, 36)}
    model.train()(x)
    model.eval()
    expected = model(x).ensemble
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).ensemble, expected)
        with torch.no_grad():
            next(other.networks["rgb"].parameters()).add_(1)
        assert not torch.equal(other(x).ensemble, expected)
    assert torch.equal(model(x).ensemble, expected)
    assert not any("index" in name for name in model.state_dict())


# ---- compile and export --------------------------------------------------------------------------------------------------


def test_it_compiles_whole() -> None:
    model = tokenfusion.fuse({"rgb": vit(depth=2), "depth": vit(48, 1)}, fuser=HALF).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures()).ensemble, model(pictures()).ensemble)


def test_it_exports() -> None:
    index = {("rgb", "audio"): time_index((1, 3, 3), (3, 5), 0), ("audio", "rgb"): torch.arange(15) % 9}
    model = tokenfusion.fuse({"rgb": vit(), "audio": ast()}, fuser=HALF, projection=index, alignment=True).eval()
    x = {"rgb": drawn(2, 3, 48, 48), "audio": drawn(2, 56, 36)}
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).ensemble, model(x).ensemble)


@pytest.mark.parametrize(("fuser", "traced"), [("none", 2), (HALF, 2), (HALF, 3)])
def test_it_exports_for_any_batch(fuser: object, traced: int) -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=fuser).eval()
    some, batch = drawn(traced, 3, 48, 48), torch.export.Dim("batch", min=2, max=8)
    shapes = ({"rgb": {0: batch}, "depth": {0: batch}},)
    exported = torch.export.export(model, ({"rgb": some, "depth": some.clone()},), dynamic_shapes=shapes).module()
    other = {"rgb": drawn(5, 3, 48, 48), "depth": drawn(5, 3, 48, 48, seed=2)}
    torch.testing.assert_close(exported(other).ensemble, model(other).ensemble)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, ONCE), reason="torch cannot be told to leave side effects out")
def test_recomputed_blocks_compile_as_one_graph() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)}, fuser=HALF).train()
    model.set_grad_checkpointing()
    trained(model, model(pictures())).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    with torch._dynamo.config.patch({ONCE: True}):
        trained(model, torch.compile(model, fullgraph=True, backend="aot_eager")(pictures())).backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, plain)


# ---- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            {("rgb", "audio"): torch.zeros(8, dtype=torch.int64)},
            r"wanted int64 \[9\] or \[B, 9\], a token of audio for each of",
        ),
        ({("rgb", "audio"): torch.zeros(9)}, r"got float32 \[9\]"),
        ({("rgb", "audio"): torch.full((9,), 15)}, r"an index lies in 15..15; wanted 0..14, or -1"),
        (
            {("rgb", "sound"): torch.zeros(9)},
            r"'sound'\) is no pair of a receiver and another giver; wanted two of rgb, audio",
        ),
        ({("rgb", "rgb"): torch.zeros(9)}, "is no pair"),
        ({("rgb", "audio"): 3}, "wanted an int64 tensor or a function of the inputs; got 3"),
        (None, "audio: ASTForAudioClassification works on no picture .* give projection="),
    ],
)
def test_wrong_projections_are_named(projection: object, message: str) -> None:
    with pytest.raises(tokenfusion.UserError, match=message):
        tokenfusion.fuse({"rgb": vit(), "audio": ast()}, projection=projection)


def test_an_index_made_from_the_inputs_is_checked_when_it_comes() -> None:
    model = tokenfusion.fuse(
        {"rgb": vit(), "depth": vit(48)}, projection={("rgb", "depth"): lambda inputs: torch.zeros(3, 9).long()}
    )
    with pytest.raises(tokenfusion.UserError, match=r"wanted int64 \[9\] or \[2, 9\], .* got int64 \[3, 9\]"):
        model(pictures())


@pytest.mark.parametrize("value", [-2, 9])
def test_an_index_made_from_the_inputs_is_in_range(value: int) -> None:
    find = {("rgb", "depth"): lambda inputs: torch.full((9,), value)}
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, projection=find)
    with pytest.raises(tokenfusion.UserError, match=rf"an index lies in {value}..{value}; wanted 0..8, or -1 where"):
        model(pictures())


def hooks(networks: dict[str, nn.Module]) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for n in networks.values() for m in n.modules())


def swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)


@pytest.mark.parametrize(
    ("others", "arguments"),
    [
        ({}, {"projection": {("rgb", "typo"): torch.arange(9)}}),
        ({}, {"projection": {("rgb", "depth"): torch.arange(8)}}),
        ({}, {"fuser": functools.partial(TokenFusion, threshold=0.5)}),
        ({}, {"fuser": lambda dim, seed: 1 / 0}),
        ({"more": swin}, {}),
        ({"more": lambda: Own(torch.relu)}, {"example": {"more": torch.zeros(2, 3, 48, 48)}}),
        ({"more": nn.Identity}, {}),
    ],
)
def test_networks_whose_fusing_failed_are_as_they_were(others: dict, arguments: dict) -> None:
    networks = {"rgb": vit(), "depth": vit(48, 3)}
    given = {**networks, **{name: make() for name, make in others.items()}}
    before = {name: list(network.modules()) for name, network in given.items()}
    with pytest.raises((tokenfusion.UserError, ZeroDivisionError, StopIteration)):
        tokenfusion.fuse(given, **arguments)
    assert {name: list(network.modules()) for name, network in given.items()} == before
    assert not hooks(given)
    model = tokenfusion.fuse(networks, fuser="none").eval()
    assert torch.equal(model(pictures()).outputs["rgb"], vit()(pictures()["rgb"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_missing_input_has_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48, 3)}, fuser=HALF, alignment=True).eval().to(dtype)
    x = pictures()["rgb"].to(dtype)
    out = model({"rgb": x})
    assert out.outputs["rgb"].dtype == dtype
    torch.testing.assert_close(out.outputs["rgb"], vit().to(dtype)(x), rtol=0.05, atol=0.05)


class Normed(Own):
    """With batch norms in the stem and in the tail."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8, momentum=None)
        self.stem, self.head = nn.Sequential(self.stem, norm), nn.Sequential(nn.BatchNorm1d(8), self.head)


def test_batch_norms_count_every_pass_once() -> None:
    torch.manual_seed(0)
    network, x = Normed().train(), {"depth": drawn(2, 3, 48, 48)}
    plain = copy.deepcopy(network)
    model = tokenfusion.fuse({"depth": network}, fuser="none", example={"depth": torch.zeros(2, 3, 48, 48)}).train()
    for _ in range(2):
        torch.testing.assert_close(model(x).outputs["depth"], plain(x["depth"]))
    for one, other in zip(model.networks["depth"].buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d))


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_is_missing_is_not_among_the_statistics_of_separate_networks(recomputes: bool) -> None:
    networks = {name: Normed().train() for name in ("rgb", "depth")}
    example = {name: torch.zeros(2, 3, 48, 48) for name in networks}
    model = tokenfusion.fuse(networks, fuser="none", example=example).train()
    if recomputes:
        model.set_grad_checkpointing()
    before = copy.deepcopy(model.networks["depth"].state_dict())
    model(pictures(), torch.stack([ALL, torch.tensor([True, False])])).ensemble.sum().backward()
    model({"rgb": pictures()["rgb"]}).ensemble.sum().backward()
    for name, value in model.networks["depth"].state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.networks["rgb"].stem[1].num_batches_tracked == 2
    assert all(m.training for m in model.networks["depth"].modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"fuser": "tokenfusion-paper"},
            "fuser is 'tokenfusion-paper'; separate networks take none, concat, average, random, tokenfusion",
        ),
        ({"fuser": functools.partial(TokenFusion, threshold=0.5)}, "exchange by an Exchange .* got TokenFusion"),
        ({"modalities": ["rgb", "depth"]}, "leave `modalities` out"),
        ({"score_nets": "stage"}, "fuse\\(\\) of separate networks takes no 'score_nets'"),
    ],
)
def test_what_separate_networks_do_not_take_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(tokenfusion.UserError, match=message):
        tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, **arguments)


def test_wrong_inputs_and_names_are_told() -> None:
    model, x = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}).eval(), pictures()
    for wrong in (None, x["depth"].numpy()):
        with pytest.raises(ValueError, match="depth must be a tensor"):
            model({**x, "depth": wrong})
    with pytest.raises(ValueError, match=r"depth is \[2, 1, 48, 48\], its VisionTransformer takes 3 channels"):
        model({**x, "depth": x["depth"][:, :1]})
    with pytest.raises(ValueError, match="depth has 1 samples, rgb has 2"):
        model({**x, "depth": x["depth"][:1]})
    with pytest.raises(ValueError, match="wanted inputs by name, .* got Tensor"):
        model(x["rgb"])
    with pytest.raises(tokenfusion.UserError, match="'keys' cannot name a modality"):
        tokenfusion.fuse({"keys": vit(), "depth": vit(48)})


def test_what_a_shared_network_does_not_take_is_named() -> None:
    with pytest.raises(tokenfusion.UserError, match="fuse\\(\\) of one shared network takes no 'projection'"):
        tokenfusion.fuse(vit(), ["rgb", "depth"], projection={})
    with pytest.raises(tokenfusion.UserError, match="wanted the names of the streams"):
        tokenfusion.fuse(vit())
    network = vit()
    with pytest.raises(tokenfusion.UserError, match="one network for several modalities is shared"):
        tokenfusion.fuse({"rgb": network, "depth": network})


def test_norms_behind_attention_take_no_weights() -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=48, embed_dim=32, num_heads=2, block_fn=_PostNorm
    )
    with pytest.raises(
        tokenfusion.UserError, match=r"rgb: block blocks\.0 \(_PostNorm\) has no norm before its attention"
    ):
        tokenfusion.fuse({"rgb": network, "depth": vit()})


class _PostNorm(nn.Module):
    """x + norm(attention(x)), as Swin v2 has it."""

    def __init__(self, dim: int, num_heads: int, **unused: object) -> None:
        super().__init__()
        self.attn, self.norm = timm.layers.Attention(dim, num_heads), nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.attn(x))
        return x + self.mlp(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_another_precision(dtype: torch.dtype) -> None:
    model = tokenfusion.fuse({"a": vit().to(dtype), "b": vit().to(dtype)}, mlp=True)
    x = {name: torch.randn(2, 3, 48, 48, dtype=dtype) for name in ("a", "b")}
    assert all(answer.dtype == dtype for answer in model(x).outputs.values())
    assert model.sparsity().dtype == dtype


def test_a_networks_own_checkpointing_is_taken_over() -> None:
    first = vit()
    first.set_grad_checkpointing(True)
    model = tokenfusion.fuse({"a": first, "b": vit()}).train()
    assert model.recomputes
    first.set_grad_checkpointing(True)
    with pytest.raises(tokenfusion.UserError, match="own gradient checkpointing is on"):
        model({name: torch.randn(2, 3, 48, 48) for name in ("a", "b")})


# ---- what training and shipping ask for ------------------------------------------------------------------------------


def trained(model: FusedStreams, out) -> Tensor:
    return sum(y.float().square().mean() for y in (*out.outputs.values(), out.ensemble)) + model.sparsity()


def test_bf16_autocast_trains() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pictures())
    trained(model, out).backward()
    assert out.outputs["rgb"].dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_has_one_name() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF)
    places = [x.data_ptr() for x in model.state_dict().values() if x.numel()]
    assert len(set(places)) == len(places)
    other = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF).eval()
    nn.init.zeros_(other.networks["rgb"].head.weight)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(pictures()).ensemble, model.eval()(pictures()).ensemble)


def test_lora_trains_its_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF).eval()
    before = model(pictures()).ensemble
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"]))
    assert torch.equal(adapted.eval()(pictures()).ensemble, before)
    trained(model, adapted.train()(pictures())).backward()
    learning = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert learning
    assert all("lora_" in name for name in learning)


@pytest.mark.slow
def test_onnx(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Named(nn.Module):
        def __init__(self, model: FusedStreams) -> None:
            super().__init__()
            self.model = model

        def forward(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
            out = self.model({"rgb": rgb, "depth": depth})
            return (*out.outputs.values(), out.ensemble)

    model, x = Named(tokenfusion.fuse({"rgb": vit(), "depth": vit(48)}, fuser=HALF)).eval(), pictures()
    torch.onnx.export(model, tuple(x.values()), tmp_path / "fused.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: image.numpy() for name, image in x.items()})
    for ours, theirs in zip(model(**x), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


def test_random_exchange_draws_other_tokens_before_every_step() -> None:
    model = tokenfusion.fuse({"rgb": vit(), "depth": vit()}, fuser="random").eval()
    seeds = [exchange.seed for step in model.exchanges for exchange in step.values()]
    assert len(set(seeds)) == len(seeds) > 2
