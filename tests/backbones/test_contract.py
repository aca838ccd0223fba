"""What every fuser promises, over all fusers, numbers of streams, placements and score networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from every_fuser import MAKERS, SCORING

from tokenfusion import fusion
from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.mit import MiT
from tokenfusion.fusion import Fuser, NoFusion, TokenFusion, scale_penalty, sparsity_loss
from tokenfusion.tasks.segmentation.head import SegFormerHead
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput

FUSERS = {
    **MAKERS,
    "everything": partial(TokenFusion, threshold=1.0),
    "started": partial(TokenFusion, init_bias=3.0),
}
CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in itertools.product(
        sorted(FUSERS), (1, 2, 3, 4), ("plain", "aligned"), ("every", "last"), ("stage", "block")
    )
    if (case[0], case[3]) != ("bottleneck", "last")  # refused: nothing would go from block to block
]


def test_every_public_fuser_is_here() -> None:
    public = {getattr(fusion, name) for name in fusion.__all__}
    fusers = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Fuser)} - {Fuser}
    assert fusers == {type(make(8, 2, 0)) for make in MAKERS.values()}


@pytest.mark.parametrize(("fuser", "modalities", "alignment", "placement", "score_nets"), CASES)
def test_contract(
    small_segmenter, images, fuser: str, modalities: int, alignment: str, placement: str, score_nets: str
) -> None:
    options = {"alignment": alignment == "aligned", "placement": placement, "score_nets": score_nets}
    model, x = small_segmenter(FUSERS[fuser], modalities, **options), images(modalities)
    output = model(x)

    assert list(output.logits) == list(x)
    assert output.present is None
    for value in (*output.logits.values(), output.ensemble):
        assert value.shape == (2, 5, 16, 24)
        assert value.isfinite().all()
    scoring = {*SCORING, "everything", "started"} - ({"mended"} if modalities == 1 else set())  # nobody to compare with
    tokens = {"every": [384, 96, 96, 24, 6], "last": [384, 96, 24, 6]}[placement] if fuser in scoring else []
    assert [tuple(s.shape) for s in output.scores] == [(modalities, 2, n) for n in tokens]
    assert all(s.min() >= 0 and s.max() <= 1 for s in output.scores)
    assert len(model.backbone.block_names()) == len(output.scores)

    again = model(x)
    assert torch.equal(again.ensemble, output.ensemble), "deterministic in evaluation"

    single = model({name: image[1:] for name, image in x.items()})  # a sample does not know its neighbours
    torch.testing.assert_close(single.ensemble, output.ensemble[1:], rtol=1e-4, atol=1e-4)
    for a, b in zip(single.scores, output.scores, strict=True):
        torch.testing.assert_close(a, b[:, 1:], rtol=1e-4, atol=1e-4)

    values = (*output.logits.values(), output.ensemble)
    loss = sum((value * torch.randn_like(value)).sum() for value in values) + sparsity_loss(output.scores, "mean")
    (loss + scale_penalty(model.backbone.scales())).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without == ({"ensemble.alpha"} if modalities == 1 else set())


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_training_mode_runs(small_segmenter, images, fuser: str) -> None:
    output = small_segmenter(FUSERS[fuser], 3).train()(images(3))
    assert output.ensemble.isfinite().all()


@pytest.mark.parametrize("fuser", sorted(set(FUSERS) - {"none", "random", "started"}))
def test_fusion_fuses(small_segmenter, images, fuser: str) -> None:
    """One stream's logits depend on the other's image; without fusion they do not."""
    x = images(2)
    changed = {**x, "depth": x["depth"].flip(-1)}
    model = small_segmenter(FUSERS[fuser])
    assert (model(x).logits["rgb"] - model(changed).logits["rgb"]).abs().max() > 1e-3
    plain = small_segmenter(NoFusion)
    assert torch.equal(plain(x).logits["rgb"], plain(changed).logits["rgb"])


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_bfloat16_autocast(small_segmenter, images, fuser: str) -> None:
    model, x = small_segmenter(FUSERS[fuser]), images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.ensemble.isfinite().all()


# ---- compile and export --------------------------------------------------------------------------------------------


@pytest.fixture
def short_segmenter(shake) -> Callable[..., FusedSegmenter]:
    """Two stages are enough to trace; three streams take the longest way through the allocation."""

    def make(fuser: Callable[..., Fuser], modalities: int = 3, **options: object) -> FusedSegmenter:
        backbone = FusedBackbone(MiT((8, 16), (1, 1)), ("rgb", "depth", "thermal")[:modalities], fuser, **options)  # type: ignore[arg-type]
        return shake(FusedSegmenter(backbone, SegFormerHead(backbone.dims, 5, width=16))).eval()  # type: ignore[return-value]

    return make


def assert_equal_outputs(a: SegmentationOutput, b: SegmentationOutput) -> None:
    torch.testing.assert_close((a.logits, a.ensemble, a.scores), (b.logits, b.ensemble, b.scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuser", sorted(MAKERS))
def test_traces_without_a_graph_break(short_segmenter, images, fuser: str) -> None:
    torch._dynamo.reset()
    model, x = short_segmenter(FUSERS[fuser], alignment=True), images(3, size=(32, 64))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_equal_outputs(compiled(x), model(x))


@pytest.mark.parametrize("fuser", sorted(MAKERS))
def test_exports(short_segmenter, images, fuser: str) -> None:
    model, x = short_segmenter(FUSERS[fuser], alignment=True), images(3, size=(32, 64))
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        assert_equal_outputs(exported(x), model(x))
        other = {name: image.flip(-1) for name, image in x.items()}
        assert_equal_outputs(exported(other), model(other))


@pytest.mark.parametrize("fuser", sorted(MAKERS))
def test_exports_with_presence_as_an_input(short_segmenter, images, fuser: str) -> None:
    model, x = short_segmenter(FUSERS[fuser]), images(3, size=(32, 64))
    present = torch.tensor([[True, True], [True, False], [False, True]])
    with torch.no_grad():
        exported = torch.export.export(model, (x, present)).module()
        for flags in (present, torch.ones_like(present), present.flip(1)):
            assert_equal_outputs(exported(x, flags), model(x, flags))


def test_exports_for_any_batch(short_segmenter, images) -> None:
    model, x = short_segmenter(FUSERS["tokenfusion"]), images(3, size=(32, 64))
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({name: {0: batch} for name in x},)).module()
        for size in (1, 5):
            other = images(3, batch=size, size=(32, 64))
            assert_equal_outputs(exported(other), model(other))


# ---- accelerator ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_same_numbers_on_an_accelerator(small_segmenter, images, fuser: str, modalities: int) -> None:
    """Allocation and random draws follow from the seed, not from the device; a missing key works there too."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, x = small_segmenter(FUSERS[fuser], modalities).double(), images(modalities)
    x = {name: image.double() for name, image in x.items()}
    expected, lonely = model(x).ensemble, model({"rgb": x["rgb"]}).ensemble
    model.cuda()
    x = {name: image.cuda() for name, image in x.items()}
    torch.testing.assert_close(model(x).ensemble.cpu(), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(model({"rgb": x["rgb"]}).ensemble.cpu(), lonely, rtol=1e-8, atol=1e-9)
