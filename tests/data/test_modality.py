"""Readers: physical units, clear refusals, and never another exception than UserError."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tokenfusion.data.modality import (
    COLOUR_MAP,
    MODALITIES,
    ModalitySpec,
    normalise,
    oklch,
    picture,
    prepare_inputs,
    read_image,
    read_inputs,
    read_label,
)
from tokenfusion.errors import UserError

RGB = ModalitySpec(kind="rgb")
DEPTH = ModalitySpec(kind="depth")
NORMAL = ModalitySpec(kind="normal")
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(pixels).convert(mode).save(path) if mode else Image.fromarray(pixels).save(path)
    return path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    stored = pixels(5, 7, 3)
    image = read_image(save(tmp_path / "a.png", stored), RGB)
    assert image.dtype == torch.float32
    assert image.shape == (3, 5, 7)
    assert np.array_equal(image.numpy().transpose(1, 2, 0), stored)


def test_depth_becomes_metres_with_zero_for_missing(tmp_path: Path) -> None:
    stored = np.array([[0, 1000], [2500, 65535]], dtype=np.uint16)
    path = save(tmp_path / "d.png", stored)
    assert torch.allclose(read_image(path, DEPTH), torch.tensor([[[0.0, 1.0], [2.5, 65.535]]]))
    invalid = ModalitySpec(kind="depth", scale=1 / 512, missing=65535)
    assert torch.allclose(read_image(path, invalid), torch.tensor([[[0.0, 1000 / 512], [2500 / 512, 0.0]]]))
    assert ModalitySpec.model_validate(invalid.model_dump()) == invalid
    assert (DEPTH.missing_value, invalid.missing_value, RGB.missing_value) == (0, 65535, None)


def test_depth_from_numpy_is_metres_already_and_integers_are_scaled(tmp_path: Path) -> None:
    np.save(tmp_path / "metres.npy", np.array([[0.5, 2.0]], dtype=np.float64))
    np.save(tmp_path / "mm.npy", np.array([[500, 2000]], dtype=np.int32))
    for name in ("metres.npy", "mm.npy"):
        assert torch.allclose(read_image(tmp_path / name, DEPTH), torch.tensor([[[0.5, 2.0]]])), name


def test_normals_are_unit_vectors_and_black_is_none(tmp_path: Path) -> None:
    stored = pixels(4, 4, 3)
    stored[0, 0] = 0
    normal = read_image(save(tmp_path / "n.png", stored), NORMAL)
    length = normal.norm(dim=0)
    assert length[0, 0] == 0
    assert torch.allclose(length.flatten()[1:], torch.ones(15))


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_gray_spans_zero_to_one_in_8_and_16_bits(tmp_path: Path, dtype: type, top: int) -> None:
    path = save(tmp_path / "g.png", np.array([[0, top]], dtype=dtype))
    assert torch.equal(read_image(path, ModalitySpec(kind="gray")), torch.tensor([[[0.0, 1.0]]]))


def test_opaque_alpha_and_palette_are_plain_rgb(tmp_path: Path) -> None:
    stored = np.dstack([pixels(4, 4, 3), np.full((4, 4), 255, np.uint8)])
    assert np.array_equal(
        read_image(save(tmp_path / "a.png", stored), RGB).numpy().transpose(1, 2, 0), stored[:, :, :3]
    )
    Image.fromarray(stored[:, :, :3]).quantize(8).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png", RGB).shape == (3, 4, 4)


def test_refusals_name_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    see_through = np.dstack([pixels(4, 4, 3), np.full((4, 4), 128, np.uint8)])
    cases = [
        (tmp_path / "nothing.png", RGB, "no such file"),
        (save(tmp_path / "grey.png", pixels(4, 4)), RGB, "1 channel"),
        (save(tmp_path / "alpha.png", see_through), RGB, "transparent"),
        (save(tmp_path / "colour.png", pixels(4, 4, 3)), DEPTH, "3 channel"),
        (save(tmp_path / "zero.png", np.zeros((4, 4), np.uint16)), DEPTH, "no depth at all"),
        (tmp_path, RGB, "cannot be read"),
    ]
    for name, value in (("nan", np.nan), ("inf", np.inf), ("below", -1.0)):
        np.save(tmp_path / f"{name}.npy", np.array([[1.0, value]]))
        cases.append((tmp_path / f"{name}.npy", DEPTH, "below zero" if name == "below" else "NaN or infinite"))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "flat.npy", np.ones(4))
    cases += [(tmp_path / "text.npy", DEPTH, "wants numbers"), (tmp_path / "flat.npy", DEPTH, "wants numbers")]
    for path, spec, text in cases:
        with pytest.raises(UserError) as caught:
            read_image(path, spec)
        assert str(path) in str(caught.value)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="evil"):
        read_image(tmp_path / "evil.npy", DEPTH)


def test_sizes_that_differ_name_both_files(tmp_path: Path) -> None:
    paths = {"rgb": save(tmp_path / "a.png", pixels(4, 6, 3)), "depth": save(tmp_path / "b.png", pixels(4, 5))}
    with pytest.raises(UserError, match=r"b\.png.*4x5.*a\.png.*4x6"):
        read_inputs(paths, {"rgb": RGB, "depth": DEPTH})


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@FUZZ
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".png", ".jpg", ".npy", ".bmp", ".tif"]))
def test_random_bytes_never_raise_anything_else(tmp_path: Path, data: bytes, suffix: str) -> None:
    magic = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff\xe0", ".npy": b"\x93NUMPY\x01\x00", ".bmp": b"BM"}
    for content in (data, magic.get(suffix, b"II*\x00") + data):
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(content)
        for read in (lambda p: read_image(p, RGB), lambda p: read_image(p, DEPTH), read_label):
            with pytest.raises(UserError):
                read(path)


@FUZZ
@given(keep=st.floats(0, 0.95), flip=st.integers(0, 10_000), suffix=st.sampled_from([".png", ".jpg", ".npy"]))
def test_truncated_and_damaged_files_are_user_errors(tmp_path: Path, keep: float, flip: int, suffix: str) -> None:
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, np.ones((16, 16), np.float32))
    else:
        Image.fromarray(pixels(16, 16)).save(buffer, format={".png": "PNG", ".jpg": "JPEG"}[suffix])
    whole = buffer.getvalue()
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(whole)
    intact = read_image(path, DEPTH)
    path.write_bytes(whole[: int(len(whole) * keep)])
    if keep < 0.8:
        with pytest.raises(UserError, match="damaged"):
            read_image(path, DEPTH)
    with suppress(UserError):  # an image that lacks its last bytes only may still hold every pixel
        assert torch.equal(read_image(path, DEPTH), intact)
    flipped = bytearray(whole)
    flipped[flip % len(whole)] ^= 1 << flip % 8
    path.write_bytes(flipped)
    with suppress(UserError):
        assert read_image(path, DEPTH).isfinite().all()  # one flipped bit may pass: that is what manifests are for


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


def test_every_kind_is_complete() -> None:
    for kind, modality in MODALITIES.items():
        assert modality.channels == 3
        raw = {kind: torch.rand(modality.stored, 4, 5)}
        assert normalise(raw, {kind: ModalitySpec(kind=kind)})[kind].shape == (3, 4, 5)
        shown = picture(raw[kind], ModalitySpec(kind=kind))
        assert (shown.shape, shown.dtype) == ((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "dept"},
        {"kind": "rgb", "scale": 2},
        {"kind": "gray", "missing": 0},
        {"kind": "depth", "scale": -1},
        {"kind": "depth", "std": 0},
        {"kind": "depth", "colour": 1},
    ],
)
def test_wrong_specifications_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModalitySpec.model_validate(entry)


def test_labels_keep_palette_indices(tmp_path: Path) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(stored).convert("P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "p.png")
    assert np.array_equal(read_label(tmp_path / "p.png").numpy(), stored)
    with pytest.raises(UserError, match="not colours"):
        read_label(save(tmp_path / "c.png", pixels(4, 4, 3)))


def test_colour_map_rises_evenly_in_lightness() -> None:
    grey = COLOUR_MAP @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(grey[::16]) > 3).all()
    white = oklch(np.array(1.0), np.array(0.0), np.array(0.0))
    assert white.tolist() == [255, 255, 255]


def test_missing_depth_is_black_in_pictures() -> None:
    depth = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    shown = picture(depth, DEPTH)[0].sum(axis=1)
    assert shown[0] == 0
    assert shown[1] > shown[2] > shown[3] > 0
