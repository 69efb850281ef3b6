"""Linear maps of many tokens on the C kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import has_storage
from ..cpu_runtime.call import Kernel, address, empty_huge_pages
from ..dispatch import needs_grad

_KERNEL = Kernel("matrix_product", integers=12)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, operands: torch.dtype = torch.bfloat16) -> Tensor:
    """``x @ weight.T + bias`` in float32, differentiable any number of times.

    ``x``: ``[..., in]``; ``weight``: ``[out, in]``; ``bias``: ``[out]``. No tensor is empty. ``operands``:
    torch.float32, or torch.bfloat16 to round the factors of every product to it, in backward too.
    """
    if needs_grad(x, weight, bias):
        y: Tensor = _Linear.apply(x, weight, bias, operands)
        return y
    out, width = weight.shape
    rows = x.reshape(-1, width)
    # rows or columns must be dense
    rows = rows if 1 in rows.stride() else rows.contiguous()
    weight = weight if 1 in weight.stride() else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = empty_huge_pages((*x.shape[:-1], out), x.dtype)
    _KERNEL(
        operands, torch.get_num_threads(), len(rows), out, width,
        rows.data_ptr(), *rows.stride(), weight.data_ptr(), weight.stride(1), weight.stride(0),
        address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operands: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operands = operands
        return linear(x, weight, bias, operands=operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        multiply = functools.partial(linear, operands=ctx.operands) if has_storage(grad) else F.linear
        return (
            multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )
