"""The fused segmenter against the published reference implementation, number by number."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from golden_rules import Case
from torch import Tensor

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.keys import from_released_segmentation
from tokenfusion.backbones.mit import mit
from tokenfusion.backbones.weights import read_checkpoint
from tokenfusion.fusion import NoFusion, TokenFusion, sparsity_loss
from tokenfusion.tasks.segmentation.head import LinearHead, SegFormerHead
from tokenfusion.tasks.segmentation.losses import upsampled_cross_entropy
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput

NAMES = ("rgb", "depth")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("seg_mit_b0")


@pytest.fixture(scope="module")
def model(case: Case) -> FusedSegmenter:
    return build(case)


def build(case: Case) -> FusedSegmenter:
    backbone = FusedBackbone(mit("b0"), NAMES, TokenFusion)
    model = FusedSegmenter(backbone, SegFormerHead(backbone.dims, 40)).eval()
    model.load_state_dict(from_released_segmentation(case.state_dict()), strict=True)
    return model


def losses(output: SegmentationOutput, target: Tensor) -> tuple[Tensor, Tensor]:
    entropy = sum(upsampled_cross_entropy(value, target) for value in (*output.logits.values(), output.ensemble))
    return entropy, entropy + 1e-6 * sparsity_loss(output.scores, "sum")


def named(case: Case, model: FusedSegmenter, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output that the case lists, under its name there."""
    output = model(inputs)
    values = {"out_rgb": output.logits["rgb"], "out_depth": output.logits["depth"], "out_ens": output.ensemble}
    for block, scores in enumerate(output.scores):
        values |= {f"mask{block:02d}_{name}": scores[m] for m, name in enumerate(NAMES)}
    for stage, maps in enumerate(model.backbone(inputs).maps):
        values |= {f"feat{stage}_{name}": maps[m] for m, name in enumerate(NAMES)}
    values["loss_ce"], values["loss"] = losses(output, torch.from_numpy(case.outputs["target"]).long())
    return values


def test_float32_outputs(case: Case, model: FusedSegmenter) -> None:
    values = named(case, model, {name: case.input(name) for name in NAMES})
    assert values.keys() | {"target"} == case.outputs.keys()
    for name, value in values.items():
        largest = abs(case.outputs[name]).max().item()
        atol = 1e-5 * largest if name.startswith("loss") else 3e-5 * max(largest, 1.0)
        case.assert_close(name, value, atol)


def test_every_discrete_decision(case: Case, model: FusedSegmenter) -> None:
    scores = model({name: case.input(name) for name in NAMES}).scores
    assert len(scores) == 8
    for block, score in enumerate(scores):
        for m, name in enumerate(NAMES):
            decided = score[m] < 0.02
            assert torch.equal(decided, torch.from_numpy(case.outputs[f"mask{block:02d}_{name}"] < 0.02))
            stated = case.case["score_below_0_02"][f"mask{block:02d}_{name}"]
            assert decided.float().mean().item() == pytest.approx(stated, abs=1e-4)


def test_rates_are_those_of_the_case(case: Case, model: FusedSegmenter) -> None:
    scores = model({name: case.input(name) for name in NAMES}).scores
    for block, rates in enumerate(model.backbone.rates(scores).values()):
        stated = [case.case["score_below_0_02"][f"mask{block:02d}_{name}"] for name in NAMES]
        torch.testing.assert_close(rates.exchanged, torch.tensor(stated), rtol=0, atol=1e-4)


def test_gradients_of_every_parameter(case: Case) -> None:
    model = build(case)
    output = model({name: case.input(name) for name in NAMES})
    losses(output, torch.from_numpy(case.outputs["target"]).long())[1].backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert len(norms) == len(list(model.parameters()))
    ours = {key: next(iter(from_released_segmentation({key: torch.zeros(1, 1)}))) for key in case.state_dict()}
    case.assert_gradients({key: norms[name] for key, name in ours.items() if name in norms}, rtol=2e-3)


