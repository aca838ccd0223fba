"""Matching and losses of boxes in images: known numbers, the definition by brute force, gradients, no boxes at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.backbones.yolos import YolosOutput
from tokenfusion.tasks.detection3d.losses2d import Loss2dSettings, corners, giou, match, postprocess, yolos_losses

SETTINGS = Loss2dSettings()
CLASSES = 3


def drawn(batch: int = 2, detections: int = 5, dtype: torch.dtype = torch.float32) -> YolosOutput:
    logits = torch.randn(batch, detections, CLASSES + 1, dtype=dtype)
    return YolosOutput(logits, 0.1 + 0.8 * torch.rand(batch, detections, 4, dtype=dtype))


def truth(
    counts: tuple[int, ...], padded: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(padded) < torch.tensor(counts).unsqueeze(1)
    boxes = 0.1 + 0.8 * torch.rand(len(counts), padded, 4, dtype=dtype)
    return boxes, torch.randint(CLASSES, (len(counts), padded)), mask


# ---- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0.5, 0.5, 0.2, 0.4), 1.0),  # the same box
        ((0.6, 0.5, 0.2, 0.4), 1 / 3),  # half of it to the side: 0.04 shared of 0.12, no gap in the hull
        ((0.8, 0.5, 0.2, 0.4), -1 / 5),  # a gap of half a box: hull 0.2, union 0.16
        ((0.5, 0.5, 0.1, 0.2), 1 / 4),  # inside
        ((0.5, 0.5, 0.0, 0.0), 0.0),  # a point inside
    ],
)
def test_giou_of_known_pairs(other: tuple[float, ...], expected: float) -> None:
    own = torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=torch.float64)
    there, back = (giou(*pair).item() for pair in itertools.permutations((own, torch.tensor(other).double())))
    assert there == pytest.approx(expected, abs=1e-6)
    assert there == pytest.approx(back)


def test_giou_is_broadcast_and_never_nan() -> None:
    a, b = torch.rand(3, 4), torch.rand(5, 4)
    pairs = giou(a[:, None], b[None])
    assert pairs.shape == (3, 5)
    assert pairs[2, 1] == giou(a[2], b[1])
    point = torch.zeros(4, requires_grad=True)
    value = giou(point, torch.zeros(4))
    value.backward()
    assert value == 0
    assert point.grad is not None
    assert point.grad.isfinite().all()


def test_corners() -> None:
    assert corners(torch.tensor([0.5, 0.25, 0.5, 0.25])).tolist() == [0.25, 0.125, 0.75, 0.375]


# ---- matching ------------------------------------------------------------------------------------------------------


def costs(output: YolosOutput, boxes: Tensor, labels: Tensor, settings: Loss2dSettings) -> Tensor:
    """``[D, K]`` of one sample, pair by pair."""
    rows = []
    for logits, found in zip(output.logits[0], output.boxes[0], strict=True):
        pairs = zip(boxes[0], labels[0], strict=True)
        rows.append(
            [
                -settings.classes * logits.softmax(0)[label]
                + settings.l1 * (found - box).abs().sum()
                - settings.giou * giou(found, box)
                for box, label in pairs
            ]
        )
    return torch.tensor(rows)


@pytest.mark.parametrize("settings", [SETTINGS, Loss2dSettings(classes=20.0, l1=0.5, giou=0.0)])
def test_the_cheapest_of_all_assignments(settings: Loss2dSettings) -> None:
    for _ in range(5):
        output, (boxes, labels, mask) = drawn(1), truth((3,))
        cost = costs(output, boxes[:, :3], labels[:, :3], settings)
        cheapest = min(
            itertools.permutations(range(5), 3), key=lambda tokens: sum(cost[t, k] for k, t in enumerate(tokens))
        )
        assert match(output, boxes, labels, mask, settings).tolist() == [[*cheapest, -1]]


def test_true_boxes_may_stand_anywhere_in_the_padding() -> None:
    output, (boxes, labels, _) = drawn(1), truth((4,))
    mask = torch.tensor([[False, True, False, True]])
    tokens = match(output, boxes, labels, mask, SETTINGS)
    alone = match(output, boxes[:, [1, 3]], labels[:, [1, 3]], torch.ones(1, 2, dtype=torch.bool), SETTINGS)
    assert tokens.tolist() == [[-1, alone[0, 0], -1, alone[0, 1]]]


def test_samples_do_not_know_each_other() -> None:
    output, (boxes, labels, mask) = drawn(), truth((2, 4))
    both = match(output, boxes, labels, mask, SETTINGS)
    for b in range(2):
        alone = YolosOutput(output.logits[b : b + 1], output.boxes[b : b + 1])
        assert torch.equal(match(alone, *(x[b : b + 1] for x in (boxes, labels, mask)), SETTINGS), both[b : b + 1])


def test_more_boxes_than_tokens_leaves_the_dearest_out() -> None:
    output, (boxes, labels, mask) = drawn(1, detections=2), truth((4,))
    tokens = match(output, boxes, labels, mask, SETTINGS)[0].tolist()
    assert sorted(tokens) == [-1, -1, 0, 1]
    losses = yolos_losses(output, boxes, labels, mask, SETTINGS)
    kept = [tokens.index(0), tokens.index(1)]
    l1 = sum((output.boxes[0, t] - boxes[0, k]).abs().sum() for t, k in enumerate(kept)) / 4
    assert losses["l1_2d"].item() == pytest.approx(5 * l1.item(), rel=1e-5)


def test_a_diverged_network_is_matched_and_its_loss_says_so() -> None:
    output, target = drawn(), truth((2, 1))
    output.boxes[0, 1] = math.nan
    assert (match(output, *target, SETTINGS) >= 0).sum() == 3
    output.boxes[:] = math.nan
    assert yolos_losses(output, *target, SETTINGS)["l1_2d"].isnan()


# ---- losses --------------------------------------------------------------------------------------------------------


def test_losses_are_their_definition() -> None:
    output, (boxes, labels, mask) = drawn(), truth((3, 1))
    tokens = match(output, boxes, labels, mask, SETTINGS)
    classes, l1, overlap = torch.full((2, 5), CLASSES), 0.0, 0.0
    for b, k in mask.nonzero().tolist():
        found = output.boxes[b, tokens[b, k]]
        classes[b, tokens[b, k]] = labels[b, k]
        l1 += (found - boxes[b, k]).abs().sum().item()
        overlap += 1 - giou(found, boxes[b, k]).item()
    losses = yolos_losses(output, boxes, labels, mask, SETTINGS)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.1])
    assert losses["classes2d"].item() == pytest.approx(
        F.cross_entropy(output.logits.flatten(0, 1), classes.flatten(), weight).item(), rel=1e-5
    )
    assert losses["l1_2d"].item() == pytest.approx(5 * l1 / 4, rel=1e-5)
    assert losses["giou_2d"].item() == pytest.approx(2 * overlap / 4, rel=1e-5)


def test_factors_and_the_weight_of_no_object() -> None:
    output, target = drawn(), truth((0, 2))
    plain = yolos_losses(output, *target, Loss2dSettings(classes=1.0, l1=1.0, giou=1.0))
    twice = yolos_losses(output, *target, Loss2dSettings(classes=2.0, l1=2.0, giou=2.0))  # the same matching
    assert all(twice[name].item() == pytest.approx(2 * plain[name].item(), rel=1e-6) for name in plain)
    assert yolos_losses(output, *target, Loss2dSettings(no_object=1.0))["classes2d"] != plain["classes2d"]


@pytest.mark.parametrize("padded", [0, 4])
def test_no_boxes_at_all_ask_for_no_object_alone(padded: int) -> None:
    output = YolosOutput(*(x.requires_grad_() for x in drawn()))
    boxes, labels, mask = truth((0, 0), padded)
    losses = yolos_losses(output, boxes, labels, mask, SETTINGS)
    expected = F.cross_entropy(output.logits.flatten(0, 1), torch.full((10,), CLASSES))
    torch.testing.assert_close(losses["classes2d"], expected)
    assert losses["l1_2d"] == losses["giou_2d"] == 0
    sum(losses.values()).backward()
    assert output.logits.grad is not None
    assert output.logits.grad.abs().max() > 0


def test_what_lies_in_the_padding_does_not_matter() -> None:
    output, (boxes, labels, mask) = drawn(), truth((2, 1))
    other_boxes, other_labels = boxes.clone(), labels.clone()
    other_boxes[~mask], other_labels[~mask] = 0, -1
    a, b = (yolos_losses(output, x, y, mask, SETTINGS) for x, y in ((boxes, labels), (other_boxes, other_labels)))
    assert a == b


def test_images_that_are_missing_are_asked_nothing() -> None:
    output, (boxes, labels, mask) = drawn(), truth((2, 3))
    one = YolosOutput(output.logits[:1], output.boxes[:1])
    losses = yolos_losses(output, boxes, labels, mask, SETTINGS, present=torch.tensor([True, False]))
    alone = yolos_losses(one, boxes[:1], labels[:1], mask[:1], SETTINGS)
    torch.testing.assert_close(losses, alone)
    nothing = yolos_losses(output, boxes, labels, mask, SETTINGS, present=torch.tensor([False, False]))
    assert sum(nothing.values()) == 0


def test_gradients() -> None:
    output, (boxes, labels, mask) = drawn(dtype=torch.float64), truth((3, 1), dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in output)

    def total(logits: Tensor, found: Tensor) -> Tensor:
        return torch.stack([*yolos_losses(YolosOutput(logits, found), boxes, labels, mask, SETTINGS).values()])

    assert torch.autograd.gradcheck(total, inputs)


def test_descent_finds_the_boxes() -> None:
    logits, raw = torch.zeros(1, 4, CLASSES + 1), torch.randn(1, 4, 4)
    inputs = [x.requires_grad_() for x in (logits, raw)]
    boxes, labels, mask = truth((2,))
    optimizer = torch.optim.Adam(inputs, lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        output = YolosOutput(logits, raw.sigmoid())
        sum(yolos_losses(output, boxes, labels, mask, SETTINGS).values()).backward()
        optimizer.step()
    tokens = match(output, boxes, labels, mask, SETTINGS)[0, :2]
    assert giou(output.boxes[0, tokens], boxes[0, :2]).min() > 0.8
    assert torch.equal(logits[0, tokens].argmax(-1), labels[0, :2])
    others = [token for token in range(4) if token not in tokens.tolist()]
    assert (logits[0, others].argmax(-1) == CLASSES).all()


def test_half_precision_outputs_are_judged_in_single() -> None:
    output, target = drawn(dtype=torch.bfloat16), truth((2, 1))
    losses = yolos_losses(output, *target, SETTINGS)
    full = yolos_losses(YolosOutput(*(x.float() for x in output)), *target, SETTINGS)
    assert losses == full
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_found_boxes_are_in_pixels_of_their_own_image() -> None:
    logits = torch.tensor([[[5.0, 0, 0, 9], [0, 0, 3, 0]]]).repeat(2, 1, 1)  # "no object" is no answer
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.5, 0.5, 0.5]]]).repeat(2, 1, 1)
    found = postprocess(YolosOutput(logits, boxes), torch.tensor([[40, 80], [10, 20]]))
    assert found.classes.tolist() == [[0, 2], [0, 2]]
    torch.testing.assert_close(found.scores[0], logits[0].softmax(-1)[[0, 1], [0, 2]])
    assert found.boxes[0].tolist() == [[20, 0, 60, 40], [0, 10, 40, 30]]
    assert found.boxes[1].tolist() == [[5, 0, 15, 10], [0, 2.5, 10, 7.5]]
