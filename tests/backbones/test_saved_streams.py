"""Separate networks, saved and read again: the same answers to the bit, or one line that says why not."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from backbones.cut_off import cut_off_renaming
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones import sealed
from tokenfusion.backbones.lockstep import FusedStreams
from tokenfusion.fusion.crossing import Exchange, RandomExchange, TokenExchange
from tokenfusion.fusion.projection import time_index
from tokenfusion.manifest import MANIFEST, file_sha256

HALF = {"_target_": "tokenfusion.fusion.crossing.TokenExchange", "threshold": 0.5}
EVERY_SAMPLE = torch.stack([torch.arange(9), torch.arange(9).flip(0) - 1])  # [B, N], one token without a stand-in


def vit(name: str = "test_vit", **changes: object) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 5, "img_size": 48, **changes})


def ast() -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ASTConfig(**sizes, max_length=56, num_mel_bins=36, num_labels=5)
    return transformers.ASTForAudioClassification(config)


def sounding() -> dict[str, nn.Module]:
    return {"rgb": vit(drop_path_rate=0.1), "audio": ast()}


BY_TIME = {("rgb", "audio"): time_index((1, 3, 3), (3, 5), 0), ("audio", "rgb"): torch.arange(15) % 9}


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Words(nn.Module):
    """A network that nobody else knows, of numbers of words."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Embedding(50, dim), nn.Linear(dim, 5)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(1))


def inputs(model: FusedStreams) -> dict[str, Tensor]:
    drawn = {}
    for column in model.columns:
        size = (2, *column.example.shape[1:])
        is_words = not column.example.is_floating_point()
        drawn[column.name] = torch.randint(0, 50, size) if is_words else torch.randn(size)
    return drawn


def change(folder: Path, **changes: object) -> None:
    """As somebody would who changes the configuration on purpose."""
    config = json.loads((folder / sealed.CONFIG).read_text())
    (folder / sealed.CONFIG).write_text(json.dumps({**config, **changes}))
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in (sealed.CONFIG, sealed.MODEL)]
    (folder / MANIFEST).write_text("".join(lines))


@pytest.fixture
def folder(tmp_path: Path, shake) -> Path:
    model = tokenfusion.fuse(sounding(), fuser=HALF, projection=BY_TIME)
    shake(model).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def pair() -> dict[str, nn.Module]:
    return {"a": vit(), "b": vit("test_vit2", num_classes=7)}


def alike() -> dict[str, nn.Module]:
    return {"a": vit(), "b": vit(), "c": vit()}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(sounding, {"projection": BY_TIME, "fuser": HALF, "alignment": True, "seed": 3}, id="index"),
        pytest.param(
            alike, {"mlp": True, "seed": 5, "fuser": functools.partial(TokenExchange, threshold=0.5)}, id="mlp"
        ),
        pytest.param(alike, {"projection": {("b", "a"): None}, "fuser": "average"}, id="one-way"),
        pytest.param(pair, {"projection": {("a", "b"): EVERY_SAMPLE, ("b", "a"): EVERY_SAMPLE}}, id="per-sample"),
        pytest.param(pair, {"fuser": functools.partial(RandomExchange, rate=0.5), "seed": 2}, id="random"),
        pytest.param(pair, {"fuser": "concat"}, id="concat"),
        pytest.param(pair, {"fuser": "none"}, id="none"),
    ],
)
def test_read_again_it_answers_alike(tmp_path: Path, shake, make: Callable, options: dict) -> None:
    model = shake(tokenfusion.fuse(make(), **options)).train()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "fused")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state), "saving draws nothing"
    again = tokenfusion.load(tmp_path / "fused")
    assert not any(module.training for module in again.modules())
    x = inputs(model)
    ours, theirs = model.eval()(x), again(x)
    for name in model.modalities:
        one, other = (getattr(out.outputs[name], "logits", out.outputs[name]) for out in (ours, theirs))
        assert torch.equal(one, other)
    for mine, its in zip(ours.scores + (ours.donors or []), theirs.scores + (theirs.donors or []), strict=True):
        assert torch.equal(mine, its)
    assert again.block_names() == model.block_names()
    assert again.account == model.account
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / MANIFEST).read_text() == (tmp_path / "fused" / MANIFEST).read_text()


