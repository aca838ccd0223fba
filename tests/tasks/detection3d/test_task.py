"""What training minimises and moves: terms, their factors, when they end, and every parameter's rate and decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tasks.detection3d.small import CLASSES, OVERRIDES, batch, task
from torch import Tensor

from tokenfusion.data.scenes import SceneBatch
from tokenfusion.errors import UserError
from tokenfusion.fusion.exchange import below
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.detection3d import DetectionTask, build_model
from tokenfusion.tasks.detection3d.losses import groupfree_losses
from tokenfusion.tasks.detection3d.losses2d import yolos_losses
from tokenfusion.train import Engine, Optimizers, train_step

POINTS = {f"points/{name}" for name in ("objectness", "center", "heading", "size", "class", "kps")}
IMAGE = {f"image/{name}" for name in ("classes2d", "l1_2d", "giou_2d")}


def losses(model: DetectionTask, sample: SceneBatch) -> dict[str, Tensor]:
    return model.losses(sample, model(sample), "model")


def unseen(sample: SceneBatch) -> SceneBatch:
    """The same scenes, of which no image is there."""
    assert sample.projection is not None
    return sample._replace(projection=torch.zeros_like(sample.projection))


def test_terms_are_those_of_both_networks_and_what_scores() -> None:
    sample = batch()
    assert losses(task(), sample).keys() == POINTS | IMAGE | {"sparsity"}
    assert losses(task("fuser=concat"), sample).keys() == POINTS | IMAGE, "nothing is scored"
    assert losses(task("loss.sparsity=0"), sample).keys() == POINTS | IMAGE
    alone = task("data.modalities=[points]")
    assert losses(alone, sample).keys() == POINTS, "images that come all the same are not looked at"
    assert losses(alone, sample._replace(images=None, projection=None)).keys() == POINTS
    without_key_points = task("data.modalities=[points]", "model.points.sampling=fps")
    assert losses(without_key_points, sample).keys() == POINTS - {"points/kps"}


def test_every_factor_reaches_its_term() -> None:
    sample = batch()
    plain = task("loss.points={heading_delta: 0.5}", "model.points.proposals=32").eval()
    expected = losses(plain, sample)
    assert all(value > 0 for value in expected.values())
    factors = {
        "kps": {"points/kps"},
        "objectness": {"points/objectness"},
        "box": {"points/center", "points/heading", "points/size"},
        "semantic": {"points/class"},
    }
    output = plain(sample)
    for name, terms in factors.items():
        own = plain.recipe.loss.points
        settings = own.model_copy(update={name: 3 * getattr(own, name)})
        changed = groupfree_losses(output.points, sample.truth, settings)
        for term, value in changed.items():
            factor = 3 if f"points/{term}" in terms else 1
            torch.testing.assert_close(value, factor * expected[f"points/{term}"], msg=f"{name} {term}")
    image = plain.recipe.loss.image.model_copy(update={"classes": 0.0, "l1": 0.0})
    found = yolos_losses(
        output.image, sample.truth.boxes2d[:, 0], sample.truth.labels, sample.truth.mask2d[:, 0], image
    )
    assert found["classes2d"] == found["l1_2d"] == 0
    assert found["giou_2d"] > 0


def test_the_loss_of_images_ends_with_its_step() -> None:
    model, sample = task("loss.image_steps=3"), batch()
    for step, judges in ((0, True), (2, True), (3, False), (4, False), (0, True)):
        model.begin(step)
        assert bool(IMAGE & losses(model, sample).keys()) is judges, step
    for forever in (task(), task("loss.image_steps=null")):
        forever.begin(10**9)
        assert losses(forever, sample).keys() >= IMAGE
    never = task("loss.image_steps=0")
    never.begin(0)
    assert not IMAGE & losses(never, sample).keys()


def test_sparsity_counts_tokens_that_have_a_stand_in() -> None:
    model, sample = task("loss.sparsity=2"), batch()
    output = model(sample)
    expected = [key.scores[key.has].mean() for key in output.keys]
    assert all(0 < key.has.double().mean() < 1 for key in output.keys), "some seeds are seen, some are not"
    torch.testing.assert_close(model.losses(sample, output, "model")["sparsity"], 2 * torch.stack(expected).sum())
    blind = unseen(sample)
    assert model.losses(blind, model(blind), "model")["sparsity"] == 0
    both = task("loss.sparsity=2", "model.exchange=both", "model.exchange_queries=true")
    output = both(sample)
    scored = [*output.keys, *output.queries, *output.patches]
    assert len(scored) == 5
    expected = [part.scores[part.has].mean() for part in scored]
    torch.testing.assert_close(both.losses(sample, output, "model")["sparsity"], 2 * torch.stack(expected).sum())


def test_a_rate_is_wanted_of_a_threshold_that_scores_can_cross() -> None:
    with pytest.raises(UserError, match="at fuser.threshold=1 scores decide nothing"):
        task("loss.target_rate=0.25", "fuser.threshold=1")


def test_every_layers_lambda_is_steered_by_what_the_layer_exchanged() -> None:
    model, sample = task("loss.sparsity=0", "loss.target_rate=0.25", "model.exchange=both"), batch()
    output = model(sample)
    got = model.losses(sample, output, "model")["sparsity"]
    missing = [0.25 - rate.exchanged.mean() for rate in model.model.rates(output).values()]
    parts = [[output.keys[0], output.patches[0]], [output.keys[1]]]
    norms = [torch.stack([part.scores[part.has].mean() for part in layer]).sum() for layer in parts]
    pressure = model.pressure
    torch.testing.assert_close(
        got, sum((pressure.pull + pressure.gain) * a * b for a, b in zip(missing, norms, strict=True))
    )
    assert [name for name in model.watch(output) if name.startswith("lambda")] == ["lambda/layer0", "lambda/layer1"]


def test_images_that_are_left_out_show_nothing() -> None:
    sample, torn = batch(size=8), task("data.drop_images=0.5")
    torch.manual_seed(3)
    visible = torn(sample).visible.any(1)
    assert visible.any()
    assert not visible.all()
    assert torn.eval()(sample).visible.any(1).all(), "evaluation sees all images"
    assert task()(sample).visible.any(1).all()
    never = task("data.drop_images=0.999")
    output = never(sample)
    assert not output.visible.any()
    plain = never.model.points(sample.points)
    torch.testing.assert_close(output.points.heads[-1].class_scores, plain.heads[-1].class_scores)
    with pytest.raises(UserError, match=r"data\.drop_images"):
        task("data.drop_images=1")


def test_views_that_are_not_there_are_not_judged() -> None:
    model, sample = task().eval(), batch(views=2)
    first = sample._replace(projection=sample.projection * torch.tensor([1.0, 0.0])[:, None, None])
    truth = sample.truth._replace(boxes2d=sample.truth.boxes2d * torch.tensor([1.0, 0.1])[:, None, None])
    with torch.no_grad():
        output = model(first)
        one, other = (model.losses(s, output, "model") for s in (first, first._replace(truth=truth)))
        seen = model.losses(sample._replace(truth=truth), output, "model")
    assert all(one[name] == other[name] for name in IMAGE), "what a missing view would show"
    assert all(one[name] != seen[name] for name in IMAGE)


def groups(model: DetectionTask) -> dict[str, Any]:
    return {group.role: group for group in model.parameter_groups("model")}


@pytest.mark.parametrize("exchange", ["image-to-point", "both"])
@pytest.mark.parametrize("queries", ["false", "true"])
@pytest.mark.parametrize("fuser", ["tokenfusion", "concat", "none", "random"])
def test_every_parameter_is_in_one_group(fuser: str, queries: str, exchange: str) -> None:
    words = (f"fuser={fuser}", f"model.exchange={exchange}", f"model.exchange_queries={queries}")
    model = task(*words, "model.image.variant=s", "model.image.detections=4")
    grouped = [p for group in groups(model).values() for p in group.params]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_roles_have_their_rates_and_decay() -> None:
    changes = "parameters={decoder_lr: 0.2, image_lr: 0.3, fusion_lr: 0.5, image_decay: 7}"
    words = ("model.exchange=both", "model.exchange_queries=true", "model.image.variant=s", "fuser=tokenfusion")
    model = task(changes, *words)
    names = {id(p): name.removeprefix("model.") for name, p in model.named_parameters()}
    found = groups(model)
    rates = {role: (group.lr_scale, group.weight_decay) for role, group in found.items()}
    assert rates == {
        "points": (1.0, True),
        "decoder": (0.2, True),
        "image": (0.3, 7.0),
        "image without decay": (0.3, False),
        "fusion": (0.5, True),
    }
    named = {role: {names[id(p)] for p in group.params} for role, group in found.items()}
    parts = {role: {name.split(".")[0] for name in members} for role, members in named.items()}
    assert parts["fusion"] == {"key_exchange", "query_exchange", "patch_exchange"}
    assert parts["image"] == parts["image without decay"] == {"image", "to_point", "to_query", "to_image"}
    assert {name.split(".")[1] for name in named["decoder"]} == {"decoder", "decoder_query", "decoder_key"}
    assert {name.split(".")[1] for name in named["points"]} == {"backbone", "kps", "heads"}
    embeddings = {"vit.cls_token", "vit.pos_embed", "det_token", "det_pos_embed", "mid_pos_embed", "mid_det_pos_embed"}
    matrices = {name for name, p in model.model.named_parameters() if p.ndim > 1}
    free = named["image without decay"] & matrices
    assert free == {f"image.{name}" for name in embeddings}
    assert "image.vit.patch_embed.proj.weight" in named["image"]
    assert all(name in matrices for name in named["image"])


def stepped(model: DetectionTask, sample: SceneBatch, precision: str = "32") -> dict[str, Tensor]:
    """One step of a batch; returns its losses."""
    optimizers, engine = Optimizers(model, model.recipe.train), Engine(1, precision, "cpu")
    optimizers.begin(model.recipe.train.warmup_steps)
    return train_step(model, engine, optimizers, [sample], model.recipe.train.clip_norm, True)[0]


@pytest.mark.parametrize("exchange", ["image-to-point", "both"])
def test_a_step_moves_everything(exchange: str) -> None:
    model = task(f"model.exchange={exchange}", "train.weight_decay=0")
    sample = batch(size=4)
    with torch.no_grad():
        output = model(sample)
        some = [below(part.scores, 0.5)[part.has] for part in (*output.keys, *output.patches)]
    assert all(replaced.any() and not replaced.all() for replaced in some), "exchanged and kept, both are trained"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logged = stepped(model, sample)
    assert all(value.isfinite() for value in logged.values())
    unmoved = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in unmoved if not may_rest(name)} == set()


def may_rest(name: str) -> bool:
    """A key's bias adds the same to all scores of a query, and softmax does not see it: only rounding moves it."""
    return name.endswith(("attention.qkv.bias",))


