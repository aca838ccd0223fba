"""Point operations: the reference's indices to the last tie, on every device that is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rules import Case, stream
from torch import Tensor

from tokenfusion.backbones import pointops, pointops_torch
from tokenfusion.backbones.pointops import (
    ball_query,
    distances,
    furthest_point_sample,
    gather,
    interpolate,
    three_nn,
    tie_order,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def _cloud(points: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, points, 3, generator=torch.Generator().manual_seed(seed)) * 4 - 1


def _lattice(points: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Whole numbers: most distances are equal to some other."""
    return torch.randint(-2, 3, (batch, points, 3), generator=torch.Generator().manual_seed(seed)).float()


# ---- the reference's kernels, step by step -------------------------------------------------------------------------


def _threads_furthest(cloud: np.ndarray, count: int) -> list[int]:
    """A block of threads, each with every T-th point, then a tree of comparisons: as the CUDA kernel works."""
    n = len(cloud)
    T = min(512, 2 ** int(np.log2(n)))
    points = cloud.astype(np.float32)
    nearest, chosen = np.full(n, 1e10, np.float32), [0]
    for _ in range(count - 1):
        best, at = np.full(T, -1, np.float32), np.zeros(T, int)
        for k in range(n):
            if float(np.float32((points[k] ** 2).sum(dtype=np.float32))) <= 1e-3:
                continue
            d = ((points[k] - points[chosen[-1]]) ** 2).sum(dtype=np.float32)
            nearest[k] = min(d, nearest[k])
            if nearest[k] > best[k % T]:
                best[k % T], at[k % T] = nearest[k], k
        half = T // 2
        while half:
            for t in range(half):
                if best[t + half] > best[t]:
                    best[t], at[t] = best[t + half], at[t + half]
            half //= 2
        chosen.append(int(at[0]))
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("points", [1, 2, 3, 37, 130, 700])
def test_furthest_points_are_the_kernels_even_in_ties(points: int, device: str) -> None:
    clouds = _lattice(points)
    chosen = furthest_point_sample(clouds.to(device), min(points + 2, 40)).cpu()
    assert chosen.dtype == torch.int64
    for cloud, row in zip(clouds.numpy(), chosen.tolist(), strict=True):
        assert row == _threads_furthest(cloud, len(row))


def test_no_point_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point is wanted, not 0"):
        furthest_point_sample(_cloud(5), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_furthest_points_skip_the_origin_and_what_is_no_number(device: str) -> None:
    cloud = _cloud(50, 1)
    cloud[0, :10] = 0.01
    cloud[0, 10] = torch.nan
    cloud[0, 11, 1] = torch.inf
    chosen = furthest_point_sample(cloud.to(device), 39)[0].tolist()
    assert sorted(chosen) == [0, *range(12, 50)]
    cloud[0, 0] = torch.nan
    chosen = furthest_point_sample(cloud.to(device), 39)[0].tolist()
    assert sorted(chosen) == [0, *range(12, 50)]
    assert furthest_point_sample(torch.full((1, 5, 3), 0.001, device=device), 3)[0].tolist() == [0, 0, 0]


def test_a_hole_is_what_its_rounded_length_is_in_double_precision() -> None:
    """The threshold is no float32; a point whose squared length rounds to that of 1e-3, a little above it, is no hole."""
    cloud = torch.tensor([[[1.0, 0.0, 0.0], [0.018365664407610893, 0.02574300579726696, 0.0]]])
    assert pointops_torch._square(cloud)[0, 1] == torch.tensor(1e-3)
    assert furthest_point_sample(cloud, 2).tolist() == [[0, 1]]
    order = torch.from_numpy(tie_order(2))
    assert pointops_torch.furthest_point_sample(cloud, 2, order).tolist() == [[0, 1]]


def _brute_ball(cloud: Tensor, centers: Tensor, radius: float, count: int) -> list[list[int]]:
    near = (centers[:, None].double() - cloud.double()).square().sum(-1) < np.float64(np.float32(radius)) ** 2
    rows = [row.nonzero().flatten().tolist()[:count] for row in near]
    return [row + [row[0] if row else 0] * (count - len(row)) for row in rows]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("points", "radius", "count"), [(500, 0.4, 16), (500, 0.05, 4), (70, 9.0, 100), (1, 0.5, 3)])
