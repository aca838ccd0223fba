"""Checkpoints of detectors, of points and of images, become folders that load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks.detection3d.small import SIZES
from tasks.walk import command

import tokenfusion
from tokenfusion.backbones.detection_keys import from_groupfree
from tokenfusion.convert import convert
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.detection3d.groupfree import GroupFree
from tokenfusion.tasks.detection3d.task import build_model as build_detector
from tokenfusion.tasks.detection3d.task import load_pretrained as start_detector

# ---- detectors of points ------------------------------------------------------------------------------------------


def described(folder: Path, classes: int, name: str = "clouds") -> Path:
    """Clouds alone: what is needed to predict."""
    folder.mkdir(exist_ok=True)
    names = ", ".join(f"class {i}" for i in range(classes))
    (folder / "dataset.yaml").write_text(
        f"name: {name}\nscene: {{points: 'points/{{id}}.npy', classes: [{names}]}}\nsplits: {{val: val.txt}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def groupfree_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as Group-Free's training writes it: prefixes, options, shared tensors under both of their names."""
    from golden_rules import Case

    official = dict(Case("groupfree_sun_l6_o256").state_dict())
    assert sum(key.startswith(("decoder_self_posembeds.", "decoder_cross_posembeds.")) for key in official) > 12
    content = {
        "config": argparse.Namespace(num_target=256, max_epoch=600),
        "save_path": "",
        "model": {f"module.{key}": value for key, value in official.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 4e-3}]},
        "scheduler": {"last_epoch": 3},
        "epoch": 600,
    }
    file = tmp_path_factory.mktemp("groupfree") / "ckpt_epoch_last.pth"
    torch.save(content, file)
    return file, official


def test_groupfree_file(tmp_path: Path, groupfree_file: tuple[Path, dict[str, torch.Tensor]]) -> None:
    from golden_rules import Case

    file, official = groupfree_file
    account = convert(file, "groupfree", tmp_path / "run", described(tmp_path / "data", 10))
    assert "Group-Free L6 O256, width 1, 10 classes" in account
    model: Any = tokenfusion.load(tmp_path / "run")
    wanted = from_groupfree(official)
    loaded = {name.removeprefix("points."): value for name, value in model.state_dict().items()}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    assert model.image is None
    recipe: Any = tokenfusion.api.recipe_of(tmp_path / "run")
    assert (recipe.data.modalities, recipe.description) == (("points",), "converted from ckpt_epoch_last.pth")
    cloud = Case("groupfree_sun_l6_o256").outputs["point_clouds"][0]
    np.save(tmp_path / "cloud.npy", cloud)
    made = tokenfusion.api.predict(tmp_path / "run", tmp_path / "made", {"points": tmp_path / "cloud.npy"})
    assert [path.name for path in made] == ["cloud.json", "cloud_above.png"]


@pytest.mark.parametrize(
    ("classes", "layers", "width", "agnostic", "proposals"),
    [(10, 1, 1, True, 256), (18, 12, 2, False, 512), (3, 2, 1, True, 256)],
)
def test_sizes_are_read_from_the_tensors(
    classes: int, layers: int, width: int, agnostic: bool, proposals: int, tmp_path: Path
) -> None:
    bins = 12 if agnostic else 1
    means = None if agnostic else [[1.0, 1.0, 1.0]] * classes
    network = GroupFree(classes, bins, means, layers=layers, width=width, proposals=proposals)
    torch.save({"model": published(network)}, tmp_path / "file.pth")
    account = convert(tmp_path / "file.pth", "groupfree", tmp_path / "run", described(tmp_path / "data", classes))
    assert f"Group-Free L{layers} O{proposals}, width {width}, {classes} classes" in account
    model: Any = tokenfusion.load(tmp_path / "run")
    assert all(torch.equal(x, y) for x, y in zip(
        model.points.state_dict().values(), network.state_dict().values(), strict=True))  # fmt: skip
    if not agnostic:
        torch.testing.assert_close(model.points.mean_sizes[0], torch.tensor([0.76966726, 0.81160211, 0.92573741]))


def published(network: GroupFree) -> dict[str, torch.Tensor]:
    """A detector's tensors under the published names: the inverse of the key map, found by trying."""
    inverse = {}
    for theirs in candidates(network):
        ours = next(iter(from_groupfree({theirs: torch.zeros(1)})))
        inverse[ours] = theirs
    state = network.state_dict()
    assert inverse.keys() == state.keys()
    return {inverse[name]: value for name, value in state.items()}


