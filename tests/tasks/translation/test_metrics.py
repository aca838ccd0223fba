"""FID and KID against the reference's numbers; pixel errors and spread against numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenfusion.tasks.translation.metrics import (
    angle_deg,
    collapsed,
    depth_error_m,
    frechet_distance,
    image_errors,
    kernel_distance,
    mean_over_pixels,
    polynomial_mmd,
    spread,
    spread_ratios,
)

pytest.importorskip("torchmetrics")
GOLDEN = Path(__file__).parents[2] / "golden" / "fid_kid"
EVERYWHERE = torch.ones(1, 16, 24, dtype=torch.bool)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "outputs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- sets of features ------------------------------------------------------------------------------------------------


def test_reference_frechet_distance(golden: dict[str, Tensor]) -> None:
    a, b = golden["features_a"], golden["features_b"]
    np.testing.assert_allclose(frechet_distance(a, b), golden["fid"], rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(b, a), golden["fid"], rtol=1e-6)


def test_reference_kernel_distance(golden: dict[str, Tensor]) -> None:
    a, b = golden["features_a"], golden["features_b"]
    results = json.loads((GOLDEN / "case.json").read_text())["results"]
    np.testing.assert_allclose(polynomial_mmd(a[:180], b), golden["mmd2_first180"], rtol=1e-9)
    for size in (180, 100):
        draw = np.random.RandomState(0)
        picks = [[draw.choice(len(rows), size, replace=False) for rows in (a, b)] for _ in range(50)]
        values = [polynomial_mmd(a[i], b[j]) for i, j in picks]
        np.testing.assert_allclose(values, golden[f"mmd2_subsets_{size}"], rtol=1e-9)
        np.testing.assert_allclose(100 * np.mean(values), results[f"kid_x100_{size}"], rtol=1e-9)


def test_kernel_distance_estimates_the_same_from_subsets_of_its_own(golden: dict[str, Tensor]) -> None:
    found = kernel_distance(golden["features_a"], golden["features_b"], subsets=50, size=100, seed=3)
    assert abs(found.mean - float(golden["kid_x100_100"]) / 100) < 3 * found.std / math.sqrt(50)
    assert abs(found.std - float(golden["mmd2_subsets_100"].std())) < 0.01


def test_frechet_distance_of_two_lines() -> None:
    """Variances 2 and 8, means 3 apart: 9 + (sqrt 2 - sqrt 8)^2 = 11; and embedded in many empty dimensions."""
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(11.0, rel=1e-12)
    assert frechet_distance(a.double() + 123456.7, b.double() + 123456.7) == pytest.approx(11.0, rel=1e-9)
    direction = torch.nn.functional.normalize(_noise(1, 300).double())
    assert frechet_distance(a.double() @ direction + 7, b.double() @ direction + 7) == pytest.approx(11.0, rel=1e-9)


def test_fewer_images_than_features() -> None:
    """The trace of the root of S1 S2 is the sum of the singular values of the centred features' product."""
    a, b = _noise(12, 200).double(), 2 * _noise(15, 200, seed=2).double() + 0.5
    p, q = (a - a.mean(0)) / math.sqrt(11), (b - b.mean(0)) / math.sqrt(14)
    means = (a.mean(0) - b.mean(0)).square().sum()
    wanted = means + p.square().sum() + q.square().sum() - 2 * torch.linalg.svdvals(p @ q.T).sum()
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-6)


def test_equal_sets_are_at_distance_zero() -> None:
    a = _noise(30, 10)
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-6
    assert (
        polynomial_mmd(a, a) < 0 < polynomial_mmd(a, a + 1)
    )  # unbiased: below zero where pairs are left out of one term


