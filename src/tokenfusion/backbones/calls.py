"""What is seen of one forward pass: the calls of a network's blocks, of their children, and of the convolutions outside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import UserError, first_line
from tokenfusion.fusion.fusers import Grid


@dataclass
class Call:
    """What was seen of one call of a module."""

    name: str
    given: torch.Size | None
    gave: torch.Size | None = None
    is_alone: bool = True  # no tensor and no size beside the first argument
    pair: Grid | None = None  # two whole numbers among the arguments: rows and columns
    children: list[Call] = field(default_factory=list)
    tokens: Tensor | None = None  # what it was given, where its shape is a new one or has two readings
    maps: list[Grid] = field(default_factory=list)  # rows and columns that convolutions outside blocks gave before


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode for a while; every module's own mode comes back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def first_tensor(value: Any) -> Tensor | None:
    """The tensor, or the first one of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def first_parameter(module: nn.Module) -> str:
    """What a module calls its first argument."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def given_by_name(first: str, kwargs: dict[str, Any]) -> str:
    """By which name a module that is called by name alone is given its tokens: its first one, else the first one given."""
    return first if first in kwargs else next(iter(kwargs), "")


def seen(network: nn.Module, blocks: dict[str, nn.Module], example: Any, run: Any) -> tuple[list[Call], list[Call]]:
    """The calls of the blocks and of the convolutions outside them, in the order of a forward pass."""
    calls: list[Call] = []
    stems: list[Call] = []
    with evaluating(network), torch.no_grad(), _watched(network, blocks, calls, stems):
        try:
            run(example)
        except UserError:
            raise
        except Exception as error:  # whatever a foreign module raises
            given = list(example.shape) if isinstance(example, Tensor) else f"{type(example).__name__}, wanted a tensor"
            raise UserError(
                f"{type(network).__name__} does not run on an example of {given} ({first_line(error)}); give example="
            ) from error
    return calls, stems


def noisy(example: Any) -> Any:
    """Inputs that tell where a token looks, and which tokens look nowhere: noise, in every sample other noise.

    Of images four: noise, the same with other noise in its left half, in its upper half, and all over. Whole numbers stay as
    they are.
    """
    if not isinstance(example, Tensor) or not example.dim() or not example.is_floating_point():
        return example
    generator = torch.Generator().manual_seed(0)
    if example.dim() != 4:
        return example[0] + torch.randn((max(4, len(example)), *example.shape[1:]), generator=generator).to(example)
    some, other = torch.randn((2, *example.shape[1:]), generator=generator).to(example)
    rows = example[0] + torch.stack([some, some, some, other])
    rows[1, :, :, : example.shape[3] // 2] = other[:, :, : example.shape[3] // 2]
    rows[2, :, : example.shape[2] // 2] = other[:, : example.shape[2] // 2]
    return rows


@contextmanager
def _watched(network: nn.Module, blocks: dict[str, nn.Module], calls: list[Call], stems: list[Call]) -> Iterator[None]:
    """Note every call of the blocks, of their children, and of the convolutions outside them."""
    handles: list[Any] = []
    open_calls: list[Call] = []
    maps: list[Grid] = []

    def begin(name: str, into: list[Call] | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = "" if args else given_by_name(first_parameter(module), kwargs)
            x = first_tensor(args) if args else first_tensor(kwargs.get(first))
            more = [*args[1:], *(value for key, value in kwargs.items() if key != first)]
            call = Call(name, None if x is None else x.shape, None, _is_nothing(more), _pair(more))
            if into is not None:
                is_either = x is not None and x.dim() == 4 and x.shape[1] == x.shape[3]
                is_new = not into or into[-1].given != call.given
                if x is not None and (is_either or is_new):
                    call.tokens = x.clone()  # a block may write to its own
                call.maps = list(maps)
                into.append(call)
            elif open_calls:
                open_calls[-1].children.append(call)
            open_calls.append(call)

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        y = first_tensor(output)
        open_calls.pop().gave = None if y is None else y.shape

    def convolved(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            stems.append(Call(name, args[0].shape, output.shape))
            if output.dim() == 4:
                maps.append((output.shape[2], output.shape[3]))

        return hook

    try:
        for name, block in blocks.items():
            handles.append(block.register_forward_pre_hook(begin(name, calls), with_kwargs=True))
            handles.append(block.register_forward_hook(end))
            for child_name, child in block.named_children():
                handles.append(child.register_forward_pre_hook(begin(child_name, None), with_kwargs=True))
                handles.append(child.register_forward_hook(end))
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not any(
                name.startswith(f"{b}.") for b in blocks
            ):
                handles.append(module.register_forward_hook(convolved(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_nothing(values: list[Any]) -> bool:
    """Arguments that say nothing of positions or sizes."""
    return not any(isinstance(v, Tensor | tuple | list) or type(v) is int for v in values)


def _pair(values: list[Any]) -> Grid | None:
    for value in values:
        if isinstance(value, tuple | list | torch.Size) and len(value) == 2 and all(type(n) is int for n in value):
            return int(value[0]), int(value[1])
    numbers = [value for value in values if type(value) is int]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None
