"""Readers and the writer: physical units, clear refusals, and never another exception than UserError."""

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

from tokenfusion.data.image import load_image, measured, read_image, read_inputs, read_label, write_image
from tokenfusion.data.modality import ModalitySpec
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


def test_labels_keep_palette_indices(tmp_path: Path) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(stored).convert("P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "p.png")
    assert np.array_equal(read_label(tmp_path / "p.png").numpy(), stored)
    with pytest.raises(UserError, match="not colours"):
        read_label(save(tmp_path / "c.png", pixels(4, 4, 3)))


def test_curvature_is_zero_at_127(tmp_path: Path) -> None:
    stored = np.array([[[127, 255, 0]]], dtype=np.uint8)
    curvature = read_image(save(tmp_path / "c.png", stored), ModalitySpec(kind="curvature"))
    assert curvature.flatten().tolist() == [0.0, 1.0, -127 / 128]


def test_measured_leaves_out_missing_depth_and_black_normals_in_both_forms(tmp_path: Path) -> None:
    stored = pixels(2, 3, 3)
    stored[0, 1] = 0
    path = save(tmp_path / "n.png", stored)
    wanted = torch.tensor([[True, False, True], [True, True, True]])
    for image in (load_image(path, NORMAL), read_image(path, NORMAL)):
        assert torch.equal(measured(image, NORMAL), wanted)
        assert measured(image, RGB).all()
    assert torch.equal(measured(torch.tensor([[[0.0, 1.0]]]), DEPTH), torch.tensor([[False, True]]))
    assert measured(torch.zeros(1, 2, 2), ModalitySpec(kind="gray")).all()  # black is a colour


WRITTEN = {
    "rgb": (RGB, "RGB", 0.5),
    "normal": (NORMAL, "RGB", 0.012),  # half a step in each channel turns the vector, and it keeps its length
    "curvature": (ModalitySpec(kind="curvature"), "RGB", 0.5 / 128),
    "gray": (ModalitySpec(kind="gray"), "L", 0.5 / 255),
    "edges": (ModalitySpec(kind="gray", scale=1 / 11355), "I;16", 0.5 / 11355),
    "thermal": (ModalitySpec(kind="thermal", scale=0.01, range=(0, 120)), "I;16", 0.005),
    "millimetres": (DEPTH, "I;16", 0.0005),
    "8 bits of depth": (ModalitySpec(kind="depth", scale=1 / 25.5), "L", 0.5 / 25.5),
    "taskonomy": (ModalitySpec(kind="depth", scale=1 / 512, range=(1 / 512, 128), missing=65535), "I;16", 0.5 / 512),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str, suffix: str) -> None:
    spec, mode, half_step = WRITTEN[name]
    low, high = spec.limits
    image = low + (high - low) * torch.rand(spec.modality.stored, 7, 9, generator=torch.Generator().manual_seed(0))
    if spec.kind == "normal":
        image = torch.nn.functional.normalize(image, dim=0)
    if spec.kind in ("normal", "depth"):
        image[:, 2, 3] = 0.0
    if spec.kind == "curvature":
        image = image.clamp(min=-127 / 128)  # 8 bits hold 128 steps above zero and 127 below
    path = tmp_path / f"image{suffix}"
    write_image(path, image, spec)
    back = read_image(path, spec)
    assert back.shape == image.shape
    assert (back - image).abs().max() <= (half_step * 1.001 if suffix == ".png" else 0)
    assert torch.equal(measured(back, spec), measured(image, spec))
    if suffix == ".png":
        assert Image.open(path).mode == mode
    if spec.kind != "normal":  # reading a normal brings it to unit length: its bytes may move by one
        write_image(tmp_path / f"again{suffix}", back, spec)
        assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_writing_clips_and_never_stores_a_measurement_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "image.png"

    def written(values: list[float], spec: ModalitySpec) -> list[int]:
        write_image(path, torch.tensor(values).view(1, 1, -1), spec)
        return np.asarray(Image.open(path)).flatten().tolist()

    assert written([0.0, 1e-6, 70.0, 3.0], DEPTH) == [0, 1, 65535, 3000]
    assert written([0.0, 1e-6, 128.0, 127.99], WRITTEN["taskonomy"][0]) == [0, 1, 65534, 65531]
    assert written([0.0, 1e-6, 0.001], ModalitySpec(kind="depth", missing=1)) == [0, 2, 2]
    assert written([-1.0, 0.0, 2.0], ModalitySpec(kind="gray")) == [0, 0, 255]
    assert written([-1.0, 0.0, 9.0], WRITTEN["edges"][0]) == [0, 0, 65535]
    write_image(path, torch.tensor([-9.0, 127.4, 300.0]).view(3, 1, 1), RGB)
    assert np.asarray(Image.open(path)).flatten().tolist() == [0, 127, 255]
    write_image(path, torch.tensor([0.0, 0.0, -5.0]).view(3, 1, 1), NORMAL)  # brought to unit length, not clipped
    assert np.asarray(Image.open(path)).flatten().tolist() == [128, 128, 0]


def test_writing_refuses_what_cannot_be_an_image(tmp_path: Path) -> None:
    image = torch.zeros(1, 2, 2)
    with pytest.raises(UserError, match=r"a\.jpg: .*\.png or \.npy"):
        write_image(tmp_path / "a.jpg", image, DEPTH)
    with pytest.raises(UserError, match=r"nowhere/a\.png: cannot be written"):
        write_image(tmp_path / "nowhere" / "a.png", image, DEPTH)
    with pytest.raises(UserError, match=r"a\.png: .*NaN"):
        write_image(tmp_path / "a.png", image * float("nan"), DEPTH)
