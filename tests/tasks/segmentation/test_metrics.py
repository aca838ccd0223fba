"""The figures, against the reference's numbers and torchmetrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenfusion.tasks.segmentation.metrics import confusion_matrix, segmentation_scores

GOLDEN = Path(__file__).parents[2] / "golden" / "seg_metrics"


def test_reference_numbers() -> None:
    outputs = np.load(GOLDEN / "outputs.npz")
    label, prediction = (torch.from_numpy(outputs[name]) for name in ("label", "prediction"))
    matrix = confusion_matrix(label, prediction, 40)
    assert torch.equal(matrix, torch.from_numpy(outputs["confusion"]))
    scores = segmentation_scores(matrix)
    wanted = json.loads((GOLDEN / "case.json").read_text())["results"]
    np.testing.assert_allclose(scores.pixel_accuracy, wanted["overall_acc"], rtol=1e-12)
    np.testing.assert_allclose(scores.mean_accuracy, wanted["mean_acc"], rtol=1e-12)
    np.testing.assert_allclose(scores.miou, wanted["mean_iou"], rtol=1e-12)
    assert segmentation_scores(torch.zeros(40, 40))[:3] == (0.0, 0.0, 0.0)


def test_images_add_up() -> None:
    label, prediction = torch.randint(0, 5, (4, 20, 30)), torch.randint(0, 5, (4, 20, 30))
    label[0, :3] = 255
    whole = confusion_matrix(label, prediction, 5)
    assert torch.equal(whole, sum(confusion_matrix(a, b, 5) for a, b in zip(label, prediction, strict=True)))
    assert whole.sum() == (label != 255).sum()


def test_torchmetrics_agrees() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    label, prediction = torch.randint(0, 5, (2, 20, 30)), torch.randint(0, 5, (2, 20, 30))
    label[:, :4] = 255
    theirs = classification.multiclass_confusion_matrix(prediction, label, 5, ignore_index=255)
    assert torch.equal(confusion_matrix(label, prediction, 5), theirs)
    iou = classification.multiclass_jaccard_index(prediction, label, 5, ignore_index=255)
    np.testing.assert_allclose(segmentation_scores(theirs).miou, 100 * float(iou), rtol=1e-5)


def test_refuses_what_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 5)
    with pytest.raises(ValueError, match=r"outside 0\.\.4"):
        confusion_matrix(torch.full((2, 2), 7), torch.zeros(2, 2), 5)
