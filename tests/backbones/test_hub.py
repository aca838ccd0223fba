"""Foreign networks fused as they are: what the adapter promises on one small ViT."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from every_fuser import SPECS
from torch import Tensor, nn

import tokenfusion
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.survey import is_norm
from tokenfusion.fusion import TokenFusion
from tokenfusion.fusion.modality import make_private

THETA = functools.partial(TokenFusion, threshold=0.5)


def vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=48, **changes).eval()


def images(*names: str, channels: int = 3, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, channels, 48, 48, generator=generator) for name in names}


def test_unfused_it_is_the_network_on_the_stacked_batch_bit_for_bit() -> None:
    network, x = vit(), images("rgb", "depth")
    expected = copy.deepcopy(network)(torch.cat([x["rgb"], x["depth"]]))
    model = tokenfusion.fuse(network, ["rgb", "depth"], "none").eval()
    assert model.network is network, "the model given is the model used"
    out = model(x).outputs
    assert torch.equal(torch.cat([out["rgb"], out["depth"]]), expected)


def test_streams_exchange_and_prefix_tokens_stay() -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    x = images("rgb", "depth")
    out = model(x)
    assert len(out.scores) == 6
    assert out.scores[0].shape == (2, 2, 9)
    other = model({**x, "depth": 2 * x["depth"]})
    assert (out.outputs["rgb"] - other.outputs["rgb"]).abs().max() > 1e-5


def test_channels_of_ones_own() -> None:
    model = tokenfusion.fuse(vit(), {"rgb": 3, "depth": 1, "ms": 13}, "none").eval()
    assert len(model.account) == 2
    x = {**images("rgb"), **images("depth", channels=1), **images("ms", channels=13)}
    grey = x["depth"].expand(-1, 3, -1, -1)
    torch.testing.assert_close(model(x).outputs["depth"], vit()(grey), rtol=1e-4, atol=1e-5)


def test_a_missing_modality_is_left_out() -> None:
    model: FusedNetwork = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    x = images("rgb", "depth")
    out = model({"rgb": x["rgb"]})
    assert list(out.outputs) == ["rgb"]
    broken = {"rgb": x["rgb"], "depth": torch.full_like(x["depth"], float("nan"))}
    same = model(broken, torch.tensor([[True, True], [False, False]]))
    torch.testing.assert_close(same.ensemble, out.ensemble)


class Batched(nn.Module):
    """A block with batch norms, as LeViT has them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
        self.attn, self.mlp = block.attn, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        return x + self.mlp(self.norm2(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_is_missing_is_not_among_the_statistics_of_a_batch(recomputes: bool) -> None:
    network = vit()
    network.blocks = nn.Sequential(*map(Batched, network.blocks))
    model = tokenfusion.fuse(network, ["rgb", "depth"], "none").train()
    if recomputes:
        model.set_grad_checkpointing()
    x = images("rgb", "depth", batch=3)
    some = {name: copy.deepcopy(model)({n: z[:2] for n, z in x.items()}).outputs[name] for name in x}
    lacking = model(x, torch.tensor([[True, True, True], [True, True, False]]))
    torch.testing.assert_close(lacking.outputs["depth"][:2], some["depth"])
    lacking.ensemble.square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    model({"rgb": x["rgb"]}).ensemble.square().sum().backward()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"0"}, "rgb's statistics alone"
    assert torch.isfinite(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])).all()


def test_convolutions_are_told() -> None:
    with pytest.raises(tokenfusion.UserError, match="no transformer blocks"):
        tokenfusion.fuse(timm.create_model("test_resnet"), ["rgb", "depth"])


def test_adapted_stems_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenfusion.fuse(vit(), {"rgb": 3, "depth": 1}, "none")
    assert "depth: 1 channel; patch_embed.proj starts from the weights of 3 channels" in caplog.text


