"""A fused network saved and read again: the same answers, or one line that says why not."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from backbones.cut_off import cut_off_renaming
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones import sealed
from tokenfusion.backbones.dense import DenseBackbone
from tokenfusion.fusion import Average, Random, TokenFusion
from tokenfusion.fusion.fusers import Fuser
from tokenfusion.manifest import MANIFEST, file_sha256


def vit(**changes) -> nn.Module:
    return timm.create_model("test_vit", **{"num_classes": 5, "img_size": 48, **changes})


def images(modalities: dict[str, int], size: int = 48) -> dict[str, Tensor]:
    return {name: torch.randn(2, n, size, size) for name, n in modalities.items()}


@pytest.fixture
def folder(tmp_path: Path, shake) -> Path:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"])
    shake(model).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def sign(folder: Path) -> None:
    """A manifest that fits the files, as somebody would write it who changes them on purpose."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in (sealed.CONFIG, sealed.MODEL)]
    (folder / MANIFEST).write_text("".join(lines))


def change(folder: Path, **changes) -> None:
    config = json.loads((folder / sealed.CONFIG).read_text())
    for key, value in changes.items():
        place = config["network"] if key in config["network"] else config
        place[key] = value
    (folder / sealed.CONFIG).write_text(json.dumps(config))
    sign(folder)


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=48, patch_size=16, num_labels=4)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "modalities", "fuser", "options"),
    [
        pytest.param(vit, {"rgb": 3, "depth": 1}, None, {}, id="timm"),
        pytest.param(
            lambda: vit(num_classes=0, global_pool="avg", drop_path_rate=0.2, dynamic_img_size=True),
            {"a": 3, "b": 3, "c": 3},
            "tokenfusion-paper",
            {"seed": 7, "blocks": [0, -1], "alignment": True},
            id="arguments",
        ),
        pytest.param(lambda: vit(in_chans=4), {"a": 4, "b": 4}, "concat", {}, id="channels"),
        pytest.param(
            lambda: timm.create_model("pvt_v2_b0", num_classes=3),
            {"a": 3, "b": 3},
            functools.partial(TokenFusion, threshold=0.5, seed=3),
            {"score_nets": "stage"},
            id="pyramid",
        ),
        pytest.param(hugging_face, {"a": 1, "b": 2}, functools.partial(Random, rate=0.4), {}, id="hugging-face"),
        pytest.param(hugging_face, {"a": 3, "b": 3}, Average, {}, id="class"),
    ],
)
def test_read_again_it_answers_alike(tmp_path: Path, shake, make: Callable, modalities, fuser, options) -> None:
    model = shake(tokenfusion.fuse(make(), modalities, fuser, **options)).train()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "fused")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state), "saving draws nothing"
    again = tokenfusion.load(tmp_path / "fused")
    assert not any(module.training for module in again.modules())
    x = images(modalities)
    torch.testing.assert_close(again(x).ensemble, model.eval()(x).ensemble, rtol=0, atol=0)
    assert again.fused_blocks() == model.fused_blocks()
    assert list(map(type, again.modules())) == list(map(type, model.modules()))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / MANIFEST).read_text() == (tmp_path / "fused" / MANIFEST).read_text()


def test_what_is_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        MANIFEST,
        sealed.CARD,
        sealed.CONFIG,
        sealed.MODEL,
    ]
    text = (folder / sealed.CARD).read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "tokenfusion"
    assert {"rgb", "depth", "timm"} <= set(yaml.safe_load(front)["tags"])
    assert "test_vit" in body
    assert "substituted" in body
    snippet = body.split("```python\n")[1].split("```")[0]
    found: dict = {}
    here = os.getcwd()
    os.chdir(folder.parent)
    try:
        exec(snippet, found)
    finally:
        os.chdir(here)
    assert found["out"].ensemble.shape == (1, 5)


