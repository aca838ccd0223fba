"""Pictures for people: even lightness, missing values black."""

from __future__ import annotations

import numpy as np
import torch

from tokenfusion.data.image import decode
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import COLOUR_MAP, oklch, picture

DEPTH = ModalitySpec(kind="depth")


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


def test_bytes_that_are_colours_are_shown_as_they_are() -> None:
    stored = torch.tensor([[10, 200], [127, 128], [0, 255]], dtype=torch.uint8).view(3, 1, 2)
    for kind in ("rgb", "curvature"):
        spec = ModalitySpec(kind=kind)
        assert picture(decode(stored, spec), spec).tolist() == stored.permute(1, 2, 0).tolist()