def test_what_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        MANIFEST,
        sealed.CARD,
        sealed.CONFIG,
        sealed.MODEL,
    ]
    assert torch.equal(load_file(folder / sealed.MODEL)["projection.audio.rgb"], BY_TIME["audio", "rgb"])
    front, body = (folder / sealed.CARD).read_text().removeprefix("---\n").split("\n---\n", 1)
    assert {"rgb", "audio", "timm", "transformers"} <= set(yaml.safe_load(front)["tags"])
    for said in (
        "- rgb: timm's test_vit (num_classes 5, img_size [48, 48], drop_path_rate 0.1), input [3, 48, 48]",
        "- audio: Hugging Face's ASTForAudioClassification, input [56, 36]",
        "- rgb takes tokens of audio through an MLP",
        "TokenExchange: The stand-in takes the place",
        "threshold 0.5",
    ):
        assert said in body
    found: dict = {}
    monkeypatch.chdir(folder.parent)
    exec(body.split("```python\n")[1].split("```")[0], found)
    assert found["out"].ensemble.shape == (1, 5)


def test_the_snippet_has_as_many_samples_as_an_index_per_sample(tmp_path: Path) -> None:
    model = tokenfusion.fuse(pair(), projection={("a", "b"): EVERY_SAMPLE})
    model.save_pretrained(tmp_path)
    assert '"a": torch.randn(2, 3, 48, 48)' in (tmp_path / sealed.CARD).read_text()


def test_half_precision_stays(tmp_path: Path) -> None:
    model = tokenfusion.fuse(pair(), fuser=HALF).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    again = FusedStreams.from_pretrained(tmp_path)
    x = {name: value.bfloat16() for name, value in inputs(model).items()}
    assert torch.equal(again(x).outputs["b"], model(x).outputs["b"])


# ---- networks that cannot be built from their names ------------------------------------------------------------------


def test_only_networks_without_a_name_are_asked_for(tmp_path: Path, shake) -> None:
    def changed() -> nn.Module:
        return vit(act_layer=nn.ReLU)

    index = {("rgb", "text"): torch.arange(9) % 8 - 1}
    networks = {"rgb": changed(), "text": Words(), "depth": vit()}
    example = {"text": torch.zeros(2, 7, dtype=torch.long)}
    model = shake(tokenfusion.fuse(networks, fuser=HALF, projection=index, example=example)).eval()
    with pytest.warns(UserWarning, match="network=") as warned:
        model.save_pretrained(tmp_path)
    told = [str(warning.message) for warning in warned]
    assert told[0].startswith("rgb: loading will need network=: test_vit, built anew, answers differently")
    assert told[1].startswith("text: loading will need network=: it is neither")
    assert len(told) == 2
    with pytest.raises(tokenfusion.UserError, match=r'rgb: .* give network=\{"rgb": \.\.\., "text": \.\.\.\}, a fresh'):
        tokenfusion.load(tmp_path)
    with pytest.raises(tokenfusion.UserError, match="text: Words cannot be built from its name"):
        tokenfusion.load(tmp_path, network={"rgb": changed()})
    again = tokenfusion.load(tmp_path, network={"rgb": changed(), "text": Words()})
    x = inputs(model)
    assert torch.equal(again(x).ensemble, model(x).ensemble)
    assert 'network={"rgb": VisionTransformer(...), "text": Words(...)}' in (tmp_path / sealed.CARD).read_text()
    with pytest.raises(tokenfusion.UserError, match=r"weights do not fit .*networks\.text"):
        tokenfusion.load(tmp_path, network={"rgb": changed(), "text": Words(32)})


def test_dropout_that_no_argument_gives_is_told_of_its_network(tmp_path: Path) -> None:
    networks = pair()
    networks["b"].blocks[1].attn.proj_drop.p = 0.25
    with pytest.warns(
        UserWarning, match=r"^b: loading will need network=: blocks\..* is 0 here and 0\.25 in a network"
    ):
        tokenfusion.fuse(networks).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Identity(), r"networks are separate; wanted network=\{name: module\}, got Identity"),
        ({"sound": nn.Identity()}, "network= gives 'sound' a Identity; wanted modules for some of rgb, audio"),
        ({"rgb": 3}, "network= gives 'rgb' a int"),
    ],
)
def test_networks_of_another_kind_are_told(folder: Path, network: object, message: str) -> None:
    with pytest.raises(tokenfusion.UserError, match=message):
        tokenfusion.load(folder, network=network)


