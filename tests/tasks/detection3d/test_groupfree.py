"""The detector of points: published sizes and numbers, its parts, and what may be set smaller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from golden_rules import Case
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.detection_keys import from_groupfree
from tokenfusion.backbones.weights import load_into
from tokenfusion.data.boxes import corners
from tokenfusion.data.truth import SceneTruth
from tokenfusion.errors import UserError
from tokenfusion.tasks.detection3d.decoder import Attention, DecoderLayer
from tokenfusion.tasks.detection3d.groupfree import GroupFree, GroupFreeOutput, HeadOutput, PredictionHead
from tokenfusion.tasks.detection3d.losses import LossSettings, groupfree_losses, head_losses, key_point_loss

SMALL = {"points": (64, 32, 16, 8), "radii": (0.4, 0.8, 1.6, 2.4), "samples": (8, 8, 4, 4), "width": 0.25}
SCANNET = {"classes": 18, "heading_bins": 1, "mean_sizes": [(1, 1, 1)] * 18}
MEANS = [(1.0, 2.0, 3.0), (0.5, 0.6, 0.7)]
OFFICIAL = {  # of a head's prediction
    "objectness": "objectness_scores",
    "center": "center",
    "heading_scores": "heading_scores",
    "heading_residuals_normalized": "heading_residuals_normalized",
    "size": "pred_size",
    "class_scores": "sem_cls_scores",
}


def _small(classes: int = 2, layers: int = 2, proposals: int = 12, **options: object) -> GroupFree:
    return GroupFree(classes, layers=layers, proposals=proposals, **{**SMALL, **options})  # type: ignore[arg-type]


def _clouds(points: int = 200, batch: int = 2, channels: int = 3) -> Tensor:
    cloud = torch.rand(batch, points, channels, generator=torch.Generator().manual_seed(3))
    return cloud * torch.tensor([4.0, 4.0, 2.0] + [1.0] * (channels - 3))


# ---- published sizes and numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("millions", "arguments"),
    [
        (14.363, {"classes": 10}),
        (14.474, SCANNET),
        (29.557, {**SCANNET, "layers": 12, "width": 2, "proposals": 512}),
    ],
    ids=["sunrgbd", "scannet", "scannet-large"],
)  # fmt: skip
def test_parameter_count_is_the_published_one(millions: float, arguments: dict[str, object]) -> None:
    with torch.device("meta"):
        network = GroupFree(**arguments)  # type: ignore[arg-type]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions


@cache
def _case() -> Case:
    return Case("groupfree_sun_l6_o256")


def _published(dtype: torch.dtype) -> tuple[GroupFree, GroupFreeOutput]:
    network = GroupFree(10).eval()
    report = load_into(network, from_groupfree(_case().state_dict()))
    assert not report.random
    assert not report.unused
    assert not report.copied
    network.to(dtype)
    return network, network(torch.from_numpy(_case().outputs["point_clouds"]).to(dtype))


def _sorted(values: Tensor, index: Tensor) -> Tensor:
    return values[:, index[0].argsort()]


def _truth(dtype: torch.dtype) -> SceneTruth:
    """The case's labels: heading = -yaw in bins, full sizes, the rows behind the last box far away."""
    stored = {name: torch.from_numpy(array) for name, array in _case().outputs.items()}
    heading = stored["heading_class_label"].double() * (2 * math.pi / 12) + stored["heading_residual_label"].double()
    boxes = torch.cat([stored["center_label"], stored["size_gts"], -heading[..., None].float()], -1)
    owner = torch.where(stored["point_obj_mask"] > 0, stored["point_instance_label"].long(), -1)
    views = torch.zeros(1, 0, 64, 4)
    mask = stored["box_label_mask"] > 0
    return SceneTruth(boxes.to(dtype), stored["sem_cls_label"].long(), mask, owner, views, views[..., 0] > 0)