def test_random_subsets_come_from_the_seed_alone() -> None:
    a, b = _noise(40, 8), _noise(30, 8, seed=2)
    before = torch.get_rng_state()
    first = kernel_distance(a, b, subsets=10, size=20, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert kernel_distance(a, b, subsets=10, size=20, seed=5) == first
    assert kernel_distance(a, b, subsets=10, size=20, seed=6) != first
    assert first.std > 0


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_torchmetrics_draws_the_same() -> None:
    image = pytest.importorskip("torchmetrics.image.kid")
    a, b = _noise(40, 8).double(), _noise(30, 8, seed=2).double()
    metric = image.KernelInceptionDistance(torch.nn.Identity(), subsets=10, subset_size=20)
    metric.update(a, real=True)
    metric.update(b, real=False)
    torch.manual_seed(5)
    np.testing.assert_allclose(kernel_distance(a, b, 10, 20, 5), [float(x) for x in metric.compute()], rtol=1e-9)


def test_one_subset_has_no_deviation() -> None:
    a, b = _noise(20, 8), _noise(20, 8, seed=2)
    found = kernel_distance(a, b, subsets=50, size=1000, seed=0)
    assert found.mean == polynomial_mmd(a, b)
    assert math.isnan(found.std)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(0, 4), torch.zeros(0, 4)),
        (_noise(1, 4), _noise(1, 4)),
        (_noise(3, 4) * torch.tensor([1.0, 1.0, 1.0, float("nan")]), _noise(3, 4)),
        (_noise(3, 4), _noise(3, 4) / 0.0),
    ],
    ids=["none", "one", "nan", "infinite"],
)
def test_no_estimate_is_nan(a: Tensor, b: Tensor) -> None:
    assert math.isnan(frechet_distance(a, b))
    assert math.isnan(polynomial_mmd(a, b))
    assert math.isnan(kernel_distance(a, b, subsets=4, size=10, seed=0).mean)
    assert all(math.isnan(x) for x in kernel_distance(a, torch.cat([b, b]), subsets=4, size=10, seed=0))


def test_sets_of_unequal_size_have_no_mmd() -> None:
    with pytest.raises(ValueError, match="3 and 4"):
        polynomial_mmd(_noise(3, 4), _noise(4, 4))


