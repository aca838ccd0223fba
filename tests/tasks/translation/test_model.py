"""Generator and discriminator against the published reference implementation, number by number; and what every fuser keeps."""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
from golden_rules import Case
from torch import Tensor, nn

from tokenfusion.backbones import mirror
from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.keys import from_released_discriminator, from_released_translation
from tokenfusion.backbones.mirror import MirroredMiT, generator
from tokenfusion.backbones.mit import MiT
from tokenfusion.errors import UserError
from tokenfusion.fusion import Average, Concat, NoFusion, Random, TokenFusion, sparsity_loss
from tokenfusion.tasks.translation.losses import masked_l1, patch_bce
from tokenfusion.tasks.translation.model import Discriminator, FusedTranslator, discriminator

NAMES = ("input0", "input1")
FUSERS = {
    "none": NoFusion,
    "released": partial(TokenFusion, threshold=0.5),
    "paper": partial(TokenFusion, rule="paper", threshold=0.5),
    "everything": partial(TokenFusion, threshold=1.0),
    "concat": Concat,
    "average": Average,
    "random": partial(Random, rate=0.4),
}
SCORING = {"released", "paper", "everything"}


class Golden(NamedTuple):
    """Both cases with their networks, inputs and target."""

    made: Case
    judged: Case
    model: FusedTranslator
    critic: Discriminator
    inputs: dict[str, Tensor]
    target: Tensor

    def double(self) -> Golden:
        inputs = {name: x.double() for name, x in self.inputs.items()}
        return self._replace(
            model=self.model.double(), critic=self.critic.double(), inputs=inputs, target=self.target.double()
        )


def golden() -> Golden:
    made, judged = Case("i2i_gen_b0"), Case("i2i_dis_b0")
    model = FusedTranslator(FusedBackbone(generator("b0"), NAMES, TokenFusion, placement="last")).eval()
    model.load_state_dict(from_released_translation(made.state_dict()), strict=True)
    critic = discriminator(mirror.discriminator("b0"), NAMES).eval()
    critic.load_state_dict(from_released_discriminator(judged.state_dict()), strict=True)
    return Golden(made, judged, model, critic, {name: made.input(name) for name in NAMES}, made.input("target"))


def generator_values(case: Golden) -> dict[str, Tensor]:
    """Every output of the generator's case, under its name there."""
    output = case.model(case.inputs)
    images = torch.stack(list(output.images.values()))
    values = {f"out_{m}": images[m] for m in range(2)} | {"out_ens": output.ensemble}
    values["alpha_soft"] = case.model.ensemble.alpha.softmax(0)
    values["loss_g_adv"] = patch_bce(case.critic(case.inputs, output.images), True).sum()
    values["loss_g_l1"] = (
        masked_l1(images, case.target, None).sum() + masked_l1(output.ensemble[None], case.target, None)[0]
    )
    values["loss_g_scores"] = sparsity_loss(output.scores, "sum")
    values["loss_g"] = values["loss_g_adv"] + 100 * values["loss_g_l1"] + 1e-3 * values["loss_g_scores"]
    for stage, scores in enumerate(output.scores):
        values |= {f"mask{stage}_{m}": scores[m].flatten() for m in range(2)}
    return values


def discriminator_values(case: Golden) -> dict[str, Tensor]:
    with torch.no_grad():
        images = case.model(case.inputs).images
    real, fake = case.critic(case.inputs, dict.fromkeys(NAMES, case.target)), case.critic(case.inputs, images)
    values = {f"real_{m}": real[m].sigmoid() for m in range(2)} | {f"fake_{m}": fake[m].sigmoid() for m in range(2)}
    values["loss_d"] = ((patch_bce(real, True) + patch_bce(fake, False)) / 2).sum()
    return values


def test_the_generator_in_float32() -> None:
    case = golden()
    values = generator_values(case)
    assert values.keys() == case.made.outputs.keys()
    for name, value in values.items():
        largest = abs(case.made.outputs[name]).max().item()
        atol = 3e-5 if name.startswith("mask") else 1e-5 * largest if name.startswith("loss") else 1e-4
        case.made.assert_close(name, value, atol)
    for stage, m in itertools.product(range(5), range(2)):
        share = (values[f"mask{stage}_{m}"] < 0.02).float().mean().item()
        assert share == pytest.approx(case.made.case["score_below_0_02"][f"mask{stage}_{m}"], abs=1e-4)


def test_the_discriminator_in_float32() -> None:
    case = golden()
    values = discriminator_values(case)
    assert values.keys() == case.judged.outputs.keys()
    for name, value in values.items():
        case.judged.assert_close(name, value, 1e-5)


