"""Asking a memory without teaching it (eq. 15): the network applied to queries at fixed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import expect_tensors
from ..dispatch import Backend, Operation
from ..native.kernel import plain, tracks
from ..precision import full_precision
from .activation import ACTIVATIONS
from .native_reading import native_reading, refuse_reading
from .native_token import native_read, refuse_token
from .reference import memory_network

EPS = 1e-6


def read_memory(
    q: Tensor,
    weights: tuple[Tensor, ...],
    activation: str = "gelu",
    norm: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``M(q)`` for every query on its own.

    Args:
        q: ``[batch, time, heads, d_in]``.
        weights: per layer ``[batch, heads, out, in]``.
        norm: ``None``, or the gain ``[heads, d_out]`` of ``M(x) = x + LN(net(x)) * gain``.

    Returns:
        ``[batch, time, heads, d_out]`` in the dtype of ``q``; computed in the weights' dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen path cannot take these arguments; the message says why.
    """
    _check(q, weights, activation, norm)
    compute = weights[0].dtype
    run = READING.choose(
        backend,
        device=q.device.type,
        dtype=compute,
        time=q.shape[1],
        layers=len(weights),
        plain=plain(q, norm, *weights),
        grad=tracks(q, norm, *weights),
    )
    with full_precision(q.device.type):
        asked = q if q.dtype == compute else q.to(compute)
        gain = norm if norm is None or norm.dtype == compute else norm.to(compute)
        y = run(asked, weights, activation, gain)
        return y if y.dtype == q.dtype else y.to(q.dtype)


def _check(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> None:
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError("read_memory: weights: expected a tuple of [batch, heads, out, in], one for each layer")
    named: list[tuple[str, Tensor]] = [("q", q), *((f"weights[{layer}]", w) for layer, w in enumerate(weights))]
    if norm is not None:
        named.append(("norm", norm))
    expect_tensors("read_memory", *named, one_dtype=False)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"read_memory: activation: expected one of {names}, got {activation!r}")
    if q.dim() != 4:
        raise ValueError(f"read_memory: q {list(q.shape)}: expected [batch, time, heads, d_in]")
    batch, _, heads, width = q.shape
    for layer, w in enumerate(weights):
        if w.dim() != 4 or w.shape[0] != batch or w.shape[1] != heads or w.shape[3] != width:
            raise ValueError(
                f"read_memory: weights[{layer}] {list(w.shape)}: expected [{batch}, {heads}, out, {width}] "
                f"to go with q {list(q.shape)}"
            )
        if w.dtype != weights[0].dtype:
            raise TypeError(f"read_memory: weights[{layer}] is {w.dtype}: expected {weights[0].dtype} as weights[0]")
        width = w.shape[2]
    if norm is not None and (norm.shape != (heads, width) or width != q.shape[3]):
        raise ValueError(f"read_memory: norm {list(norm.shape)}: expected [{heads}, {width}], as wide as q")


def _torch(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    if tracks(q, norm, *weights):
        return _Recomputed.apply(activation, q, norm, *weights)
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


class _Recomputed(torch.autograd.Function):
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


def _reference(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    return torch.stack([memory_network(weights, x, activation, norm) for x in q.unbind(1)], dim=1)


READING = Operation(
    "memory_read",
    [
        Backend("native_step", native_read, refuse_token),
        Backend("native", native_reading, refuse_reading),
        Backend("torch", _torch),
        Backend("reference", _reference),
    ],
)
