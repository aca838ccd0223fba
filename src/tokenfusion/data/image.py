"""Image files: read in physical units, written back in their own encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.prepare.archive import encode_image
from tokenfusion.errors import UserError, first_line


def read_image(path: Path | str, spec: ModalitySpec) -> Tensor:
    """Read one file in physical units: float32 [3, H, W] for rgb (0..255), normal (unit vectors) and
    curvature (-1..1), else [1, H, W].

    Errors: UserError that names the file, see ``load_image``.
    """
    return decode(load_image(path, spec), spec)


def read_inputs(paths: dict[str, Path], specs: dict[str, ModalitySpec]) -> dict[str, Tensor]:
    """Read one file per modality as ``read_image`` does; all must have the same height and width."""
    images = {name: read_image(path, specs[name]) for name, path in paths.items()}
    check_sizes(paths, images)
    return images


def load_image(path: Path | str, spec: ModalitySpec) -> Tensor:
    """Read one file in its working form: uint8 [C, H, W] as stored (8-bit rgb, normal, curvature, gray) or physical float32.

    Working on bytes as long as possible is what keeps augmentation fast; ``decode`` turns both forms to physical.

    Errors: UserError that names the file where it is missing, damaged, has the wrong channels, or is a depth image
    with values that are not finite, below zero, or missing everywhere.
    """
    kind, path = spec.kind, Path(path)
    values = _to_channels(_read_array(path, keep_palette=False), path, kind, spec.modality.stored)
    if kind == "depth":
        return _depth_metres(values, path, spec)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))  # a copy: Pillow's is read-only
    if spec.modality.stored == 3 and values.dtype.kind != "f":
        raise UserError(f"{path}: {kind} must be stored in 8 bits, this file holds {values.dtype}")
    scale = 1.0 if values.dtype.kind == "f" else spec.scale or 1.0 / np.iinfo(values.dtype).max
    physical = torch.from_numpy(np.array(values.transpose(2, 0, 1), dtype=np.float32, order="C"))
    if not physical.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite (NaN or infinite); mend the file")
    return physical * scale if scale != 1.0 else physical


def decode(image: Tensor, spec: ModalitySpec) -> Tensor:
    """Working form [C, H, W] -> physical float32 [C, H, W]; float32 is physical already."""
    if image.dtype != torch.uint8:
        return image
    if spec.kind == "normal":
        return F.normalize(image.float() / 127.5 - 1.0, dim=0) * measured(image, spec)  # black: the zero vector
    return (image.float() - spec.modality.zero) * (spec.scale or spec.modality.scale or 1.0 / 255.0)


def measured(image: Tensor, spec: ModalitySpec) -> Tensor:
    """Where an image in working or physical form [C, H, W] holds a measurement: bool [H, W].

    False where depth is missing or a normal is the zero vector (stored black); the other kinds are measured everywhere.
    """
    if spec.modality.missing is None and not spec.modality.is_vector:
        return torch.ones(image.shape[-2:], dtype=torch.bool, device=image.device)
    return (image != 0).any(dim=0)


def write_image(path: Path | str, physical: Tensor, spec: ModalitySpec) -> None:
    """Write a physical image [C, H, W] so that ``read_image`` with the same ``spec`` gives it back.

    ``.npy`` holds the values themselves. ``.png`` holds them in steps: rgb, normal and curvature in 8 bits, the other
    kinds in 8 bits where ``255 x scale`` reaches the high end of ``spec.limits`` (always without a scale), else in 16.
    What does not fit is clipped. Depth of 0 is stored as 0 = missing, and measured depth never as a value that means it.

    Errors: UserError where values are not finite or the file cannot be written.
    """
    path, values = Path(path), physical.detach().float().cpu()
    if not values.isfinite().all():
        raise UserError(f"{path}: the image to write holds NaN or infinite values; the prediction is not usable")
    if path.suffix not in (".npy", ".png"):
        raise UserError(f"{path}: images are written as .png or .npy, not {path.suffix!r}")
    pixels = values.numpy() if path.suffix == ".npy" else _encode(values, spec)
    pixels = np.ascontiguousarray(pixels[0] if spec.modality.stored == 1 else pixels.transpose(1, 2, 0))
    try:
        if path.suffix == ".npy":
            np.save(path, pixels, allow_pickle=False)
        else:
            path.write_bytes(encode_image(pixels, ".png"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _encode(values: Tensor, spec: ModalitySpec) -> np.ndarray:
    """Physical [C, H, W] -> stored uint8 or uint16 [C, H, W]."""
    if spec.kind == "normal":
        known = measured(values, spec)
        return (((F.normalize(values, dim=0) + 1.0) * 127.5).round() * known).numpy().astype(np.uint8)
    scale = spec.scale or spec.modality.scale
    top = 255 if scale is None or 255 * scale >= spec.limits[1] * (1 - 1e-6) else 65535
    scale = scale or 1.0 / 255.0
    stored = (values / scale + spec.modality.zero).round()
    if spec.kind == "depth":
        known = values > 0
        stored = stored.clamp(1, top)  # what was measured is never written as 0 = missing
        missing = spec.missing_value or 0.0
        stored[stored == missing] = missing - 1 if missing > 1 else 2
        stored = stored * known
    return stored.clamp(0, top).numpy().astype(np.uint8 if top == 255 else np.uint16)


def read_label(path: Path | str) -> Tensor:
    """Read stored class ids: int64 [H, W]. Palette images give their indices."""
    values = _to_channels(_read_array(Path(path), keep_palette=True), Path(path), "label", 1)[:, :, 0]
    if values.dtype.kind == "f":
        raise UserError(f"{path}: labels must be whole numbers, this file holds {values.dtype}")
    return torch.from_numpy(values.astype(np.int64))


def check_sizes(paths: dict[str, Path], images: dict[str, Tensor]) -> None:
    """Raise a UserError that names both files where two images differ in height or width."""
    (first, image), *others = images.items()
    for name, other in others:
        if other.shape[-2:] != image.shape[-2:]:
            (h, w), (other_h, other_w) = image.shape[-2:], other.shape[-2:]
            raise UserError(
                f"{paths[name]}: {name} is {other_h}x{other_w} (height x width), but {first} ({paths[first]}) is "
                f"{h}x{w}; all modalities must be aligned pixel by pixel"
            )


def _read_array(path: Path, keep_palette: bool) -> np.ndarray:
    """[H, W] or [H, W, C] as stored; .npy or any image file that Pillow reads."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".npy":
                return np.lib.format.read_array(file, allow_pickle=False)
            with Image.open(file) as image:
                image.load()
                if image.mode == "P" and not keep_palette:
                    return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
                return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # decoders answer damage with a dozen different exceptions
        reason = first_line(error)
        what = "a NumPy array" if path.suffix == ".npy" else "an image"
        raise UserError(f"{path}: cannot be read as {what} ({reason}); the file may be damaged") from None


