"""Points to pixels to patches and tokens back: a known camera, a real recording, every way of not being visible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenfusion.fusion.projection import (
    camera_index,
    gather_views,
    grid_index,
    pair_layers,
    patch_index,
    project,
    projection_net,
    scatter_mean,
    time_index,
)

SIZE, PATCH = (37, 50), 16  # two whole patches by three; 5 rows and 2 columns are left over
CAMERA = torch.tensor([[20.0, 24.5, 0, 0], [0, 18.0, -20, 0], [0, 1, 0, 0]])  # looks along y, z up


def seen(points: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return patch_index(*project(points, projection), SIZE, PATCH)


# ---- Eq. 8 and 9 ---------------------------------------------------------------------------------------------------


def test_a_known_camera() -> None:
    points = torch.tensor([[0.0, 2, 0], [1, 2, 0], [0, 2, 1], [0, -2, 0], [3, 0, 1]])
    pixels, depth = project(points, CAMERA)
    assert pixels[:3].tolist() == [[24.5, 18], [34.5, 18], [24.5, 8]]
    assert depth.tolist() == [2, 2, 2, -2, 0]
    assert pixels.isfinite().all()


def test_projection_is_the_matrix_product_per_view() -> None:
    points = torch.randn(2, 7, 3, dtype=torch.float64) + torch.tensor([0, 5.0, 0])
    matrices = CAMERA.double() + 0.1 * torch.randn(2, 4, 3, 4, dtype=torch.float64)
    pixels, depth = project(points.unsqueeze(1), matrices)
    assert pixels.shape == (2, 4, 7, 2)
    for b in range(2):
        for v in range(4):
            u, w, z = matrices[b, v] @ torch.cat([points[b], torch.ones(7, 1)], 1).T
            torch.testing.assert_close(pixels[b, v], torch.stack([u / z, w / z], 1))
            torch.testing.assert_close(depth[b, v], z)


def test_autocast_leaves_pixels_exact() -> None:
    points = torch.randn(50, 3) + torch.tensor([0, 5.0, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(points, CAMERA)[0], project(points, CAMERA)[0].float())
        under = project(points, CAMERA)[0]
    assert torch.equal(under, project(points, CAMERA)[0])


@given(st.integers(0, 31), st.integers(0, 47), st.floats(-0.49, 0.49), st.floats(-0.49, 0.49), st.floats(0.1, 9))
def test_every_pixel_lies_in_its_patch(row: int, column: int, dv: float, du: float, depth: float) -> None:
    """The definition: row-major into floor(H / P) x floor(W / P), from the pixel whose centre is nearest."""
    pixel = torch.tensor([[column + du, row + dv]], dtype=torch.float64)
    index, visible = patch_index(pixel, torch.tensor([depth]), SIZE, PATCH)
    assert index.dtype == torch.int64
    assert visible.item()
    assert index.item() == row // 16 * 3 + column // 16


@pytest.mark.parametrize(
    ("u", "v", "depth"),
    [
        *((-0.51, 3, 1), (3, -0.51, 1), (47.51, 3, 1), (49, 3, 1), (3, 31.51, 1), (3, 36, 1), (1e30, 3, 1)),
        *(
            (3, 3, 0),
            (3, 3, -1),
            (3, 3, math.nan),
            (math.nan, 3, 1),
            (3, math.nan, 1),
            (-math.inf, 3, 1),
            (3, math.inf, 1),
        ),
    ],
)
def test_what_has_no_patch_is_not_visible(u: float, v: float, depth: float) -> None:
    """Outside the image, in what the border leaves over, behind the camera, not a number: never a neighbour's token."""
    index, visible = patch_index(torch.tensor([[u, v], [3, 3]]), torch.tensor([depth, 1]), SIZE, PATCH)
    assert visible.tolist() == [False, True]
    assert index.tolist() == [0, 0]


def test_borders_belong_to_the_nearest_pixel() -> None:
    pixels = torch.tensor([[-0.4, -0.4], [15.4, 0], [15.6, 0], [47.4, 31.4], [0, 15.6]])
    index, visible = patch_index(pixels, torch.ones(5), SIZE, PATCH)
    assert visible.all()
    assert index.tolist() == [0, 0, 1, 5, 3]


