"""Feature extractors: one contract for all, known numbers, the published layouts, and files that are refused."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tasks.translation.small_vit import save_weights
from torch import Tensor, nn

from tokenfusion.components import build
from tokenfusion.errors import UserError
from tokenfusion.tasks.translation import features
from tokenfusion.tasks.translation.features import Features, as_features, dinov2, inception, pixels, to_uint8

PUBLISHED_SHA256 = features.INCEPTION_SHA256  # the tests of files put another in its place


class Moments(nn.Module):
    """Somebody's own extractor; the dropout shows whether it is in eval mode, and in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = images.double() / 255
        return self.dropout(torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1) * self.weight)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("dinov2") / "small.npz")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Random weights in the layout of the real file; its hash counts as the right one meanwhile."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network_class = library.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network_class, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = network_class("inception-v3-compat", ["2048"])
        for layer in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)  # or nothing of an image arrives at the end
        torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        yield str(path)


@pytest.fixture(scope="module", params=["pixels", "own", "dinov2", "inception"])
def extractor(request: pytest.FixtureRequest) -> Features:
    if request.param == "pixels":
        return pixels()
    if request.param == "own":
        return as_features(Moments())
    if request.param == "dinov2":
        pytest.importorskip("transformers")
        return dinov2(request.getfixturevalue("vit_file"))
    return inception(request.getfixturevalue("inception_file"))


def _images(n: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + height)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_contract(extractor: Features) -> None:
    """Any size; float32 rows without a graph; an image's row does not depend on its batch or on the mode."""
    images = _images(2, 48, 70)
    rows = extractor.train()(images)
    assert rows.dtype == torch.float32
    assert rows.dim() == 2
    assert len(rows) == 2
    assert not rows.requires_grad
    assert not any(module.training for module in extractor.modules())
    assert torch.equal(rows, extractor(images))
    torch.testing.assert_close(rows[1:], extractor(images[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows[0], rows[1], rtol=1e-4, atol=1e-5)
    grey = extractor(images[:1, :1].expand(1, 3, 48, 70))
    assert grey.isfinite().all()
    assert extractor(_images(1, 9, 7)).shape == (1, rows.shape[1])
    assert extractor.name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rows, extractor(images))


def test_names_and_widths(vit_file: str, inception_file: str) -> None:
    pytest.importorskip("transformers")
    made = [pixels(), pixels(4), as_features(Moments()), dinov2(vit_file), inception(inception_file)]
    assert [(x.name, x(_images(1, 30, 30)).shape[1]) for x in made] == [
        ("pixels 8x8", 192),
        ("pixels 4x4", 48),
        ("Moments", 6),
        ("dinov2-vit64x2-14", 64),
        ("inception-v3-compat 2048", 2048),
    ]


@pytest.mark.parametrize("make", [dinov2, inception], ids=lambda make: make.__name__)
def test_making_one_draws_nothing(make: Callable[[str], Features], vit_file: str, inception_file: str) -> None:
    pytest.importorskip("transformers")
    before = torch.get_rng_state()
    make({dinov2: vit_file, inception: inception_file}[make])
    assert torch.equal(before, torch.get_rng_state())


def test_a_recipe_names_one() -> None:
    made = build({"_target_": "tokenfusion.tasks.translation.features.pixels", "size": 4}, "features")
    assert as_features(made) is made


def test_what_is_no_extractor_is_refused() -> None:
    with pytest.raises(UserError, match="wanted a torch module .* got int"):
        as_features(3)
    with pytest.raises(UserError, match=r"Identity returned \(1, 3, 4, 4\)"):
        as_features(nn.Identity())(_images(1, 4, 4))


def test_an_own_name_is_kept() -> None:
    network = Moments()
    network.name = "moments of my own"  # type: ignore[assignment]
    assert as_features(network).name == "moments of my own"


def test_pixels_by_hand() -> None:
    image = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    image[0, 0, :, :3] = 255
    image[0, 1, :2] = 51
    assert pixels(2)(image).tolist() == [pytest.approx([1, -1, 1, -1, -0.6, -0.6, -1, -1, -1, -1, -1, -1])]


def test_to_uint8() -> None:
    coded = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, float("nan")])
    assert to_uint8(coded).tolist() == [0, 0, 128, 255, 255, 128]
    stored = torch.arange(256)
    assert torch.equal(to_uint8(stored / 127.5 - 1), stored.to(torch.uint8))


def test_inception_loads_the_very_weights(inception_file: str) -> None:
    stored = torch.load(inception_file, weights_only=True)
    loaded = {
        key.removeprefix("network.network."): value for key, value in inception(inception_file).state_dict().items()
    }
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], value) for key, value in stored.items())


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_another_file_is_never_unpickled(inception_file: str, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "goes off")))
    assert (tmp_path / "goes off").is_dir()
    bomb, cut = tmp_path / "bomb.pth", tmp_path / "cut.pth"
    torch.save(Bomb(tmp_path / "went off"), bomb)
    cut.write_bytes(Path(inception_file).read_bytes()[:-1000])
    for path in (bomb, cut):
        with pytest.raises(UserError, match=rf"{path.name}: SHA-256 is [0-9a-f]{{16}}.* get the file again") as refusal:
            inception(str(path))
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "went off").exists()


def test_the_hash_is_the_one_in_the_files_name() -> None:
    assert len(PUBLISHED_SHA256) == 64
    assert features.INCEPTION_FILE.endswith(f"-{PUBLISHED_SHA256[:8]}.pth")


def test_a_missing_file_is_named_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> str:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match="/no/such.pth: no such file; wanted .* torch-fidelity"):
        inception("/no/such.pth")
    with pytest.raises(UserError, match=r"not fetched from the hub \(no network\); wanted"):
        inception("owner/repo/folder/file.pth")


def test_the_hub_gives_the_file(inception_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def download(*names: str) -> str:
        asked.append(names)
        return inception_file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert inception("owner/repo/folder/file.pth").name == "inception-v3-compat 2048"
    assert asked == [("owner/repo", "folder/file.pth")]
