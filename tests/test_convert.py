"""Foreign checkpoints become folders that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokenfusion
from tokenfusion.backbones.keys import from_released_segmentation
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


def test_single_modal_weights_start_a_fused_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
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


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pth")
    for kind in ("released-segmentation", "segformer", "hf-segformer"):
        with pytest.raises(UserError, match="weight"):
            convert(tmp_path / "a.pth", kind, tmp_path / "out")
    torch.save(mit("b0").state_dict() | {"stages.0.blocks.7.norm1.weight": torch.zeros(32)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="none of MiT-B0 to B5"):
        convert(tmp_path / "b.pth", "segformer", tmp_path / "out")
    assert not (tmp_path / "out").exists()
