"""Foreign checkpoints become folders that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tasks.walk import command, plain_image

import tokenfusion
from tokenfusion.backbones.keys import from_released_segmentation, from_released_translation
from tokenfusion.backbones.mit import mit
from tokenfusion.convert import convert
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.segmentation.task import build_model, load_pretrained


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.yaml").write_text(
        "name: forty\nmodalities: {rgb: {kind: rgb, files: 'r/{id}.png'}, depth: {kind: depth, files: 'd/{id}.png'}}\n"
        f"classes: [{', '.join(f'class {i}' for i in range(40))}]\nsplits: {{val: val.txt}}\n"
    )
    return tmp_path / "data"


def test_released_segmentation_file(tmp_path: Path, dataset: Path) -> None:
    from golden_rules import Case

    official = Case("seg_mit_b0").state_dict()
    file = tmp_path / "model-best.pth.tar"
    torch.save({"segmenter": {f"module.{k}": v for k, v in official.items()}, "epoch_start": 3, "best_val": 0.5}, file)
    account = convert(file, "released-segmentation", tmp_path / "run", dataset)
    assert "MiT-B0, 40 classes" in account
    loaded = tokenfusion.load(tmp_path / "run").state_dict()
    wanted = from_released_segmentation(dict(official))
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    with pytest.raises(UserError, match="--dataset"):
        convert(file, "released-segmentation", tmp_path / "other")
    with pytest.raises(UserError, match="not empty"):
        convert(file, "released-segmentation", tmp_path / "run", dataset)


PAIR = ("shade", "edge_texture")


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """A description of three modalities, as ``prepare taskonomy`` writes it."""
    kinds = {"rgb": "rgb", "shade": "gray", "edge_texture": "gray"}
    entries = ", ".join(f"{name}: {{kind: {kind}, files: '{name}/{{id}}.png'}}" for name, kind in kinds.items())
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "dataset.yaml").write_text(
        f"name: views\nmodalities: {{{entries}}}\nsplits: {{val: val.txt}}\n"
    )
    return tmp_path / "views"


@pytest.fixture(scope="module")
def generator_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A released generator's file as training with several devices wrote it, and what is in it."""
    from golden_rules import Case

    official = dict(Case("i2i_gen_b0").state_dict())
    file = tmp_path_factory.mktemp("released") / "checkpoint-gen-399.pth.tar"
    torch.save({f"module.{key}": value for key, value in official.items()}, file)
    return file, official


