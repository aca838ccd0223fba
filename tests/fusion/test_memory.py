"""What is computed again in the backward pass gives the numbers of the plain modules, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tokenfusion.fusion.memory import linears_behind

NORMS = {
    "norm": lambda: nn.LayerNorm(8),
    "bare norm": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "gelu": lambda: None,
}


class Layers(nn.Module):
    def __init__(self, norm: nn.LayerNorm | None, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.norm, self.linears = norm, nn.ModuleList(linears)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        return linears_behind(self.norm, list(self.linears), x, training)


@pytest.fixture(params=[(name, count) for name in NORMS for count in (1, 3)], ids=lambda p: f"{p[0]} and {p[1]}")
def layers(request: pytest.FixtureRequest) -> Layers:
    torch.manual_seed(0)
    name, count = request.param
    made = Layers(NORMS[name](), [nn.Linear(8, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)][:count])
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def gradients(layers: Layers, x: Tensor, training: bool) -> list[Tensor | None]:
    """The output, and the gradients of the input and of every parameter."""
    learning = [x, *layers.parameters()]
    for leaf in learning:
        leaf.grad = None
    y = layers(x, training)
    y.float().square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in learning)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_plain_modules(layers: Layers, autocast: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not autocast:
        layers.bfloat16()
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lean, plain = (gradients(layers, x, training) for training in (True, False))
    for a, b in zip(lean, plain, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("learns", [True, False])
def test_what_is_frozen_gets_no_gradient(layers: Layers, learns: bool) -> None:
    for index, parameter in enumerate(layers.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    x = torch.randn(2, 3, 8, requires_grad=learns)
    lean, plain = (gradients(layers, x, training) for training in (True, False))
    wanted = [True, learns, *(parameter.requires_grad for parameter in layers.parameters())]
    assert [g is not None for g in lean] == [g is not None for g in plain] == wanted
    assert all(a is None or torch.equal(a, b) for a, b in zip(lean, plain, strict=True))


def test_what_lies_between_is_not_kept(layers: Layers) -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)

    def kept(training: bool) -> int:
        places: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: places.add(t.data_ptr()) or t, lambda t: t):
            y = layers(x, training)
        del y
        return len(places - {parameter.data_ptr() for parameter in layers.parameters()})

    assert kept(training=True) == len(layers.linears)  # the input, and every product but the last
    assert kept(training=False) >= 2 * len(layers.linears)


@pytest.mark.parametrize("place", ["norm", "linear"])
def test_hooks_are_called(place: str) -> None:
    """Pruning, old weight norms, profilers and adapters hang on calls."""
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 4)
    fired: list[str] = []
    (norm if place == "norm" else linear).register_forward_hook(lambda *_: fired.append(place))
    linears_behind(norm, [linear], torch.randn(2, 8, requires_grad=True), training=True)
    assert fired == [place]


def test_pruned_layers_learn() -> None:
    linear = nn.Linear(8, 4)
    prune.l1_unstructured(linear, "weight", 0.5)
    for _ in range(2):
        linears_behind(None, [linear], torch.randn(2, 8), training=True).sum().backward()
    assert (linear.weight_orig.grad[linear.weight_mask == 0] == 0).all()


@pytest.mark.parametrize("shape", [(8,), (2, 8), (0, 8), (2, 3, 5, 8)])
def test_rows_of_any_shape(layers: Layers, shape: tuple[int, ...]) -> None:
    x = torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))).requires_grad_()
    assert x.shape == shape
    for a, b in zip(*(gradients(layers, x, training) for training in (True, False)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_adapter_in_the_place_of_a_layer_is_called() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    adapter, x = Adapter(8, 4), torch.randn(2, 8, requires_grad=True)
    assert torch.equal(linears_behind(None, [adapter], x, training=True), adapter(nn.functional.gelu(x)))