def test_without_exchange_the_stand_ins_networks_rest() -> None:
    model = task("fuser=none", "train.weight_decay=0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(model, batch())
    moved = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"points", "image"}
    loose = task("fuser=average", "train.weight_decay=0", "loss.image_steps=0", "model.detach=true")
    loose.begin(0)
    before = {name: p.detach().clone() for name, p in loose.named_parameters()}
    stepped(loose, batch())
    moved = {name.split(".")[1] for name, p in loose.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"points", "to_point"}, "detached, and without a loss of its own, the image's network rests"


@pytest.mark.parametrize("overrides", [(), ("model.exchange=both",), ("data.modalities=[points]",)])
def test_scenes_without_boxes(overrides: tuple[str, ...]) -> None:
    model, sample = task(*overrides), batch(boxes=0)
    logged = stepped(model, sample)
    assert all(value.isfinite() for value in logged.values())
    assert logged["loss/points/center"] == logged["loss/points/size"] == logged["loss/points/class"] == 0
    assert logged["loss/points/objectness"] > 0
    if not overrides:
        assert logged["loss/image/l1_2d"] == logged["loss/image/giou_2d"] == 0
        assert logged["loss/image/classes2d"] > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_scene_without_boxes_among_others_changes_only_means() -> None:
    """Its row of zeros in the padding is no box at the origin."""
    model, sample = task("data.modalities=[points]", "loss.points.kps=0").eval(), batch()
    mask = sample.truth.mask.clone()
    mask[1] = False
    owner = sample.truth.point_box.clone()
    owner[1] = -1
    empty = sample.truth._replace(mask=mask, point_box=owner)
    moved = empty._replace(boxes=torch.where(mask[..., None], empty.boxes, 0.0))
    output = model(sample)
    one, other = (groupfree_losses(output.points, truth, model.recipe.loss.points) for truth in (empty, moved))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fuser", ["tokenfusion", "concat", "average", "random"])
