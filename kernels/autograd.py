"""Gradients of gradients, and transforms of functions, for operations with a backward of their own.

Autograd cannot differentiate what a hand-written backward returns. Each such operation therefore has a *formula*: the
same function in differentiable PyTorch operators. Its gradient takes the place of the fast one where the gradient is
itself differentiated (``create_graph=True``) or comes in batches (``is_grads_batched=True``). Inside of ``torch.func``
transforms and of forward-mode differentiation, operations run without a backward of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def has_storage(x: Tensor) -> bool:
    """False for a batch of gradients (``is_grads_batched``), which looks like one gradient."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def differentiable(
    formula: Callable[..., Any], first: int = 0, stop: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of the ``backward`` of an ``autograd.Function``, which can then be differentiated any number of times.

    Args:
        formula, first, stop: as of :func:`gradient_of`.
    """
    gradient = gradient_of(formula, first, stop)

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.compiler.is_compiling():  # it differentiates no gradient
                return backward(ctx, *grads)
            slow = torch.is_grad_enabled() or not all(grad is None or has_storage(grad) for grad in grads)
            return (gradient if slow else backward)(ctx, *grads)

        return run

    return decorate


def gradient_of(
    formula: Callable[..., Any], first: int = 0, stop: int | None = None
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The ``backward`` of an ``autograd.Function`` that computes ``formula`` again and differentiates it.

    Args:
        formula: ``formula(ctx, *tensors)`` returns what ``forward`` returned for ``tensors``: the first tensors that
            ``forward`` saved, which are its arguments ``first`` to ``stop``, in order.
        first, stop: the arguments of ``forward`` that are tensors or ``None``, ``ctx`` not counted.
    """

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[first:stop]
        with torch.enable_grad():
            # views, so that a tensor that was given as two arguments is two tensors here
            tensors = [None if x is None else x.view_as(x) for x, _ in zip(ctx.saved_tensors, wanted)]
            made = formula(ctx, *tensors)
        outputs = made if isinstance(made, tuple) else (made,)
        pairs = [(y, grad) for y, grad in zip(outputs, grads) if grad is not None and y.requires_grad]
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        places = [first + i for i, (x, want) in enumerate(zip(tensors, wanted)) if want and x is not None]
        if pairs and places:
            inputs: Any = [tensors[place - first] for place in places]
            ends, pushed = zip(*pairs)
            again = torch.is_grad_enabled()
            found = torch.autograd.grad(ends, inputs, pushed, create_graph=again, allow_unused=True)
            for place, grad in zip(places, found):
                results[place] = grad
        return tuple(results)

    return gradient


def refuse_second_derivative(y: Tensor, hint: str) -> Tensor:
    """``y``, whose gradient is an error where it would have to be differentiated itself."""

    def refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(f"has no second derivatives (create_graph=True): {hint}")

    if y.requires_grad:
        y.register_hook(refuse)
    return y
