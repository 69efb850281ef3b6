"""Reading at fixed weights on the C kernel, for many queries, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address
from ..cpu_runtime.call import empty_huge_pages as fresh
from ..cpu_runtime.call import product_dtype as operands
from ..dispatch import needs_grad as tracks
from .activation import NUMBERS
from .cpu import LAYERS, dense

_SIZES = 5 + LAYERS + 1
_run = Kernel("read_run", _SIZES + 4 * 4 + 2 + 2 * 3 * LAYERS + 2, 0)


def refuse_reading(*, layers: int = 1, **facts: Any) -> str | None:
    """Why the kernel cannot run, or ``None``."""
    if layers > LAYERS:
        return f"takes at most {LAYERS} layers, not {layers}"
    return library.refuse(**facts)


def native_reading(q: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` in float32 or float64 on a CPU."""
    if tracks(q, norm, *weights):
        return _Native.apply(activation, operands(q.dtype), q, norm, *weights)
    return _forward(activation, operands(q.dtype), q, norm, weights)[0]


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: str, products: torch.dtype, q: Tensor, norm: Tensor | None, *weights: Tensor
    ) -> Tensor:
        y, q, weights = _forward(activation, products, q, norm, weights)
        ctx.activation, ctx.operands = activation, products
        ctx.save_for_backward(q, norm, *weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, norm, *weights = ctx.saved_tensors
        # hooks on saved tensors may give them back laid out otherwise
        q, weights = dense(q, 1), [dense(w, 2) for w in weights]
        grad_q = fresh(q.shape, q.dtype)
        grad_norm = None if norm is None else norm.new_empty(q.shape[0], *norm.shape)
        grad_weights = [torch.empty(w.shape, dtype=w.dtype) for w in weights]
        _call(ctx.activation, ctx.operands, q, norm, weights, None, dense(grad, 1), grad_q, grad_norm, grad_weights)
        return None, None, grad_q, None if grad_norm is None else grad_norm.sum(0), *grad_weights


def _forward(
    activation: str, products: torch.dtype, q: Tensor, norm: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    q, weights = dense(q, 1), tuple([dense(w, 2) for w in weights])
    y = fresh((*q.shape[:3], weights[-1].shape[2]), q.dtype)
    _call(activation, products, q, norm, weights, y, None, None, None, ())
    return y, q, weights


def _call(
    activation: str,
    products: torch.dtype,
    q: Tensor,
    norm: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor | None,
    grad: Tensor | None,
    grad_q: Tensor | None,
    grad_norm: Tensor | None,
    grad_weights: Sequence[Tensor],
) -> None:
    """``asking`` of read.c, field by field; ``products``: what ``operands`` said."""
    batch, time, heads, width = q.shape
    layers = len(weights)
    widths = [width, *(w.shape[2] for w in weights), *[0] * (LAYERS - layers)]
    matrices = lambda part: [  # noqa: E731
        *(n for w in part for n in (w.data_ptr(), w.stride(0), w.stride(1))), *[0] * (3 * (LAYERS - len(part)))
    ]  # fmt: skip
    gain = None if norm is None else norm.contiguous()
    _run(
        products, batch, time, heads, layers, NUMBERS[activation], *widths,
        *(n for x in (q, y, grad_q, grad) for n in _sequence(x)), address(gain), address(grad_norm),
        *matrices(weights), *matrices(grad_weights), grad is not None,
        max(1, min(torch.get_num_threads(), batch * heads)),
    )  # fmt: skip


def _sequence(x: Tensor | None) -> list[int]:
    return [0] * 4 if x is None else [x.data_ptr(), *x.stride()[:3]]
