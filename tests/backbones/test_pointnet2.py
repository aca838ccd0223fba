"""PointNet++: indices that can be found ahead, seeds, and the order of its layers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.backbones.pointnet2 import Abstraction, Levels, PointNet2, Propagation, point_indices
from tokenfusion.backbones.pointops import distances, furthest_point_sample, gather, interpolate, three_nn

SMALL = Levels((32, 16, 8, 4), (0.5, 1.0, 2.0, 3.0), (8, 4, 4, 4))


def _small(channels: int = 3) -> PointNet2:
    return PointNet2(channels, 0.125, *SMALL)


def _clouds(points: int = 100, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, points, channels, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("width", [1, 2])
def test_parameter_count(width: int) -> None:
    """Added up from the table of layers."""
    with torch.device("meta"):
        network = PointNet2(width=width)
    a, b, c = 64 * width, 128 * width, 256 * width
    mlps = [(3, a, a, b), (3 + b, b, b, c), *[(3 + c, b, b, c)] * 2, (2 * c, c, c), (2 * c, c, 288)]
    count = sum(i * o + 2 * o for mlp in mlps for i, o in pairwise(mlp))
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_seeds(channels: int) -> None:
    cloud = _clouds(channels=channels)
    seeds = _small(channels).eval()(cloud)
    assert seeds.features.shape == (2, 16, 288)
    assert seeds.index.dtype == torch.int64
    assert torch.equal(seeds.xyz, gather(cloud[..., :3], seeds.index))
    assert torch.equal(seeds.index, furthest_point_sample(cloud[..., :3], 16))


def test_later_levels_are_the_beginning_of_the_first() -> None:
    """Furthest points of points in that order are those points in that order."""
    cloud = _clouds(300)
    level = gather(cloud, furthest_point_sample(cloud, 64))
    assert furthest_point_sample(level, 32).tolist() == [list(range(32))] * 2


def test_indices_of_one_cloud_are_those_of_the_batch() -> None:
    cloud = _clouds()
    together = point_indices(cloud, SMALL)
    worker = pickle.loads(pickle.dumps(partial(point_indices, levels=SMALL)))
    for b in range(2):
        for alone, all_of_them in zip(worker(cloud[b]), together, strict=True):
            assert alone.dtype == torch.int32
            assert torch.equal(alone, all_of_them[b])
    network = _small().eval()
    assert torch.equal(network(cloud, together).features, network(cloud).features)


def test_abstraction_is_an_mlp_on_the_ball_and_a_maximum(shake: Callable[..., nn.Module]) -> None:
    """Features go through the first layer before they are gathered; that may not change anything."""
    stage = shake(Abstraction(5, (6, 7), 0.5, 0.1).double()).eval()
    xyz, features = _clouds(50).double(), torch.randn(2, 50, 5, dtype=torch.float64)
    centers, group = xyz[:, :9], torch.randint(50, (2, 9, 4))
    x = torch.cat([(gather(xyz, group) - centers[:, :, None]) / 0.5, gather(features, group)], -1)
    for layer in stage.layers:
        x = layer(x)
    torch.testing.assert_close(stage(xyz, features, centers, group), x.amax(2))
    with torch.no_grad():
        torch.testing.assert_close(stage(xyz, features, centers, group), x.amax(2))


def test_propagation_joins_interpolated_features_with_its_own(shake: Callable[..., nn.Module]) -> None:
    stage = shake(Propagation(5, (6,), 0.1).double()).eval()
    fine, coarse = _clouds(20).double(), _clouds(20).double()[:, :7]
    skip, features = torch.randn(2, 20, 2, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    _, index = three_nn(fine, coarse)
    spread = interpolate(features, distances(fine, coarse, index), index)
    torch.testing.assert_close(spread[:, :7], features)  # these points are known
    expected = stage.layers(torch.cat([spread, skip], -1))
    torch.testing.assert_close(stage(fine, skip, coarse, features, index), expected)


def test_layers_are_batch_normed_along_points(shake: Callable[..., nn.Module]) -> None:
    network = shake(_small()).train()
    layer = network.down[0].layers[0]
    layer.norm.momentum = 1.0
    x = torch.randn(2, 6, 5, 3)
    y = layer.linear(x).flatten(0, -2)
    layer(x)
    torch.testing.assert_close(layer.norm.running_mean, y.mean(0))
    torch.testing.assert_close(layer.norm.running_var, y.var(0))
    assert {
        m.momentum for m in PointNet2(3, 0.125, *SMALL, momentum=0.3).modules() if isinstance(m, nn.BatchNorm1d)
    } == {0.3}


def test_gradients_reach_every_parameter_and_the_cloud(shake: Callable[..., nn.Module]) -> None:
    network = shake(_small(6))
    cloud = _clouds(channels=6).requires_grad_()
    features = network(cloud).features
    (features * torch.randn_like(features)).sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert cloud.grad is not None
    assert cloud.grad[..., :3].abs().max() > 0
    assert cloud.grad[..., 3:].abs().max() > 0


@pytest.mark.parametrize("points", [1, 2, 5])
def test_fewer_points_than_the_first_level_repeat(points: int) -> None:
    seeds = _small().eval()(_clouds(points))
    assert seeds.features.isfinite().all()
    assert set(seeds.index.flatten().tolist()) == set(range(points))


def test_moving_a_cloud_sideways_moves_the_seeds_alone() -> None:
    network, cloud = _small().eval(), _clouds() + 1
    indices = point_indices(cloud, SMALL)
    here, there = network(cloud, indices), network(cloud + torch.tensor([8.0, -4.0, 2.0]), indices)
    torch.testing.assert_close(there.features, here.features, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.xyz - here.xyz, torch.tensor([8.0, -4.0, 2.0]).expand_as(here.xyz))


@pytest.mark.parametrize("points", [(32, 16, 8), (16, 32, 8, 4)])
def test_impossible_levels_are_refused(points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted 4 of each and no more points than the level before"):
        PointNet2(points=points)
    with pytest.raises(ValueError, match="at least the 3 coordinates"):
        PointNet2(channels=2)