def test_ball_query_takes_the_first_hits(points: int, radius: float, count: int, device: str) -> None:
    clouds, centers = _cloud(points), torch.cat([_cloud(40, seed=1), _cloud(3, seed=2) * 100], 1)
    found = ball_query(clouds.to(device), centers.to(device), radius, count).cpu()
    assert found.dtype == torch.int64
    for cloud, middles, rows in zip(clouds, centers, found.tolist(), strict=True):
        assert rows == _brute_ball(cloud, middles, radius, count)


@pytest.mark.parametrize("device", DEVICES)
def test_ball_is_open_and_counts_in_order_on_a_lattice(device: str) -> None:
    clouds = _lattice(300)
    found = ball_query(clouds.to(device), clouds[:, :50].to(device), 1.0, 8).cpu()  # neighbours lie at exactly 1
    for cloud, rows in zip(clouds, found.tolist(), strict=True):
        assert rows == _brute_ball(cloud, cloud[:50], 1.0, 8)
        assert (cloud[torch.tensor(rows)] == cloud[:50, None]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_ball_query_bears_outliers_and_what_is_no_number(device: str) -> None:
    cloud, centers = _cloud(200, 1), _cloud(30, 1, seed=1)
    plain = ball_query(cloud.to(device), centers.to(device), 0.5, 8)
    odd = torch.tensor([[[torch.nan] * 3, [torch.inf, 0, 0], [1e6, -1e6, 1e6]]])
    cloud, centers = torch.cat([cloud, odd], 1), torch.cat([centers, odd], 1)
    found = ball_query(cloud.to(device), centers.to(device), 0.5, 8)
    assert torch.equal(found[:, :30], plain)
    assert found[0, 30:].tolist() == [[0] * 8, [0] * 8, [202] * 8]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [_cloud, _lattice])
@pytest.mark.parametrize("known", [3, 40, 333])
def test_three_nearest_and_the_lowest_of_equals(make: Callable[..., Tensor], known: int, device: str) -> None:
    unknown, others = make(150), make(known, seed=1)
    distance, index = three_nn(unknown.to(device), others.to(device))
    square = (unknown[:, :, None].double() - others[:, None].double()).square().sum(-1)
    expected = square.sort(stable=True)
    assert torch.equal(index.cpu(), expected.indices[..., :3])
    torch.testing.assert_close(distance.cpu(), expected.values[..., :3].sqrt().float())


def test_fewer_than_three_known_points() -> None:
    _, index = three_nn(torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]]))
    assert index.tolist() == [[[1, 0, 0]]]
    _, index = three_nn(torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[torch.nan] * 3, [1.0, 0, 0]]]))
    assert index[0, 0, 0] == 1


# ---- golden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_golden_indices_and_interpolation(device: str) -> None:
    case = Case("pointops")
    settings, outputs, tag = case.case["settings"], case.outputs, case.case["inputs"]["features"]
    xyz = torch.from_numpy(outputs["points"])[None].to(device)
    chosen = furthest_point_sample(xyz, settings["fps"])
    assert chosen[0].tolist() == outputs["fps_idx"].tolist()
    centers = gather(xyz, chosen)
    assert ball_query(xyz, centers, 0.2, settings["nsample"])[0].tolist() == outputs["ball_idx"].tolist()
    distance, index = three_nn(centers, centers[:, :128])
    assert index[0].tolist() == outputs["three_nn_idx"].tolist()
    case.assert_close("three_nn_dist", distance[0], 1e-6)
    features = torch.from_numpy(stream(tag["tag"], tag["shape"]).astype(np.float32)).transpose(1, 2).to(device)
    case.assert_close("interpolated", interpolate(features, distance, index)[0].T, 1e-4)


# ---- what is plain torch -------------------------------------------------------------------------------------------


def test_gather_takes_rows_sample_by_sample() -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (3, 5, 2))
    assert torch.equal(gather(x, index), torch.stack([rows[at] for rows, at in zip(x, index, strict=True)]))
    assert torch.equal(gather(x, index.int()), gather(x, index))
    assert torch.autograd.gradcheck(lambda rows: gather(rows, index), x)


