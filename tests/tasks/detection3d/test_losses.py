"""The losses of the points' detector: known numbers, what each term sees, scenes without boxes. Golden: test_groupfree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from tokenfusion.backbones.pointnet2 import Seeds
from tokenfusion.data.boxes import axis_aligned_extent, wrap_angle
from tokenfusion.data.truth import SceneTruth
from tokenfusion.tasks.detection3d.groupfree import GroupFree, GroupFreeOutput, HeadOutput
from tokenfusion.tasks.detection3d.losses import (
    LossSettings,
    focal,
    groupfree_losses,
    head_losses,
    heading_target,
    key_points,
    targets,
)

BOXES = torch.tensor([[1.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.7], [4.0, 1.0, 0.5, 1.0, 1.5, 2.0, -2.0]])
MEANS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 4.0]])
SUN = LossSettings()


def _truth(boxes: Tensor, owner: list[list[int]], labels: list[int] | None = None, padding: int = 0) -> SceneTruth:
    """One scene repeated for each row of owners; rows of zeros behind the boxes."""
    batch, count = len(owner), len(boxes)
    mask = F.pad(torch.ones(batch, count, dtype=torch.bool), (0, padding))
    kinds = F.pad(torch.tensor(labels or [1] * count, dtype=torch.int64), (0, padding)).expand(batch, -1)
    views = torch.zeros(batch, 0, count + padding, 4)
    rows = F.pad(boxes, (0, 0, 0, padding)).expand(batch, -1, -1)
    return SceneTruth(rows, kinds, mask, torch.tensor(owner), views, views[..., 0] > 0)


def _output(
    truth: SceneTruth, queries: int, bins: int = 12, means: Tensor | None = None, layers: int = 1
) -> GroupFreeOutput:
    """Random predictions of a cloud whose every point is a seed; the first ones are the queries."""
    batch, seeds = truth.point_box.shape
    xyz = torch.randn(batch, seeds, 3)
    index = torch.arange(seeds).expand(batch, -1)

    def head() -> HeadOutput:
        def noise(*last: int) -> Tensor:
            return torch.randn(batch, queries, *last, requires_grad=True)

        many = (None, None) if means is None else (noise(len(means)), noise(len(means), 3))
        return HeadOutput(xyz[:, :queries], noise(3), noise(), noise(bins), noise(bins), noise(3), *many, noise(3))

    names = ("proposal", *(f"{i}head" for i in range(layers - 1)), "last")
    logits = torch.randn(batch, seeds, requires_grad=True)
    return GroupFreeOutput(
        Seeds(xyz, xyz, index), logits, index[:, :queries], [head() for _ in range(layers + 1)], names, means
    )


def _leaves(output: GroupFreeOutput) -> list[Tensor]:
    return [x for head in output.heads for x in head[1:] if x is not None] + [output.seed_logits]  # type: ignore[list-item]


# ---- terms ---------------------------------------------------------------------------------------------------------


def test_focal_loss_is_torchvisions() -> None:
    logits, labels = torch.randn(40) * 5, torch.rand(40) < 0.3
    torch.testing.assert_close(focal(logits, labels), sigmoid_focal_loss(logits, labels.float(), 0.25, 2.0))
    sure = focal(torch.tensor([200.0, -200.0, 200.0]), torch.tensor([True, False, False]))
    torch.testing.assert_close(sure, torch.tensor([0.0, 0.0, 150.0]))


@pytest.mark.parametrize("bins", [1, 4, 12])
def test_headings_are_bins_and_rests_of_minus_yaw(bins: int) -> None:
    yaw = torch.linspace(-3.1, 9.0, 200, dtype=torch.float64)
    number, rest = heading_target(yaw, bins)
    assert number.min() >= 0
    assert number.max() == bins - 1
    assert rest.abs().max() <= 1
    back = -(2 * number.double() + rest) * math.pi / bins
    torch.testing.assert_close(wrap_angle(back - yaw), torch.zeros_like(yaw))
    number, rest = heading_target(torch.deg2rad(torch.tensor([0.0, -30.0, 40.0])), 12)  # published: 0, 30, 320 degrees
    assert number.tolist() == [0, 1, 11]
    torch.testing.assert_close(rest, torch.tensor([0.0, 0.0, -10 / 15]))


def test_queries_answer_for_the_object_under_their_point() -> None:
    truth = _truth(BOXES, [[1, -1, 0, 0, 1]], [2, 0], padding=1)
    output = _output(truth, 3)
    output = output._replace(query_index=torch.tensor([[3, 1, 4]]))
    target = targets(output, truth, truth.boxes[..., 3:6], 12)
    assert target.positive.tolist() == [[True, False, True]]
    assert target.labels.tolist() == [[2, 0, 0]]
    torch.testing.assert_close(target.center[0], torch.stack([BOXES[0, :3], torch.zeros(3), BOXES[1, :3]]))
    torch.testing.assert_close(target.size[0, ::2], BOXES[:, 3:6])


def test_seeds_reach_objects_through_their_points() -> None:
    truth = _truth(BOXES, [[-1, 0, 1, -1]])
    output = _output(truth, 1)
    output = output._replace(
        seeds=output.seeds._replace(index=torch.tensor([[3, 2, 1, 0]])), query_index=torch.tensor([[1]])
    )
    assert targets(output, truth, truth.boxes[..., 3:6], 12).center[0, 0].tolist() == BOXES[1, :3].tolist()


def test_key_points_are_the_nearest_own_seeds_in_sizes_of_the_box() -> None:
    box = torch.tensor([[0.0, 0, 0, 10, 1, 1, 0]])
    truth = _truth(box, [[0] * 6], padding=1)
    xyz = torch.tensor([[[4.0, 0, 0], [0, 0.45, 0], [0, 0, 0.3], [0, 0.5, 0], [2.0, 0, 0], [0.1, 0, 0]]])
    sizes = truth.boxes[..., 3:6]
    assert key_points(xyz, torch.zeros(1, 6, dtype=torch.int64), truth, sizes, 3)[0].nonzero().flatten().tolist() == [
        2,
        4,
        5,
    ]
    owner = torch.tensor([[0, 0, -1, 1, -1, 0]])  # background is nobody's; row 1 is padding
    assert key_points(xyz, owner, truth, sizes, 4)[0].nonzero().flatten().tolist() == [0, 1, 5]
    assert key_points(xyz, owner, truth, sizes, 50).sum() == 3


def _perfect(truth: SceneTruth, bins: int, means: Tensor | None) -> GroupFreeOutput:
    """What is predicted is true, and the detector is sure of it."""
    output = _output(truth, truth.point_box.shape[1], bins, means)
    target = targets(output, truth, truth.boxes[..., 3:6], bins)
    heading = F.one_hot(target.heading_class, bins) * 200.0
    scores = residuals = None
    if means is not None:
        scores = F.one_hot(target.labels, len(means)) * 200.0
        right = (target.size / means[target.labels] - 1)[..., None, :]
        residuals = torch.where(scores[..., None] > 0, right, 9.0)
    head = HeadOutput(
        target.center, target.center, torch.where(target.positive, 200.0, -200.0), heading,
        torch.where(heading > 0, target.heading_residual[..., None], 9.0), target.size, scores, residuals,
        F.one_hot(target.labels, 3) * 200.0,
    )  # fmt: skip
    good = key_points(output.seeds.xyz, truth.point_box, truth, truth.boxes[..., 3:6], 4)
    return output._replace(heads=[head, head], seed_logits=torch.where(good, 200.0, -200.0))


@pytest.mark.parametrize("bins", [1, 12])
@pytest.mark.parametrize("means", [None, MEANS])
def test_the_truth_costs_nothing_and_decodes_to_itself(bins: int, means: Tensor | None) -> None:
    boxes = BOXES.clone()
    boxes[:, 6] *= bins > 1
    truth = _truth(boxes, [[0, 1, -1], [-1, 1, 1]], [2, 1])
    output = _perfect(truth, bins, means)
    losses = groupfree_losses(output, truth, SUN)
    assert set(losses) == {"kps", "objectness", "center", "heading", "size", "class"}
    assert all(loss.abs() < 1e-6 for loss in losses.values()), losses
    decoder = GroupFree(3, bins, layers=1, proposals=1, points=(4, 2, 1, 1), width=0.125)
    torch.testing.assert_close(decoder.boxes(output.heads[0])[0, :2], boxes)


@pytest.mark.parametrize(
    ("field", "term"),
    [
        ("center", "center"),
        ("objectness", "objectness"),
        ("heading_scores", "heading"),
        ("heading_residuals_normalized", "heading"),
        ("size", "size"),
        ("class_scores", "class"),
    ],
)
def test_each_mistake_costs_its_own_term(field: str, term: str) -> None:
    truth = _truth(BOXES, [[0, 1, -1]], [2, 1])
    output = _perfect(truth, 12, None)
    wrong = output.heads[0]._replace(**{field: -getattr(output.heads[0], field) + 0.25})
    losses = groupfree_losses(output._replace(heads=[wrong, output.heads[1]]), truth, SUN)
    assert {name for name, loss in losses.items() if loss > 1e-4} == {term}


def test_weights_of_the_terms() -> None:
    """10 x (c_kps KPS + (c_obj OBJ + c_box BOX + c_sem SEM) / (L + 1)), each a sum over the heads."""
    truth = _truth(BOXES, [[0, 1, -1, 0], [1, -1, -1, 0]], [2, 1])
    output = _output(truth, 3, means=MEANS, layers=2)
    settings = LossSettings(kps=0.3, objectness=0.7, box=1.5, semantic=0.2, heading_delta=0.5, size_delta=0.3, topk=1)
    terms = groupfree_losses(output, truth, settings)
    each = head_losses(output, truth, truth.boxes[..., 3:6], settings)
    assert each.center.shape == (3,)
    torch.testing.assert_close(terms["objectness"], 10 / 3 * 0.7 * each.objectness.sum())
    torch.testing.assert_close(terms["center"], 10 / 3 * 1.5 * each.center.sum())
    heading = 0.1 * each.heading_class + 0.5 * each.heading_residual
    torch.testing.assert_close(terms["heading"], 10 / 3 * 1.5 * heading.sum())
    size = 0.1 * each.size_class + 0.3 * each.size_residual
    torch.testing.assert_close(terms["size"], 10 / 3 * 1.5 * size.sum())
    torch.testing.assert_close(terms["class"], 10 / 3 * 0.2 * each.semantic.sum())
    good = key_points(output.seeds.xyz, truth.point_box, truth, truth.boxes[..., 3:6], 1)
    assert output.seed_logits is not None
    kps = sigmoid_focal_loss(output.seed_logits, good.float(), 0.25, 2.0).sum() / 8
    torch.testing.assert_close(terms["kps"], 10 * 0.3 * kps)


def test_terms_are_means_over_positives_of_the_whole_batch() -> None:
    """By hand, for relative sizes."""
    truth = _truth(BOXES, [[0, 1, -1], [1, -1, -1]], [2, 1])
    output = _output(truth, 2, means=MEANS)
    each = head_losses(output, truth, truth.boxes[..., 3:6], SUN)
    head = output.heads[0]
    assert head.size_scores is not None
    assert head.size_residuals is not None
    pairs = [(0, 0, 0, 2), (0, 1, 1, 1), (1, 0, 1, 1)]  # sample, query, box, label
    size = scores = center = torch.tensor(0.0)
    for b, q, k, label in pairs:
        error = head.size_residuals[b, q, label] - (BOXES[k, 3:6] / MEANS[label] - 1)
        size = size + F.smooth_l1_loss(error, torch.zeros(3), beta=0.0625, reduction="sum")
        scores = scores + F.cross_entropy(head.size_scores[b, q], torch.tensor(label))
        center = center + F.smooth_l1_loss(head.center[b, q], BOXES[k, :3], beta=1 / 9, reduction="sum")
    torch.testing.assert_close(each.size_residual[0], size / 3)
    torch.testing.assert_close(each.size_class[0], scores / 3)
    torch.testing.assert_close(each.center[0], center / 3)


def test_published_sizes_of_sun_rgbd() -> None:
    """The true size costs nothing against exact sizes; the turned box's extent costs nothing against groupfree's."""
    truth = _truth(BOXES, [[0, 1]])
    output = _perfect(truth, 12, None)
    published = LossSettings(gt_size="groupfree")
    assert groupfree_losses(output, truth, published)["size"] > 0.1
    hull = output.heads[0]._replace(size=axis_aligned_extent(truth.boxes))
    assert groupfree_losses(output._replace(heads=[hull, hull]), truth, published)["size"] < 1e-6
    assert groupfree_losses(output._replace(heads=[hull, hull]), truth, SUN)["size"] > 0.1


# ---- what scenes may lack ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("means", [None, MEANS])
def test_scenes_without_boxes(padding: int, means: Tensor | None) -> None:
    truth = _truth(BOXES[:0], [[-1] * 5, [-1] * 5], padding=padding)
    output = _output(truth, 3, means=means)
    losses = groupfree_losses(output, truth, SUN)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["center"] == losses["heading"] == losses["size"] == losses["class"] == 0
    assert losses["objectness"] > 0
    assert losses["kps"] > 0
    assert all(x.grad is None or x.grad.isfinite().all() for x in _leaves(output))


def test_padding_changes_nothing() -> None:
    owner = [[0, 1, -1, 1], [1, 0, 0, -1]]
    plain, padded = _truth(BOXES, owner, [2, 1]), _truth(BOXES, owner, [2, 1], padding=5)
    output = _output(plain, 3, means=MEANS)
    for name, loss in groupfree_losses(output, plain, SUN).items():
        torch.testing.assert_close(groupfree_losses(output, padded, SUN)[name], loss)


def test_without_key_points_there_is_no_such_term() -> None:
    truth = _truth(BOXES, [[0, 1, -1]])
    assert "kps" not in groupfree_losses(_output(truth, 3)._replace(seed_logits=None), truth, SUN)


def test_gradients_are_those_of_the_numbers() -> None:
    truth = _truth(BOXES.double(), [[0, 1, -1]], [2, 1])
    output = _output(truth, 3, means=MEANS.double(), layers=1)
    leaves = [x.detach().double().requires_grad_() for x in _leaves(output)]

    def loss(*values: Tensor) -> Tensor:
        parts = iter(values)
        heads = [HeadOutput(head.base_xyz.double(), *(next(parts) for _ in head[1:])) for head in output.heads]
        return sum(groupfree_losses(output._replace(heads=heads, seed_logits=next(parts)), truth, SUN).values())  # type: ignore[return-value]

    assert torch.autograd.gradcheck(loss, leaves)


def test_half_precision_predictions_cost_in_single_precision() -> None:
    truth = _truth(BOXES, [[0, 1, -1]])
    output = _output(truth, 3)
    halves = [HeadOutput(*(None if x is None else x.bfloat16() for x in head)) for head in output.heads]
    assert output.seed_logits is not None
    losses = groupfree_losses(output._replace(heads=halves, seed_logits=output.seed_logits.bfloat16()), truth, SUN)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("key", [{"center_delta": 0.0}, {"kps": -1.0}, {"gt_size": "half"}, {"kp": 1.0}])
def test_impossible_settings_are_refused(key: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LossSettings(**key)