def test_float64_run(case: Case) -> None:
    """Sees what float32 hides, such as an epsilon of 1e-5 in place of 1e-6."""
    model = build(case).double()
    values = named(case, model, {name: case.input(name).double() for name in NAMES})
    assert values.keys() == case.case["float64_run"].keys()
    for name, value in values.items():
        case.assert_float64(name, value, rtol=1e-9)


def test_a_released_file_on_disk(case: Case, model: FusedSegmenter, tmp_path) -> None:
    """The layout that the released training writes: DataParallel's prefix inside a wrapper with counters."""
    segmenter = {f"module.{key}": value for key, value in case.state_dict().items()}
    torch.save({"segmenter": segmenter, "epoch_start": 299, "best_val": 54.8}, tmp_path / "model-best.pth.tar")
    ours = from_released_segmentation(read_checkpoint(tmp_path / "model-best.pth.tar"))
    expected = model.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


# ---- the model itself ----------------------------------------------------------------------------------------------


def test_outputs_are_at_a_quarter_of_the_image_whatever_its_size(small_segmenter, images) -> None:
    for size, expected in (((64, 96), (16, 24)), ((70, 101), (18, 26))):
        output = small_segmenter(TokenFusion)(images(2, size=size))
        assert output.ensemble.shape == (2, 5, *expected)
        assert output.logits["depth"].shape == (2, 5, *expected)


def test_head_is_shared_by_the_streams(small_segmenter, images) -> None:
    """Equal images in equal streams give equal logits; the ensemble of equal logits is the same again."""
    model = small_segmenter(NoFusion)
    state = model.state_dict()
    for name in state:
        if name.endswith((".1.weight", ".1.bias")) and name[:-8].rstrip(".") and "norm" in name:
            first = name.replace(".1.weight", ".0.weight").replace(".1.bias", ".0.bias")
            if first in state and state[first].shape == state[name].shape:
                state[name].copy_(state[first])
    image = images(1)["rgb"]
    output = model({"rgb": image, "depth": image})
    torch.testing.assert_close(output.logits["rgb"], output.logits["depth"])
    torch.testing.assert_close(output.ensemble, output.logits["rgb"])


def test_ensemble_loss_trains_alpha_alone(small_segmenter, images) -> None:
    model = small_segmenter(partial(TokenFusion, threshold=0.5))
    model(images(2)).ensemble.pow(2).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {"ensemble.alpha"}


def test_all_parameters_belong_to_the_optimiser(small_segmenter) -> None:
    """Released code forgot alpha: here it is a parameter like all others."""
    assert "ensemble.alpha" in dict(small_segmenter(NoFusion).named_parameters())


def test_modalities_are_named_in_order(small_segmenter) -> None:
    assert small_segmenter(NoFusion, 3).modalities == ("rgb", "depth", "thermal")


@pytest.mark.parametrize("kind", [SegFormerHead, LinearHead])
def test_what_is_missing_is_not_among_the_heads_statistics(kind: type) -> None:
    torch.manual_seed(0)
    backbone = FusedBackbone(mit("b0", drop_path=0.0), NAMES, NoFusion)
    model = FusedSegmenter(backbone, kind(backbone.dims, 5, dropout=0.0)).train()
    x = {name: torch.randn(3, 3, 64, 64) for name in NAMES}
    with_none, with_one = copy.deepcopy(model), copy.deepcopy(model)
    alone = with_none({"rgb": x["rgb"]}).logits["rgb"]
    present = torch.tensor([[True, True, True], [False, True, False]])
    beside = with_one(x, present)
    torch.testing.assert_close(with_none.head.norm.running_mean, _running_mean(model, x["rgb"]))
    assert not torch.allclose(with_one.head.norm.running_mean, with_none.head.norm.running_mean), "one depth map more"
    assert torch.isfinite(beside.ensemble).all()
    assert alone.shape == beside.logits["rgb"].shape


def _running_mean(model: FusedSegmenter, x: Tensor) -> Tensor:
    """What the head's batch norm keeps of one stream, run without any other."""
    model = copy.deepcopy(model)
    model.head([maps[0] for maps in model.backbone({"rgb": x}).maps])
    return model.head.norm.running_mean
