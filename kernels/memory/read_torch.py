"""The memory network at fixed weights in PyTorch: many queries with gradients, or one token in few operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import full_precision
from ..dispatch import needs_grad as tracks
from .activation import ACTIVATIONS

EPS = 1e-6


def torch_reading(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` on any device."""
    if tracks(q, norm, *weights) and not torch.compiler.is_compiling():  # which decides what to keep
        return Recomputed.apply(activation, q, norm, *weights)
    batch, time, heads, _ = q.shape
    if time > 1:
        return _through(q, weights, activation, norm)
    gain = None if norm is None else per_row(norm, batch)
    y = answer(q.reshape(batch * heads, 1, -1), [w.flatten(0, 1) for w in weights], activation, gain)
    return y.view(batch, 1, heads, -1)


def _through(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    h = x = q.transpose(1, 2)
    for layer, weight in enumerate(weights):
        if layer:
            h = ACTIVATIONS[activation].value(h)
        h = h @ weight.mT
    if norm is not None:
        h = x + F.layer_norm(h, h.shape[-1:], eps=EPS) * norm.unsqueeze(1)
    return h.transpose(1, 2)


class Recomputed(torch.autograd.Function):
    """Keeps the queries and the weights, which exist anyway, and no hidden value."""

    @staticmethod
    def forward(ctx: Any, activation: str, q: Tensor, norm: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(q, norm, *weights)
        ctx.activation = activation
        return _through(q, weights, activation, norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given: list[Any] = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])
        ]
        q, norm, *weights = given
        with torch.enable_grad(), full_precision(grad.device.type):
            y = _through(q, weights, ctx.activation, norm)
        wanted = [x for x in given if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad))
        return None, *(next(found) if x is not None and x.requires_grad else None for x in given)


# ---------------------------------------------------------------------------------------------------------------
# One token of each row, without gradients: every tensor [rows, 1, width], a row being a batch row and a head


def answer(query: Tensor, weights: list[Tensor], activation: str, gain: Tensor | None) -> Tensor:
    """``M(query)`` for one token of each row: query ``[rows, 1, d_in]``, weights ``[rows, out, in]``."""
    y = network(query, weights, activation)[1][-1]
    if gain is None:
        return y
    return torch.addcmul(query, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], gain)


def network(x: Tensor, weights: list[Tensor], activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' inputs and outputs, ``[rows, 1, width]``, for the input ``x``."""
    value = small(ACTIVATIONS[activation].value)
    inputs, hidden = [x], [times(weights[0], x)]
    for weight in weights[1:]:
        inputs.append(hidden[-1] if activation == "identity" else value(hidden[-1]))
        hidden.append(times(weight, inputs[-1]))
    return inputs, hidden


def times(weight: Tensor, x: Tensor) -> Tensor:
    """``W x`` for every row: weight ``[rows, out, in]``, x ``[rows, 1, in]`` -> ``[rows, 1, out]``.

    The transpose's strides matter: the same column as a contiguous tensor takes seven times as long.
    """
    return torch.bmm(weight, x.mT).view(x.shape[0], 1, -1)


def small(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same elementwise function of ``[rows, x, y]``, for few numbers.

    PyTorch hands contiguous tensors to a library that takes longer to set up than these take to compute.
    """
    return lambda *tensors: function(*[x.transpose(0, 2) for x in tensors]).transpose(0, 2)


def per_row(gain: Tensor, batch: int) -> Tensor:
    """``[heads, d] -> [rows, 1, d]``."""
    return gain.expand(batch, *gain.shape).reshape(-1, 1, gain.shape[-1])