def _to_channels(values: np.ndarray, path: Path, kind: str, wanted: int) -> np.ndarray:
    """[H, W, wanted]; an opaque alpha channel is dropped, anything else that does not fit is an error."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) if kind == "label" else values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or values.size == 0:
        raise UserError(f"{path}: holds {values.dtype} of shape {values.shape}, {kind} wants numbers [H, W, {wanted}]")
    if values.ndim == 2:
        values = values[:, :, None]
    if wanted == 3 and values.shape[2] == 4 and values.dtype == np.uint8:
        if (values[:, :, 3] != 255).any():
            raise UserError(f"{path}: has a transparent alpha channel; save it as plain RGB (3 channels)")
        values = values[:, :, :3]
    if values.shape[2] != wanted:
        hint = "; store class ids, not colours" if kind == "label" else ""
        raise UserError(f"{path}: has {values.shape[2]} channel(s), {kind} needs {wanted}{hint}")
    return values


def _depth_metres(values: np.ndarray, path: Path, spec: ModalitySpec) -> Tensor:
    """Stored depth [H, W, 1] -> metres float32 [1, H, W], 0 = missing. Floating-point .npy files are metres already."""
    metres = np.array(values.transpose(2, 0, 1), dtype=np.float32, order="C")
    in_metres = path.suffix == ".npy" and values.dtype.kind == "f"
    if not np.isfinite(metres).all():
        count = int((~np.isfinite(metres)).sum())
        raise UserError(f"{path}: {count} depth values are NaN or infinite; write 0 where depth is missing")
    if not in_metres:
        missing = None if spec.missing_value is None else metres == spec.missing_value
        metres = metres * np.float32(spec.scale or spec.modality.scale or 1.0)
        if missing is not None:
            metres[missing] = 0.0
    if metres.min() < 0:
        raise UserError(f"{path}: holds depth below zero ({metres.min():g} m); write 0 where depth is missing")
    if not metres.any():
        raise UserError(f"{path}: holds no depth at all, every pixel is missing; leave out this frame, or the modality")
    return torch.from_numpy(metres)
