"""Attention on the C kernel (cpu.c), forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable
from ..cpu_runtime.call import Kernel, address, empty_huge_pages, product_dtype
from ..dispatch import needs_grad
from .reference import Prefix, reference_attention

_KERNEL = Kernel("attention_run", integers=71)


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, start: Tensor | None, prefix: Prefix | None, step: int
) -> Tensor:
    """``attention`` in float32 or float64 on a CPU."""
    tensors = (q, k, v) if prefix is None else (q, k, v, *prefix)
    start = None if start is None else start.contiguous()
    products = product_dtype(q.dtype)
    if needs_grad(*tensors):
        return _Native.apply(window, step, start, products, *tensors)
    y = empty_huge_pages(q.shape, q.dtype)
    _call(window, step, start, products, tensors, y, None, None, None)
    return y


def _formula(ctx: Any, *tensors: Tensor) -> Tensor:
    q, k, v, *prefix = tensors
    return reference_attention(q, k, v, ctx.window, ctx.start, Prefix(*prefix) if prefix else None, ctx.step)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, window: int | None, step: int, start: Tensor | None, products: torch.dtype, *tensors: Tensor
    ) -> Tensor:
        q = tensors[0]
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        y = empty_huge_pages(q.shape, q.dtype)
        _call(window, step, start, products, tensors, y, lse, None, None)
        ctx.window, ctx.step, ctx.start, ctx.operands = window, step, start, products
        ctx.save_for_backward(*tensors, y, lse)
        return y

    @staticmethod
    @differentiable(_formula, first=4)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y, lse = ctx.saved_tensors
        # hooks on saved tensors may return other strides
        y, grad = y.contiguous(), grad if grad.stride(3) == 1 else grad.contiguous()
        grads = [empty_huge_pages(x.shape, x.dtype) for x in tensors]
        _call(ctx.window, ctx.step, ctx.start, ctx.operands, tensors, y, lse.contiguous(), grads, grad)
        return None, None, None, None, *grads


def _call(
    window: int | None,
    step: int,
    start: Tensor | None,
    products: torch.dtype,
    tensors: Sequence[Tensor],
    y: Tensor,
    lse: Tensor | None,
    grads: list[Tensor] | None,
    grad: Tensor | None,
) -> None:
    """``tensors`` and ``grads``: of q, k, v and perhaps the prefix's. ``products``: the dtype of products."""
    rows, time, heads, d = y.shape
    kv_heads = tensors[1].shape[2]
    dense: list[Tensor] = []
    for x in tensors:
        dense.append(x if x.stride(3) == 1 else x.contiguous())
    sets: list[int] = []
    for first in (0, 3):
        if first == len(dense):
            sets += [0] * 26
            continue
        for part in (dense, grads):
            for i in range(first, first + 3):
                sets += (0, 0, 0, 0) if part is None else (part[i].data_ptr(), *part[i].stride()[:3])
        sets += [dense[first + 1].shape[1], first > 0]
    _KERNEL(
        products, rows, time, heads, kv_heads, d, window or 0, step, *sets, address(start),
        y.data_ptr(), *y.stride()[:3], *((0, 0, 0, 0) if grad is None else (grad.data_ptr(), *grad.stride()[:3])),
        address(lse), grads is not None,
        max(1, min(torch.get_num_threads(), rows * kv_heads)),
    )  # fmt: skip