def test_interpolation_weighs_by_distance() -> None:
    known = torch.tensor([[[0.0, 0, 0], [3.0, 0, 0], [0, 6.0, 0]]])
    features = torch.tensor([[[1.0], [10.0], [100.0]]])
    unknown = torch.tensor([[[1.0, 0, 0], [3.0, 0, 0]]])
    distance, index = three_nn(unknown, known)
    weights = np.array([1, 1 / 2, 1 / 37**0.5])
    expected = (weights * [1, 10, 100]).sum() / weights.sum()
    torch.testing.assert_close(interpolate(features, distance, index).flatten(), torch.tensor([expected, 10.0]).float())
    both = (features.double().requires_grad_(), unknown.double()[:, :1].requires_grad_())
    index = index[:, :1]
    spread = lambda f, u: interpolate(f, distances(u, known.double(), index), index)  # noqa: E731
    assert torch.autograd.gradcheck(spread, both)


def test_double_precision_and_gradients_do_not_change_indices() -> None:
    cloud = _cloud(200)
    twice = cloud.double().requires_grad_()
    assert torch.equal(furthest_point_sample(twice, 20), furthest_point_sample(cloud, 20))
    assert torch.equal(ball_query(twice, twice[:, :9], 0.5, 4), ball_query(cloud, cloud[:, :9], 0.5, 4))
    assert torch.equal(three_nn(twice, twice[:, :9])[1], three_nn(cloud, cloud[:, :9])[1])


@pytest.mark.parametrize("shape", [(4, 3), (2, 0, 3), (2, 5, 4)])
def test_wrong_clouds_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, N, 3\] with N > 0, not"):
        furthest_point_sample(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match="radius must be positive"):
        ball_query(_cloud(4), _cloud(2), 0.0, 2)


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_operators_keep_their_promises() -> None:
    cloud, ops = _cloud(60), torch.ops.tokenfusion
    for operator, arguments in (
        (ops.furthest_point_sample.default, (cloud, 7)),
        (ops.ball_query.default, (cloud, cloud[:, :5].contiguous(), 0.5, 4)),
        (ops.three_nn.default, (cloud, cloud[:, :5].contiguous())),
    ):
        torch.library.opcheck(operator, arguments)


