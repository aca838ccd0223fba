"""Score networks and the l1 penalty (Eq. 4, 5)."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.fusion import ScorePredictor, sparsity_loss


def test_scores_are_the_softmax_of_each_modalitys_own_network(shake) -> None:
    predictor = shake(ScorePredictor(8, 3).double())
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    expected = torch.stack(
        [net(stream).log_softmax(-1).softmax(-1)[..., 0] for net, stream in zip(predictor.nets, x, strict=True)]
    )
    torch.testing.assert_close(predictor(x), expected, rtol=1e-12, atol=1e-12)


def test_network_has_the_released_layers() -> None:
    layers = [type(layer).__name__ for layer in ScorePredictor(32, 1).nets[0]]
    assert layers == ["LayerNorm", "Linear", "GELU", "Linear", "GELU", "Linear", "GELU", "Linear"]
    widths = [layer.out_features for layer in ScorePredictor(32, 1).nets[0] if isinstance(layer, torch.nn.Linear)]
    assert widths == [32, 16, 8, 2]
    assert ScorePredictor(32, 1).nets[0][0].eps == 1e-5


def test_scores_start_undecided_or_where_the_bias_says() -> None:
    x = torch.randn(2, 3, 50, 32)
    start = ScorePredictor(32, 2)(x)
    assert (start - 0.5).abs().max() < 0.05
    kept = ScorePredictor(32, 2, init_bias=3.0)(x)
    assert (kept - 0.9526).abs().max() < 0.01


def test_extreme_logits_stay_within_zero_and_one_and_keep_a_finite_gradient() -> None:
    predictor = ScorePredictor(8, 1, init_bias=-500.0)
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    scores = predictor(x)
    assert scores.min() >= 0
    scores.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_another_number_of_streams_than_networks_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        ScorePredictor(8, 2)(torch.randn(3, 1, 4, 8))


def test_gradients(shake) -> None:
    predictor = shake(ScorePredictor(4, 2).double())
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(predictor, (x,))


# ---- sparsity loss -------------------------------------------------------------------------------------------------


def test_sum_adds_every_score() -> None:
    scores = [torch.tensor([[[0.5, 0.25]], [[1.0, 0.0]]]), torch.tensor([[[0.125]], [[0.5]]])]
    assert sparsity_loss(scores, "sum").item() == 0.5 + 0.25 + 1.0 + 0.125 + 0.5


def test_mean_averages_over_samples_and_tokens_and_adds_over_layers_and_modalities() -> None:
    scores = [torch.tensor([[[0.5, 0.25]], [[1.0, 0.0]]]), torch.tensor([[[0.125]], [[0.5]]])]
    assert sparsity_loss(scores, "mean").item() == 0.375 + 0.5 + 0.125 + 0.5


def test_mean_depends_on_neither_batch_nor_resolution_and_sum_on_both() -> None:
    scores = [torch.rand(2, 3, 8, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)]
    larger = [s.repeat(1, 4, 9) for s in scores]
    torch.testing.assert_close(sparsity_loss(larger, "mean"), sparsity_loss(scores, "mean"), rtol=1e-12, atol=0)
    torch.testing.assert_close(sparsity_loss(larger, "sum"), 36 * sparsity_loss(scores, "sum"), rtol=1e-12, atol=0)


def test_mean_pushes_every_layer_alike_whatever_its_number_of_tokens() -> None:
    small, large = torch.rand(2, 1, 4, requires_grad=True), torch.rand(2, 1, 400, requires_grad=True)
    sparsity_loss([small, large], "mean").backward()
    assert small.grad is not None
    assert large.grad is not None
    torch.testing.assert_close(small.grad.sum(), large.grad.sum())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_scores_there_is_nothing_to_penalise(reduction: str) -> None:
    assert sparsity_loss([], reduction).item() == 0  # type: ignore[arg-type]


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'median'"):
        sparsity_loss([torch.rand(1, 1, 1)], "median")  # type: ignore[arg-type]