def test_both_in_float64() -> None:
    """Sees what float32 hides, such as an epsilon of 1e-5 in place of 1e-6."""
    case = golden().double()
    for golden_case, values in ((case.made, generator_values(case)), (case.judged, discriminator_values(case))):
        assert values.keys() == golden_case.case["float64_run"].keys()
        for name, value in values.items():
            golden_case.assert_float64(name, value, rtol=1e-9)


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_gradients_of_every_parameter(which: str) -> None:
    case = golden()
    made = which == "generator"
    network, golden_case = (case.model, case.made) if made else (case.critic, case.judged)
    (generator_values(case)["loss_g"] if made else discriminator_values(case)["loss_d"]).backward()
    rename = from_released_translation if made else from_released_discriminator
    ours = {key: next(iter(rename({key: torch.zeros(1)})), None) for key in golden_case.state_dict()}
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    assert set(norms) == {name for name in ours.values() if name is not None}
    golden_case.assert_gradients({key: norms[name] for key, name in ours.items() if name in norms}, rtol=2e-3)


def test_only_the_norms_that_upsampling_never_applies_are_left_out() -> None:
    official = Case("i2i_gen_b0").state_dict()
    left_out = [key for key in official if not from_released_translation({key: official[key]})]
    assert len(left_out) == 5 * 2 * 2  # five enlargements, two modalities, weight and bias
    assert all(key.startswith("patch_embed_dec.") and ".norm.lrnorm_" in key for key in left_out)
    with pytest.raises(UserError, match="'decoder.weight' is not part of the released translation layout"):
        from_released_translation({"decoder.weight": torch.zeros(1)})


# ---- every fuser, number of modalities, placement ------------------------------------------------------------------


def small(fuser: str, modalities: int, shake, placement: str = "every", score_nets: str = "block", **options):
    names = [f"m{i}" for i in range(modalities)]
    network = MirroredMiT((16, 16, 16, 32, 32), (1, 2, 1, 1, 1))
    backbone = FusedBackbone(network, names, FUSERS[fuser], score_nets, placement, **options)
    x = {
        name: torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(i)).tanh()
        for i, name in enumerate(names)
    }
    return shake(FusedTranslator(backbone)).eval(), x


