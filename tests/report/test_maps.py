"""Pictures as functions of arrays: which pixel gets which colour."""

from __future__ import annotations

import numpy as np
import pytest

from tokenfusion.report import maps


def luminance(colour: tuple[int, int, int]) -> float:
    return float(np.dot(colour, [0.299, 0.587, 0.114]))


def test_exchange_is_strictly_below_the_threshold() -> None:
    scores = np.array([[[0.0, 0.02], [0.5, 1.0]]], np.float32)
    assert maps.exchange_map(scores, 0.02).tolist() == [[[True, False], [False, False]]]


def test_half_precision_is_compared_in_single() -> None:
    scores = np.array([[[0.02, 0.0199]]], np.float16)  # the first is 0.02000427 as half precision
    assert maps.exchange_map(scores, 0.02).tolist() == [[[False, True]]]


@pytest.mark.parametrize("scores", [np.zeros((4, 4)), np.full((2, 1, 1), 1.5), np.full((2, 1, 1), np.nan)])
def test_scores_that_are_none_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores"):
        maps.exchange_map(scores, 0.02)


def test_donor_below_needs_two_streams() -> None:
    exchanged = np.array([[[True, True, False]], [[True, False, False]]])
    below = maps.donor_below(exchanged)
    assert below is not None
    assert below.tolist() == [[[True, False, False]]] * 2
    assert maps.donor_below(np.zeros((3, 1, 1), bool)) is None
    assert maps.donor_below(np.zeros((1, 1, 1), bool)) is None


def test_upsample_by_whole_and_odd_factors() -> None:
    cells = np.arange(6).reshape(1, 2, 3)
    assert np.array_equal(maps.upsample(cells, 4, 6), np.kron(cells, np.ones((1, 2, 2), int)))
    odd = maps.upsample(cells, 5, 7)
    assert odd.shape == (1, 5, 7)
    assert odd[0, 0, 0] == 0
    assert odd[0, -1, -1] == 5
    assert np.array_equal(maps.upsample(cells, 2, 3), cells)


def test_overlay_colours_the_three_states_and_keeps_the_picture_grey() -> None:
    image = np.full((12, 16, 3), (200, 40, 90), np.uint8)
    exchanged = np.zeros((3, 4), bool)
    exchanged[0, :2] = True
    below = np.zeros((3, 4), bool)
    below[0, 0] = below[2, 3] = True  # the second is not exchanged: it stays grey
    picture = maps.overlay(image, exchanged, below).astype(int)
    blue, orange, kept = picture[1, 1], picture[1, 6], picture[10, 14]
    assert blue[2] > blue[0] + 40
    assert orange[0] > orange[2] + 40
    assert kept[0] == kept[1] == kept[2]


def test_states_differ_in_lightness_too() -> None:
    assert abs(luminance(maps.SUBSTITUTED) - luminance(maps.DONOR_BELOW)) > 60
    assert abs(luminance(maps.CORRECT) - luminance(maps.WRONG)) > 60


def test_grid_shows_for_coarse_cells_only() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    coarse = maps.overlay(image, np.zeros((4, 4), bool))
    fine = maps.overlay(image, np.zeros((32, 32), bool))
    assert (coarse[16] > coarse[8, 8]).all()
    assert (coarse[:, 48] > coarse[8, 8]).all()
    assert len(np.unique(fine)) == 1


def test_chosen_blocks_are_the_ends_of_each_stage() -> None:
    blocks = ["stage1.0", "stage1.1", "stage1.2", "stage2.0", "stage3.0", "stage3.1"]
    assert maps.chosen_blocks(blocks) == [
        ("stage1.0", 1, 1), ("stage1.2", 1, 2), ("stage2.0", 2, 1), ("stage3.0", 3, 1), ("stage3.1", 3, 2),
    ]  # fmt: skip
    plain = maps.chosen_blocks([f"block.{number}" for number in range(12)])
    assert [name for name, _, _ in plain] == ["block.0", "block.4", "block.7", "block.11"]
    assert maps.chosen_blocks(["block.0"]) == [("block.0", 1, 1)]


def test_encoder_and_decoder_are_bands_of_their_own() -> None:
    blocks = ["enc1.0", "enc2.1", "dec1.0", "dec1.1"]
    assert maps.bands(blocks) == [["enc1.0", "enc2.1"], ["dec1.0", "dec1.1"]]
    assert maps.bands(["stage1.0", "stage4.12"]) == [["stage1.0", "stage4.12"]]


def test_small_images_grow_by_whole_factors() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = maps.enlarge(image, 11)
    assert large.shape == (6, 9, 3)
    assert np.array_equal(large[::3, ::3], image)
    assert np.array_equal(large[2::3, 2::3], image)
    assert np.array_equal(maps.enlarge(image, 2), image)


def test_palette_keeps_given_colours_and_fills_in_distinct_ones() -> None:
    colours = maps.palette([[1, 2, 3], *[None] * 39])
    assert colours[0].tolist() == [1, 2, 3]
    gaps = np.abs(colours[:, None].astype(int) - colours[None].astype(int)).sum(axis=2)
    assert gaps[~np.eye(40, dtype=bool)].min() > 20


def test_labels_take_their_colours() -> None:
    colours = np.array([[1, 1, 1], [2, 2, 2]], np.uint8)
    picture = maps.colour_labels(np.array([[0, 1, 255]], np.uint8), colours)
    assert picture.tolist() == [[[1, 1, 1], [2, 2, 2], list(maps.IGNORED)]]
    with pytest.raises(ValueError, match="class id 2 occurs, but only 2 classes"):
        maps.colour_labels(np.array([[2]], np.uint8), colours)


def test_error_map_of_labels() -> None:
    prediction, target = np.array([[0, 1, 1]], np.uint8), np.array([[0, 0, 255]], np.uint8)
    assert maps.error_map(prediction, target).tolist() == [[list(maps.CORRECT), list(maps.WRONG), list(maps.IGNORED)]]
    assert maps.error_share(prediction, target) == 0.5
    assert maps.error_share(prediction, np.full((1, 3), 255, np.uint8)) is None


def test_error_map_of_images_shades_the_difference() -> None:
    target = np.zeros((1, 3, 3), np.uint8)
    prediction = target + np.array([[[0], [32], [255]]], np.uint8)
    shades = maps.error_map(prediction, target)
    assert shades[0, 0].tolist() == list(maps.CORRECT)
    assert shades[0, 2].tolist() == list(maps.WRONG)
    assert maps.WRONG[0] < shades[0, 1, 0] < maps.CORRECT[0]
    assert maps.error_share(prediction, target) == pytest.approx((32 + 255) / 3 / 255)
    with pytest.raises(ValueError, match="differ in shape"):
        maps.error_map(prediction, target[:, :2])
