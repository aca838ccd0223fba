"""The loss terms by hand: means per branch, what is missing or was not measured counts for nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tokenfusion.tasks.translation.losses import masked_l1, patch_bce


def test_bce_by_hand() -> None:
    logits = torch.tensor([[[[[0.0, 2.0]]]], [[[[-1.0, 1.0]]]]])  # two branches, one sample, two patches
    real = patch_bce(logits, True)
    assert real[0].item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    assert real[1].item() == pytest.approx((math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 2)
    assert patch_bce(-logits, False).tolist() == pytest.approx(real.tolist())
    assert patch_bce(logits.half(), True).dtype == torch.float32
    assert patch_bce(torch.full((1, 1, 1, 2, 2), 1e4), False).isfinite().all()


def test_a_missing_branch_is_not_judged() -> None:
    logits = torch.randn(2, 3, 1, 2, 2)
    present = torch.tensor([[True, False, True], [False, False, False]])
    loss = patch_bce(logits, True, present)
    torch.testing.assert_close(loss[0], patch_bce(logits[:1, [0, 2]], True)[0])
    assert loss[1] == 0


def test_l1_counts_what_was_measured() -> None:
    target, images = torch.zeros(2, 3, 2, 2), torch.ones(2, 2, 3, 2, 2)
    images[1] = 0.5
    valid = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    valid[0, 0, 0, 0] = False
    images[:, 0, :, 0, 0] = 100.0  # nobody asked
    assert masked_l1(images, target, valid).tolist() == pytest.approx([1.0, 0.5])
    assert masked_l1(images, target, torch.zeros_like(valid)).tolist() == [0, 0]
    assert masked_l1(images[:, 1:], target[1:], None).tolist() == pytest.approx([1.0, 0.5])


def test_l1_counts_the_samples_that_have_the_branch() -> None:
    target, images = torch.zeros(2, 3, 4, 4), torch.ones(2, 2, 3, 4, 4)
    images[0, 1] = 7.0
    present = torch.tensor([[True, False], [True, True]])
    assert masked_l1(images, target, None, present).tolist() == pytest.approx([1.0, 1.0])


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 3, 2, 3, generator=generator, dtype=torch.float64).float()
    target = torch.randn(2, 3, 2, 3, generator=generator)
    valid = torch.rand(2, 1, 2, 3, generator=generator) > 0.3
    images.requires_grad_()
    masked_l1(images, target, valid).sum().backward()
    expected = (images.detach() - target).sign() * valid / (3 * valid.sum())
    torch.testing.assert_close(images.grad, expected)
