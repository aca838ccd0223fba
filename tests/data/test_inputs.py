"""Both forms of the networks' inputs: normalised, and coded into -1..1 and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenfusion.data.inputs import from_tanh, normalise, prepare_inputs, to_tanh
from tokenfusion.data.modality import ModalitySpec

RGB = ModalitySpec(kind="rgb")
DEPTH = ModalitySpec(kind="depth")
TASKONOMY = ModalitySpec(kind="depth", scale=1 / 512, range=(1 / 512, 128))
SPECS = {
    **{kind: ModalitySpec(kind=kind) for kind in ("rgb", "depth", "normal", "curvature", "gray")},
    "thermal": ModalitySpec(kind="thermal", range=(-20, 120)),
    "taskonomy": TASKONOMY,
}


def test_normalise_gives_three_channels_and_missing_depth_stays_zero() -> None:
    raw = {"rgb": torch.full((3, 2, 2), 255.0), "depth": torch.tensor([[[0.0, 5.0], [10.0, 2.5]]])}
    inputs = normalise(raw, {"rgb": RGB, "depth": DEPTH})
    assert torch.allclose(inputs["rgb"][0], torch.tensor((255 - 123.675) / 58.395))
    assert torch.equal(inputs["depth"], torch.tensor([[[0.0, 1.0], [2.0, 0.5]]]).expand(3, 2, 2))
    centred = normalise(raw, {"rgb": RGB, "depth": ModalitySpec(kind="depth", mean=5, std=2)})["depth"]
    assert torch.equal(centred[0], torch.tensor([[0.0, 0.0], [2.5, -1.25]]))


def test_prepare_inputs_resizes_depth_without_mixing_values() -> None:
    depth = torch.zeros(1, 8, 8)
    depth[:, :, 4:] = 4.0
    resized = prepare_inputs({"depth": depth}, {"depth": DEPTH}, (4, 4))["depth"]
    assert resized.shape == (3, 4, 4)
    assert set(resized.unique().tolist()) <= {0.0, torch.tensor(0.8).item()}


def one(value: float, channels: int = 1) -> torch.Tensor:
    return torch.full((channels, 1, 1), value)


@pytest.mark.parametrize(
    ("name", "low", "middle", "high"),
    [
        ("rgb", 0, 127.5, 255),
        ("normal", -1, 0, 1),
        ("curvature", -1, 0, 1),
        ("gray", 0, 0.5, 1),
        ("thermal", -20, 50, 120),
    ],
)
def test_tanh_is_linear_over_the_range_and_clipped_outside(name: str, low: float, middle: float, high: float) -> None:
    spec = SPECS[name]
    for value, wanted in ((low, -1), (middle, 0), (high, 1), (low - 1, -1), (high + 1, 1)):
        coded = to_tanh(one(value, spec.modality.stored), spec)
        assert coded.shape == (3, 1, 1)
        assert torch.allclose(coded, torch.tensor(float(wanted)), atol=1e-6), value


def test_tanh_of_depth_is_logarithmic_from_near_on_and_missing_is_the_lowest_value() -> None:
    spec = ModalitySpec(kind="depth", range=(2.0, 6.0))  # 1 + far / near = 4: the logarithm of 2 is half of it
    for depth_m, wanted in ((0.0, -1.0), (2.0, 0.0), (6.0, 1.0), (50.0, 1.0)):
        assert to_tanh(one(depth_m), spec)[1].item() == pytest.approx(wanted, abs=1e-6)
    assert from_tanh(torch.zeros(3, 1, 1), spec).item() == pytest.approx(2.0)
    assert from_tanh(-torch.ones(3, 1, 1), spec).item() == 0.0


def test_taskonomy_depth_is_coded_like_the_released_one() -> None:
    stored = torch.tensor([1.0, 100.0, 1024.0, 5000.0, 60000.0]).view(1, 1, -1)
    released = 2 * torch.log1p(stored) / 11.1 - 1
    assert torch.allclose((to_tanh(stored / 512, TASKONOMY)[:1] + 1) / (released + 1), torch.tensor(1.0), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_from_tanh_undoes_to_tanh(name: str, seed: int, size: tuple[int, int]) -> None:
    spec = SPECS[name]
    low, high = spec.limits
    image = torch.rand(spec.modality.stored, *size, generator=torch.Generator().manual_seed(seed))
    image = low + (high - low) * image
    if spec.kind == "normal":
        image = torch.nn.functional.normalize(image, dim=0)
    if spec.kind in ("normal", "depth"):
        image[:, 0, 0] = 0.0  # none and missing come back as such
    coded = to_tanh(image, spec)
    assert coded.shape == (3, *size)
    assert coded.dtype == torch.float32
    assert coded.abs().max() <= 1
    assert torch.allclose(from_tanh(coded, spec), image, rtol=2e-5, atol=2e-6 * max(abs(low), abs(high)))


def test_from_tanh_averages_channels_and_renormalises() -> None:
    assert from_tanh(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1), SPECS["gray"]).item() == pytest.approx(0.5)
    normal = from_tanh(torch.tensor([0.3, 0.0, -0.4]).view(3, 1, 1), SPECS["normal"])
    assert torch.allclose(normal.flatten(), torch.tensor([0.6, 0.0, -0.8]))
    beyond = from_tanh(torch.full((3, 1, 1), 7.0), DEPTH)  # no network with a tanh does that
    assert beyond.item() == pytest.approx(10.0)


def test_prepare_inputs_for_translation_resizes_before_it_codes() -> None:
    depth = torch.zeros(1, 8, 8)
    depth[:, :, 4:] = 4.0
    raw, specs = {"depth": depth, "rgb": torch.full((3, 8, 8), 255.0)}, {"depth": DEPTH, "rgb": RGB}
    coded = prepare_inputs(raw, specs, (4, 4), as_tanh=True)
    assert torch.equal(coded["rgb"], torch.ones(3, 4, 4))
    four = 2 * math.log(5) / math.log(11) - 1
    assert torch.allclose(coded["depth"], torch.tensor([-1.0, -1.0, four, four]).expand(3, 4, 4))
