"""Average precision: the reference's numbers, scenes small enough to count by hand, and a slow second opinion."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tokenfusion.data.boxes import from_groupfree, with_hull_sizes
from tokenfusion.tasks.detection3d.iou import iou3d
from tokenfusion.tasks.detection3d.metrics import (
    AveragePrecision,
    Detections,
    DetectionScores,
    Protocol,
    average_precision,
    class_scores,
    ensemble,
    suppress,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "ap_eval"
NO_POINTS = torch.zeros(0, 3)
PLAIN = Protocol()


def at(*x: float) -> Tensor:
    """Unit boxes along the x axis."""
    boxes = torch.zeros(len(x), 7)
    boxes[:, 0], boxes[:, 3:6] = torch.tensor(x), 1
    return boxes


def found(x: list[float], objectness: list[float], labels: list[int], classes: int = 2) -> Detections:
    """Proposals that are sure of their class."""
    return Detections(at(*x), torch.tensor(objectness), torch.eye(classes)[labels])


def judged(scenes: list[tuple[Detections, Tensor, Tensor]], protocol: Protocol = PLAIN) -> DetectionScores:
    average = AveragePrecision(scenes[0][0].classes.shape[1], protocol)
    for number, (detections, boxes, labels) in enumerate(scenes):
        average.add(detections, boxes, labels, f"{number:04}")
    return average.compute()


def reference_scenes(protocol: Protocol) -> list[tuple[Detections, Tensor, Tensor]]:
    """The golden case's scenes, suppressed."""
    out = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "outputs.npz").items()}
    scenes = []
    for scene in range(12):
        boxes = from_groupfree(
            torch.cat([out["pred_center"], out["pred_size"], out["pred_heading"][..., None]], -1)[scene]
        )
        proposals = Detections(boxes, out["pred_obj_logit"][scene].sigmoid(), out["pred_sem_logits"][scene].softmax(-1))
        kept = suppress(proposals, NO_POINTS, protocol)
        assert torch.equal(kept.boxes, boxes[out["nms_keep"][scene]])
        truth = torch.cat([out["gt_center"], out["gt_size"], out["gt_heading"][..., None]], -1)[scene]
        real = out["gt_cls"][scene] >= 0
        scenes.append((kept, from_groupfree(truth[real]), out["gt_cls"][scene][real]))
    return scenes


