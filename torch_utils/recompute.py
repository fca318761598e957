"""Gradient checkpointing part by part: only the arguments are kept, and derivatives recompute one part at a time.

So a pass takes the memory of one part, in second derivatives too, where torch.utils.checkpoint keeps the graphs of all.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def by_parts(
    function: Callable[..., Tensor], parts: Iterable[tuple[Tensor, ...]], shared: Iterable[Tensor]
) -> list[Tensor]:
    """Compute [function(*part) for part in parts], differentiable twice.

    `shared`: the tensors, besides its arguments, that the function reads and that may need a gradient.
    The function must be deterministic. It always runs under the present autocast state.
    """
    if not torch.is_grad_enabled():
        return [function(*part) for part in parts]
    shared = list(shared)
    return [_Value.apply(_with_autocast(function, part[0].device.type), len(part), *part, *shared) for part in parts]


def recomputed(module: torch.nn.Module, *arguments: Tensor) -> Tensor:
    """Compute module(*arguments), differentiable twice, and keep only the arguments."""
    (value,) = by_parts(module, [arguments], module.parameters())
    return value


def _with_autocast(function: Callable, device: str) -> Callable:
    """Capture the current autocast state for `function`: backward passes run outside of it."""
    if not torch.amp.is_autocast_available(device):
        return function
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled):
            return function(*tensors)

    return call


class _Value(torch.autograd.Function):
    """function(*tensors[:count]), which also reads the other tensors."""

    @staticmethod
    def forward(ctx, function, count, *tensors):
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors)
        return function(*tensors[:count])

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[2:]
        made = iter(_Gradient.apply(ctx.function, ctx.count, needed, gradient, *ctx.saved_tensors))
        return None, None, *(next(made) if need else None for need in needed)


class _Gradient(torch.autograd.Function):
    """The gradient of ⟨gradient, function(…)⟩ with respect to the `needed` tensors."""

    @staticmethod
    def forward(ctx, function, count, needed, gradient, *tensors):
        ctx.function, ctx.count, ctx.needed = function, count, needed
        ctx.save_for_backward(gradient, *tensors)
        return _derivatives(function, count, needed, gradient, _leaves(tensors, count))

    @staticmethod
    def backward(ctx, *weights):
        gradient, *tensors = ctx.saved_tensors
        inputs = [gradient.detach().requires_grad_(), *_leaves(tensors, ctx.count)]
        first = _derivatives(ctx.function, ctx.count, ctx.needed, inputs[0], inputs[1:], create_graph=True)
        # The gradients of unread tensors are zeros without a graph.
        first, weights = zip(*[(f, w) for f, w in zip(first, weights, strict=True) if f.requires_grad], strict=True)
        needed = ctx.needs_input_grad[3:]
        made = iter(
            torch.autograd.grad(first, _those(inputs, needed), weights, allow_unused=True, materialize_grads=True)
        )
        return None, None, None, *(next(made) if need else None for need in needed)


def _leaves(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Detach the arguments of a part, the first `count` tensors, so that they start a new graph."""
    return [t.detach().requires_grad_(t.requires_grad) if i < count else t for i, t in enumerate(tensors)]


def _those(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t for t, need in zip(tensors, needed, strict=True) if need]


def _derivatives(function, count, needed, gradient, tensors, create_graph=False) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        value = function(*tensors[:count])
        return torch.autograd.grad(
            value, _those(tensors, needed), gradient, create_graph=create_graph, materialize_grads=True
        )