@pytest.mark.parametrize("options", [{"fuser": "concat"}, {"fuser": THETA, "blocks": [12]}])
def test_a_network_that_cannot_be_fused_stays_as_it_is(options: dict) -> None:
    network = timm.create_model("test_vit_relpos", num_classes=5, img_size=48).eval()
    names, x = list(network.state_dict()), images("rgb")["rgb"]
    expected = network(x)
    with pytest.raises(tokenfusion.UserError, match=r"block|blocks"):
        tokenfusion.fuse(network, {"rgb": 3, "depth": 1}, **options)
    assert list(network.state_dict()) == names
    assert torch.equal(network(x), expected)


# What a network may come with


class Block(nn.Module):
    """Called by keyword, and asked for what kind it is."""

    kind = "mine"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = timm.layers.Attention(dim, num_heads=4)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def attend(self, hidden: Tensor, scale: float) -> Tensor:
        hidden = hidden + scale * self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class ByPosition(Block):
    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return self.attend(hidden, scale)


class KeywordOnly(Block):
    def forward(self, *, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return self.attend(hidden, scale)


class Mine(nn.Module):
    def __init__(self, block: type[Block] = ByPosition, answer: str = "tensor", dim: int = 32) -> None:
        super().__init__()
        self.stem, self.answer = nn.Conv2d(3, dim, 16, 16), answer
        self.blocks = nn.ModuleList([block(dim) for _ in range(2)])
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> object:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            assert block.kind == "mine"
            x = block(scale=0.5, hidden=x)
        x = self.head(x.mean(1))
        answers = {"tensor": x, "beside": (x.sum(), x), "dict": {"loss": x.sum(), "out": x}, "text": {"label": "cat"}}
        return answers[self.answer]


EXAMPLE = torch.zeros(2, 3, 48, 48)


@pytest.mark.parametrize("block", [ByPosition, KeywordOnly])
def test_blocks_called_by_keyword(block: type[Block]) -> None:
    network, x = Mine(block).eval(), images("rgb", "depth")
    expected = network(torch.cat(list(x.values())))
    plain = tokenfusion.fuse(copy.deepcopy(network), ["rgb", "depth"], "none", example=EXAMPLE).eval()
    assert torch.equal(torch.cat(list(plain(x).outputs.values())), expected)
    model = tokenfusion.fuse(network, ["rgb", "depth"], THETA, example=EXAMPLE).eval()
    out = model(x).ensemble
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x).ensemble, out)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).ensemble, out)


@pytest.mark.parametrize("answer", ["beside", "dict"])
def test_an_answer_with_more_than_one_tensor_per_sample(answer: str) -> None:
    model = tokenfusion.fuse(Mine(answer=answer), ["rgb", "depth"], example=EXAMPLE).eval()
    out = model(images("rgb", "depth"))
    loss, own = out.outputs["rgb"].values() if answer == "dict" else out.outputs["rgb"]
    assert (loss.shape, own.shape, out.ensemble.shape) == ((), (2, 5), (2, 5))


def test_an_answer_without_a_tensor_is_told_when_fusing() -> None:
    with pytest.raises(tokenfusion.UserError, match="no tensor to average"):
        tokenfusion.fuse(Mine(answer="text"), ["rgb", "depth"], example=EXAMPLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fuser", SPECS.values(), ids=SPECS)
def test_a_network_of_another_precision(dtype: torch.dtype, fuser: object) -> None:
    model = tokenfusion.fuse(vit().to(dtype), {"rgb": 3, "depth": 1}, fuser).train()
    x = {**images("rgb"), **images("depth", channels=1)}
    out = model({name: own.to(dtype) for name, own in x.items()})
    assert out.ensemble.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    (sum(y.sum() for y in out.outputs.values()) + model.sparsity()).backward()


def test_ones_own_network_in_double_precision() -> None:
    model = tokenfusion.fuse(Mine().double(), ["rgb", "depth"], example=EXAMPLE.double()).eval()
    assert model({name: x.double() for name, x in images("rgb", "depth").items()}).ensemble.dtype == torch.float64


def test_norms_with_an_activation_are_private() -> None:
    norm = timm.layers.BatchNormAct2d(8)
    assert is_norm(norm)
    assert is_norm(timm.layers.LayerNormAct2d(8))
    assert not is_norm(timm.layers.NormMlpClassifierHead(8, 4))
    model = make_private(nn.Sequential(nn.Conv2d(3, 8, 3), norm), 2, is_norm).train()
    model(torch.cat([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)]))
    first, second = model[1]
    assert not torch.equal(first.running_mean, second.running_mean)