@pytest.mark.parametrize(
    ("fuser", "modalities", "placement"), list(itertools.product(sorted(FUSERS), (1, 2, 3, 4), ("every", "last")))
)
def test_contract(shake, fuser: str, modalities: int, placement: str) -> None:
    model, x = small(fuser, modalities, shake, placement)
    output = model(x)
    assert list(output.images) == list(x)
    for image in (*output.images.values(), output.ensemble):
        assert image.shape == (2, 3, 32, 64)
        assert image.abs().max() <= 1
    encoder = [("enc1.0", 512), ("enc2.0", 128), ("enc2.1", 128), ("enc3.0", 32), ("enc4.0", 8), ("enc5.0", 2)]
    decoder = [("dec1.0", 8), ("dec2.0", 32), ("dec3.0", 128), ("dec3.1", 128), ("dec4.0", 512)]
    blocks = [*encoder, *decoder] if placement == "every" else [b for b in encoder if b[0] != "enc2.0"]
    blocks = blocks if fuser in SCORING else []
    assert model.backbone.block_names() == [name for name, _ in blocks]
    assert [tuple(s.shape) for s in output.scores] == [(modalities, 2, tokens) for _, tokens in blocks]

    single = model({name: image[1:] for name, image in x.items()})  # a sample does not know its neighbours
    torch.testing.assert_close(single.ensemble, output.ensemble[1:], rtol=1e-4, atol=1e-4)

    loss = sum((image * torch.randn_like(image)).sum() for image in (*output.images.values(), output.ensemble))
    (loss + sparsity_loss(output.scores, "mean")).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without == ({"ensemble.alpha"} if modalities == 1 else set())


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (40, 70), (1, 5)])
def test_any_size_is_padded_and_cropped_back(shake, size: tuple[int, int]) -> None:
    model, _ = small("released", 2, shake)
    x = {name: torch.randn(1, 3, *size).tanh() for name in model.modalities}
    output = model(x)
    assert output.ensemble.shape == (1, 3, *size)
    whole = [-(-n // 32) * 32 for n in size]
    grow = nn.ReplicationPad2d((0, whole[1] - size[1], 0, whole[0] - size[0]))
    padded = {name: grow(image) for name, image in x.items()}
    torch.testing.assert_close(output.ensemble, model(padded).ensemble[..., : size[0], : size[1]], rtol=0, atol=0)
    maps = model.backbone.score_maps(output.scores, size)
    assert maps["enc1.0"].shape == (2, 1, -(-size[0] // 2), -(-size[1] // 2))
    assert maps["dec1.0"].shape == (2, 1, -(-size[0] // 16), -(-size[1] // 16))
    whole_maps = model.backbone.score_maps(output.scores, whole)
    for name, value in maps.items():
        assert torch.equal(value, whole_maps[name][..., : value.shape[2], : value.shape[3]])


def test_without_fusion_every_stream_is_the_plain_network(shake) -> None:
    single = shake(MirroredMiT((16, 16, 16, 32, 32), (1, 1, 1, 1, 1))).eval()
    x = torch.randn(1, 3, 32, 32).tanh()
    expected = single(x)[-1]
    fused = FusedBackbone(single, ["a", "b"], NoFusion).eval()
    features = fused({"a": x, "b": -x})
    torch.testing.assert_close(features.maps[-1][0], expected, rtol=1e-5, atol=1e-5)


def test_a_missing_modality_is_filled_in(shake) -> None:
    model, x = small("released", 3, shake)
    output = model({"m0": x["m0"], "m2": x["m2"]})
    assert list(output.images) == ["m0", "m2"]
    weights = model.ensemble.alpha[[0, 2]].softmax(0)
    expected = weights[0] * output.images["m0"] + weights[1] * output.images["m2"]
    torch.testing.assert_close(output.ensemble, expected)
    broken = dict(x, m1=torch.full_like(x["m1"], float("nan")))
    present = torch.tensor([[True, True], [False, False], [True, True]])
    torch.testing.assert_close(model(broken, present).ensemble, output.ensemble)


def test_streams_exchange_in_the_decoder_too(shake) -> None:
    """With everything exchanged in every block, one stream's input reaches the other's image; with none it does not."""
    for fuser, reaches in (("everything", True), ("none", False)):
        model, x = small(fuser, 2, shake)
        before = model(x).images["m1"]
        after = model(dict(x, m0=-x["m0"])).images["m1"]
        assert (not torch.equal(before, after)) == reaches
    names = small("everything", 2, shake)[0].backbone.block_names()
    assert sum(name.startswith("dec") for name in names) == 5


# ---- the discriminator ---------------------------------------------------------------------------------------------


def critic(shake, modalities: tuple[str, ...] = ("a", "b")) -> Discriminator:
    network = MiT((16, 16, 16, 32, 32), (1,) * 5, 6, 0.1, mirror.LAYOUT, "dis")
    return shake(discriminator(network, modalities)).eval()


def test_one_judgement_per_patch_and_branch(shake) -> None:
    network = critic(shake)
    x, y = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 64, 96)
    assert network({"a": x, "b": y}, {"a": y, "b": x}).shape == (2, 2, 1, 2, 3)
    assert network({"a": x[..., :33], "b": y[..., :33]}, {"a": y[..., :33], "b": x[..., :33]}).shape == (2, 2, 1, 2, 2)


def test_branches_are_judged_apart(shake) -> None:
    network = critic(shake)
    x, y, z = (torch.randn(1, 3, 32, 32) for _ in range(3))
    first, second = network({"a": x, "b": y}, {"a": z, "b": z}), network({"a": x, "b": -y}, {"a": z, "b": z})
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    swapped = network({"a": y, "b": x}, {"a": z, "b": z})
    assert not torch.allclose(swapped[1], first[0]), "the norms are private"


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(mirror.DEPTHS))
def test_layouts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)  # the numbers themselves take seconds
    monkeypatch.setattr("tokenfusion.backbones.mit.initialise", lambda module: None)
    network = generator(variant)
    depths, widths = mirror.DEPTHS[variant], mirror.WIDTHS.get(variant, mirror.WIDE)
    assert [len(stage.blocks) for stage in network.parts()] == [*depths, *depths[-2::-1]]
    assert network.dims == [*widths, *widths[-2::-1]]
    assert [stage.stride for stage in network.parts()] == [2, 4, 8, 16, 32, 16, 8, 4, 2]
    rates = [block.drop.p for stage in network.parts()[:5] for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / (len(rates) - 1) for i in range(len(rates))])
    mirrored = [block.drop.p for stage in network.parts()[5:] for block in stage.blocks]
    assert mirrored == rates[: len(mirrored)]
    judge = mirror.discriminator(variant)
    assert [len(stage.blocks) for stage in judge.parts()] == list(depths)
    assert judge.parts()[0].embed.proj.in_channels == 6


def test_the_papers_sizes() -> None:
    """Ti has 10 layers, S has 20, "only different in layer numbers"; widths 32 to 512, heads 1 to 16."""
    assert (sum(mirror.DEPTHS["ti"]), sum(mirror.DEPTHS["s"])) == (10, 20)
    for variant in ("ti", "s"):
        assert mirror.WIDTHS[variant] == (32, 64, 128, 256, 512)
    assert mirror.LAYOUT.heads == (1, 2, 4, 8, 16)
    with pytest.raises(ValueError, match="must be one of xs, ti, s, b0"):
        generator("b9")
