"""The head equals SegFormer's literal formulation: project, upsample, concatenate, 1x1 convolution, batch norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.tasks.segmentation.head import SegFormerHead

DIMS = (8, 16, 20, 32)


def literal(head: SegFormerHead, maps: list[Tensor], dropped: Tensor | None = None) -> Tensor:
    upsampled = []
    for x, projection in reversed(list(zip(maps, head.projections, strict=True))):
        tokens = projection(x.flatten(2).transpose(1, 2))
        x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        upsampled.append(F.interpolate(x, size=maps[0].shape[2:], mode="bilinear", align_corners=False))
    fused = F.conv2d(torch.cat(upsampled, 1), head.fuse.weight[:, :, None, None])
    norm = head.norm
    if head.training:
        mean, var = fused.mean((0, 2, 3)), fused.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    normed = (fused - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    activated = F.relu(normed * norm.weight[:, None, None] + norm.bias[:, None, None])
    return F.conv2d(activated, head.classify.weight, head.classify.bias)


@pytest.fixture
def head(shake) -> SegFormerHead:
    return shake(SegFormerHead(DIMS, classes=5, width=12, dropout=0.0).double())


@pytest.fixture
def maps() -> list[Tensor]:
    """Of an image of 69 x 101: no size is a multiple of the next."""
    sizes = [(18, 26), (9, 13), (5, 7), (3, 4)]
    return [
        torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
        for dim, size in zip(DIMS, sizes, strict=True)
    ]


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_literal_formulation_in_value_and_gradient(
    head: SegFormerHead, maps: list[Tensor], training: bool
) -> None:
    head.train(training)
    expected, mine = literal(head, maps), head(maps)
    assert mine.shape == (2, 5, 18, 26)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)
    probe = torch.randn_like(mine)
    wanted = (*maps, *head.parameters())
    for a, b in zip(
        torch.autograd.grad((mine * probe).sum(), wanted),
        torch.autograd.grad((expected * probe).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_running_statistics_follow_the_batch(head: SegFormerHead, maps: list[Tensor]) -> None:
    before = head.norm.running_mean.clone()
    head.train()(maps)
    assert not torch.equal(head.norm.running_mean, before)
    held = head.norm.running_mean.clone()
    head.eval()(maps)
    assert torch.equal(head.norm.running_mean, held)


def test_dropout_drops_whole_channels_in_training_alone(maps: list[Tensor]) -> None:
    head = SegFormerHead(DIMS, classes=5, width=12, dropout=0.5).double()
    assert isinstance(head.dropout, nn.Dropout2d)
    assert not torch.equal(head(maps), head(maps))
    head.eval()
    assert torch.equal(head(maps), head(maps))


def test_layers_start_as_torch_starts_them() -> None:
    """The fuse matrix starts as the 1x1 convolution that it is: uniform within 1 / sqrt(fan in)."""
    head = SegFormerHead((32, 64, 160, 256), classes=40)
    bound = 1 / math.sqrt(4 * 256)
    assert head.fuse.weight.abs().max() <= bound
    assert abs(head.fuse.weight.std().item() - bound / math.sqrt(3)) < 0.01 * bound
    assert head.norm.eps == 1e-5


def test_fewer_stages_and_a_wrong_number_of_maps() -> None:
    head = SegFormerHead((8, 16), classes=3, width=4).eval()
    assert head([torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]).shape == (1, 3, 8, 8)
    with pytest.raises((ValueError, RuntimeError)):
        head([torch.randn(1, 8, 8, 8)])


def test_gradcheck(shake) -> None:
    head = shake(SegFormerHead((2, 4), classes=2, width=3, dropout=0.0).double()).eval()
    maps = [torch.randn(1, c, n, n, dtype=torch.float64, requires_grad=True) for c, n in ((2, 4), (4, 2))]
    assert torch.autograd.gradcheck(lambda *m: head(m), maps)
