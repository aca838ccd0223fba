"""The two phases: what each trains, what each sees, and that holes in the target are no sign of anything."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.translation import Batch, TranslationTask, build_discriminator, build_model
from tokenfusion.tasks.translation.task import load_pretrained
from tokenfusion.train import Engine, Optimizers, train_step

NARROW = "widths: [16, 16, 16, 16, 16], depths: [1, 1, 1, 1, 1]"
NANO = [f"model.generator={{_target_: tokenfusion.backbones.mirror.MirroredMiT, {NARROW}}}", "train.batch_size=2"]


def task(*overrides: str) -> TranslationTask:
    recipe = read_recipe("toy-translation", [*NANO, *overrides])
    return TranslationTask(build_model(recipe), build_discriminator(recipe), recipe).train()


def batch(
    names: tuple[str, ...] = ("shade", "edge_texture"), valid: torch.Tensor | None = None, size: int = 32
) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(2, 3, size, size, generator=generator).tanh() for _ in (*names, "target")]
    return Batch(["a", "b"], dict(zip(names, images[:-1], strict=True)), images[-1], valid)


def test_terms_are_those_of_the_specification() -> None:
    model, sample = task(), batch()
    output = model(sample)
    assert list(model.losses(sample, output, "discriminator")) == ["shade", "edge_texture"]
    assert list(model.losses(sample, output, "generator")) == [
        "adversarial",
        "l1/shade",
        "l1/edge_texture",
        "l1/ensemble",
        "sparsity",
    ]
    weighed = task("loss.l1=7", "loss.adversarial=0", "loss.sparsity=0")
    weighed.load_state_dict(model.state_dict())
    plain, other = model.losses(sample, output, "generator"), weighed.losses(sample, output, "generator")
    assert other["adversarial"] == 0
    assert "sparsity" not in other
    torch.testing.assert_close(other["l1/ensemble"], plain["l1/ensemble"] * 0.07)


def test_the_discriminators_phase_does_not_reach_the_generator() -> None:
    model, sample = task(), batch()
    sum(model.losses(sample, model(sample), "discriminator").values()).backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert all(p.grad is not None for p in model.discriminator.parameters())


def test_truth_and_images_in_one_pass_are_two_passes() -> None:
    model, sample = task().eval(), batch()
    output = model(sample)
    losses = model.losses(sample, output, "discriminator")
    from tokenfusion.tasks.translation.losses import patch_bce

    real = model.discriminator(sample.inputs, dict.fromkeys(sample.inputs, sample.target))
    made = model.discriminator(sample.inputs, output.images)
    expected = (patch_bce(real, True) + patch_bce(made, False)) / 2
    torch.testing.assert_close(torch.stack(list(losses.values())), expected)


def test_a_step_moves_both_networks_and_runs_the_generator_once() -> None:
    model, sample = task(), batch(size=64)  # the last stage attends: it has several tokens
    optimizers, engine = Optimizers(model, model.recipe.train), Engine(1, "32", "cpu")
    optimizers.begin(30)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append("generator"))
    model.discriminator.register_forward_hook(lambda *_: calls.append("discriminator"))
    train_step(model, engine, optimizers, [sample], None, False)
    assert calls == ["generator", "discriminator", "discriminator"]
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved
    assert all(p.requires_grad for p in model.parameters())


def test_every_parameter_belongs_to_one_phase() -> None:
    model = task()
    groups = {phase: [p for g in model.parameter_groups(phase) for p in g.params] for phase in model.phases}
    assert {id(p) for p in groups["generator"]} == {id(p) for p in model.model.parameters()}
    assert {id(p) for p in groups["discriminator"]} == {id(p) for p in model.discriminator.parameters()}


def test_holes_in_the_target_teach_nothing() -> None:
    """Neither the losses nor the gradients depend on what stands where the target was not measured."""
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[:, :, 5:20, 8:30] = False
    model, sample = task().eval(), batch(valid=valid)
    output = model(sample)
    images = {name: torch.where(valid, x, 0.9) for name, x in output.images.items()}
    changed = output._replace(images=images, ensemble=torch.where(valid, output.ensemble, -0.3))
    for phase in model.phases:
        plain, other = model.losses(sample, output, phase), model.losses(sample, changed, phase)
        for name in plain:
            torch.testing.assert_close(plain[name], other[name], msg=f"{phase} {name}")


def test_samples_without_a_modality() -> None:
    model, sample = task("data.drop_modality=0.9"), batch()
    torch.manual_seed(0)
    output = model(sample)
    assert output.present is not None
    assert output.present.any(0).all(), "one at least"
    for phase in model.phases:
        assert all(value.isfinite() for value in model.losses(sample, output, phase).values())
    assert model.eval()(sample).present is None


def test_the_monitor_is_what_ranks() -> None:
    assert task("evaluation.features=pixels").monitor == "ensemble/fid"
    model = task()
    assert model.monitor == "ensemble/mae"
    assert not model.higher_is_better


@pytest.mark.parametrize("modalities", [("normal",), ("shade", "normal", "depth", "edge_texture")])
def test_one_to_four_modalities(modalities: tuple[str, ...]) -> None:
    model = task(f"data.modalities=[{', '.join(modalities)}]")
    sample = batch(modalities)
    output = model(sample)
    assert list(model.losses(sample, output, "discriminator")) == list(modalities)
    watched = model.watch(output)
    assert {name.split("/")[2] for name in watched} == set(modalities)
    total = sum(model.losses(sample, output, "generator").values())
    assert total.isfinite()


def test_what_does_not_fit_is_said() -> None:
    recipe = read_recipe("toy-translation", NANO)
    wrong = {"_target_": "tokenfusion.backbones.mirror.discriminator", "variant": "xs"}
    with pytest.raises(UserError, match=r"model\.generator: wanted a MirroredMiT, got MiT"):
        build_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"generator": wrong})}))
    with pytest.raises(UserError, match=r"data\.target 'shade' is one of data\.modalities"):
        read_recipe("toy-translation", ["data.target=shade"])
    with pytest.raises(UserError, match=r"model\.generator: .*variant must be one of"):
        build_model(read_recipe("toy-translation", ["model.generator.variant=b7"]))


def test_a_generator_starts_from_weights(tmp_path) -> None:
    from golden_rules import Case

    recipe = read_recipe("taskonomy-shade-texture-to-rgb-released", ["model.generator.variant=b0"])
    official = Case("i2i_gen_b0").state_dict()
    torch.save({f"module.{key}": value for key, value in official.items()}, tmp_path / "checkpoint-gen-399.pth.tar")
    model = build_model(recipe)
    account = load_pretrained(model, str(tmp_path / "checkpoint-gen-399.pth.tar"))
    assert "0 left random, 0 unused" in account
    assert torch.equal(model.ensemble.alpha, official["alpha"])
