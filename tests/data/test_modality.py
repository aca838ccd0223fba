"""The table of kinds, and what an entry of dataset.yaml may say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tokenfusion.data.inputs import normalise, to_tanh
from tokenfusion.data.modality import MODALITIES, ModalitySpec
from tokenfusion.data.picture import picture


def test_every_kind_is_complete() -> None:
    for kind, modality in MODALITIES.items():
        assert modality.channels == 3
        raw = {kind: torch.rand(modality.stored, 4, 5)}
        assert normalise(raw, {kind: ModalitySpec(kind=kind)})[kind].shape == (3, 4, 5)
        assert to_tanh(raw[kind], ModalitySpec(kind=kind)).shape == (3, 4, 5)
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
        {"kind": "depth", "range": [0, 10]},
        {"kind": "depth", "range": [5, 5]},
        {"kind": "gray", "range": [1, 0]},
        {"kind": "gray", "range": [0, float("nan")]},
        {"kind": "gray", "range": [0]},
        {"kind": "rgb", "range": [0, 1]},
        {"kind": "curvature", "scale": 2},
    ],
)
def test_wrong_specifications_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModalitySpec.model_validate(entry)


def test_a_range_is_the_kinds_unless_it_is_given() -> None:
    assert ModalitySpec(kind="depth").limits == (1.0, 10.0)
    spec = ModalitySpec.model_validate({"kind": "depth", "range": [0.5, 80]})
    assert spec.limits == (0.5, 80.0)
    assert ModalitySpec.model_validate(spec.model_dump()) == spec