def test_compiles_in_one_graph() -> None:
    def search(cloud: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centers = gather(cloud, furthest_point_sample(cloud, 9))
        distance, index = three_nn(cloud, centers)
        return ball_query(cloud, centers, 0.5, 4), index, interpolate(centers, distance, index)

    cloud = _cloud(80)
    for mine, expected in zip(
        torch.compile(search, fullgraph=True, backend="aot_eager")(cloud), search(cloud), strict=True
    ):
        torch.testing.assert_close(mine, expected)


# ---- plain torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_cloud, _lattice])
@pytest.mark.parametrize("points", [1, 2, 40, 600])
def test_plain_torch_finds_the_same(make: Callable[..., Tensor], points: int) -> None:
    cloud = make(points)
    cloud[:, points // 2] = 0.01  # a hole
    if points > 2:
        cloud[:, -1] = torch.nan
        cloud[:, -2] = torch.inf
    order = torch.from_numpy(tie_order(points))
    chosen = furthest_point_sample(cloud, 12)
    assert torch.equal(pointops_torch.furthest_point_sample(cloud, 12, order), chosen)
    centers = torch.cat([gather(cloud, chosen), torch.full((2, 1, 3), 50.0)], 1)
    for radius, count in ((1.0, 5), (0.3, 8), (9.0, 33)):
        expected = ball_query(cloud, centers, radius, count)
        assert torch.equal(pointops_torch.ball_query(cloud, centers, radius, count), expected)
    assert torch.equal(pointops_torch.three_nn(cloud, centers), three_nn(cloud, centers)[1])


def test_other_devices_take_plain_torch() -> None:
    assert pointops._on_device(torch.empty(1, 1, 3, device="meta")) is pointops_torch


# ---- Triton, in its interpreter ------------------------------------------------------------------------------------

INTERPRETED = """
import sys
import torch
from tokenfusion.backbones import pointops, pointops_triton as gpu

torch.manual_seed(0)
for cloud in (torch.rand(2, 150, 3) * 3 - 1, torch.randint(-2, 3, (2, 130, 3)).float(), torch.randn(1, 2, 3)):
    cloud[:, 1:2] = 0.01
    if cloud.shape[1] > 100:
        cloud[:, 7] = torch.nan
        cloud[:, 8] = torch.inf
    order = torch.from_numpy(pointops.tie_order(cloud.shape[1]))
    chosen = pointops.furthest_point_sample(cloud, 12)
    assert torch.equal(gpu.furthest_point_sample(cloud, 12, order), chosen)
    centers = torch.cat([pointops.gather(cloud, chosen), torch.full((len(cloud), 1, 3), 50.0)], 1)
    for radius, count in ((1.0, 5), (0.3, 8), (9.0, 33)):
        assert torch.equal(gpu.ball_query(cloud, centers, radius, count), pointops.ball_query(cloud, centers, radius, count))
    assert torch.equal(gpu.three_nn(cloud, centers), pointops.three_nn(cloud, centers)[1])
print("equal")
"""


def test_triton_kernels_find_the_same() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, timeout=300
    )
    if "interpreter" in done.stderr and "assert" not in done.stderr:
        pytest.skip(f"Triton's interpreter does not run here: {done.stderr.splitlines()[-1]}")
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_triton_kernels_compile_for_every_card() -> None:
    """To machine code, without a card; each squared length is one product and two fused steps, whatever the compiler likes."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenfusion.backbones import pointops_triton as kernels

    clouds, found = dict.fromkeys(("x", "y", "z", "nearest"), "*fp32"), {"points": "i32", "count": "i32"}
    pair = {"unknown": "*fp32", "known": "*fp32", "nearest": "*i32", "rows": "i32", "others": "i32"}
    ball = {
        "xyz": "*fp32",
        "centers": "*fp32",
        "found": "*i32",
        "points": "i32",
        "rows": "i32",
        "limit": "fp32",
        "count": "i32",
    }
    for kernel, arguments, constants, warps in (
        (kernels._furthest, {**clouds, "chosen": "*i32", **found}, {"CHUNK": kernels.CHUNK}, 16),
        (kernels._ball, ball, {"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS, "SLOTS": 64}, 8),
        (kernels._three, pair, {"POINTS": kernels.POINTS}, 4),
    ):
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        for capability in (75, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            text = made.asm["ptx"]
            assert made.asm["cubin"]
            assert text.count("fma.rn.f32") == 2 * text.count("mul.f32") > 0


# ---- speed ---------------------------------------------------------------------------------------------------------


def _fastest(run: Callable[[], object], tries: int = 5) -> float:
    """CPU seconds of this process, the least of several: other work on the machine does not count."""
    run()
    times = []
    for _ in range(tries):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def _seconds(cloud: Tensor) -> tuple[float, float]:
    chosen = furthest_point_sample(cloud, 2048)
    centers = gather(cloud, chosen)
    return (
        _fastest(lambda: furthest_point_sample(cloud, 2048)),
        _fastest(lambda: ball_query(cloud, centers, 0.2, 64)),
    )


def test_speed_on_a_made_cloud() -> None:
    """Points on the walls of a room. A third of these times is the goal."""
    cloud = _cloud(20000, 1)
    wall = torch.arange(20000) % 3
    cloud[0, torch.arange(20000), wall] = cloud[0, torch.arange(20000), wall].round()
    sampling, search = _seconds(cloud)
    assert sampling < 0.3
    assert search < 0.15


def test_speed_on_a_recording(real_data: Path) -> None:
    rows = np.fromfile(real_data / "detection3d" / "sunrgbd_000017" / "000017.bin", np.float32).reshape(-1, 6)
    chosen = np.random.default_rng(0).choice(len(rows), 20000, replace=False)
    sampling, search = _seconds(torch.from_numpy(rows[chosen, :3].copy())[None])
    assert sampling < 0.3
    assert search < 0.15
