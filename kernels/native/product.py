"""Linear maps of many tokens on the C kernel, with bfloat16 operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel import Kernel, address, tracks
from .pages import fresh


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float32, operands rounded to bfloat16; so are those of its gradients, however often.

    ``x``: ``[..., in]``; ``weight``: ``[out, in]``; ``bias``: ``[out]``. None is empty.
    """
    if not tracks(x, weight, bias):
        return _linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # a batch of gradients (``is_grads_batched``) looks like one, and has no numbers of its own
        multiply = F.linear if torch._C._functorch.is_legacy_batchedtensor(grad) else linear
        return (
            multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    rows, right = _laid_out(x.reshape(-1, width)), _laid_out(weight)
    bias = None if bias is None else bias.contiguous()
    y = fresh((*x.shape[:-1], out), x.dtype)
    _KERNEL(
        torch.bfloat16, torch.get_num_threads(), len(rows), out, width,
        rows.data_ptr(), *rows.stride(), right.data_ptr(), right.stride(1), right.stride(0),
        address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


def _laid_out(x: Tensor) -> Tensor:
    """With its rows or its columns dense."""
    return x if 1 in x.stride() else x.contiguous()


_KERNEL = Kernel("matrix_product", 12, 0)