@pytest.mark.parametrize(
    ("sharing", "said"),
    [("default", "each has its own norms"), ("shared", "norms too"), ("unshared", "each stream has a copy of its own")],
)
def test_a_card_says_what_is_shared(tmp_path: Path, sharing: str, said: str) -> None:
    tokenfusion.fuse(vit(), ["rgb", "depth"], "average", sharing=sharing).save_pretrained(tmp_path)
    assert said in (tmp_path / sealed.CARD).read_text()


def test_a_card_that_was_written_on_stays(folder: Path) -> None:
    (folder / sealed.CARD).write_text("mine")
    tokenfusion.load(folder).save_pretrained(folder)
    assert (folder / sealed.CARD).read_text() == "mine"
    tokenfusion.load(folder)


def test_half_precision_stays(tmp_path: Path) -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"]).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    again = tokenfusion.FusedNetwork.from_pretrained(tmp_path)
    x = {name: value.bfloat16() for name, value in images({"rgb": 3, "depth": 3}).items()}
    assert torch.equal(again(x).ensemble, model(x).ensemble)


def test_weights_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"])
    model.network.bfloat16()
    with pytest.raises(tokenfusion.UserError, match="the weights are of bfloat16, float32; wanted one of float16"):
        model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.4, "attn_drop_rate": 0.5}


@pytest.mark.parametrize("rates", [RATES, *({name: rate} for name, rate in RATES.items())])
def test_dropout_stays(tmp_path: Path, rates: dict[str, float]) -> None:
    model = tokenfusion.fuse(vit(**rates), ["rgb", "depth"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / sealed.CONFIG).read_text())["network"]["arguments"].items() >= rates.items()
    again, drops = tokenfusion.load(tmp_path), nn.Dropout
    told = [[repr(m) for m in x.modules() if isinstance(m, drops)] for x in (model, again)]
    assert told[0] == told[1]


def test_dropout_of_an_architecture_that_hands_its_arguments_on(tmp_path: Path) -> None:
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, attn_drop_rate=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenfusion.fuse(network, ["a", "b"]).save_pretrained(tmp_path)
    assert tokenfusion.load(tmp_path).network.blocks[0].attn.attn_drop.p == 0.25


def test_dropout_that_no_argument_gives_is_told(tmp_path: Path) -> None:
    network = vit()
    network.blocks[1].attn.proj_drop.p = 0.25
    model = tokenfusion.fuse(network, ["rgb", "depth"])
    with pytest.warns(
        UserWarning, match=r"need network=: network\.blocks\..* is 0 here and 0\.25 in a network built anew"
    ):
        model.save_pretrained(tmp_path)


def test_saving_seeds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed() reaches every device."""
    model = tokenfusion.fuse(vit(), ["rgb", "depth"])

    def forbidden(seed: int) -> None:
        raise AssertionError("seeded")

    monkeypatch.setattr(torch, "manual_seed", forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, dim), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    """A network that nobody else knows, with one matrix under two names."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head, self.tied = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.tied(self.head(x)).mean(1)


def test_ones_own_network_is_given_when_loading(tmp_path: Path, shake) -> None:
    model = shake(tokenfusion.fuse(Own(), ["a", "b"], "tokenfusion", example=torch.zeros(2, 3, 16, 24)))
    with pytest.warns(UserWarning, match="needs network=|need network="):
        model.save_pretrained(tmp_path)
    names = load_file(tmp_path / sealed.MODEL)
    assert sum(name.endswith(("head.weight", "tied.weight")) for name in names) == 1, "a weight is there once"
    with pytest.raises(tokenfusion.UserError, match="Own cannot be built from its name .*give network="):
        tokenfusion.load(tmp_path)
    again = tokenfusion.load(tmp_path, network=Own())
    assert again.network.head.weight is again.network.tied.weight
    x = {name: torch.randn(2, 3, 16, 24) for name in ("a", "b")}
    assert torch.equal(again(x).ensemble, model.eval()(x).ensemble)
    with pytest.raises(tokenfusion.UserError, match="weights do not fit Own"):
        tokenfusion.load(tmp_path, network=Own(32))


