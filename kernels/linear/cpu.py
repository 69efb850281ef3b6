"""Linear maps of many tokens on the C kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime.call import Kernel, address, tracks
from ..cpu_runtime.huge_pages import fresh


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, operands: torch.dtype = torch.bfloat16) -> Tensor:
    """``x @ weight.T + bias`` in float32, from operands as they are or rounded; so are its gradients, however often.

    ``x``: ``[..., in]``; ``weight``: ``[out, in]``; ``bias``: ``[out]``. None is empty. ``operands``: float32 or
    bfloat16.
    """
    if not tracks(x, weight, bias):
        return _linear(x, weight, bias, operands)
    y: Tensor = _Linear.apply(x, weight, bias, operands)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operands: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operands = operands
        return _linear(x, weight, bias, operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # a batch of gradients (``is_grads_batched``) looks like one, and has no numbers of its own
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)
        multiply = F.linear if batched else functools.partial(linear, operands=ctx.operands)
        return (
            multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, operands: torch.dtype) -> Tensor:
    out, width = weight.shape
    rows, right = _laid_out(x.reshape(-1, width)), _laid_out(weight)
    bias = None if bias is None else bias.contiguous()
    y = fresh((*x.shape[:-1], out), x.dtype)
    _KERNEL(
        operands, torch.get_num_threads(), len(rows), out, width,
        rows.data_ptr(), *rows.stride(), right.data_ptr(), right.stride(1), right.stride(0),
        address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


def _laid_out(x: Tensor) -> Tensor:
    """With its rows or its columns dense."""
    return x if 1 in x.stride() else x.contiguous()


_KERNEL = Kernel("matrix_product", 12, 0)