@given(st.lists(st.tuples(*[st.floats(width=32)] * 3), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(deadline=None)
def test_any_points_under_any_camera_give_an_index_in_range(points: list[tuple[float, ...]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = 20 * torch.randn(3, 3, 4, generator=generator)
    matrix[1] = 0  # a missing view
    index, visible = seen(torch.tensor(points).view(1, -1, 3), matrix)
    assert index.min() >= 0
    assert index.max() < 6
    assert not visible[1].any()
    assert not index[~visible].any()
    assert not visible[:, ~torch.tensor(points).isfinite().all(1)].any()


def test_a_real_frame_is_exact(real_data) -> None:
    """The colour that a recorded point carries is that of the pixel it is projected to."""
    folder = real_data / "detection3d" / "sunrgbd_000017"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: no real frame here")
    from PIL import Image

    cloud = torch.from_numpy(np.fromfile(folder / "000017.bin", np.float32).reshape(-1, 6))
    tilt, intrinsics = (
        np.array(line.split(), float).reshape(3, 3, order="F")
        for line in (folder / "calib_000017.txt").read_text().splitlines()[:2]
    )
    intrinsics[:2, 2] -= 1  # pixels count from 0
    turn = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    matrix = torch.from_numpy(np.concatenate([intrinsics @ turn @ tilt.T, np.zeros((3, 1))], 1)).float()
    pixels, depth = project(cloud[:, :3], matrix)
    with Image.open(folder / "000017.jpg") as image:
        colours = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    rows, columns = colours.shape[:2]
    u, v = pixels.round().long().unbind(-1)
    assert depth.min() > 0
    assert ((u >= 0) & (u < columns) & (v >= 0) & (v < rows)).all()
    assert torch.equal(colours[v, u], (cloud[:, 3:] * 255).round().byte())
    index, visible = patch_index(pixels, depth, (rows, columns), 16)
    assert torch.equal(visible, (v < rows // 16 * 16) & (u < columns // 16 * 16))
    assert torch.equal(index[visible], (v // 16 * (columns // 16) + u // 16)[visible])


# ---- Eq. 2 and 3: from patches to points ----------------------------------------------------------------------------


def drawn(views: int, points: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[2, V, 6, 5]``, indices and visibilities ``[2, V, N]``."""
    index = torch.randint(6, (2, views, points))
    visible = torch.rand(2, views, points) < 0.6
    return torch.randn(2, views, 6, 5, dtype=dtype), torch.where(visible, index, 0), visible


def test_one_view_gives_the_very_token() -> None:
    tokens, index, visible = drawn(1, dtype=torch.float32)
    stand_in, has = gather_views(tokens, index, visible)
    assert torch.equal(has, visible[:, 0])
    for b, n in has.nonzero().tolist():
        assert torch.equal(stand_in[b, n], tokens[b, 0, index[b, 0, n]])
    assert not stand_in[~has].any()


def test_several_views_give_the_mean_of_those_that_see() -> None:
    tokens, index, visible = drawn(3)
    stand_in, has = gather_views(tokens, index, visible)
    assert 0 < has.sum() < has.numel()
    for b in range(2):
        for n in range(40):
            views = visible[b, :, n].nonzero()[:, 0]
            assert has[b, n] == (len(views) > 0)
            if len(views):
                expected = tokens[b, views, index[b, views, n]].mean(0)
                torch.testing.assert_close(stand_in[b, n], expected)


def test_what_no_view_sees_does_no_harm() -> None:
    """A broken view's tokens reach nobody, forwards or backwards."""
    tokens, index, visible = drawn(2)
    visible[:, 1] = False
    tokens[:, 1] = math.nan
    tokens.requires_grad_()
    stand_in, _ = gather_views(tokens, index, visible)
    stand_in.sum().backward()
    assert stand_in.isfinite().all()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert not tokens.grad[:, 1].any()


@pytest.mark.parametrize("views", [1, 3])
def test_gradient_of_gathering(views: int) -> None:
    tokens, index, visible = drawn(views, points=9)
    assert torch.autograd.gradcheck(lambda x: gather_views(x, index, visible)[0], tokens.requires_grad_())


# ---- the other way round: from points to patches ---------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 3])
def test_a_patch_receives_the_mean_of_its_points(views: int) -> None:
    _, index, visible = drawn(views, points=8)
    points = torch.randn(2, 8, 5, dtype=torch.float64)
    mean, has = scatter_mean(points, index, visible, patches=6)
    assert mean.shape == (2, views, 6, 5)
    assert 0 < has.sum() < has.numel()
    for b in range(2):
        for v in range(views):
            for patch in range(6):
                inside = points[b, visible[b, v] & (index[b, v] == patch)]
                assert has[b, v, patch] == (len(inside) > 0)
                torch.testing.assert_close(
                    mean[b, v, patch], inside.mean(0) if len(inside) else torch.zeros(5).double()
                )


def test_points_that_no_view_sees_reach_no_patch() -> None:
    _, index, visible = drawn(1)
    points = torch.randn(2, 40, 5, dtype=torch.float64)
    points[~visible[:, 0]] = math.nan
    points.requires_grad_()
    mean, _ = scatter_mean(points, index, visible, 6)
    mean.sum().backward()
    assert mean.isfinite().all()
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert not points.grad[~visible[:, 0]].any()
    nothing, has = scatter_mean(points, index, torch.zeros_like(visible), 6)
    assert not nothing.any()
    assert not has.any()


def test_gradient_of_scattering_and_repeated_sums() -> None:
    _, index, visible = drawn(2, points=9)
    points = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter_mean(x, index, visible, 6)[0], points)
    _, index, visible = drawn(2, points=5000)
    many = torch.randn(2, 5000, 5)
    assert torch.equal(scatter_mean(many, index, visible, 6)[0], scatter_mean(many, index, visible, 6)[0])


def test_half_precision_is_summed_in_single() -> None:
    """A thousand hundreds are more than half precision can hold; their mean is not."""
    points, visible = torch.full((1, 1000, 2), 100, dtype=torch.float16), torch.ones(1, 1, 1000, dtype=torch.bool)
    mean, _ = scatter_mean(points, torch.zeros(1, 1, 1000, dtype=torch.int64), visible, 1)
    assert mean.dtype == torch.float16
    assert mean.tolist() == [[[[100, 100]]]]


def test_there_and_back_again() -> None:
    """What patches give to their points they get back, whatever the number of points."""
    tokens, index, visible = drawn(1)
    stand_in, _ = gather_views(tokens, index, visible)
    mean, has = scatter_mean(stand_in, index, visible, 6)
    torch.testing.assert_close(mean[has], tokens[has])


def test_traces_without_a_graph_break() -> None:
    def exchange(points: Tensor, projection: Tensor, tokens: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        index, visible = seen(points.unsqueeze(1), projection)
        return (*gather_views(tokens, index, visible), *scatter_mean(features, index, visible, 6))

    torch._dynamo.reset()
    points, projection = torch.randn(2, 30, 3) + torch.tensor([0, 3.0, 0]), CAMERA.expand(2, 3, 3, 4).clone()
    projection[1, 2] = 0
    inputs = (points, projection, torch.randn(2, 3, 6, 5), torch.randn(2, 30, 7))
    compiled = torch.compile(exchange, fullgraph=True, backend="eager")
    for mine, expected in zip(compiled(*inputs), exchange(*inputs), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_numbers_on_an_accelerator() -> None:
    tokens, index, visible = drawn(3)
    points = torch.randn(2, 40, 3)
    features = torch.randn(2, 40, 5, dtype=torch.float64)
    torch.testing.assert_close(project(points.cuda(), CAMERA.cuda())[1].cpu(), project(points, CAMERA)[1])
    for function, x, more in ((gather_views, tokens, ()), (scatter_mean, features, (6,))):
        expected = function(x, index, visible, *more)
        there = function(x.cuda(), index.cuda(), visible.cuda(), *more)
        for a, b in zip(there, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b)


# ---- the shallow MLP, and which layers meet ---------------------------------------------------------------------------


def test_projection_net_is_three_layers_with_relu(shake) -> None:
    net = shake(projection_net(6, 4))
    x = torch.randn(3, 6)
    first, second, third = (net[i] for i in (0, 2, 4))
    torch.testing.assert_close(net(x), third(second(first(x).relu()).relu()))
    assert [tuple(layer.weight.shape) for layer in (first, second, third)] == [(6, 6), (6, 6), (4, 6)]
    assert [tuple(layer.weight.shape) for layer in projection_net(6, 4, 2)[::2]] == [(2, 6), (2, 2), (4, 2)]


@pytest.mark.parametrize(
    ("image", "points", "lengths"),
    [
        (12, 6, [2] * 6),  # as released
        (12, 12, [1] * 12),
        (12, 5, [3, 2, 3, 2, 2]),
        (6, 12, [1, 0] * 6),
        (1, 3, [1, 0, 0]),
        (0, 2, [0, 0]),
        (7, 1, [7]),
    ],
)
def test_pairs_of_layers(image: int, points: int, lengths: list[int]) -> None:
    assert [len(blocks) for blocks in pair_layers(image, points)] == lengths


@given(st.integers(0, 40), st.integers(1, 40))
def test_all_blocks_run_once_in_order_and_evenly(image: int, points: int) -> None:
    pairs = pair_layers(image, points)
    assert len(pairs) == points
    assert [block for blocks in pairs for block in blocks] == list(range(image))
    lengths = [len(blocks) for blocks in pairs]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths)


@pytest.mark.parametrize("depths", [(-1, 3), (3, 0)])
def test_impossible_depths_are_named(depths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{depths[0]} and {depths[1]}"):
        pair_layers(*depths)


@pytest.mark.parametrize("hidden", [None, 24])
def test_the_projection_net_keeps_the_spread_of_its_input(hidden: int | None) -> None:
    torch.manual_seed(0)
    x = 0.4 * torch.randn(2000, 96) + 0.3
    made = projection_net(96, 288, hidden)(x)
    assert 0.5 < made.std(0).mean() / x.std(0).mean() < 1.5


# ---- maps between token grids --------------------------------------------------------------------------------------------


def test_a_patch_takes_the_one_that_holds_its_middle() -> None:
    assert grid_index((2, 3), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert grid_index((1, 2), (2, 4)).tolist() == [5, 7]
    assert grid_index((2, 4), (1, 2)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_grids_over_one_picture_agree_with_the_geometry(rows: int, columns: int, others: int, across: int) -> None:
    index = grid_index((rows, columns), (others, across))
    for number, taken in enumerate(index.tolist()):
        v, u = (number // columns + 0.5) / rows, (number % columns + 0.5) / columns
        assert taken // across == int(v * others + 1e-9)
        assert taken % across == int(u * across + 1e-9)


def test_spectrograms_over_one_span_keep_their_frequency() -> None:
    """Two bands; 4 and 2 times, time running fastest."""
    assert time_index((2, 4), (2, 2)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert time_index((2, 4), (2, 4)).tolist() == list(range(8))


def test_a_video_takes_the_sound_of_its_moment() -> None:
    """2 times of 2 x 1 patches, and 2 bands of 4 times."""
    assert time_index((2, 2, 1), (2, 4), receiver_time=0).tolist() == [1, 5, 3, 7]
    assert time_index((2, 4), (2, 2, 1), giver_time=0).tolist() == [0, 0, 2, 2, 1, 1, 3, 3]


def test_a_picture_lies_in_the_middle_of_the_span() -> None:
    assert time_index((1, 1, 2), (2, 5), receiver_time=0).tolist() == [2, 7]
    with pytest.raises(ValueError, match=r"time axis 2 of a token grid \(3, 5\): there is none"):
        time_index((1, 2, 2), (3, 5), 0, 2)


def test_spectrogram_transformers_lay_out_time_fastest() -> None:
    """The order that time_index takes for granted of (frequencies, times), in transformers' own patch embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_length=56, num_mel_bins=36
    )
    embed = transformers.ASTModel(config).embeddings.patch_embeddings
    quiet = torch.zeros(1, 56, 36)  # [B, time, mel], 5 patches of stride 10 by 3
    loud = quiet.clone()
    loud[0, 55, 17] = 1  # only the last time sees frame 55; bin 17 lies in bands 1 (10..25) and no other but 0 (0..15)
    changed = (embed(loud) != embed(quiet)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [1 * 5 + 4]


def test_a_camera_says_which_patch_shows_a_point_and_where_there_is_none() -> None:
    points = torch.tensor([[[0.0, 2, 0], [0, -2, 0], [0, 2, 1]]])
    index = camera_index(points, CAMERA[None], SIZE, PATCH)
    expected, visible = seen(points[0], CAMERA)
    assert index.dtype == torch.int64
    assert visible.tolist() == [True, False, True]
    assert index[0].tolist() == [int(expected[0]), -1, int(expected[2])]