class Reader(Own):
    """Takes numbers of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.tied(self.head(x)).mean(1)


@pytest.mark.filterwarnings("ignore:.*network=")
def test_a_network_of_words_is_read_again(tmp_path: Path, shake) -> None:
    x = {name: torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(1)) for name in ("a", "b")}
    model = shake(tokenfusion.fuse(Reader(), ["a", "b"], "average", example=x["a"])).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(tokenfusion.load(tmp_path, network=Reader())(x).ensemble, model(x).ensemble)
    assert "a (input [6])" in (tmp_path / sealed.CARD).read_text()


def test_a_network_that_was_changed_wants_the_like(tmp_path: Path) -> None:
    """Its name and its arguments do not tell of the other activation: what is built from them answers differently."""
    make = functools.partial(vit, act_layer=nn.ReLU)
    model = tokenfusion.fuse(make(), ["a", "b"]).eval()
    with pytest.warns(UserWarning, match="answers differently"):
        model.save_pretrained(tmp_path)
    x = images({"a": 3, "b": 3})
    assert torch.equal(tokenfusion.load(tmp_path, network=make())(x).ensemble, model(x).ensemble)


def test_a_fuser_without_a_name_is_refused(tmp_path: Path) -> None:
    model = tokenfusion.fuse(vit(), ["a", "b"], lambda dim, modalities, stage: TokenFusion(dim, modalities, stage))
    with pytest.raises(tokenfusion.UserError, match=r"TokenFusion\) was made by a function"):
        model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_the_backbone_of_a_task_is_saved_with_its_run(tmp_path: Path) -> None:
    with pytest.raises(tokenfusion.UserError, match="DenseBackbone is part of a task's model"):
        DenseBackbone(vit(), ["a", "b"], TokenFusion).save_pretrained(tmp_path)


class Foreign(Fuser):
    """A fuser that is no part of tokenfusion."""


def test_foreign_fusers_are_built_when_trusted(tmp_path: Path) -> None:
    tokenfusion.fuse(vit(), ["a", "b"], Foreign).save_pretrained(tmp_path)
    with pytest.raises(tokenfusion.UserError, match="is no part of a network of tokenfusion"):
        tokenfusion.load(tmp_path)
    assert isinstance(tokenfusion.load(tmp_path, trust=True).fusers[0], Foreign)


def test_damage_is_told(folder: Path) -> None:
    weights = folder / sealed.MODEL
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(tokenfusion.UserError, match=r"model.safetensors: damaged \(SHA-256") as error:
            tokenfusion.load(folder)
        assert "\n" not in str(error.value)
    sign(folder)  # the flipped bit is now what the manifest says
    tokenfusion.load(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    sign(folder)
    with pytest.raises(tokenfusion.UserError, match="model.safetensors: not readable"):
        tokenfusion.load(folder)
    weights.unlink()
    with pytest.raises(tokenfusion.UserError, match="model.safetensors: cannot be read"):
        tokenfusion.load(folder)


@pytest.mark.parametrize("content", [None, "", "one two\n", f"{'0' * 64}  other.bin\n", "ä"])
def test_a_damaged_manifest_is_told(folder: Path, content: str | None) -> None:
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)
    with pytest.raises(tokenfusion.UserError, match=r"MANIFEST.sha256: (missing or )?damaged"):
        tokenfusion.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format is 2, this version reads 1; upgrade"),
        ({"more": 1}, "unknown key 'more'"),
        ({"seed": "x"}, "seed"),
        ({"name": "hf-hub:somebody/something"}, "no such architecture"),
        ({"kind": "hf", "name": "pipeline"}, "no such network"),
        ({"arguments": {"pretrained": True}}, "not these arguments"),
        ({"arguments": {"num_classes": 7}}, "weights do not fit test_vit"),
        ({"fuser": {"_target_": "os.system"}}, "is no part of a network"),
        ({"fuser": {"_target_": "tokenfusion.fusion.TokenFusion", "theta": 1}}, "takes no such argument"),
        ({"modalities": ["rgb", "rgb"]}, "modalities must be different names"),
        ({"example": [2, 3, 0]}, "cannot be fused as config.json says"),
        ({"example": [2, 3, 2**40, 2**40]}, "cannot be fused as config.json says"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(folder: Path, changes: dict, message: str) -> None:
    change(folder, **changes)
    with pytest.raises(tokenfusion.UserError, match=message) as error:
        tokenfusion.load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_tells_no_kind_holds_one_shared_network(folder: Path) -> None:
    config = json.loads((folder / sealed.CONFIG).read_text())
    assert config.pop("kind") == "shared"
    (folder / sealed.CONFIG).write_text(json.dumps(config))
    sign(folder)
    assert isinstance(tokenfusion.load(folder), tokenfusion.FusedNetwork)


def test_weights_of_another_network_are_told(folder: Path) -> None:
    tensors = load_file(folder / sealed.MODEL)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / sealed.MODEL)
    sign(folder)
    with pytest.raises(tokenfusion.UserError, match="weights do not fit test_vit: Missing key"):
        tokenfusion.load(folder)


def test_what_cannot_be_written_leaves_what_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tokenfusion.load(folder)
    nn.init.zeros_(model.ensemble.alpha)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "flush", full)
    with pytest.raises(tokenfusion.UserError, match="cannot be written .No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder.parent / "file").write_text("")
    with pytest.raises(tokenfusion.UserError, match="cannot be written"):
        model.save_pretrained(folder.parent / "file")


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_new", [False, True])
def test_saving_that_is_cut_off_leaves_the_old_or_the_new(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException, is_new: bool
) -> None:
    """At every rename, the last of them included; KeyboardInterrupt stands for a kill: nothing is tidied up."""
    model, target = tokenfusion.load(folder), tmp_path / "other" if is_new else folder
    nn.init.constant_(model.ensemble.alpha, 0.25)
    old = load_file(folder / sealed.MODEL)["ensemble.alpha"]
    cut_off_renaming(monkeypatch, failing, error)
    cut_off = failing < (4 if is_new else 3)  # a card that is there stays
    with pytest.raises((tokenfusion.UserError, KeyboardInterrupt)) if cut_off else contextlib.nullcontext():
        model.save_pretrained(target)
    monkeypatch.undo()
    if is_new and not failing:
        with pytest.raises(tokenfusion.UserError, match="not a run folder|MANIFEST.sha256: missing"):
            tokenfusion.load(target)
    else:
        alpha = tokenfusion.load(target).ensemble.alpha
        assert torch.equal(alpha, model.ensemble.alpha if failing else old)
    nn.init.constant_(model.ensemble.alpha, 0.75)
    model.save_pretrained(target)
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, sealed.CARD, sealed.CONFIG, sealed.MODEL]
    assert torch.equal(tokenfusion.load(target).ensemble.alpha, model.ensemble.alpha)


def test_a_save_that_was_cut_off_is_finished_before_the_next_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one fails too, before its own manifest: what the first wrote is not lost."""
    model = tokenfusion.load(folder)
    nn.init.constant_(model.ensemble.alpha, 0.25)
    os.replace(folder / sealed.MODEL, folder / f".{sealed.MODEL}.partial")  # as if it were new and not renamed yet
    monkeypatch.setattr(sealed, "save_file", lambda *args, **kwargs: (folder / f".{sealed.MODEL}.partial").open("x"))
    monkeypatch.setattr(sealed, "file_sha256", lambda path: _cut_off(path, folder))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert not torch.equal(tokenfusion.load(folder).ensemble.alpha, model.ensemble.alpha)


def _cut_off(path: Path, folder: Path) -> str:
    """A checksum, until there is the partial file of a new configuration."""
    if (folder / f".{sealed.CONFIG}.partial").exists():
        raise KeyboardInterrupt
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_neither_a_run_nor_a_fused_network(tmp_path: Path) -> None:
    with pytest.raises(tokenfusion.UserError, match="not a run folder"):
        tokenfusion.load(tmp_path)
    with pytest.raises(tokenfusion.UserError, match="no such folder"):
        tokenfusion.FusedNetwork.from_pretrained(tmp_path / "nowhere")