def test_the_two_kinds_are_told_apart(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(tokenfusion.UserError, match="holds a FusedStreams, not a FusedNetwork"):
        tokenfusion.FusedNetwork.from_pretrained(folder)
    tokenfusion.fuse(vit(), ["a", "b"]).save_pretrained(tmp_path / "shared")
    with pytest.raises(tokenfusion.UserError, match="holds a FusedNetwork, not a FusedStreams"):
        FusedStreams.from_pretrained(tmp_path / "shared")
    with pytest.raises(
        tokenfusion.UserError, match="the streams share one network; wanted network= a module, got dict"
    ):
        tokenfusion.load(tmp_path / "shared", network={"a": vit()})


# ---- what cannot be saved, and what does not fit -----------------------------------------------------------------------


def test_a_projection_that_is_a_function_is_refused(tmp_path: Path) -> None:
    model = tokenfusion.fuse(pair(), projection={("a", "b"): lambda inputs: torch.arange(9)})
    with pytest.raises(tokenfusion.UserError, match=r"projection \('a', 'b'\) is a function .* cannot be saved; give"):
        model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_an_exchange_without_a_name_is_refused(tmp_path: Path) -> None:
    model = tokenfusion.fuse(pair(), fuser=lambda dim, seed: TokenExchange(dim, seed))
    with pytest.raises(tokenfusion.UserError, match=r"TokenExchange\) was made by a function"):
        model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


class Foreign(Exchange):
    """An exchange that is no part of tokenfusion."""

    def take(self, tokens: Tensor, stand_in: Tensor, has: Tensor, scores: Tensor | None) -> Tensor:
        return tokens - stand_in


def test_foreign_exchanges_are_built_when_trusted(tmp_path: Path) -> None:
    tokenfusion.fuse(pair(), fuser=Foreign).save_pretrained(tmp_path)
    with pytest.raises(tokenfusion.UserError, match="is no part of a network of tokenfusion"):
        tokenfusion.load(tmp_path)
    assert isinstance(tokenfusion.load(tmp_path, trust=True).exchanges[0]["0"], Foreign)


def test_damage_is_told(folder: Path) -> None:
    weights = folder / sealed.MODEL
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(tokenfusion.UserError, match=r"model.safetensors: damaged \(SHA-256"):
        tokenfusion.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind is 'other', this version reads shared, separate; upgrade"),
        ({"kind": ["separate"]}, "kind is"),
        ({"kind": "shared"}, "key 'network' is missing"),
        ({"streams": {}}, "streams: .* at least 1"),
        ({"projection": {"rgb": {"rgb": "grid"}}}, "is no pair of a receiver and another giver"),
        ({"projection": {"audio": {"sound": "index"}}}, "cannot be fused as config.json says .*projection.audio.sound"),
        ({"projection": {"rgb": {"audio": "time"}}}, "projection.rgb.audio"),
        ({"fuser": {"_target_": "tokenfusion.fusion.TokenFusion"}}, "fuser.modalities: .* needs this argument"),
        ({"mlp": "x"}, "mlp"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(folder: Path, changes: dict, message: str) -> None:
    change(folder, **changes)
    with pytest.raises(tokenfusion.UserError, match=message) as error:
        tokenfusion.load(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("failing", range(3))
def test_saving_that_is_cut_off_leaves_the_old_or_the_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """KeyboardInterrupt stands for a kill: nothing is tidied up."""
    model = tokenfusion.load(folder)
    old = model.ensemble.alpha.detach().clone()
    nn.init.constant_(model.ensemble.alpha, 0.25)
    cut_off_renaming(monkeypatch, failing, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(tokenfusion.load(folder).ensemble.alpha, model.ensemble.alpha if failing else old)
