"""Joint augmentation of images as such; how it moves frames is in test_frames.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenfusion.data.augment import Augment
from tokenfusion.data.image import decode
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError

SPECS = {kind: ModalitySpec(kind=kind) for kind in ("rgb", "depth", "normal")}


def test_flip_mirrors_and_turns_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randint(1, 255, (3, 4, 6), dtype=torch.uint8)
    normal[:, 0, 0] = 0
    images = {"normal": normal, "depth": torch.rand(1, 4, 6)}
    target = torch.randint(0, 5, (4, 6))
    flipped, mirrored = Augment(scale=(1, 1), flip=1.0)(images, target, SPECS, generator)
    assert mirrored is not None
    assert torch.equal(mirrored, target.flip(-1))
    assert torch.equal(flipped["depth"], images["depth"].flip(-1))
    wanted = decode(normal, SPECS["normal"]).flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert torch.allclose(decode(flipped["normal"], SPECS["normal"]), wanted, atol=1e-6)
    physical, _ = Augment(scale=(1, 1), flip=1.0)({"normal": decode(normal, SPECS["normal"])}, None, SPECS, generator)
    assert torch.allclose(physical["normal"], wanted, atol=1e-6)


def test_jitter_changes_rgb_alone() -> None:
    images = {"rgb": torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8), "depth": torch.rand(1, 8, 8)}

    def run(jitter: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return Augment(scale=(1, 1), flip=0.0, jitter=jitter)(images, None, SPECS, generator)[0]

    assert torch.equal(run(0.0)["rgb"], images["rgb"])
    assert not torch.equal(run(0.4)["rgb"], images["rgb"])
    assert torch.equal(run(0.4)["depth"], images["depth"])


def test_padding_has_the_meaning_of_nothing_in_every_kind() -> None:
    images = {
        "normal": torch.full((3, 4, 4), 9, dtype=torch.uint8),
        "curvature": torch.full((3, 4, 4), 9, dtype=torch.uint8),
        "depth": torch.ones(1, 4, 4),
    }
    specs = {**SPECS, "curvature": ModalitySpec(kind="curvature")}
    valid = torch.ones(4, 4, dtype=torch.uint8)
    moved, map_ = Augment(crop=(8, 8), scale=(1, 1))(images, valid, specs, torch.Generator().manual_seed(0))
    assert map_ is not None
    assert set(map_.unique().tolist()) == {1, 255}
    for name, image in moved.items():
        assert (decode(image, specs[name])[:, map_ == 255] == 0).all(), name
        assert (decode(image, specs[name])[:, map_ == 1] != 0).all(), name


@pytest.mark.parametrize(
    "wrong", [{"scale": (0, 1)}, {"scale": (2, 1)}, {"flip": 2}, {"jitter": -1}, {"crop": (0, 4)}, {"resize": (4,)}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augment(**wrong)  # type: ignore[arg-type]