@pytest.mark.parametrize("exchange", ["image-to-point", "both"])
def test_bf16(fuser: str, exchange: str) -> None:
    changes = [f"fuser={fuser}", f"model.exchange={exchange}", "model.points.proposals=32"]  # all seeds: none by a hair
    model, other = task(*changes), task(*changes)
    full = stepped(other, batch())
    logged = stepped(model, batch(), "bf16")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    for name, value in full.items():
        assert logged[name] == pytest.approx(value.item(), rel=0.1), name
    assert logged["loss/total"] != full["loss/total"], "few bits were at work"


def test_watched_are_the_shares_of_what_was_exchanged() -> None:
    sample = batch()
    model = task("model.exchange=both")
    output = model(sample)
    watched = model.watch(output)
    layers = [f"exchange/layer{i}/{name}" for i in (0, 1) for name in ("points", "rgb")]
    assert watched.keys() == {*layers, "visible"}
    key = output.keys[1]
    expected = (below(key.scores, 0.5) & key.has).sum() / key.has.sum()
    torch.testing.assert_close(watched["exchange/layer1/points"], expected)
    assert watched["visible"] == output.visible.double().mean()
    asking = task("model.exchange_queries=true")
    layers = [f"exchange/layer{i}/{name}" for i in (0, 1) for name in ("points", "queries")]
    assert asking.watch(asking(sample)).keys() == {*layers, "visible"}
    assert task("fuser=random").watch(task("fuser=random")(sample)).keys() == {"visible"}
    alone = task("data.modalities=[points]")
    assert alone.watch(alone(sample)) == {}


