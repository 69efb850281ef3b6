"""Reading at fixed weights on the Triton kernel, with gradients, which are a few large products and PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native.kernel import tracks
from ..triton.memory_answer import answer_kernel
from ..triton.memory_network import NUMBERS
from ..triton.schedule import operands, schedule
from .torch_reading import EPS, Recomputed


def triton_reading(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    """``read_memory`` for one or two layers; queries in half precision are multiplied in it."""
    if tracks(q, norm, *weights):
        return _Answered.apply((activation, q.dtype), q.to(weights[0].dtype), norm, *weights)
    return _answer(q, weights, activation, norm, q.dtype)


class _Answered(Recomputed):
    @staticmethod
    def forward(ctx: Any, form: Any, q: Tensor, norm: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(q, norm, *weights)
        ctx.activation, given = form
        return _answer(q, weights, ctx.activation, norm, given)


def _answer(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, given: torch.dtype) -> Tensor:
    batch, time, heads, d_in = q.shape
    d_out, width = weights[-1].shape[2:]
    y = torch.empty(batch, time, heads, d_out, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    q = q if q.stride(3) == 1 else q.contiguous()
    first, last = weights[0].contiguous(), weights[-1].contiguous()
    tiles = schedule(answer_kernel.__name__, time, d_in, width, d_out)
    products = operands(weights[0].dtype, given)
    answer_kernel[(batch * heads, triton.cdiv(time, tiles["ROWS"]))](
        q, first, last, None if norm is None else norm.contiguous(), y,
        time, heads, d_in, width, d_out, EPS, q.stride(0), q.stride(1), q.stride(2),
        LAYERS=len(weights), ACTIVATION=NUMBERS[activation], NORM=norm is not None,
        WIDE=tl.float64 if weights[0].dtype == torch.float64 else tl.float32,
        **{name: tiles[name] for name in ("ROWS", "IN", "OUT", "BLOCK", "num_warps", "num_stages")},
        OPERAND=products["OPERAND"], PRECISION=products["PRECISION"],
    )  # fmt: skip
    return y