@pytest.mark.parametrize(("variant", "per_class"), [("percls", True), ("argmax", False)])
def test_reference_numbers(variant: str, per_class: bool) -> None:
    outputs = np.load(GOLDEN / "outputs.npz")
    protocol = Protocol(per_class_proposals=per_class)
    scores = judged(reference_scenes(protocol), protocol)
    for row, percent in enumerate((25, 50)):
        suffix = f"{variant}_{percent}"
        np.testing.assert_allclose(scores.ap[row] / 100, outputs[f"ap_{suffix}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.recall[row] / 100, outputs[f"recall_{suffix}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.means[f"map{percent}"] / 100, outputs[f"mAP_{suffix}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.means[f"ar{percent}"] / 100, outputs[f"AR_{suffix}"], rtol=0, atol=1e-12)


def test_processes_and_their_order_do_not_matter() -> None:
    scenes = reference_scenes(Protocol())
    whole = judged(scenes)
    parts = []
    for rank in (1, 0, 2):
        part = AveragePrecision(10, Protocol())
        for index in range(rank, 12, 3):
            part.add(*scenes[index], f"{index:04}")
        parts.append(part)
    parts[0].merge(parts[1].scenes)
    parts[0].merge(parts[2].scenes)
    again = parts[0].compute()
    assert np.array_equal(again.ap, whole.ap)
    assert again.means == whole.means


def test_figures_by_hand() -> None:
    """Class 0: hit, false alarm, hit of three boxes: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    first = (found([0, 9, 0], [0.9, 0.8, 0.3], [0, 0, 1]), at(0, 5), torch.tensor([0, 0]))
    second = (found([3], [0.7], [0]), at(3), torch.tensor([0]))
    scores = judged([first, second])
    np.testing.assert_allclose(scores.ap[:, 0], 100 * (1 / 3 + 2 / 3 / 3))
    np.testing.assert_allclose(scores.recall[:, 0], 200 / 3)
    assert np.isnan(scores.ap[:, 1]).all()  # class 1 has no true box: it is left out
    assert scores.means["map25"] == pytest.approx(500 / 9)
    assert list(scores.means) == ["map25", "ar25", "map50", "ar50"]


def test_a_box_is_found_once_and_by_the_better_score() -> None:
    scene = (found([0.3, 0], [0.9, 0.8], [0, 0]), at(0), torch.tensor([0]))
    scores = judged([scene], Protocol(thresholds=(0.25, 0.6)))
    assert scores.ap[0, 0] == 100  # the first hits (IoU 0.54), the second is too late
    assert scores.ap[1, 0] == 50  # the first misses
    assert scores.recall[:, 0].tolist() == [100, 100]


def test_only_the_best_overlap_is_tried() -> None:
    """A proposal whose best box is taken does not turn to another one that it overlaps as well."""
    scene = (found([0, 0.1], [0.9, 0.8], [0, 0]), at(0, 0.6), torch.tensor([0, 0]))
    assert judged([scene]).recall[0, 0] == 50


def test_of_equal_overlaps_the_first_box_is_tried() -> None:
    scene = (found([0, -0.25], [0.9, 0.8], [0, 0]), at(-0.25, 0.25), torch.tensor([0, 0]))
    assert judged([scene]).recall[0, 0] == 50


def test_equal_scores_come_in_the_order_of_the_scenes_names() -> None:
    hit = (found([0], [0.9], [0]), at(0), torch.tensor([0]))
    miss = (found([9], [0.9], [0]), at(0), torch.tensor([0]))
    average = AveragePrecision(2, PLAIN)
    average.add(*miss, "b")
    average.add(*hit, "a")
    assert average.compute().ap[0, 0] == 50  # the hit first: precision 1 at recall 1/2


def test_the_threshold_must_be_exceeded() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 2, 1, 1, 0]])
    scene = (found([0.5], [0.9], [0]), boxes, torch.tensor([0]))  # one half
    assert judged([scene], Protocol(thresholds=(0.5, 0.499))).ap[:, 0].tolist() == [0, 100]


def test_classes_scenes_and_proposals_may_be_missing() -> None:
    nothing = found([], [], [])
    assert judged([(nothing, at(0), torch.tensor([1]))]).ap[0].tolist() == [pytest.approx(math.nan, nan_ok=True), 0]
    assert judged([(found([0], [0.5], [0]), at(), torch.tensor([], dtype=torch.int64))]).means["map25"] == 0
    assert AveragePrecision(3, Protocol()).compute().means["ar50"] == 0
    late = [(found([0], [0.9], [0]), at(), torch.tensor([], dtype=torch.int64)), (nothing, at(0), torch.tensor([0]))]
    assert judged(late).ap[0, 0] == 0


def test_a_proposal_counts_for_every_class_or_for_its_own() -> None:
    proposals = Detections(at(0), torch.tensor([0.5]), torch.tensor([[0.2, 0.8]]))
    torch.testing.assert_close(class_scores(proposals, True), torch.tensor([[0.1, 0.4]]))
    torch.testing.assert_close(class_scores(proposals, False), torch.tensor([[math.nan, 0.5]]), equal_nan=True)
    scene = (proposals, at(0), torch.tensor([0]))
    assert judged([scene]).ap[0, 0] == 100
    assert judged([scene], Protocol(per_class_proposals=False)).ap[0, 0] == 0


def test_a_diverged_network_ends_no_evaluation() -> None:
    proposals = Detections(at(0, math.nan), torch.tensor([0.5, math.nan]), torch.full((2, 2), 0.5))
    kept = suppress(proposals, torch.zeros(9, 3), Protocol(remove_empty=True))
    assert len(kept.boxes) == 1
    scene = (proposals, at(0), torch.tensor([0]))
    assert judged([scene]).ap[0, 0] == 100


def test_empty_boxes_and_order_of_what_stays() -> None:
    proposals = found([0, 5, 0.1, 9], [0.5, 0.4, 0.6, 0.9], [0, 0, 0, 0])
    assert suppress(proposals, NO_POINTS, Protocol()).boxes[:, 0].tolist() == [5, pytest.approx(0.1), 9]
    cloud = torch.tensor([[0.2, 0.0, 0.0]] * 5 + [[9.0, 0.0, 0.0]] * 4)
    assert suppress(proposals, cloud, Protocol(remove_empty=True)).boxes[:, 0].tolist() == [pytest.approx(0.1)]
    assert len(suppress(proposals, NO_POINTS, Protocol(remove_empty=True)).boxes) == 0


def test_heads_together() -> None:
    both = ensemble([found([0], [0.9], [0]), found([0.1, 4], [0.8, 0.7], [0, 1])])
    assert both.boxes[:, 0].tolist() == [0, pytest.approx(0.1), 4]
    assert suppress(both, NO_POINTS, Protocol()).boxes[:, 0].tolist() == [0, 4]


def test_groupfrees_sizes_are_hulls() -> None:
    truth = torch.tensor([[0.0, 0, 0, 2, 0.5, 1, 0.7]])
    proposals = Detections(truth, torch.tensor([0.9]), torch.eye(1))
    hull = float(iou3d(truth.numpy(), with_hull_sizes(truth).numpy())[0, 0])
    protocol = Protocol(gt_size="groupfree", thresholds=(hull - 0.01, hull + 0.01))
    assert judged([(proposals, truth, torch.tensor([0]))], protocol).ap[:, 0].tolist() == [100, 0]
    assert judged([(proposals, truth, torch.tensor([0]))], Protocol(thresholds=(0.99,))).ap[0, 0] == 100
    assert "not comparable" in str(protocol)
    assert str(Protocol()) == "NMS 0.25, IoU > 0.25, 0.5, true sizes, batch 1, fp32"


def test_mistakes_are_named() -> None:
    average = AveragePrecision(2, Protocol())
    scene = (found([0], [0.9], [0]), at(0), torch.tensor([0]))
    average.add(*scene, "a")
    with pytest.raises(ValueError, match="a was counted before"):
        average.add(*scene, "a")
    with pytest.raises(ValueError, match=r"class lies outside 0\.\.1"):
        average.add(scene[0], at(0), torch.tensor([2]), "b")
    with pytest.raises(ValueError, match=r"class lies outside 0\.\.1"):
        average.add(found([0], [0.9], [0], classes=3), at(0), torch.tensor([0]), "b")
    for wrong in ({"thresholds": ()}, {"thresholds": (1.5,)}, {"nms": 0.3}, {"repeats": 0}, {"gt_size": "hull"}):
        with pytest.raises(ValidationError):
            Protocol(**wrong)


def many_scenes(count: int, proposals: int, classes: int) -> list[tuple[Detections, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for _ in range(count):
        truth = torch.rand(8, 7, generator=generator) * torch.tensor([5.0, 5, 1, 1, 1, 1, 6]) + torch.tensor(0.3)
        boxes = truth[torch.randint(8, (proposals,), generator=generator)]
        boxes = boxes + 0.15 * torch.randn(proposals, 7, generator=generator)
        logits = torch.randn(proposals, classes, generator=generator)
        labels = torch.randint(classes, (8,), generator=generator)
        objectness = torch.rand(proposals, generator=generator)
        scenes.append((Detections(boxes, objectness, logits.softmax(1)), truth, labels))
    return scenes


def slow_average_precision(
    scenes: list[tuple[Detections, Tensor, Tensor]], threshold: float, label: int
) -> tuple[float, float]:
    """The definition, word by word: one class, one threshold, one proposal at a time."""
    entries, count = [], 0
    for number, (detections, truth, labels) in enumerate(scenes):
        own = truth[labels == label]
        count += len(own)
        overlap = iou3d(detections.boxes.numpy(), own.numpy())
        scores = (detections.classes[:, label] * detections.objectness).tolist()
        entries += [(score, number, list(row)) for score, row in zip(scores, overlap, strict=True)]
    used: set[tuple[int, int]] = set()
    hits, curve = 0, []
    for rank, (_, number, row) in enumerate(sorted(entries, key=lambda entry: -entry[0]), 1):
        best = max(range(len(row)), key=row.__getitem__, default=None)
        if best is not None and row[best] > threshold and (number, best) not in used:
            used.add((number, best))
            hits += 1
        curve.append((hits / count, hits / rank))
    area, last = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - last) * max(precision for _, precision in curve[place:])
        last = recall
    return area, last


def test_a_slow_second_opinion() -> None:
    scenes = many_scenes(6, 40, 3)
    scores = judged(scenes)
    for row, threshold in enumerate((0.25, 0.5)):
        for label in range(3):
            wanted = slow_average_precision(scenes, threshold, label)
            np.testing.assert_allclose([scores.ap[row, label] / 100, scores.recall[row, label] / 100], wanted)
    assert 0 < scores.means["map50"] < scores.means["map25"] < 100


def test_area_under_the_envelope() -> None:
    assert average_precision(np.zeros(0, bool), 3) == (0.0, 0.0)
    assert average_precision(np.array([False, True]), 1) == (0.5, 1.0)
    area, recall = average_precision(np.array([True, False, False, True, True, False]), 4)
    assert area == pytest.approx(1 / 4 + 2 * (3 / 5) / 4)
    assert recall == 0.75


def test_fifty_scenes_take_a_moment() -> None:
    """Goal: 0.1 s for 50 scenes x 256 proposals x 10 classes at both thresholds; the margin is for slow machines."""
    scenes = many_scenes(50, 256, 10)
    protocol = Protocol()
    judged([(suppress(scenes[0][0], NO_POINTS, protocol), *scenes[0][1:])])  # compiled
    times = []
    for _ in range(3):
        start = time.process_time()
        judged([(suppress(detections, NO_POINTS, protocol), *truth) for detections, *truth in scenes])
        times.append(time.process_time() - start)
    assert min(times) < 0.5
