"""What is computed again in the backward pass gives the numbers of the plain modules, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tokenfusion.fusion.memory import linear_behind

LAYERS = {
    "norm": lambda: nn.LayerNorm(8),
    "bare norm": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "gelu": lambda: None,
}


@pytest.fixture(params=list(LAYERS))
def layers(request: pytest.FixtureRequest) -> tuple[nn.LayerNorm | None, nn.Linear]:
    torch.manual_seed(0)
    norm, linear = LAYERS[request.param](), nn.Linear(8, 4)
    if norm is not None and norm.elementwise_affine:
        nn.init.normal_(norm.weight)
    return norm, linear


def gradients(norm: nn.LayerNorm | None, linear: nn.Module, x: Tensor, training: bool) -> list[Tensor | None]:
    """The output, and the gradients of the input and of every parameter."""
    learning = [x, *(norm.parameters() if norm else ()), *linear.parameters()]
    for leaf in learning:
        leaf.grad = None
    y = linear_behind(norm, linear, x, training)
    y.float().square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in learning)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_plain_modules(layers, autocast: bool, dtype: torch.dtype) -> None:
    norm, linear = layers
    if dtype == torch.bfloat16 and not autocast:
        linear.bfloat16(), norm and norm.bfloat16()
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lean = gradients(norm, linear, x, training=True)
        plain = gradients(norm, linear, x, training=False)
    for a, b in zip(lean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_frozen_gets_no_gradient(layers) -> None:
    norm, linear = layers
    linear.weight.requires_grad_(False)
    if norm is not None and norm.weight is not None:
        norm.bias.requires_grad_(False)
    for learns in (True, False):
        x = torch.randn(2, 3, 8, requires_grad=learns)
        lean, plain = (gradients(norm, linear, x, training) for training in (True, False))
        assert [g is None for g in lean] == [g is None for g in plain]
        assert (lean[1] is None) != learns
        for a, b in zip(lean, plain, strict=True):
            assert a is None or torch.equal(a, b)


def test_the_input_of_the_linear_layer_is_not_kept(layers) -> None:
    norm, linear = layers
    x, kept = torch.randn(2, 3, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear_behind(norm, linear, x, training=True)
    known = {t.data_ptr() for t in (x, *linear.parameters(), *(norm.parameters() if norm else ()))}
    assert set(kept) <= known
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear_behind(norm, linear, x, training=False)
    assert not set(kept) <= known


def test_an_adapter_in_the_place_of_the_layer_is_called() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    adapter, x = Adapter(8, 4), torch.randn(2, 8, requires_grad=True)
    assert torch.equal(linear_behind(None, adapter, x, training=True), adapter(nn.functional.gelu(x)))
