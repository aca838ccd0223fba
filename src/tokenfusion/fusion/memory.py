"""Activations that are cheaper to compute twice than to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear_behind(norm: nn.LayerNorm | None, linear: nn.Module, x: Tensor, training: bool) -> Tensor:
    """``linear(norm(x))``, or ``linear(gelu(x))`` where ``norm`` is None.

    In training what ``linear`` is given is computed again in the backward pass instead of kept. A compiler decides for itself
    what to keep; what is no plain ``nn.Linear`` (an adapter in its place) is called as it is.
    """
    if training and torch.is_grad_enabled() and type(linear) is nn.Linear and not torch.compiler.is_compiling():
        before = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
        found: Tensor = _LinearBehind.apply(x, linear.weight, linear.bias, *before)
        return found
    product: Tensor = linear(F.gelu(x) if norm is None else norm(x))
    return product


class _LinearBehind(torch.autograd.Function):
    """A linear layer behind a norm (where there is an ``eps``) or GELU, that keeps the input of both alone.

    ``torch.utils.checkpoint`` does so for any function, for half a millisecond of the host per call: on a GPU that is more than
    layers of this size take.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float | None,
    ) -> Tensor:
        given = _given(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias)
        ctx.eps, ctx.dtype = eps, given.dtype  # which autocast may have chosen; it is over in the backward pass
        return F.linear(given, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *norm = ctx.saved_tensors
        of_x, of_weight, of_bias, *of_norm, _ = ctx.needs_input_grad
        wanted = (of_x, *of_norm)
        leaves: list[Any]
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip((x, *norm), wanted, strict=True)]
        with torch.set_grad_enabled(ctx.eps is not None):
            given = _given(leaves[0].to(ctx.dtype), leaves[1], leaves[2], ctx.eps)
        rows, given_rows = grad.flatten(0, -2), given.detach().flatten(0, -2).to(grad.dtype)
        to_weight = (rows.t() @ given_rows).to(weight.dtype) if of_weight else None
        to_bias = rows.sum(0).to(bias.dtype) if of_bias else None
        if not any(wanted):
            return None, to_weight, to_bias, None, None, None
        to_given = (grad @ weight.to(grad.dtype)).to(given.dtype)
        if ctx.eps is None:
            return torch.ops.aten.gelu_backward(to_given, x), to_weight, to_bias, None, None, None
        found = iter(torch.autograd.grad(given, [t for t, w in zip(leaves, wanted, strict=True) if w], to_given))
        to_x, *to_norm = [next(found) if w else None for w in wanted]
        return to_x, to_weight, to_bias, *to_norm, None


def _given(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    return F.gelu(x) if eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)
