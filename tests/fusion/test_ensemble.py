"""The learned ensemble."""

from __future__ import annotations

import torch

from tokenfusion.fusion import LearnedEnsemble


def test_starts_as_the_mean() -> None:
    assert LearnedEnsemble(3).alpha.tolist() == [1, 1, 1]
    x = torch.randn(3, 2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(LearnedEnsemble(3).double()(x), x.mean(0), rtol=1e-12, atol=1e-12)


def test_is_the_softmax_weighted_sum() -> None:
    ensemble = LearnedEnsemble(2).double()
    with torch.no_grad():
        ensemble.alpha.copy_(torch.tensor([0.3, -1.2]))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    weight = torch.tensor([0.3, -1.2], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(ensemble(x), weight[0] * x[0] + weight[1] * x[1], rtol=1e-6, atol=1e-7)


def test_one_stream_is_returned_as_it_is() -> None:
    x = torch.randn(1, 2, 5, 4, 4)
    assert torch.equal(LearnedEnsemble(1)(x), x[0])


def test_its_loss_trains_the_weights_and_never_the_streams() -> None:
    ensemble = LearnedEnsemble(2)
    x = torch.randn(2, 3, 5, requires_grad=True)
    ensemble(x).pow(2).sum().backward()
    assert x.grad is None
    assert ensemble.alpha.grad is not None
    assert ensemble.alpha.grad.abs().min() > 0


def test_learns_to_prefer_the_better_stream() -> None:
    ensemble = LearnedEnsemble(2)
    target = torch.randn(4, 5)
    x = torch.stack([target, torch.randn(4, 5)])
    optimiser = torch.optim.SGD(ensemble.parameters(), lr=1.0)
    for _ in range(20):
        optimiser.zero_grad()
        (ensemble(x) - target).pow(2).mean().backward()
        optimiser.step()
    assert ensemble.alpha[0] > ensemble.alpha[1] + 1


def test_renormalised_over_the_streams_that_are_present() -> None:
    ensemble = LearnedEnsemble(3).double()
    with torch.no_grad():
        ensemble.alpha.copy_(torch.tensor([0.5, -0.5, 2.0]))
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    y = ensemble(x, present)
    first = torch.tensor([0.5, -0.5], dtype=torch.float64).softmax(0)
    second = torch.tensor([0.5, 2.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(y[0], first[0] * x[0, 0] + first[1] * x[1, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[1], second[0] * x[0, 1] + second[1] * x[2, 1], rtol=1e-12, atol=1e-12)


def test_a_missing_stream_gives_neither_value_nor_gradient_to_its_weight() -> None:
    ensemble = LearnedEnsemble(3)
    x = torch.randn(3, 2, 5)
    present = torch.tensor([[True, True], [False, False], [True, True]])
    y = ensemble(x, present)
    assert torch.equal(ensemble(torch.stack([x[0], torch.full_like(x[1], 1e6), x[2]]), present), y)
    y.pow(2).sum().backward()
    assert ensemble.alpha.grad is not None
    assert ensemble.alpha.grad[1] == 0
    assert ensemble.alpha.grad.isfinite().all()


def test_gradient_of_the_weights() -> None:
    ensemble = LearnedEnsemble(3).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def of_alpha(alpha: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ensemble, {"alpha": alpha}, (x,))

    assert torch.autograd.gradcheck(of_alpha, (ensemble.alpha.detach().clone().requires_grad_(),))