def test_processes_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller has gathered all rows; torchmetrics would add them up over processes once more, or wait for ever."""
    a, b = _noise(9, 4), _noise(9, 4, seed=2)
    alone = frechet_distance(a, b)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert frechet_distance(a, b) == alone


# ---- rows of one image each ------------------------------------------------------------------------------------------


def test_image_errors_by_hand() -> None:
    truth, coded = torch.zeros(3, 2, 2), torch.tensor([0.5, -1.0, 0.25, float("nan")]).view(1, 2, 2).expand(3, 2, 2)
    valid = torch.tensor([True, True, True, False]).view(1, 2, 2)
    row = image_errors(coded, truth, valid)
    assert row.dtype == torch.float64
    assert row.tolist() == [3 * 1.75, 3 * 1.3125, 9]
    assert mean_over_pixels(torch.stack([row, torch.tensor([0.0, 0.0, 3.0]).double()])) == [5.25 / 12, 3.9375 / 12]
    nothing = image_errors(coded, truth, torch.zeros_like(valid))
    assert nothing.tolist() == [0, 0, 0]
    assert all(math.isnan(x) for x in mean_over_pixels(nothing[None]))


def test_images_add_up() -> None:
    coded, truth, valid = _noise(3, 16, 24), _noise(3, 16, 24, seed=2), _noise(1, 16, 24, seed=3) > 0
    parts = [image_errors(*(x[:, rows] for x in (coded, truth, valid))) for rows in (slice(0, 5), slice(5, 16))]
    np.testing.assert_allclose(sum(parts), image_errors(coded, truth, valid), rtol=1e-12)
    mae, mse = mean_over_pixels(torch.stack(parts))
    difference = (coded - truth)[:, valid[0]].double()
    np.testing.assert_allclose([mae, mse], [difference.abs().mean(), difference.square().mean()], rtol=1e-6)


def test_angles_by_hand() -> None:
    """Equal, opposite, square, 45 degrees of other length, no direction, not measured."""
    truth = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).float().T.view(3, 1, 6)
    coded = torch.tensor([[0, 0, 3], [0, 0, -1], [0, 2, 0], [0.5, 0, 0.5], [0, 0, 0], [1, 0, 0]]).T.view(3, 1, 6)
    valid = truth.any(0, keepdim=True)
    total, count = angle_deg(coded, truth, valid).tolist()
    assert count == 5
    assert total == pytest.approx(0 + 180 + 90 + 45 + 90, abs=1e-4)


def test_depth_in_metres() -> None:
    depth, truth = torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[1.5, 4.0, 0.0]]])
    assert depth_error_m(depth, truth, truth > 0).tolist() == [2.5, 2]


# ---- spread ----------------------------------------------------------------------------------------------------------


def _rows(images: list[Tensor], valid: Tensor = EVERYWHERE) -> Tensor:
    return torch.stack([spread(image, valid) for image in images])


def _scenes(n: int = 6) -> list[Tensor]:
    return [_noise(3, 16, 24, seed=seed).clamp(-2, 2) / 2 for seed in range(n)]


def test_spread_by_hand() -> None:
    image = torch.full((3, 16, 24), 0.5)
    assert spread(image, EVERYWHERE)[0] == 0
    assert torch.equal(spread(image, EVERYWHERE)[1:], torch.full((192,), 0.5, dtype=torch.float64))
    image[:, :, ::2] = -0.5
    row = spread(image, EVERYWHERE)
    assert row.shape == (193,)
    assert row[0] == 0.5
    colour = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 16, 24)
    assert spread(colour, EVERYWHERE)[0] == 0


def test_as_much_as_the_truth_and_half_of_it() -> None:
    truth = _rows(_scenes())
    assert spread_ratios(truth, truth) == (1, 1)
    assert spread_ratios(_rows([image / 2 for image in _scenes()]), truth) == pytest.approx((0.5, 0.5))


def test_collapse_to_a_colour_to_one_image_and_none() -> None:
    scenes = _scenes()
    truth = _rows(scenes)
    colour = spread_ratios(_rows([torch.full_like(image, 0.3) for image in scenes]), truth)
    assert colour == pytest.approx((0, 0), abs=1e-12)
    assert collapsed(*colour)
    one = spread_ratios(_rows([scenes[0]] * len(scenes)), truth)
    assert one.contrast > 0.9
    assert one.diversity == 0
    assert collapsed(*one)
    flat = spread_ratios(_rows([torch.full_like(image, i / 6) for i, image in enumerate(scenes)]), truth)
    assert flat.contrast == 0
    assert flat.diversity > 0.9
    assert collapsed(*flat)
    diverged = spread_ratios(_rows([image * float("nan") for image in scenes]), truth)
    assert collapsed(*diverged)
    assert not collapsed(*spread_ratios(_rows([image / 10 for image in scenes]), truth))


def test_a_truth_that_does_not_vary_accuses_nobody() -> None:
    grey = [torch.zeros(3, 16, 24)] * 4
    assert spread_ratios(_rows(grey), _rows(grey)) == (1, 1)
    lively = spread_ratios(_rows(_scenes(4)), _rows(grey))
    assert all(1 < value < math.inf for value in lively)
    single = spread_ratios(_rows(_scenes(1)), _rows(_scenes(1)))
    assert single == (1, 1)
    assert not collapsed(*single)
    assert collapsed(*spread_ratios(_rows(grey[:1]), _rows(_scenes(1))))


def test_unmeasured_pixels_leave_no_trace() -> None:
    """A hole differs from image to image; a constant generator must not look diverse by it."""
    constant, rows, clean = torch.full((3, 16, 24), 0.3), [], []
    for index, scene in enumerate(_scenes()):
        valid = EVERYWHERE.clone()
        valid[:, : 2 * index + 1, 3:9] = False
        rows.append(spread(torch.where(valid, constant, -1.0), valid))
        clean.append(spread(torch.where(valid, scene, -1.0), valid))
        assert torch.equal(spread(scene, valid).nan_to_num(9), clean[-1].nan_to_num(9))
    found = spread_ratios(torch.stack(rows), torch.stack(clean))
    assert found == pytest.approx((0, 0), abs=1e-12)
    nothing = spread(constant, torch.zeros_like(EVERYWHERE))
    assert nothing.isnan().all()
    assert spread_ratios(nothing[None], nothing[None]) == (1, 1)