@pytest.mark.parametrize(("thresholds", "monitor"), [("[0.25, 0.5]", "last/map25"), ("[0.5]", "last/map50")])
def test_the_monitor_is_what_ranks(thresholds: str, monitor: str) -> None:
    assert task(f"evaluation.thresholds={thresholds}").monitor == monitor
    assert task().higher_is_better


def test_layers_draw_apart_and_runs_alike() -> None:
    """``random`` in evaluation: each layer has a draw of its own, each run of a seed the same ones."""
    first, again, other = (task("fuser=random", f"seed={seed}").model.key_exchange for seed in (1, 1, 2))
    own, has = torch.zeros(1, 64, 288), torch.ones(1, 64, dtype=torch.bool)

    def drawn(exchange: Any) -> Tensor:
        return exchange.eval()(own, torch.ones_like(own), has)[0][..., 0]

    assert torch.equal(drawn(first[0]), drawn(again[0]))
    assert not torch.equal(drawn(first[0]), drawn(first[1]))
    assert not torch.equal(drawn(first[0]), drawn(other[0]))


def test_what_does_not_fit_is_said() -> None:
    recipe: Any = read_recipe("toy-detection3d", OVERRIDES)

    def built(**parts: Any) -> None:
        model = recipe.model.model_copy(update={k: v for k, v in parts.items() if k != "fuser"})
        fuser = parts.get("fuser", recipe.fuser)
        build_model(recipe.model_copy(update={"model": model, "fuser": fuser}), CLASSES)

    with pytest.raises(UserError, match=r"model\.image: wanted a Yolos, got GroupFree"):
        built(image=recipe.model.points)
    with pytest.raises(UserError, match=r"model\.points: wanted a GroupFree, got Yolos"):
        built(points=recipe.model.image)
    with pytest.raises(UserError, match=r"model\.points: .*three_layers\(\) got an unexpected .*'classes'"):
        built(points={"_target_": "tokenfusion.backbones.yolos.three_layers", "dim": 8, "out": 8})
    with pytest.raises(UserError, match=r"fuser"):
        built(fuser={"_target_": "tokenfusion.fusion.Concat"})
    with pytest.raises(UserError, match=r"model\.image\.variant|model\.image: .*variant must be one of"):
        build_model(read_recipe("toy-detection3d", [*OVERRIDES, "model.image.variant=xl"]), CLASSES)
    with pytest.raises(UserError, match=r"model\.points: .*64 proposals of 32 seeds"):
        build_model(read_recipe("toy-detection3d", [*OVERRIDES, "model.points.proposals=64"]), CLASSES)
    with pytest.raises(UserError, match=r"model\.image is missing"):
        read_recipe("toy-detection3d", ["model.image=null"])
    means = "model.points.mean_sizes=[[1, 1, 1], [1, 1, 1]]"
    with pytest.raises(UserError, match=r"model\.points: .*2 mean sizes for 3 classes"):
        build_model(read_recipe("toy-detection3d", [*OVERRIDES, means]), CLASSES)


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before() -> None:
    first = task().state_dict()
    torch.randn(7)
    second = task().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = task("seed=4").state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)
