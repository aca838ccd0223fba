"""Cross-entropy at label size: the same number as the plain way, and the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.tasks.segmentation.losses import upsampled_cross_entropy


def plain(logits: Tensor, target: Tensor, ignore: int = 255) -> Tensor:
    full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=ignore)


def case(
    batch: int = 3, classes: int = 5, small: tuple[int, int] = (6, 8), size: tuple[int, int] = (24, 32)
) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(batch, classes, *small, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, classes, (batch, *size))
    target[torch.rand(target.shape) < 0.3] = 255
    return logits, target


@pytest.mark.parametrize("size", [(24, 32), (23, 29), (6, 8), (3, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_value_and_gradient_are_those_of_the_plain_way(size: tuple[int, int], batch: int) -> None:
    logits, target = case(batch, size=size)
    target[0] = 255 if batch > 1 else target[0]  # samples without labels do not shift the mean
    mine, expected = upsampled_cross_entropy(logits, target), plain(logits, target)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradcheck() -> None:
    logits, target = case(2, 3, (2, 3), (8, 12))
    assert torch.autograd.gradcheck(lambda v: upsampled_cross_entropy(v, target), (logits,))


def test_gradient_scales_with_what_comes_from_above() -> None:
    logits, target = case()
    (once,) = torch.autograd.grad(upsampled_cross_entropy(logits, target), logits)
    (scaled,) = torch.autograd.grad(-7.5 * upsampled_cross_entropy(logits, target) + 3, logits)
    torch.testing.assert_close(scaled, -7.5 * once, rtol=1e-12, atol=0)


def test_several_losses_on_the_same_logits_add_up() -> None:
    logits, target = case()
    other = target.roll(1, 0)
    total = upsampled_cross_entropy(logits, target) + 2 * upsampled_cross_entropy(logits, other)
    expected = plain(logits, target) + 2 * plain(logits, other)
    torch.testing.assert_close(
        torch.autograd.grad(total, logits), torch.autograd.grad(expected, logits), rtol=1e-11, atol=1e-14
    )


def test_without_any_label_it_is_zero_with_a_zero_gradient() -> None:
    logits, target = case()
    loss = upsampled_cross_entropy(logits, torch.full_like(target, 255))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_a_single_labelled_pixel() -> None:
    logits, target = case()
    target[:] = 255
    target[1, 3, 4] = 2
    torch.testing.assert_close(upsampled_cross_entropy(logits, target), plain(logits, target), rtol=1e-12, atol=0)


def test_another_ignored_value() -> None:
    logits, target = case()
    target[target == 255] = 0
    torch.testing.assert_close(
        upsampled_cross_entropy(logits, target, ignore=0), plain(logits, target, 0), rtol=1e-12, atol=0
    )


def test_a_label_out_of_range_is_an_error() -> None:
    logits, target = case()
    target[0, 0, 0] = 5
    with pytest.raises((IndexError, RuntimeError)):
        upsampled_cross_entropy(logits, target)


def test_without_gradient_it_is_the_value_alone() -> None:
    logits, target = case()
    with torch.no_grad():
        loss = upsampled_cross_entropy(logits, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(logits, target).detach(), rtol=1e-12, atol=0)
    detached = upsampled_cross_entropy(logits.detach(), target)
    assert not detached.requires_grad
    torch.testing.assert_close(detached, loss, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_judged_in_float32(dtype: torch.dtype) -> None:
    logits, target = case()
    half = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = upsampled_cross_entropy(half, target)
    assert loss.dtype == torch.float32
    exact = half.detach().float().requires_grad_()
    torch.testing.assert_close(loss, plain(exact, target), rtol=1e-6, atol=0)
    (mine,), (expected,) = torch.autograd.grad(loss, half), torch.autograd.grad(plain(exact, target), exact)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.float(), expected, rtol=1e-2, atol=1e-6)


def test_a_loss_scale_acts_before_the_gradient_is_rounded_to_float16() -> None:
    """What a gradient scaler is for; its first scale, 2^16, is itself beyond float16."""
    logits = (3 * torch.randn(4, 40, 30, 40)).half().requires_grad_()
    target = torch.randint(0, 40, (4, 120, 160))
    scale = 2.0**16
    (mine,) = torch.autograd.grad(upsampled_cross_entropy(logits, target) * scale, logits)
    exact = logits.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(plain(exact, target) * scale, exact)
    assert expected.abs().max() < 60000
    torch.testing.assert_close(mine.float(), expected, rtol=2e-3, atol=1e-6)


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    logits, target = case()
    (first,) = torch.autograd.grad(upsampled_cross_entropy(logits, target) ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.pow(2).sum(), logits)