def test_golden_outputs_losses_and_gradients() -> None:
    case = _case()
    network, output = _published(torch.float32)
    sample = network.backbone.levels.points
    assert torch.equal(output.seeds.index, torch.from_numpy(case.outputs["seed_inds"]).long())
    assert output.seeds.index.tolist() == case.outputs["sa1_inds"][:, : sample[1]].tolist()
    chosen = torch.from_numpy(case.outputs["query_points_sample_inds"]).long()
    assert set(output.query_index[0].tolist()) == set(chosen[0].tolist())
    tolerance = 1e-4
    expected = case.outputs["fp2_features"]
    mine = output.seeds.features.detach().transpose(1, 2)[:, ::8].numpy()
    np.testing.assert_allclose(mine, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    case.assert_close("seed_xyz", output.seeds.xyz, 0)
    case.assert_close("seeds_obj_cls_logits", output.seed_logits[:, None], tolerance)
    for name, head in zip(output.names, output.heads, strict=True):
        for ours, official in OFFICIAL.items():
            key = f"{name}_{official}"
            theirs = torch.from_numpy(case.outputs[key])
            value = getattr(head, ours)
            value = value[..., None] if ours == "objectness" else value
            atol = tolerance * theirs.abs().max().item()
            torch.testing.assert_close(
                _sorted(value, output.query_index), _sorted(theirs, chosen), rtol=0, atol=atol, msg=key
            )
    _golden_losses(output, torch.float32, 1e-4)
    sum(groupfree_losses(output, _truth(torch.float32), LossSettings()).values()).backward()
    mine_by_name = dict(network.named_parameters())
    norms = {key: mine_by_name[name].grad.norm().item() for key, name in _names().items() if name in mine_by_name}
    case.assert_gradients(norms, rtol=5e-3)


def _names() -> dict[str, str]:
    """Reference key -> our name; a tensor with two names goes by the first."""
    entries = json.loads((_case().folder / "keys.json").read_text())
    return {
        (entries[key][2] if len(entries[key]) > 2 else key): ours
        for key, value in _case().state_dict().items()
        for ours in from_groupfree({key: value})
    }


def _golden_losses(output: GroupFreeOutput, dtype: torch.dtype, rtol: float) -> None:
    case, truth, settings = _case(), _truth(dtype), LossSettings()
    for figures in ({k: v[0] for k, v in case.case["float64_run"].items()}, case.outputs):
        sizes = truth.boxes[..., 3:6]
        parts = head_losses(output, truth, sizes, settings)
        official = {
            "objectness_loss": parts.objectness,
            "center_loss": parts.center,
            "heading_cls_loss": parts.heading_class,
            "heading_reg_loss": settings.heading_delta * parts.heading_residual,
            "size_reg_loss": settings.size_delta * parts.size_residual,
            "sem_cls_loss": parts.semantic,
        }
        for name, values in official.items():
            for head, value in zip(output.names, values, strict=True):
                np.testing.assert_allclose(value.item(), figures[f"{head}_{name}"], rtol=rtol, err_msg=f"{head}_{name}")
        generation = key_point_loss(output, truth, sizes, settings.topk)
        np.testing.assert_allclose(generation.item(), figures["query_points_generation_loss"], rtol=rtol)
        total = sum(groupfree_losses(output, truth, settings).values())
        np.testing.assert_allclose(total.item(), figures["loss"], rtol=rtol)


def test_golden_in_double_precision() -> None:
    """Sees constants that single precision hides. The reference keeps some of them in single precision: 1e-6."""
    case = _case()
    _, output = _published(torch.float64)
    case.assert_float64("fp2_features", output.seeds.features.transpose(1, 2), 1e-6)
    case.assert_float64("seeds_obj_cls_logits", output.seed_logits, 1e-6)
    for name, head in zip(output.names, output.heads, strict=True):
        for ours, official in OFFICIAL.items():
            case.assert_float64(f"{name}_{official}", getattr(head, ours), 1e-6)
    _golden_losses(output, torch.float64, 2e-6)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("means", [None, MEANS])
def test_key_map_reaches_every_tensor(means: list[tuple[float, ...]] | None) -> None:
    """Backwards by the published names of section 1.8, for both ways to predict sizes."""
    network = _small(mean_sizes=means)
    official = {_official(name): value for name, value in network.state_dict().items()}
    assert len(official) == len(network.state_dict())
    assert not any(".hidden." in key or "_position." in key for key in official)
    extra = {"decoder_self_posembeds.0.position_embedding_head.0.bias": torch.zeros(288)}
    back = from_groupfree({**official, **extra})
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())