def test_released_translation_file(
    tmp_path: Path, views: Path, generator_file: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    from golden_rules import Case

    file, official = generator_file
    account = convert(file, "released-translation", tmp_path / "run", views, PAIR)
    assert "b0, shade, edge_texture -> rgb" in account
    model = tokenfusion.load(tmp_path / "run")
    loaded, wanted = model.state_dict(), from_released_translation(official)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    case = Case("i2i_gen_b0")
    with torch.no_grad():
        output = model({name: case.input(f"input{m}") for m, name in enumerate(PAIR)})
    case.assert_close("out_ens", output.ensemble, 1e-4)
    recipe = tokenfusion.api.recipe_of(tmp_path / "run")
    assert recipe.model.discriminator["variant"] == recipe.model.generator["variant"] == "b0"  # type: ignore[attr-defined]
    assert recipe.data.target == "rgb"
    for name in PAIR:
        plain_image(tmp_path / f"{name}.png", (40, 50))
    files = {name: tmp_path / f"{name}.png" for name in PAIR}
    assert len(tokenfusion.api.predict(tmp_path / "run", tmp_path / "made", files)) == 2


def test_released_translation_on_the_command_line(
    tmp_path: Path,
    views: Path,
    generator_file: tuple[Path, dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, official = generator_file
    start, names = ["convert", file, "--from", "released-translation"], ["--modalities", "shade, edge_texture"]
    out, described = ["--out", tmp_path / "run"], ["--dataset", views]
    torch.save({k: v for k, v in official.items() if "alpha" not in k}, tmp_path / "no-alpha.pth")
    torch.save(
        {k: v for k, v in official.items() if not k.startswith("score_predictor.0")}, tmp_path / "without-scores.pth"
    )
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:5000])
    mistakes = [
        ([*start, *out, *names], "--dataset"),
        ([*start, *out, *described, "--modalities", "shade"], "has 2 streams; --modalities names 1"),
        ([*start, *out, *described], "no modality 'depth'"),
        ([*start, *out, *described, *names, "--target", "rbg"], "did you mean 'rgb'?"),
        ([*start, *out, *described, *names, "--target", "shade"], "'shade' is one of data.modalities"),
        (["convert", tmp_path / "no-alpha.pth", *start[2:], *out, *described, *names], "not a whole file"),
        (["convert", tmp_path / "without-scores.pth", *start[2:], *out, *described, *names], "do not fit the model"),
        (["convert", tmp_path / "cut.pth", *start[2:], *out, *described, *names], "cut.pth"),
        (["convert", views / "dataset.yaml", *start[2:], *out, *described, *names], "dataset.yaml"),
        (["convert", file, "--from", "released-translatoin", *out], "did you mean 'released-translation'?"),
        (["convert", file, "--from", "released-segmentation", *out, *described], str(file)),
    ]
    for arguments, said in mistakes:
        message = command(*arguments, code=2, capsys=capsys)
        assert said in message, (arguments, message)
        assert message.count("\n") == 1, (arguments, message)
        assert not (tmp_path / "run").exists(), arguments
    command(*start, *out, *described, *names, capsys=capsys)
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert "not empty" in command(*start, *out, *described, *names, code=2, capsys=capsys)


def test_single_modal_weights_start_a_fused_model(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(hidden_sizes=[32, 64, 160, 256], depths=[2, 2, 2, 2])
    theirs = transformers.SegformerModel(config)
    theirs.save_pretrained(tmp_path / "hf")
    assert "MiT-B0" in convert(tmp_path / "hf", "hf-segformer", tmp_path / "ours")
    recipe = read_recipe("toy-segmentation")
    model = build_model(recipe, 5)
    account = load_pretrained(model, str(tmp_path / "ours"))
    assert "private copies" in account
    assert " 0 left random" in account
    again = build_model(recipe, 5)
    load_pretrained(again, str(tmp_path / "hf"))  # the folder itself serves as well
    first, second = model.backbone.state_dict(), again.backbone.backbone.state_dict()
    assert all(torch.equal(first[f"backbone.{k}"], v) for k, v in second.items())
    assert torch.equal(first["backbone.stages.0.norm.0.weight"], first["backbone.stages.0.norm.1.weight"])


def test_a_dinov2_of_hugging_face_starts_a_network_of_timm(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "hf")
    assert "width 48, 2 blocks, patches of 14 pixels" in convert(tmp_path / "hf", "hf-dinov2", tmp_path / "ours")
    arguments = "img_size: 28, embed_dim: 48, depth: 2, num_heads: 4"
    named = f"_target_: tokenfusion.backbones.foreign.timm_network, name: vit_small_patch14_dinov2, {arguments}"
    model = build_model(read_recipe("toy-segmentation", [f"model.backbone={{{named}}}"]), 5)
    assert " 0 left random, 0 unused" in load_pretrained(model, str(tmp_path / "ours"))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pth")
    for kind in (
        "released-segmentation",
        "released-translation",
        "groupfree",
        "segformer",
        "hf-segformer",
        "hf-dinov2",
        "yolos",
    ):
        with pytest.raises(UserError, match="weight"):
            convert(tmp_path / "a.pth", kind, tmp_path / "out")
    torch.save(mit("b0").state_dict() | {"stages.0.blocks.7.norm1.weight": torch.zeros(32)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="none of MiT-B0 to B5"):
        convert(tmp_path / "b.pth", "segformer", tmp_path / "out")
    assert not (tmp_path / "out").exists()
