"""The fused detector: what it is without images, what meets where, and that gradients go where they may."""

from __future__ import annotations

import pytest
import torch
from tasks.detection3d.small import LAYERS, batch, detector

from tokenfusion.fusion.crossing import (
    AverageExchange,
    ConcatExchange,
    Exchange,
    NoExchange,
    RandomExchange,
    TokenExchange,
)
from tokenfusion.fusion.projection import patch_index, project
from tokenfusion.tasks.detection3d.model import DetectionOutput, FusedDetector

KINDS = [NoExchange, TokenExchange, RandomExchange, AverageExchange, ConcatExchange]


def run(model: FusedDetector, views: int = 1) -> DetectionOutput:
    sample = batch(views=views)
    return model(sample.points, sample.images, sample.projection)


def differs(a: DetectionOutput, b: DetectionOutput) -> bool:
    return not torch.allclose(a.points.heads[-1].center, b.points.heads[-1].center, atol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("views", [1, 3])
def test_every_exchange_gives_finite_boxes_and_gradients(
    kind: type[Exchange], both: bool, queries: bool, views: int
) -> None:
    model = detector(kind, both=both, exchange_queries=queries).train()
    output = run(model, views)
    assert output.image is not None
    assert output.image.boxes.shape == (2 * views, 8, 4)
    found = model.points.boxes(output.points.heads[-1])
    assert found.shape == (2, 8, 7)
    total = sum(x.double().square().mean() for head in output.points.heads for x in head if x is not None)
    (total + output.image.logits.square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    scored = kind is TokenExchange
    assert len(output.keys) == (LAYERS if scored else 0)
    assert len(output.queries) == (LAYERS if scored and queries else 0)
    assert len(output.patches) == (LAYERS - 1 if scored and both else 0), "behind the last block nobody reads patches"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("missing", ["images", "projection", "view"])
def test_without_an_image_it_is_the_points_network(kind: type[Exchange], queries: bool, missing: str) -> None:
    model = detector(kind, exchange_queries=queries).eval()
    sample = batch()
    with torch.no_grad():
        plain = model.points(sample.points)
        images = None if missing == "images" else sample.images
        projection = None if missing == "projection" else sample.projection
        if missing == "view":
            projection = torch.zeros_like(sample.projection)
        output = model(sample.points, images, projection)
    for ours, theirs in zip(output.points.heads[-1], plain.heads[-1], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("queries", [False, True])
def test_no_exchange_is_both_networks_side_by_side(queries: bool) -> None:
    model = detector(NoExchange, exchange_queries=queries).eval()
    sample = batch()
    with torch.no_grad():
        output, alone = run(model), model.image(sample.images[:, 0])
        points = model.points(sample.points)
    torch.testing.assert_close(output.image.boxes, alone.boxes)
    torch.testing.assert_close(output.points.heads[-1].center, points.heads[-1].center)


def test_an_unseen_point_keeps_its_key_and_a_seen_one_takes_its_patch() -> None:
    model = detector(threshold=1.0).eval()  # everything that can be is replaced
    sample = batch(views=2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.key_exchange[0].register_forward_hook(lambda _, given, made: seen.append((given, made[0])))
    with torch.no_grad():
        sample.projection[:, 1] = 0  # the second view is missing
        output = run_batch(model, sample)
    (key, stand_in, has), fused = seen[0]
    seeds = output.points.seeds.xyz
    pixels, depth = project(seeds, sample.projection[:, 0])
    index, visible = patch_index(pixels, depth, (32, 48), 16)
    assert torch.equal(has, visible)
    assert 0 < visible.double().mean() < 1
    torch.testing.assert_close(fused[~visible], key[~visible])
    torch.testing.assert_close(fused[visible], stand_in[visible])
    with torch.no_grad():
        tokens, grid = model.image.embed(sample.images[:, 0])
        for block in model.pairs[0]:
            tokens = model.image.block(block, tokens, grid)
        expected = model.to_point[0](tokens[:, 1:7].gather(1, index.unsqueeze(-1).expand(-1, -1, 32)))
    torch.testing.assert_close(stand_in[visible], expected[visible], rtol=1e-4, atol=1e-5)


def test_what_a_query_reads_is_its_own_points_patch_and_the_query_stays() -> None:
    model = detector(threshold=1.0, exchange_queries=True).eval()
    sample = batch(views=2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    sums: list[torch.Tensor] = []
    model.query_exchange[0].register_forward_hook(lambda _, given, made: seen.append((given, made[0])))
    layer = model.points.decoder[0]
    layer.norm1.register_forward_hook(lambda _, given, made: sums.append(made))
    layer.norm2.register_forward_hook(lambda _, given, made: sums.append(given[0]))
    with torch.no_grad():
        sample.projection[:, 1] = 0  # the second view is missing
        output = run_batch(model, sample)
        (read, stand_in, has), fused = seen[0]
        pixels, depth = project(output.points.heads[0].base_xyz, sample.projection[:, 0])
        index, visible = patch_index(pixels, depth, (32, 48), 16)
        tokens, grid = model.image.embed(sample.images[:, 0])
        for block in model.pairs[0]:
            tokens = model.image.block(block, tokens, grid)
        expected = model.to_query[0](tokens[:, 1:7].gather(1, index.unsqueeze(-1).expand(-1, -1, 32)))
    assert torch.equal(has, visible)
    assert 0 < visible.double().mean() < 1
    torch.testing.assert_close(fused[~visible], read[~visible])
    torch.testing.assert_close(fused[visible], stand_in[visible])
    torch.testing.assert_close(stand_in[visible], expected[visible], rtol=1e-4, atol=1e-5)
    query, summed = sums
    torch.testing.assert_close(summed, query + fused)


def test_queries_see_the_image_where_keys_do_not() -> None:
    sample = batch()
    for queries in (False, True):
        model = detector(threshold=1.0, exchange_queries=queries).eval()
        model.key_exchange = torch.nn.ModuleList(NoExchange(model.points.dim) for _ in model.key_exchange)
        with torch.no_grad():
            first, other = run_batch(model, sample), run_batch(model, sample._replace(images=-sample.images))
        assert differs(first, other) is queries


def run_batch(model: FusedDetector, sample: object) -> DetectionOutput:
    return model(sample.points, sample.images, sample.projection)  # type: ignore[attr-defined]


@pytest.mark.parametrize("detach", [True, False])
def test_detached_or_not(detach: bool) -> None:
    model = detector(threshold=1.0, detach=detach).train()
    run(model).points.heads[-1].center.square().sum().backward()
    reached = any(p.grad is not None and bool(p.grad.any()) for p in model.image.vit.parameters())
    assert reached is not detach
    assert model.to_point[0][0].weight.grad.any()


def test_the_image_changes_the_boxes_and_with_both_points_change_the_image() -> None:
    for both in (False, True):
        model = detector(threshold=1.0, both=both).eval()
        sample = batch()
        with torch.no_grad():
            first = run_batch(model, sample)
            other = run_batch(model, sample._replace(images=-sample.images))
            moved = run_batch(model, sample._replace(points=sample.points * torch.tensor([1.0, 1.05, 1.0])))
        assert differs(first, other)
        same = torch.allclose(first.image.boxes, moved.image.boxes, atol=1e-6)
        assert same is not both


@pytest.mark.parametrize(("depth", "layers"), [(1, 0), (2, 1), (3, 1), (8, 1)])
def test_points_go_to_images_where_a_block_follows(depth: int, layers: int) -> None:
    """Elsewhere a network would learn nothing, or only to score low."""
    model = detector(depth=depth, both=True).train()
    assert len(model.to_image) == len(model.patch_exchange) == layers
    output = run(model)
    (output.image.boxes.square().sum() + output.points.heads[-1].center.square().sum()).backward()
    assert all(p.grad is not None for p in [*model.to_image.parameters(), *model.patch_exchange.parameters()])


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_any_depths_are_paired_and_every_block_runs_once(depth: int) -> None:
    model = detector(NoExchange, depth=depth).eval()
    with torch.no_grad():
        output, alone = run(model), model.image(batch().images[:, 0])
    torch.testing.assert_close(output.image.logits, alone.logits)


def test_alignment_tells_patches_their_position_again() -> None:
    sample = batch()
    outputs = []
    for alignment in (True, False):
        model = detector(threshold=1.0, both=True, alignment=alignment).eval()
        with torch.no_grad():
            model.image.vit.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
            outputs.append(run_batch(model, sample).image.logits)
    assert not torch.allclose(*outputs)


def test_rates_are_shares_of_what_can_be_replaced() -> None:
    model = detector(threshold=1.0, both=True).eval()
    with torch.no_grad():
        rates = model.rates(run(model, 2))
    assert list(rates) == ["layer0", "layer1"]
    assert [rate.exchanged.tolist() for rate in rates.values()] == [[1.0, 1.0], [1.0, 0.0]]
    assert model.exchanging == ("points", "rgb")
    assert detector(NoExchange).rates(run(detector(NoExchange))) == {}


@pytest.mark.parametrize("both", [False, True])
def test_rates_of_queries_come_last(both: bool) -> None:
    model = detector(threshold=0.5, both=both, exchange_queries=True).eval()
    for part, bias in (*((p, -9.0) for p in model.query_exchange), *((p, 9.0) for p in model.key_exchange)):
        torch.nn.init.constant_(part.scorer.nets[0][-1].bias[:1], bias)
    with torch.no_grad():
        rates = model.rates(run(model, 2))
    assert model.exchanging == (("points", "rgb", "queries") if both else ("points", "queries"))
    for rate in rates.values():
        found = dict(zip(model.exchanging, rate.exchanged.tolist(), strict=True))
        assert (found["points"], found["queries"]) == (0, 1)