def _official(name: str) -> str:
    """Our name -> the published one, written down the other way round."""
    parts = name.split(".")
    if parts[0] == "backbone":
        kind = {"down": "sa{}.mlp_module", "up": "fp{}.mlp"}[parts[1]].format(int(parts[2]) + 1)
        part = {"linear": "conv", "norm": "bn.bn"}[parts[5]]
        return f"backbone_net.{kind}.layer{parts[4]}.{part}.{parts[6]}"
    if parts[0] in ("kps", "heads"):
        inner = parts[1:] if parts[0] == "kps" else parts[2:]
        heads = (
            "proposal_head"
            if parts[1] == "0"
            else f"prediction_heads.{int(parts[1]) - 1 if parts[0] == 'heads' else 0}"
        )
        prefix = "points_obj_cls" if parts[0] == "kps" else heads
        if inner[0] == "hidden":
            return f"{prefix}.{ {'linear': 'conv', 'norm': 'bn'}[inner[2]] }{int(inner[1]) + 1}.{inner[3]}".replace(
                " ", ""
            )
        last = {
            "score": "conv3",
            "objectness": "objectness_scores_head",
            "center": "center_residual_head",
            "size": "size_pred_head",
            "classify": "sem_cls_scores_head",
        }.get(inner[0], f"{inner[0]}_head")
        return f"{prefix}.{last}.{inner[1]}"
    if parts[0] != "decoder":
        return f"{parts[0]}_proj.{parts[1]}"
    if parts[2].endswith("_position"):
        place = {"hidden.linear": 0, "hidden.norm": 1, "out": 3}[".".join(parts[3:-1])]
        return f"decoder.{parts[1]}.{parts[2][:-9]}_posembed.position_embedding_head.{place}.{parts[-1]}"
    kind = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}.get(parts[2])
    if kind is not None:
        part = {"qkv": "in_proj_", "proj": "out_proj."}[parts[3]]
        return f"decoder.{parts[1]}.{kind}.{part}{parts[4]}"
    return f"decoder.{parts[1]}.{parts[2].replace('fc', 'linear')}.{parts[3]}"


def test_foreign_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"key 'vote\.conv1\.weight' is not part of the Group-Free-3D layout"):
        from_groupfree({"vote.conv1.weight": torch.zeros(1)})


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_attention_is_torchs(shake: Callable[..., nn.Module]) -> None:
    mine = shake(Attention(16, 4, 0.1).double()).eval()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(
        {
            "in_proj_weight": mine.qkv.weight,
            "in_proj_bias": mine.qkv.bias,
            "out_proj.weight": mine.proj.weight,
            "out_proj.bias": mine.proj.bias,
        }
    )
    x, context = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x, x, x)[0])
    torch.testing.assert_close(mine(x, context), theirs(x, context, context)[0])


