"""Activations that are cheaper to compute twice than to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linears_behind(norm: nn.LayerNorm | None, linears: Sequence[nn.Module], x: Tensor, training: bool) -> Tensor:
    """Linear layers with a GELU before each; ``norm``, where given, takes the place of the first GELU.

    In training what a linear layer is given is computed again in the backward pass instead of kept. A compiler decides for
    itself what to keep; where a layer is no plain one (an adapter in its place, hooks on it) all are called as they are.
    """
    learns = training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if learns and all(map(_is_plain, linears)) and (norm is None or _is_plain(norm)):
        before = (None, None, None) if norm is None else (norm.eps, norm.weight, norm.bias)
        parameters = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
        found: Tensor = _LinearsBehind.apply(x, *before, *parameters)
        return found
    for index, linear in enumerate(linears):
        x = linear(F.gelu(x) if norm is None or index else norm(x))
    return x


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does what its class says and no more: hooks, pruning and old weight norms hang on calls."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) in (nn.Linear, nn.LayerNorm) and not hooks and "forward" not in vars(layer)


class _LinearsBehind(torch.autograd.Function):
    """Of the input and of the products of all layers but the last, which are kept, what lies between follows.

    ``torch.utils.checkpoint`` does so for any function, for half a millisecond of the host per call: on a GPU that is more than
    layers of this size take.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | None, *parameters: Tensor | None) -> Tensor:
        scale, shift, *linears = parameters
        products: list[Tensor] = []
        given = F.gelu(x) if eps is None else F.layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.eps, ctx.dtype = eps, given.dtype  # which autocast may have chosen; it is over in the backward pass
        for weight, bias in zip(linears[::2], linears[1::2], strict=True):
            given = F.gelu(products[-1]) if products else given
            products.append(F.linear(given, weight, bias))  # type: ignore[arg-type]
        ctx.save_for_backward(*parameters, x, *products[:-1])
        return products[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, _, *of_parameters = ctx.needs_input_grad
        saved = ctx.saved_tensors  # asked for once: whoever computes them again does so once
        parameters, (x, *products) = saved[: len(of_parameters)], saved[len(of_parameters) :]
        start, of_norm = x.to(ctx.dtype), (of_x, *of_parameters[:2])
        if ctx.eps is not None:
            # a norm's parameters may be more exact than the tokens, never less
            scale, shift = [t if t is None else t.to(torch.promote_types(t.dtype, ctx.dtype)) for t in parameters[:2]]
            normed, *moments = torch.native_layer_norm(start, x.shape[-1:], scale, shift, ctx.eps)
        befores = [start if ctx.eps is None else None, *products]  # what a GELU was given; None where it was the norm
        to_linears: list[Tensor | None] = []
        for index, before in reversed(list(enumerate(befores))):
            weight, bias = parameters[2 + 2 * index : 4 + 2 * index]
            of_weight, of_bias = of_parameters[2 + 2 * index : 4 + 2 * index]
            given = normed if before is None else F.gelu(before)
            rows, given_rows = grad.reshape(-1, grad.shape[-1]), given.reshape(-1, given.shape[-1])
            to_weight = _as(rows.t() @ _as(given_rows, grad), weight) if of_weight else None
            to_linears[:0] = [to_weight, _as(rows.sum(0), bias) if of_bias else None]
            if index or any(of_norm):
                grad = _as(grad @ _as(weight, grad), given)
                if before is not None:
                    grad = torch.ops.aten.gelu_backward(grad, before)
        if not any(of_norm):
            return None, None, None, None, *to_linears
        if ctx.eps is None:
            return grad, None, None, None, *to_linears
        layer_norm_backward = torch.ops.aten.native_layer_norm_backward
        found = layer_norm_backward(grad, start, x.shape[-1:], *moments, scale, shift, of_norm)
        asked = zip(found, (x, *parameters[:2]), of_norm, strict=True)
        to_x, *to_norm = [_as(g, t) if wanted else None for g, t, wanted in asked]
        return to_x, None, *to_norm, *to_linears


def _as(x: Tensor, other: Tensor) -> Tensor:
    """In the type of another; most often it is, and this is called often."""
    return x if x.dtype == other.dtype else x.to(other.dtype)
