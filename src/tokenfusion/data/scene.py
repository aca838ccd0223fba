"""Files that describe a scene: boxes, cameras, and the projection that they make."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from torch import Tensor

from tokenfusion.data.boxes import FAR_M
from tokenfusion.errors import UserError

Row3 = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
Row4 = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
RIGID = 1e-3  # how far a pose's axes may be from orthonormal
FAR_PX = 1e6  # no camera has a longer focal length, in pixels
SHAPES = {"center": "3", "size": "3", "box2d": "4", "K": "3x3", "pose": "4x4"}
MISSHAPEN = ("missing", "too_long", "tuple_type")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it


class SceneBoxes(NamedTuple):
    """What stands in a scene; for the seven numbers of a box see ``boxes.py``."""

    boxes: Tensor  # float32 [K, 7]
    names: list[str]  # of their classes
    boxes2d: Tensor  # float32 [K, 4], x1 y1 x2 y2 in pixels of the one image; NaN where the file has none


class View(NamedTuple):
    """One image of a scene and its camera. Camera axes: x right, y down, z forward."""

    image: Path
    K: Tensor  # float64 [3, 3]; pixels count from 0 at the centre of the first one
    pose: Tensor  # float64 [4, 4], camera to upright axes


class _Box(BaseModel):
    name: str = Field(alias="class")
    center: Row3
    size: Row3
    yaw_rad: FiniteFloat
    box2d: Row4 | None = None

    @model_validator(mode="after")
    def _has_extent(self) -> _Box:
        if min(self.size) <= 0:
            raise ValueError(f"size is {list(self.size)}; wanted three lengths above 0, in metres")
        if max(map(abs, (*self.center, *self.size))) > FAR_M:
            place = f"center is {list(self.center)} and size {list(self.size)}"
            raise ValueError(f"{place}; wanted metres, none beyond {FAR_M:g}")
        if self.box2d is not None and not (self.box2d[0] < self.box2d[2] and self.box2d[1] < self.box2d[3]):
            raise ValueError(f"box2d is {list(self.box2d)}; wanted [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        return self


class _Boxes(BaseModel):
    boxes: tuple[_Box, ...]


class _Camera(BaseModel):
    K: tuple[Row3, Row3, Row3]
    pose: tuple[Row4, Row4, Row4, Row4]

    @field_validator("K")
    @classmethod
    def _projects(cls, rows: tuple[Row3, Row3, Row3]) -> tuple[Row3, Row3, Row3]:
        K = torch.tensor(rows, dtype=torch.float64)
        if K[2].tolist() != [0, 0, 1] or min(K[0, 0], K[1, 1]) <= 0 or torch.linalg.det(K) <= 0:
            raise ValueError("wanted focal lengths above 0 on the diagonal, and a last row 0 0 1")
        if K.abs().max() > FAR_PX:
            raise ValueError(f"holds {K.flatten()[K.abs().argmax()]:g}; wanted pixels, none beyond {FAR_PX:g}")
        return rows

    @field_validator("pose")
    @classmethod
    def _moves(cls, rows: tuple[Row4, Row4, Row4, Row4]) -> tuple[Row4, Row4, Row4, Row4]:
        pose = torch.tensor(rows, dtype=torch.float64)
        if not is_rigid(pose):
            raise ValueError("is no rotation and shift (camera to upright), with a last row 0 0 0 1")
        if pose[:3, 3].abs().max() > FAR_M:
            raise ValueError(f"shifts by {pose[:3, 3].tolist()}; wanted metres, none beyond {FAR_M:g}")
        return rows


class _View(_Camera):
    image: str

    @field_validator("image")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} leaves the data set's folder; wanted a plain path below it")
        return name


class _Views(BaseModel):
    views: tuple[_View, ...]


class _Either(BaseModel, extra="allow"):
    views: object = None


Content = TypeVar("Content", bound=BaseModel)


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path | str, data: bytes, model: type[Content]) -> Content:
    """JSON by its model; the first problem in one line."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error.errors()[0])}") from None


def _explain(first: ErrorDetails) -> str:
    """One problem in one line: the key, what is wrong with it, and what came."""
    kind, parts = first["type"], [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if kind == "missing" and not parts[-1].isdigit():
        return f"the key {'.'.join(parts)!r} is missing"
    field = next((part for part in parts if part in SHAPES), None)
    if field is not None and kind in MISSHAPEN:
        parts, message = parts[: parts.index(field) + 1], f"wanted {SHAPES[field]} numbers"
    came = "" if kind in ("value_error", "json_invalid") else f" (came: {str(first['input'])[:60]!r})"
    return f"{'.'.join(parts)}: {message}{came}" if parts else f"{message}{came}"


def read_boxes(path: Path | str) -> SceneBoxes:
    """Read ``{"boxes": [{"class", "center", "size", "yaw_rad", "box2d"}]}``; the list may be empty, box2d may lack.

    Errors: UserError that names the file and the entry.
    """
    boxes = _parse(path, _read(path), _Boxes).boxes
    rows = [[*box.center, *box.size, box.yaw_rad] for box in boxes]
    shown = [box.box2d or (float("nan"),) * 4 for box in boxes]
    return SceneBoxes(
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 7),
        [box.name for box in boxes],
        torch.tensor(shown, dtype=torch.float32).reshape(-1, 4),
    )


def read_camera(path: Path | str, image: Path | None = None, root: Path | None = None) -> list[View]:
    """Read ``{"K", "pose"}`` of the one ``image``, or ``{"views": [{"image", "K", "pose"}, ...]}``; may be empty.

    Args:
        path: the file.
        image: the image that a camera without views belongs to.
        root: the folder below which views name their images; by default the file's own.

    Errors: UserError that names the file and the entry: a K without focal lengths, a pose that is no rigid motion, what
    lies out of all reach.
    """
    path = Path(path)
    data = _read(path)
    if _parse(path, data, _Either).views is not None:
        views = _parse(path, data, _Views).views
        return [_view((root or path.parent) / view.image, view) for view in views]
    camera = _parse(path, data, _Camera)
    if image is None:
        raise UserError(f"{path}: belongs to one image, but none is named; give rgb=FILE, or list views in it")
    return [_view(image, camera)]


def _view(image: Path, camera: _Camera) -> View:
    return View(image, *(torch.tensor(rows, dtype=torch.float64) for rows in (camera.K, camera.pose)))


def is_rigid(pose: Tensor) -> bool:
    """Whether a [4, 4] is a rotation and a shift, up to a thousandth."""
    if not bool(pose.isfinite().all()) or pose[3].tolist() != [0, 0, 0, 1]:
        return False
    turn = pose[:3, :3]
    off = (turn @ turn.T - torch.eye(3, dtype=pose.dtype)).abs().max()
    return bool(off < RIGID and torch.linalg.det(turn) > 0)


def projection_of(K: Tensor, pose: Tensor) -> Tensor:
    """K [3, 3] and pose [4, 4] (camera to upright) -> P [3, 4] with (u z, v z, z) = P (x, y, z, 1)."""
    return K @ torch.linalg.inv(pose)[:3]