def test_layer_is_post_norm_and_positions_enter_values(shake: Callable[..., nn.Module]) -> None:
    layer = shake(DecoderLayer(16, 4, 32, 0.1, 0.1).double()).eval()
    query, key = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    box, xyz = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)

    def place(embedding: nn.Module, values: Tensor) -> Tensor:
        norm, linear = embedding.hidden.norm, embedding.hidden.linear
        y = (linear(values) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        return embedding.out(y.relu())

    own, seen = place(layer.self_position, box), place(layer.cross_position, xyz)
    x = layer.norm1(query + layer.self_attention(query + own, query + own))
    x = layer.norm2(x + layer.cross_attention(x + own, key + seen))
    expected = layer.norm3(x + layer.fc2(F.relu(layer.fc1(x))))
    torch.testing.assert_close(layer(query, key, box, xyz), expected)


def test_dropout_acts_in_training_alone() -> None:
    layer = DecoderLayer(16, 4, 32, 0.5, 0.1)
    x, box = torch.randn(1, 4, 16), torch.randn(1, 4, 6)
    assert not torch.equal(layer(x, x, box, box[..., :3]), layer(x, x, box, box[..., :3]))
    layer.eval()
    assert torch.equal(layer(x, x, box, box[..., :3]), layer(x, x, box, box[..., :3]))


# ---- the detector --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("means", [None, MEANS])
def test_shapes_and_names(channels: int, means: list[tuple[float, ...]] | None) -> None:
    network = _small(channels=channels, mean_sizes=means, layers=3).eval()
    output = network(_clouds(channels=channels))
    assert output.names == ("proposal", "0head", "1head", "last")
    assert (network.layers, network.dim, len(output.heads)) == (3, 288, 4)
    assert output.seeds.features.shape == (2, 32, 288)
    assert output.seed_logits is not None
    assert output.seed_logits.shape == (2, 32)
    for head in output.heads:
        assert torch.equal(head.base_xyz, output.seeds.xyz.take_along_dim(output.query_index[..., None], 1))
        assert head.center.shape == head.size.shape == (2, 12, 3)
        assert head.heading_scores.shape == head.heading_residuals_normalized.shape == (2, 12, 12)
        assert (head.objectness.shape, head.class_scores.shape) == ((2, 12), (2, 12, 2))
        boxes = network.boxes(head)
        assert boxes.shape == (2, 12, 7)
        assert boxes.isfinite().all()


def test_sizes_relative_to_the_most_likely_mean(shake: Callable[..., nn.Module]) -> None:
    part = shake(PredictionHead(16, 2, 12, torch.tensor(MEANS), 0.1)).eval()
    head = part(3 * torch.randn(2, 9, 16), torch.zeros(2, 9, 3))
    best = head.size_scores.argmax(-1)
    assert len(best.unique()) == 2
    for b, q in ((0, 0), (1, 7), (1, 8)):
        k = int(best[b, q])
        expected = torch.tensor(MEANS[k]) * (1 + head.size_residuals[b, q, k])
        torch.testing.assert_close(head.size[b, q], expected)


def test_key_points_are_the_likeliest_seeds_and_fps_the_first() -> None:
    output = _small().eval()(_clouds())
    assert output.seed_logits is not None
    for logits, index in zip(output.seed_logits, output.query_index, strict=True):
        rest = torch.ones(32, dtype=torch.bool).scatter(0, index, False)
        assert logits[index].min() >= logits[rest].max()
    furthest = _small(sampling="fps").eval()(_clouds())
    assert furthest.seed_logits is None
    assert furthest.query_index.tolist() == [list(range(12))] * 2


def test_fuse_sees_every_layers_keys_and_only_that_layer() -> None:
    network, seen = _small().eval(), []
    cloud = _clouds()
    plain = network(cloud)

    def fuse(layer: int, key: Tensor) -> Tensor:
        seen.append((layer, key))
        return key if layer == 0 else torch.zeros_like(key)

    fused = network(cloud, fuse=fuse)
    assert [layer for layer, _ in seen] == [0, 1]
    assert torch.equal(seen[0][1], seen[1][1])
    torch.testing.assert_close(seen[0][1], network.decoder_key(plain.seeds.features))
    assert torch.equal(fused.heads[1].center, plain.heads[1].center)
    assert not torch.allclose(fused.heads[2].center, plain.heads[2].center)


def test_fuse_read_sees_what_every_layers_queries_read() -> None:
    network, cloud, seen = _small().eval(), _clouds(), []
    plain = network(cloud)

    def fuse(layer: int, key: Tensor) -> Tensor:
        seen.append(("key", layer))
        return key

    def fuse_read(layer: int, index: Tensor, read: Tensor) -> Tensor:
        seen.append(("read", layer))
        assert torch.equal(index, plain.query_index)
        assert read.shape == (*index.shape, network.dim)
        return read if layer == 0 else torch.zeros_like(read)

    fused = network.decode(network.encode(cloud), fuse, fuse_read)
    assert seen == [("key", 0), ("read", 0), ("key", 1), ("read", 1)]
    assert torch.equal(fused.heads[1].center, plain.heads[1].center)
    assert not torch.allclose(fused.heads[2].center, plain.heads[2].center)
    blind = network(cloud, fuse=lambda layer, key: key if layer == 0 else key + 1)
    again = network.decode(plain.seeds, lambda layer, key: key if layer == 0 else key + 1, fuse_read)
    assert not torch.allclose(blind.heads[2].center, plain.heads[2].center)
    assert torch.equal(again.heads[2].center, fused.heads[2].center), "the keys reach the queries by what those read"


def test_a_layer_knows_the_last_heads_box_without_gradient() -> None:
    network = _small(layers=1).eval()
    output = network(_clouds())
    output.heads[1].center.sum().backward()
    assert network.heads[0].center.weight.grad is None
    assert network.decoder[0].self_position.out.weight.grad.abs().max() > 0
    with torch.no_grad():
        network.heads[0].center.bias += 1
    assert not torch.allclose(network(_clouds()).heads[1].center, output.heads[1].center)


def test_indices_found_ahead_change_nothing() -> None:
    network, cloud = _small().eval(), _clouds()
    ahead = [network.indexer()(points) for points in cloud]
    indices = type(ahead[0])(*(torch.stack(of) for of in zip(*ahead, strict=True)))
    for mine, expected in zip(network(cloud, indices).heads[-1], network(cloud).heads[-1], strict=True):
        assert mine is None or torch.equal(mine, expected)


@pytest.mark.parametrize("points", [1, 7])
def test_tiny_clouds_give_finite_boxes(points: int) -> None:
    network = _small().eval()
    boxes = network.boxes(network(_clouds(points)).heads[-1])
    assert boxes.isfinite().all()


def test_gradients_reach_every_parameter(shake: Callable[..., nn.Module]) -> None:
    network = shake(_small(mean_sizes=MEANS)).train()
    output = network(_clouds())
    parts = [x.float() for head in output.heads for x in head if x is not None] + [output.seed_logits]
    sum((x * torch.randn_like(x)).sum() for x in parts).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not missing


def test_start_of_the_weights_and_the_decoders_parameters() -> None:
    network = _small()
    bound = math.sqrt(6 / (288 + 3 * 288))
    assert 0.95 * bound < network.decoder[0].self_attention.qkv.weight.abs().max() <= bound
    assert network.decoder[0].cross_attention.proj.bias.abs().max() == 0
    inside = {id(p) for module in network.decoder_modules() for p in module.parameters()}
    assert {n.split(".")[0] for n, p in network.named_parameters() if id(p) in inside} == {
        "decoder", "decoder_key", "decoder_query"
    }  # fmt: skip


def test_compiles_in_one_graph() -> None:
    network, cloud = _small().eval(), _clouds()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(cloud)
        torch.testing.assert_close(compiled.heads[-1].center, network(cloud).heads[-1].center)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposals": 33}, "33 proposals of 32 seeds"),
        ({"layers": 0}, "layers: wanted whole numbers above 0, not 0"),
        ({"momentum": 0.0}, "momentum: wanted above 0 and at most 1"),
        ({"radii": (0.2, 0.4, float("nan"), 1.2)}, "radii: wanted metres above 0"),
        ({"sampling": "vote"}, "kps or fps, not 'vote'"),
        ({"classes": 3, "mean_sizes": MEANS}, "2 mean sizes for 3 classes"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)  # type: ignore[arg-type]


# ---- boxes ---------------------------------------------------------------------------------------------------------


def _head(bin_number: int, residual: float, bins: int = 12, size: tuple[float, ...] = (2, 1, 1)) -> HeadOutput:
    scores = F.one_hot(torch.tensor([[bin_number]]), bins).float()
    center = torch.tensor([[[1.0, 2.0, 3.0]]])
    residuals = torch.where(scores > 0, residual, 9.0)
    return HeadOutput(center, center, scores[..., 0], scores, residuals, torch.tensor([[size]]), None, None, scores)


@pytest.mark.parametrize(
    ("number", "residual", "yaw_deg"), [(0, 0, 0), (1, 0, -30), (3, 0.5, -97.5), (9, -1, 105), (11, 1, 15)]
)
def test_boxes_turn_the_other_way_round(number: int, residual: float, yaw_deg: float) -> None:
    box = _small().boxes(_head(number, residual))[0, 0]
    torch.testing.assert_close(box, torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 1.0, math.radians(yaw_deg)]))
    heading = -math.radians(yaw_deg)  # Group-Free's corner: c + Rz(-heading) (l, w, h) / 2
    ahead = torch.tensor([math.cos(-heading), math.sin(-heading)])
    front = corners(box)[:, :2] - box[:2]
    assert (front @ ahead).max() == pytest.approx(1.0)


def test_sizes_below_zero_and_boxes_along_the_axes() -> None:
    network = _small()
    assert network.boxes(_head(0, 0, size=(-1.0, 0.5, 2.0)))[0, 0, 3:6].tolist() == [0.0, 0.5, 2.0]
    assert network.boxes(_head(0, 0.7, bins=1))[0, 0, 6] == 0