# Recomputing


def test_checkpointing_that_is_on_becomes_ours() -> None:
    network = vit()
    network.set_grad_checkpointing(True)
    model = tokenfusion.fuse(network, ["rgb", "depth"], THETA).train()
    assert model.recomputes
    assert not network.grad_checkpointing
    assert "recomputed" in model.account[0]
    model(images("rgb", "depth")).outputs["rgb"].sum().backward()
    network.set_grad_checkpointing(True)
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(tokenfusion.UserError, match="own gradient checkpointing"):
            again.train()(images("rgb", "depth"))
        again.eval()(images("rgb", "depth"))


def test_checkpointing_of_hugging_face_becomes_ours() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=48, patch_size=16, num_labels=4)
    network = transformers.ViTForImageClassification(config)
    network.gradient_checkpointing_enable()
    model = tokenfusion.fuse(network, ["rgb", "depth"], THETA).train()
    assert model.recomputes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    model(images("rgb", "depth"))
    network.gradient_checkpointing_enable()
    with pytest.raises(tokenfusion.UserError, match="own gradient checkpointing"):
        model(images("rgb", "depth"))


# Who is there


def test_a_sample_without_any_modality_has_finite_answers() -> None:
    present = torch.tensor([[False, True], [False, True]])
    for fuser in SPECS.values():
        model = tokenfusion.fuse(vit(), ["rgb", "depth"], fuser).train()
        out = model(images("rgb", "depth"), present)
        assert out.ensemble[0].abs().max() == 0
        (out.ensemble.sum() + sum(y.sum() for y in out.outputs.values())).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        whole = model.eval()(images("rgb", "depth")).ensemble
        torch.testing.assert_close(model(images("rgb", "depth"), present).ensemble[1], whole[1])


def test_scores_of_training_are_forgotten_in_evaluation() -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).train()
    model(images("rgb", "depth"))
    assert model.sparsity() > 0
    model.eval()(images("rgb", "depth"))
    with pytest.raises(RuntimeError, match="training"):
        model.sparsity()


