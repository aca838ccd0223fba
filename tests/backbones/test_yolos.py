"""YOLOS alone: the reference's numbers, transformers', every layout of a checkpoint, any image size."""

from __future__ import annotations

import json

import pytest
import torch
from golden_rules import Case

from tokenfusion.backbones.vit import ViT, resampled
from tokenfusion.backbones.weights import StateDict, load_into, read_checkpoint
from tokenfusion.backbones.yolos import VARIANTS, Yolos, yolos
from tokenfusion.backbones.yolos_keys import from_hf_yolos, from_yolos, load_detector, variant_of
from tokenfusion.errors import UserError
from tokenfusion.tasks.detection3d.losses2d import Loss2dSettings, match, postprocess, yolos_losses


def small_yolos(mid: bool = False, classes: int = 5, grid: tuple[int, int] = (3, 4)) -> Yolos:
    return Yolos(ViT(12, 3, 3, grid=grid), classes, detections=6, mid=mid)


@pytest.fixture(params=[False, True], ids=["plain", "mid"])
def small(shake, request: pytest.FixtureRequest) -> Yolos:
    return shake(small_yolos(request.param)).eval()


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "millions"), [("ti", 6.489), ("s", 30.685)])
def test_parameter_count_is_the_published_one(variant: str, millions: float) -> None:
    with torch.device("meta"):
        assert round(sum(p.numel() for p in yolos(variant).parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_variants_are_told_apart_by_their_tensors(variant: str) -> None:
    with torch.device("meta"):
        network = yolos(variant, classes=10, detections=20, init_size=(64, 96))
        assert variant_of(network.state_dict()) == variant
        assert network.vit.grid == (4, 6)
        assert network.class_head[-1].out_features == 11
        assert (network.mid_pos_embed is not None) == (variant in ("s", "s-dwr", "b"))
        assert network.depth == len(network.vit.blocks)


def test_published_positions_have_the_published_shapes() -> None:
    with torch.device("meta"):
        ti, s = yolos("ti"), yolos("s")
    assert ti.vit.pos_embed.shape == (1, 4251 - 100, 192)
    assert s.mid_pos_embed is not None
    assert s.mid_pos_embed.shape == (11, 1829 - 100, 384)
    assert (ti.dim, ti.depth, ti.patch, ti.detections) == (192, 12, 16, 100)


def test_unknown_variants_are_named(small: Yolos) -> None:
    with pytest.raises(ValueError, match="xs, ti, s, s-dwr, b, not 'tiny'"):
        yolos("tiny")
    with pytest.raises(UserError, match="3 blocks of width 12 are none of YOLOS"):
        variant_of(small.state_dict())
    with pytest.raises(UserError, match="0 blocks of width 0"):
        variant_of({})


@pytest.mark.parametrize("size", [(48, 64), (16, 16), (70, 101)])
def test_forward_is_its_steps(small: Yolos, size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size)
    tokens, grid = small.embed(image)
    assert grid == (size[0] // 16, size[1] // 16)
    assert tokens.shape == (2, 1 + grid[0] * grid[1] + 6, 12)
    for index in range(small.depth):
        tokens = small.block(index, tokens, grid)
    output = small(image)
    assert torch.equal(small.head(tokens).logits, output.logits)
    assert output.logits.shape == (2, 6, 6)
    assert output.boxes.shape == (2, 6, 4)
    assert output.boxes.min() >= 0
    assert output.boxes.max() <= 1


@pytest.mark.parametrize(("variant", "mid"), [("s", False), ("ti", True)])
def test_mid_positions_are_a_choice(variant: str, mid: bool) -> None:
    with torch.device("meta"):
        network, published = (yolos(variant, init_size=(64, 96), mid=wish) for wish in (mid, None))
    assert (network.mid_pos_embed is not None, published.mid_pos_embed is not None) == (mid, not mid)


def test_mid_positions_come_after_every_block_but_the_last(shake) -> None:
    network = shake(small_yolos(mid=True)).eval()
    tokens, grid = network.embed(torch.randn(1, 3, 80, 48))
    assert network.mid_pos_embed is not None
    assert network.mid_det_pos_embed is not None
    for index, block in enumerate(network.vit.blocks):
        added = network.block(index, tokens, grid) - block(tokens, grid)
        if index == 2:
            assert added.abs().max() == 0
        else:
            expected = torch.cat(
                [resampled(network.mid_pos_embed[index][None], (3, 4), grid), network.mid_det_pos_embed[[index]]], 1
            )
            torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_detection_tokens_differ_by_what_is_learned_for_them(small: Yolos) -> None:
    tokens, _ = small.embed(torch.randn(2, 3, 48, 64))
    torch.testing.assert_close(tokens[1, -6:], (small.det_token + small.det_pos_embed)[0])


def test_gradients_reach_every_parameter(small: Yolos) -> None:
    output = small(torch.randn(2, 3, 64, 80))
    sum((value * torch.randn_like(value)).sum() for value in output).backward()
    assert not [name for name, p in small.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_fresh_embeddings_are_drawn() -> None:
    network = small_yolos(mid=True)
    for embedding in network.parameters(recurse=False):
        assert 0.01 < embedding.std() < 0.03


def test_traces_without_a_graph_break(small: Yolos) -> None:
    torch._dynamo.reset()
    image = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image).logits, small(image).logits)


# ---- the reference's numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> tuple[Case, Yolos, StateDict]:
    case = Case("yolos_ti")
    official = case.state_dict()
    network = yolos("ti").eval()
    report = load_detector(network, official)
    assert not report.random
    assert not report.unused
    return case, network, official


def truth(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes, labels = (torch.from_numpy(case.outputs[f"target_{name}_0"])[None] for name in ("boxes", "labels"))
    return boxes, labels, torch.ones_like(labels, dtype=torch.bool)


def test_outputs_matching_and_losses_are_the_references(golden) -> None:
    case, network, _ = golden
    with torch.no_grad():
        output = network(case.input("image"))
    scale = abs(case.outputs["logits"]).max()
    case.assert_close("logits", output.logits, atol=3e-6 * scale)
    case.assert_close("boxes", output.boxes, atol=1e-6)
    settings = Loss2dSettings()
    tokens = match(output, *truth(case), settings)[0].tolist()
    pairs = zip(case.outputs["match_pred_0"].tolist(), case.outputs["match_target_0"].tolist(), strict=True)
    assert dict(pairs) == {token: box for box, token in enumerate(tokens)}
    losses = yolos_losses(output, *truth(case), settings)
    assert list(losses) == ["classes2d", "l1_2d", "giou_2d"]
    for (name, factor), value in zip(
        {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}.items(), losses.values(), strict=True
    ):
        case.assert_close(name, value / factor, atol=1e-5)
    case.assert_close("loss", sum(losses.values()), atol=2e-5)


def test_found_boxes_are_the_references(golden) -> None:
    case, network, _ = golden
    with torch.no_grad():
        found = postprocess(network(case.input("image")), torch.tensor([[480, 640]]))
    assert found.classes[0].tolist() == case.outputs["post_labels_0"].tolist()
    case.assert_close("post_scores_0", found.scores[0], atol=1e-6)
    case.assert_close("post_boxes_0", found.boxes[0], atol=1e-3)


def test_gradients_are_the_references(golden) -> None:
    case, network, official = golden
    network.zero_grad()
    sum(yolos_losses(network(case.input("image")), *truth(case), Loss2dSettings()).values()).backward()
    numbered = {key: torch.full(value.shape, float(i)) for i, (key, value) in enumerate(official.items())}
    keys = list(official)
    squares = dict.fromkeys(keys, 0.0)
    parameters = dict(network.named_parameters())
    for name, value in from_yolos(numbered).items():
        squares[keys[int(value.flatten()[0])]] += parameters[name].grad.double().pow(2).sum().item()
    case.assert_gradients({key: square**0.5 for key, square in squares.items()}, rtol=1e-4)


def test_double_precision_sees_the_same_constants(golden) -> None:
    case, _, official = golden
    network = yolos("ti").double().eval()
    load_into(network, from_yolos(official))
    with torch.no_grad():
        output = network(case.input("image").double())
    case.assert_float64("logits", output.logits, rtol=1e-9)
    case.assert_float64("boxes", output.boxes, rtol=1e-9)
    boxes, labels, mask = truth(case)
    losses = yolos_losses(output, boxes.double(), labels, mask, Loss2dSettings())
    case.assert_float64("loss", sum(losses.values()), rtol=1e-9)


# ---- against transformers ------------------------------------------------------------------------------------------


def theirs(shake, mid: bool, image: tuple[int, int] = (64, 96)):
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=list(image),
        num_detection_tokens=7,
        num_labels=5,
        layer_norm_eps=1e-6,
        use_mid_position_embeddings=mid,
    )
    return shake(transformers.YolosForObjectDetection(config)).eval()


@pytest.mark.parametrize("mid", [False, True], ids=["plain", "mid"])
def test_equals_transformers_on_any_image_size(shake, tmp_path, mid: bool) -> None:
    reference = theirs(shake, mid)
    reference.save_pretrained(tmp_path)
    mine = Yolos(ViT(24, 4, 3, grid=(4, 6)), 5, detections=7, mid=mid).eval()
    for source in (read_checkpoint(tmp_path), reference.state_dict()):  # a file's names are not always the module's
        report = load_detector(mine, source)
        assert not report.random
        assert not report.unused
        for size in ((64, 96), (48, 48), (96, 160), (70, 101)):
            image = torch.randn(2, 3, *size)
            with torch.no_grad():
                expected, output = reference(image), mine(image)
            scale = expected.logits.abs().max().item()
            torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(output.boxes, expected.pred_boxes, rtol=0, atol=1e-5)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def published(network: Yolos) -> StateDict:
    """The other way round: our tensors in the published layout."""
    ours = network.state_dict()
    result = {
        "backbone." + key.removeprefix("vit.").replace(".attention.", ".attn."): value
        for key, value in ours.items()
        if key.startswith("vit.") and "pos_embed" not in key
    }
    result["backbone.det_token"] = ours["det_token"]
    result["backbone.pos_embed"] = torch.cat([ours["vit.pos_embed"], ours["det_pos_embed"]], 1)
    if "mid_pos_embed" in ours:
        result["backbone.mid_pos_embed"] = torch.cat([ours["mid_pos_embed"], ours["mid_det_pos_embed"]], 1)[:, None]
    for head, name in (("class_head", "class_embed"), ("box_head", "bbox_embed")):
        for layer in range(3):
            for leaf in ("weight", "bias"):
                result[f"{name}.layers.{layer}.{leaf}"] = ours[f"{head}.{2 * layer}.{leaf}"]
    return result


def test_published_names_are_ours_one_to_one(small: Yolos, tmp_path) -> None:
    torch.save({"model": published(small), "epoch": 3}, tmp_path / "yolos.pth")
    back = from_yolos(read_checkpoint(tmp_path / "yolos.pth"))
    assert back.keys() == small.state_dict().keys()
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in back.items())


def test_every_key_of_the_published_file_is_read() -> None:
    keys = json.loads((Case("yolos_ti").folder / "keys.json").read_text())
    with torch.device("meta"):
        source = {key: torch.empty(shape) for key, (shape, _) in keys.items()}
        shapes = {name: value.shape for name, value in from_yolos(source).items()}
        assert shapes == {name: value.shape for name, value in yolos("ti").state_dict().items()}


def test_our_own_names_are_read(small: Yolos, shake) -> None:
    other = shake(small_yolos(small.mid_pos_embed is not None), seed=1)
    report = load_detector(other, small.state_dict())
    assert sorted(report.loaded) == sorted(small.state_dict())


def test_other_classes_start_with_a_last_layer_of_their_own(small: Yolos) -> None:
    other = small_yolos(small.mid_pos_embed is not None, classes=9)
    report = load_detector(other, published(small))
    assert report.random == ["class_head.4.bias", "class_head.4.weight"]
    assert torch.equal(other.class_head[2].weight, small.class_head[2].weight)


def test_a_classifier_leaves_what_is_for_detection_random(small: Yolos) -> None:
    fresh = {name: value.clone() for name, value in small.state_dict().items()}
    source = ViT(12, 3, 3).state_dict()
    report = load_detector(small, {key.replace(".attention.", ".attn."): value for key, value in source.items()})
    assert {name.removeprefix("vit.") for name in report.loaded} == source.keys()
    assert not report.unused
    assert all(torch.equal(small.state_dict()[name], fresh[name]) for name in report.random)
    assert {name.split(".")[0] for name in report.random} >= {"det_token", "det_pos_embed", "class_head", "box_head"}
    torch.testing.assert_close(small.vit.pos_embed, resampled(source["pos_embed"], (14, 14), (3, 4)))


def test_what_does_not_fit_is_named(small: Yolos) -> None:
    with pytest.raises(UserError, match=r"'layer1.weight' are no YOLOS or DeiT checkpoint.*backbone.det_token"):
        load_detector(small, {"layer1.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"'x' are no YOLOS checkpoint: backbone.det_token is missing"):
        from_hf_yolos({"x": torch.ones(1)})
    query = "vit.encoder.layer.0.attention.attention.query.weight"
    with pytest.raises(UserError, match=r"\.attn\.key\.weight is missing: not a whole checkpoint"):
        from_hf_yolos({query: torch.ones(1)})
    with pytest.raises(UserError, match=r"'mask_head.weight' is not part of the YOLOS layout"):
        from_yolos({**published(small), "mask_head.weight": torch.ones(1)})
    for name, wrong in (("det_token", (3,)), ("det_token", (1, 0, 12)), ("pos_embed", (5,)), ("mid_pos_embed", (2, 5))):
        with pytest.raises(UserError, match=rf"backbone\.{name} is .*; wanted a tensor of \d dimensions"):
            from_yolos({**published(small), f"backbone.{name}": torch.ones(wrong)})
    with pytest.raises(UserError, match=r"pos_embed.*\(\d, 13, 12\).*\(\d, 21, 12\)"):
        load_detector(small_yolos(small.mid_pos_embed is not None, grid=(4, 5)), published(small))
