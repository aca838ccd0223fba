"""The composer: streams stacked, fusers placed, positions aligned, missing modalities."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from every_fuser import MAKERS
from torch import nn

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.fusion import Context, NoFusion, PerModality, TokenFusion

FUSERS = {**MAKERS, "everything": partial(TokenFusion, threshold=1.0)}


# ---- structure -----------------------------------------------------------------------------------------------------


def test_without_fusion_every_stream_is_the_plain_network(small_mit, shake, images) -> None:
    single = shake(small_mit()).eval()
    fused = FusedBackbone(copy.deepcopy(single), ["rgb", "depth"], NoFusion).eval()
    x = images(2)
    features = fused(x)
    assert features.scores == []
    assert features.present is None
    for m, name in enumerate(("rgb", "depth")):
        for mine, expected in zip(features.maps, single(x[name]), strict=True):
            torch.testing.assert_close(mine[m], expected, rtol=1e-5, atol=1e-5)


def test_norms_are_private_and_the_rest_is_shared(small_mit) -> None:
    fused = FusedBackbone(small_mit(), ["a", "b", "c"], NoFusion)
    for name, module in fused.backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert isinstance(fused.backbone.get_submodule(name.rsplit(".", 1)[0]), PerModality), name
    shared = sum(p.numel() for p in small_mit().parameters() if p.dim() > 1)
    assert sum(p.numel() for p in fused.backbone.parameters() if p.dim() > 1) == shared


@pytest.mark.parametrize(("score_nets", "nets"), [("stage", [1, 1, 1, 1]), ("block", [1, 2, 1, 1])])
def test_score_networks_per_stage_or_per_block(small_mit, score_nets: str, nets: list[int]) -> None:
    fused = FusedBackbone(small_mit(), ["a", "b"], TokenFusion, score_nets=score_nets)
    assert [len(stage) for stage in fused.fusers] == nets
    assert (fused.fuser_of(1, 0) is fused.fuser_of(1, 1)) == (score_nets == "stage")
    assert fused.block_names() == ["stage1.0", "stage2.0", "stage2.1", "stage3.0", "stage4.0"]


@pytest.mark.parametrize("score_nets", ["stage", "block"])
def test_last_placement_fuses_the_last_block_of_each_stage(small_mit, shake, images, score_nets: str) -> None:
    fused = FusedBackbone(small_mit(), ["rgb", "depth"], TokenFusion, score_nets=score_nets, placement="last").eval()
    shake(fused)
    assert isinstance(fused.fuser_of(1, 0), NoFusion)
    assert fused.block_names() == ["stage1.0", "stage2.1", "stage3.0", "stage4.0"]
    features = fused(images(2))
    assert [s.shape[2] for s in features.scores] == [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    assert list(fused.rates(features.scores)) == fused.block_names()


def test_fusers_know_their_width_streams_and_stage(small_mit) -> None:
    asked = []

    def factory(dim: int, modalities: int, stage: int) -> NoFusion:
        asked.append((dim, modalities, stage))
        return NoFusion(dim, modalities, stage)

    FusedBackbone(small_mit(), ["a", "b", "c"], factory)
    assert asked == [(8, 3, 0), (16, 3, 1), (20, 3, 2), (32, 3, 3)]


def test_rates_are_those_of_the_scores(small_mit, shake, images) -> None:
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], FUSERS["tokenfusion"])).eval()
    scores = fused(images(2)).scores
    rates = fused.rates(scores)
    for name, score in zip(fused.block_names(), scores, strict=True):
        below = score < 0.5
        torch.testing.assert_close(rates[name].exchanged, below.float().mean((1, 2)))
        both = (below & below.flip(0)).float().mean((1, 2)) / below.float().mean((1, 2)).clamp(min=1e-9)
        torch.testing.assert_close(rates[name].donor_below, both)
    assert fused.threshold == 0.5


def test_a_fuser_that_blocks_share_is_told_which_of_them_runs(small_mit, images) -> None:
    seen: list[int] = []

    class Spy(NoFusion):
        def leave(self, attended: torch.Tensor, scores: torch.Tensor | None, ctx: Context) -> torch.Tensor:
            seen.append(ctx.block)
            return attended

    FusedBackbone(small_mit((1, 3, 1, 1)), ["rgb", "depth"], Spy)(images(2))
    assert seen == [0, 0, 1, 2, 0, 0]


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_scales_are_those_of_the_norms_before_attention(small_segmenter, fuser: str) -> None:
    """Of every block whose fuser goes by them, in order."""
    model = small_segmenter(FUSERS[fuser], 3)
    stages = model.backbone.backbone.stages
    norms = [block.norm1 for stage in stages for block in stage.blocks] if "channel" in fuser else []
    expected = [torch.stack([own.weight for own in norm]) for norm in norms]
    torch.testing.assert_close(model.backbone.scales(), expected, rtol=0, atol=0)
    if fuser == "bottleneck":  # refuses other placements
        return
    last = small_segmenter(FUSERS[fuser], 3, placement="last").backbone.scales()
    assert [s.shape for s in last] == ([(3, dim) for dim in model.backbone.dims] if "channel" in fuser else [])


# ---- input ---------------------------------------------------------------------------------------------------------


def test_order_of_the_names_in_the_input_does_not_matter(small_mit, shake, images) -> None:
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], FUSERS["tokenfusion"])).eval()
    x = images(2)
    for a, b in zip(fused(x).maps, fused(dict(reversed(x.items()))).maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("names", [[], ["rgb", "rgb"]])
def test_modalities_must_be_different_names(small_mit, names: list[str]) -> None:
    with pytest.raises(ValueError, match="different names, at least one"):
        FusedBackbone(small_mit(), names, NoFusion)


def test_wrong_inputs_are_named(small_mit) -> None:
    fused = FusedBackbone(small_mit(), ["rgb", "depth"], NoFusion)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="some of rgb, depth; got rgb, thermal"):
        fused({"rgb": x, "thermal": x})
    with pytest.raises(ValueError, match="some of rgb, depth; got none"):
        fused({})
    with pytest.raises(ValueError, match=r"one shape; got .*64, 64.*64, 32"):
        fused({"rgb": x, "depth": x[..., :32]})


@pytest.mark.parametrize("option", ["score_nets", "placement"])
def test_misspelt_options_are_named(small_mit, option: str) -> None:
    with pytest.raises(ValueError, match="evry"):
        FusedBackbone(small_mit(), ["rgb", "depth"], NoFusion, **{option: "evry"})  # type: ignore[arg-type]


# ---- residual positional alignment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_alignment_starts_as_the_identity(small_mit, shake, images, fuser: str) -> None:
    with_, without = (
        shake(FusedBackbone(small_mit(), ["rgb", "depth"], FUSERS[fuser], alignment=flag)) for flag in (True, False)
    )
    without.load_state_dict({k: v for k, v in with_.state_dict().items() if k != "position.embedding"})
    nn.init.zeros_(with_.position.embedding)
    for a, b in zip(with_.eval()(images(2)).maps, without.eval()(images(2)).maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fuser", ["none", "tokenfusion", "tokenfusion-paper", "concat"])
def test_position_gradient_comes_through_the_first_layer_alone(small_mit, shake, images, fuser: str) -> None:
    """Walk the layers by hand with two embeddings: one that the first layer sees, another that all later ones see."""
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], FUSERS[fuser], alignment=True)).double().eval()
    nn.init.normal_(fused.position.embedding, std=0.3)
    x = {name: image.double() for name, image in images(2).items()}
    probes = [torch.randn_like(m) for m in fused(x).maps]
    loss = sum((m * p).sum() for m, p in zip(fused(x).maps, probes, strict=True))
    (gradient,) = torch.autograd.grad(loss, fused.position.embedding)

    first = fused.position.embedding.detach().clone().requires_grad_()
    later = fused.position.embedding.detach().clone().requires_grad_()

    def walk() -> torch.Tensor:
        from tokenfusion.backbones.mit import to_map
        from tokenfusion.fusion import Context, merge, split

        def position(embedding: torch.Tensor, grid: tuple[int, int], dim: int) -> torch.Tensor:
            return torch.func.functional_call(fused.position, {"embedding": embedding}, (grid, dim))

        image, total = merge(torch.stack([x["rgb"], x["depth"]])), 0
        for s, stage in enumerate(fused.backbone.stages):
            tokens, grid = stage.embed(image)
            tokens = split(tokens, 2)
            for b, block in enumerate(stage.blocks):
                ctx = Context(grid)
                if (s, b) == (0, 0):
                    tokens = tokens + position(first, grid, stage.dim)
                else:
                    ctx.position = position(later, grid, stage.dim)
                tokens, _ = fused.fuser_of(s, b)(block, tokens, ctx)
            image = to_map(stage.norm(merge(tokens)), grid)
            total = total + (split(image, 2) * probes[s]).sum()
        return total

    by_hand = walk()
    torch.testing.assert_close(by_hand, loss)
    of_first, of_later = torch.autograd.grad(by_hand, (first, later))
    torch.testing.assert_close(gradient, of_first)
    assert of_later.abs().max() > 1e-3, "later layers do see the embedding, their gradient is stopped"


def test_alignment_acts_at_any_size(small_mit, shake) -> None:
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], NoFusion, alignment=True)).eval()
    nn.init.normal_(fused.position.embedding)
    for size in ((32, 32), (70, 101)):
        x = {name: torch.randn(1, 3, *size) for name in ("rgb", "depth")}
        assert all(m.isfinite().all() for m in fused(x).maps)


# ---- missing modalities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_missing_key_equals_absent_flag_and_garbage(
    small_segmenter, images, fuser: str, modalities: int, alignment: bool
) -> None:
    model = small_segmenter(FUSERS[fuser], modalities, alignment=alignment)
    x = images(modalities)
    present = torch.ones(modalities, 2, dtype=torch.bool)
    present[1] = False
    missing = model({name: image for name, image in x.items() if name != "depth"})
    flagged = model({**x, "depth": 1e3 * torch.randn_like(x["depth"])}, present)
    assert list(missing.logits) == [name for name in x if name != "depth"]
    assert torch.equal(missing.present, present)
    assert missing.ensemble.isfinite().all()
    assert torch.equal(missing.ensemble, flagged.ensemble)
    for name, logits in missing.logits.items():
        assert logits.isfinite().all()
        assert torch.equal(logits, flagged.logits[name])
    for a, b in zip(missing.scores, flagged.scores, strict=True):
        assert torch.equal(a, b)
        assert (a[1] == 0).all()


@pytest.mark.parametrize("fuser", sorted(FUSERS))
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_broken_sensor_marked_as_missing_breaks_nothing(small_segmenter, images, fuser: str, garbage: float) -> None:
    model = small_segmenter(FUSERS[fuser])
    x = images(2)
    present = torch.tensor([[True, True], [True, False]])
    depth = x["depth"].clone()
    depth[1] = garbage
    output = model({"rgb": x["rgb"], "depth": depth}, present)
    assert output.ensemble.isfinite().all()
    assert torch.equal(output.ensemble, model(x, present).ensemble)


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_presence_is_per_sample(small_segmenter, images, fuser: str) -> None:
    """A sample without depth is as if it came alone without depth; its neighbour is as if nothing were missing."""
    model, x = small_segmenter(FUSERS[fuser], 3), images(3)
    present = torch.tensor([[True, True], [False, True], [True, True]])
    mixed = model(x, present)
    alone = model({name: image[:1] for name, image in x.items() if name != "depth"})
    complete = model({name: image[1:] for name, image in x.items()})
    torch.testing.assert_close(mixed.ensemble[:1], alone.ensemble, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.ensemble[1:], complete.ensemble, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_flags_and_missing_keys_add_up(small_segmenter, images, fuser: str) -> None:
    model, x = small_segmenter(FUSERS[fuser], 3), images(3)
    present = torch.tensor([[True, True], [True, True], [True, False]])
    output = model({name: image for name, image in x.items() if name != "depth"}, present)
    assert output.present.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_one_stream_left_of_three(small_segmenter, images, fuser: str) -> None:
    model, x = small_segmenter(FUSERS[fuser], 3), images(3)
    output = model({"thermal": x["thermal"]})
    assert list(output.logits) == ["thermal"]
    assert output.logits["thermal"].isfinite().all()
    torch.testing.assert_close(output.ensemble, output.logits["thermal"])


def test_a_missing_stream_starts_as_zeros_after_the_stem(small_mit, shake, images) -> None:
    """Without fusion and position it sees no image at all: the same whatever the sample."""
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], NoFusion)).eval()
    seen = []
    fused.backbone.stages[0].blocks[0].norm1[1].register_forward_hook(lambda module, args, result: seen.append(args[0]))
    fused({"rgb": images(1)["rgb"]})
    assert (seen[0] == 0).all()


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_gradients_stay_finite_where_a_modality_is_missing(small_segmenter, images, fuser: str) -> None:
    model, x = small_segmenter(FUSERS[fuser], 3), images(3)
    present = torch.tensor([[True, False], [False, True], [True, False]])
    output = model(x, present)
    (output.ensemble.pow(2).sum() + sum(v.pow(2).sum() for v in output.logits.values())).backward()
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not broken


# ---- handling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_deepcopy_pickle_and_state_dict(small_segmenter, images, fuser: str) -> None:
    model, x = small_segmenter(FUSERS[fuser], 3, alignment=True, score_nets="block"), images(3)
    expected = model(x).ensemble
    assert torch.equal(copy.deepcopy(model)(x).ensemble, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).ensemble, expected)
    other = small_segmenter(FUSERS[fuser], 3, alignment=True, score_nets="block")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert torch.equal(other(x).ensemble, expected)


@pytest.mark.parametrize("score_nets", ["stage", "block"])
@pytest.mark.parametrize("placement", ["every", "last"])
def test_state_dict_holds_no_tensor_twice(small_segmenter, score_nets: str, placement: str) -> None:
    """safetensors refuses shared memory, and a second name would be a second truth."""
    model = small_segmenter(TokenFusion, 3, alignment=True, score_nets=score_nets, placement=placement)
    pointers = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(set(pointers)) == len(pointers)


def test_stage_and_block_share_the_names_of_the_first_block(small_segmenter) -> None:
    stage = set(small_segmenter(TokenFusion, score_nets="stage").state_dict())
    block = set(small_segmenter(TokenFusion, score_nets="block").state_dict())
    assert stage < block
    assert all(name.startswith("backbone.fusers.1.1.") for name in block - stage)


def test_a_network_is_fused_once(small_mit) -> None:
    network = small_mit()
    FusedBackbone(network, ["rgb", "depth"], TokenFusion)
    with pytest.raises(ValueError, match="deepcopy"):
        FusedBackbone(network, ["rgb", "depth"], TokenFusion)


def test_flags_of_another_shape_are_refused(small_segmenter, images) -> None:
    model = small_segmenter(FUSERS["tokenfusion"])
    for present in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"bool \[2, 2\]"):
            model(images(2), present)