def test_threads_do_not_meet() -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    inputs = [images("rgb", "depth", batch=n) for n in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [model(x).ensemble for x in inputs]
    with torch.no_grad(), concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for own, found in zip(expected, pool.map(_without_gradients(model), inputs), strict=True):
                torch.testing.assert_close(found, own)


def _without_gradients(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def run(x: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(x).ensemble

    return run


def test_a_forward_pass_inside_another_leaves_it_running() -> None:
    model = tokenfusion.fuse(vit(), ["rgb", "depth"], THETA).eval()
    x = images("rgb", "depth")
    expected, inner = model(x), []

    def again(*_: object) -> None:
        handle.remove()
        inner.append(model(x))

    handle = model.network.patch_embed.register_forward_hook(again)
    out = model(x)
    assert torch.equal(out.ensemble, expected.ensemble)
    assert len(out.scores) == len(inner[0].scores) == 6


# Mistakes


@pytest.mark.parametrize(
    ("modalities", "options", "match"),
    [
        ("rgb", {}, "modalities must be"),
        ([1, 2], {}, "modalities must be"),
        ({"rgb": 3, "depth": None}, {}, "channels"),
        (["a", "b"], {"blocks": "0"}, "blocks: wanted"),
        (["a", "b"], {"blocks": 5}, "blocks: wanted"),
        (["a", "b"], {"blocks": [1.5]}, "blocks: wanted"),
        (["a", "b"], {"fuser": 3}, "fuser: wanted"),
        (["a", "b"], {"fuser": nn.Linear}, "fuser: wanted"),
        (["a", "b"], {"fuser": lambda dim, modalities, stage: None}, "fuser: wanted"),
        (["a", "b"], {"fuser": lambda dim: TokenFusion(dim, 2)}, "fuser: wanted"),
    ],
)
def test_mistakes_are_told_in_one_line(modalities: object, options: dict, match: str) -> None:
    with pytest.raises(tokenfusion.UserError, match=match) as caught:
        tokenfusion.fuse(vit(), modalities, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["vit_small", None, nn.Linear, {"a": "vit"}])
def test_what_is_no_network_is_told(network: object) -> None:
    with pytest.raises(tokenfusion.UserError, match="wants a network that is made"):
        tokenfusion.fuse(network, None if isinstance(network, dict) else ["a", "b"])


def test_an_exchange_of_the_other_kind_is_told() -> None:
    crossing = {"_target_": "tokenfusion.fusion.crossing.TokenExchange"}
    with pytest.raises(
        tokenfusion.UserError, match="TokenExchange is of the other kind; one shared network takes none, concat"
    ):
        tokenfusion.fuse(vit(), ["a", "b"], crossing)
    with pytest.raises(
        tokenfusion.UserError, match="TokenFusion is of the other kind; separate networks take none, concat"
    ):
        tokenfusion.fuse({"a": vit(), "b": vit()}, fuser={"_target_": "tokenfusion.fusion.TokenFusion"})


def test_a_network_that_sees_no_images_is_told() -> None:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(tokenfusion.UserError, match=r"BertModel does not run on an example of .* give example="):
        tokenfusion.fuse(transformers.BertModel(config), ["a", "b"])


def test_a_fused_network_is_set_to_another_size() -> None:
    sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    network = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, **sizes)
    model = tokenfusion.fuse(network, ["a", "b"], THETA).eval()
    model.network.set_input_size(img_size=(96, 64))
    out = model({name: torch.randn(1, 3, 96, 64) for name in ("a", "b")})
    assert [tuple(scores.shape) for scores in out.scores] == [(2, 1, 24 * 16), (2, 1, 12 * 8)]


def test_wrong_inputs_are_told() -> None:
    model = tokenfusion.fuse(vit(), ["a", "b"], THETA).eval()
    x = images("a", "b")
    with pytest.raises(ValueError, match="b must be a tensor"):
        model({"a": x["a"], "b": None})
    with pytest.raises(ValueError, match="wanted inputs by name, .* got Tensor"):
        model(x["a"])
    with pytest.raises(ValueError, match=r'takes 3 channels; for others: fuse\(network, \{"a": 1, "b": 1\}\)'):
        model({name: image[:, :1] for name, image in x.items()})
    told = r'b is \[2, 1, 48, 48\], the network takes 3 channels; for others: fuse\(network, \{"a": 3, "b": 1\}\)'
    for given in ({**x, "b": x["b"][:, :1]}, {"b": x["b"][:, :1]}):
        with pytest.raises(ValueError, match=told):
            model(given)
    with pytest.raises(ValueError, match=r"b must be \[2, 3, 48, 48\], as the modalities are aligned"):
        model({**x, "b": x["b"][..., :32]})
    for present in ([[True, True], [True, False]], {"a": True}):
        with pytest.raises(ValueError, match="present must be bool"):
            model(x, present)


def test_dropped_patches_are_told() -> None:
    with pytest.raises(tokenfusion.UserError, match="patch_drop_rate=0"):
        tokenfusion.fuse(vit(patch_drop_rate=0.5), ["rgb", "depth"])


def test_the_seed_reaches_what_makes_fusers() -> None:
    for fuser, seed in (
        (TokenFusion, 7),
        (THETA, 7),
        (functools.partial(TokenFusion, seed=5), 5),
        (lambda dim, modalities, stage, seed: TokenFusion(dim, modalities, stage, seed), 7),
    ):
        model = tokenfusion.fuse(vit(), ["a", "b", "c"], fuser, seed=7)
        assert {own.seed for own in model.fusers} == {seed}
        assert model.recipe["fuser"] is None or model.recipe["seed"] == seed


def test_alignment_without_positions_is_told() -> None:
    model = tokenfusion.fuse(Mine(), ["rgb", "depth"], example=EXAMPLE, alignment=True)
    assert "alignment changes nothing" in model.account[0]