def candidates(network: GroupFree) -> list[str]:
    """Every key of a published file of this size."""
    layers = network.layers
    affine, statistics = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    heads = ["objectness_scores_head", "center_residual_head", "heading_class_head", "heading_residual_head",
             "sem_cls_scores_head"]  # fmt: skip
    heads += ["size_pred_head"] if network.mean_sizes is None else ["size_class_head", "size_residual_head"]
    shared = {"conv1": affine, "bn1": statistics, "conv2": affine, "bn2": statistics}
    prediction = {**shared, **dict.fromkeys(heads, affine)}
    position = {f"position_embedding_head.{i}": statistics if i == 1 else affine for i in (0, 1, 3)}
    layer = {"linear1": affine, "linear2": affine, "norm1": affine, "norm2": affine, "norm3": affine}
    for attention in ("self_attn", "multihead_attn"):
        layer |= {attention: ("in_proj_weight", "in_proj_bias"), f"{attention}.out_proj": affine}
    for kind in ("self_posembed", "cross_posembed"):
        layer |= {f"{kind}.{name}": parts for name, parts in position.items()}
    modules: dict[str, tuple[str, ...]] = {
        **{f"backbone_net.sa{n}.mlp_module.layer{i}.{part}": kinds
           for n in range(1, 5) for i in range(3) for part, kinds in (("conv", ("weight",)), ("bn.bn", statistics))},
        **{f"backbone_net.fp{n}.mlp.layer{i}.{part}": kinds
           for n in (1, 2) for i in range(2) for part, kinds in (("conv", ("weight",)), ("bn.bn", statistics))},
        **{f"points_obj_cls.{name}": parts for name, parts in {**shared, "conv3": affine}.items()},
        **{f"proposal_head.{name}": parts for name, parts in prediction.items()},
        **{f"prediction_heads.{i}.{name}": parts for i in range(layers) for name, parts in prediction.items()},
        "decoder_key_proj": affine, "decoder_query_proj": affine,
        **{f"decoder.{i}.{name}": parts for i in range(layers) for name, parts in layer.items()},
    }  # fmt: skip
    return [f"{module}.{part}" for module, parts in modules.items() for part in parts]


def test_groupfree_on_the_command_line(
    tmp_path: Path,
    groupfree_file: tuple[Path, dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, official = groupfree_file
    start, out = ["convert", file, "--from", "groupfree"], ["--out", tmp_path / "run"]
    ten, nine = described(tmp_path / "ten", 10), described(tmp_path / "nine", 9)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "dataset.yaml").write_text(
        "name: flat\nmodalities: {rgb: {kind: rgb, files: 'r/{id}.png'}}\nsplits: {val: val.txt}\n"
    )

    def saved(name: str, content: dict[str, torch.Tensor]) -> list[object]:
        torch.save({"model": content}, tmp_path / name)
        return ["convert", tmp_path / name, *start[2:], *out, "--dataset", ten]

    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:5000])
    relative = {key.replace("size_pred_head", "size_class_head"): value for key, value in official.items()}
    coloured = dict(official)
    first = "backbone_net.sa1.mlp_module.layer0.conv.weight"
    coloured[first] = torch.zeros(64, 6, 1, 1)
    mistakes = [
        ([*start, *out], "has 10 classes; say with --dataset"),
        ([*start, *out, "--dataset", nine], "scene names 9 classes"),
        ([*start, *out, "--dataset", flat], f"{flat / 'dataset.yaml'}: has no scene"),
        ([*start, *out, "--dataset", tmp_path / "none"], "no such file"),
        (["convert", tmp_path / "cut.pth", *start[2:], *out, "--dataset", ten], "cut.pth: damaged"),
        (["convert", tmp_path / "none.pth", *start[2:], *out, "--dataset", ten], "none.pth"),
        (saved("half.pth", {k: v for k, v in official.items() if not k.startswith("decoder.3")}), "do not fit the model"),
        (saved("headless.pth", {k: v for k, v in official.items() if "head" not in k}), "not a whole file"),
        (saved("no-decoder.pth", {k: v for k, v in official.items() if not k.startswith("decoder.")}), "not a whole file"),
        (saved("relative.pth", relative), "only ScanNet's 18 have here"),
        (saved("coloured.pth", coloured), "takes points of 6 channels; recipes know x y z alone"),
        (saved("other.pth", {"votenet.weight": torch.zeros(3)}), "'votenet.weight' is not part of the Group-Free-3D"),
        (["convert", file, "--from", "group-free", *out], "did you mean 'groupfree'?"),
        (["convert", file, "--from", "yolos", *out], str(file)),
        (["convert", file, "--from", "released-segmentation", *out, "--dataset", ten], str(file)),
    ]  # fmt: skip
    for arguments, said in mistakes:
        message = command(*arguments, code=2, capsys=capsys)
        assert said in message, (arguments, message)
        assert message.count("\n") == 1, (arguments, message)
        assert not (tmp_path / "run").exists(), arguments
    command(*start, *out, "--dataset", ten, capsys=capsys)
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert "not empty" in command(*start, *out, "--dataset", ten, code=2, capsys=capsys)


# ---- detectors of images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of all three layouts, of YOLOS-Ti's size."""
    from golden_rules import Case

    folder = tmp_path_factory.mktemp("image")
    official = dict(Case("yolos_ti").state_dict())
    torch.save({"model": official}, folder / "yolos.pth")
    generator = torch.Generator().manual_seed(0)
    backbone = {key.removeprefix("backbone."): x for key, x in official.items() if key.startswith("backbone.")}
    deit = {key: x for key, x in backbone.items() if key not in ("det_token", "pos_embed")}
    deit |= {"pos_embed": torch.randn(1, 197, 192, generator=generator), "head.weight": torch.zeros(1000, 192),
             "head.bias": torch.zeros(1000)}  # fmt: skip
    torch.save({"model": deit}, folder / "deit.pth")
    return {"yolos": folder / "yolos.pth", "deit": folder / "deit.pth"}


FEW = [f"model.points.{key}={value}" for key, value in {**SIZES, "layers": 1, "proposals": 4}.items()]
PUBLISHED = ["model.image.variant=ti", "model.image.detections=100", "model.image.init_size=null"]


def fused(weights: Path, *more: str) -> tuple[Any, str]:
    """A detector whose image's network starts from weights, and the account of it."""
    changes = [*FEW, *PUBLISHED, *more, f"model.image_weights={weights}"]
    recipe: Any = read_recipe("toy-detection3d", changes)
    model = build_detector(recipe, 5)
    return model, start_detector(model, recipe)[0]


@pytest.mark.parametrize("kind", ["yolos", "deit"])
def test_image_weights_start_a_fused_detector(kind: str, image_files: dict[str, Path], tmp_path: Path) -> None:
    account = convert(image_files[kind], kind, tmp_path / "ours")
    assert account.startswith("YOLOS ti; weights from ")
    assert f"model.image_weights={tmp_path / 'ours'}" in account
    model, converted = fused(tmp_path / "ours")
    again, direct = fused(image_files[kind])
    first, second = model.image.state_dict(), again.image.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first), "the file itself serves as well"
    untouched = build_detector(read_recipe("toy-detection3d", [*FEW, *PUBLISHED]), 5).image.state_dict()
    random = {name for name in first if torch.equal(first[name], untouched[name])}
    heads = {name for name in first if name.startswith(("class_head", "box_head"))}
    last = {"class_head.4.weight", "class_head.4.bias"}
    assert random == (last if kind == "yolos" else heads | {"det_token", "det_pos_embed"})
    assert f"{len(random)} left random" in converted
    assert f"{len(random)} left random" in direct


@pytest.mark.parametrize("mid", [False, True])
def test_transformers_yolos_starts_a_fused_detector(mid: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    width, heads, image = (384, 6, [512, 864]) if mid else (192, 3, [800, 1333])
    config = transformers.YolosConfig(
        hidden_size=width,
        num_hidden_layers=12,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        image_size=image,
        use_mid_position_embeddings=mid,
        num_labels=91,
    )
    theirs = transformers.YolosForObjectDetection(config)
    theirs.save_pretrained(tmp_path / "hf")
    account = convert(tmp_path / "hf", "hf-yolos", tmp_path / "ours")
    assert f"YOLOS {'s' if mid else 'ti'}; " in account
    assert " 0 left random, 0 unused" in account
    variant = f"model.image.variant={'s' if mid else 'ti'}"
    model, _ = fused(tmp_path / "ours", variant)
    again, direct = fused(tmp_path / "hf", variant)
    first, second = model.image.state_dict(), again.image.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert " 2 left random, 0 unused" in direct, "the classes of boxes are other ones"


def test_image_weights_on_the_command_line(
    image_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "ours"]
    official = torch.load(image_files["yolos"])["model"]
    torch.save({k: v for k, v in official.items() if not k.startswith("backbone.blocks.3.")}, tmp_path / "eleven.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(image_files["yolos"].read_bytes()[:5000])
    mistakes = [
        (["convert", image_files["deit"], "--from", "yolos", *out], "are no YOLOS checkpoint"),
        (["convert", image_files["yolos"], "--from", "deit", *out], "not a whole file of this kind"),
        (["convert", tmp_path / "eleven.pth", "--from", "yolos", *out], "eleven.pth: 11 blocks of width 192 are none"),
        (["convert", image_files["deit"], "--from", "hf-yolos", *out], "deit.pth"),
        (["convert", tmp_path / "other.pth", "--from", "deit", *out], "other.pth"),
        (["convert", tmp_path / "other.pth", "--from", "hf-yolos", *out], "other.pth"),
        (["convert", tmp_path / "cut.pth", "--from", "yolos", *out], "cut.pth: damaged"),
        (["convert", image_files["yolos"], "--from", "yolo", *out], "did you mean 'yolos'?"),
    ]
    for arguments, said in mistakes:
        message = command(*arguments, code=2, capsys=capsys)
        assert said in message, (arguments, message)
        assert message.count("\n") == 1, (arguments, message)
        assert not (tmp_path / "ours").exists(), arguments
    command("convert", image_files["deit"], "--from", "deit", *out, capsys=capsys)
    assert (tmp_path / "ours" / "model.safetensors").is_file()


def test_image_weights_of_another_size_are_refused(image_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"yolos\.pth: .*the checkpoint has shape"):
        fused(image_files["yolos"], "model.image.variant=s")
    with pytest.raises(UserError, match=r"yolos\.pth: det_token: the checkpoint has shape .*, the network .1, 32, 192"):
        fused(image_files["yolos"], "model.image.detections=32")
