"""Reading at fixed weights on the Triton kernels, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import needs_grad
from ...triton_runtime import launch
from ..network_torch import ACTIVATION_NUMBERS, EPS
from .answer_bwd_kernel import answer_backward_kernel, answer_backward_weights_kernel, stretches
from .answer_kernel import answer_kernel
from .schedule import operands, schedule


def triton_read(
    q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None
) -> Tensor:
    """``read_memory`` for one or two layers; ``half``: what products are rounded to (``half_dtype``)."""
    products = operands(weights[0].dtype, None if half is None else getattr(torch, half))
    if needs_grad(q, norm, *weights):
        return _Answered.apply(activation, products, q, norm, *weights)
    return _answer(activation, products, q, norm, weights)


class _Answered(torch.autograd.Function):
    """Keeps the queries and the weights, which exist anyway, and no hidden value."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, products: dict[str, Any], q: Tensor, norm: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, norm, *weights)
        ctx.activation, ctx.products = activation, products
        return _answer(activation, products, q, norm, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, norm, *weights = ctx.saved_tensors
        learned = any(ctx.needs_input_grad[4:])
        grad_q, grad_norm, grad_weights = _pull(ctx.activation, ctx.products, grad, q, norm, weights, learned)
        return None, None, grad_q, grad_norm, *grad_weights


def _answer(
    activation: str, products: dict[str, Any], q: Tensor, norm: Tensor | None, weights: tuple[Tensor, ...]
) -> Tensor:
    batch, time, heads, d_in = q.shape
    d_out, width = weights[-1].shape[2:]
    y = torch.empty(batch, time, heads, d_out, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    q, fixed = _dense(q), _fixed(answer_kernel, activation, products, time, norm, weights)
    launch(
        answer_kernel, (batch * heads * triton.cdiv(time, fixed["ROWS"]),),
        q, *_two(weights), None if norm is None else norm.contiguous(), y,
        time, heads, d_in, width, d_out, EPS, *_steps(q), **fixed,
    )  # fmt: skip
    return y


def _pull(
    activation: str,
    products: dict[str, Any],
    grad: Tensor,
    q: Tensor,
    norm: Tensor | None,
    weights: list[Tensor],
    learned: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Gradients of the queries, of the gain, and, where they are to be ``learned``, of the weights."""
    batch, time, heads, d_in = q.shape
    d_out, width = weights[-1].shape[2:]
    if not grad.numel():
        none = [torch.zeros_like(w) if learned else None for w in weights]
        return torch.zeros_like(q), None if norm is None else torch.zeros_like(norm), none
    q, grad, two = _dense(q), _dense(grad), _two(weights)
    wide = lambda *shape: torch.empty(shape, dtype=weights[0].dtype, device=q.device)  # noqa: E731
    fixed = _fixed(answer_backward_kernel, activation, products, time, norm, weights)
    blocks = triton.cdiv(time, fixed["ROWS"])
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pushed, grad_gain = grad, None
    if norm is not None:
        pushed, grad_gain = wide(batch, heads, time, d_out).transpose(1, 2), wide(batch, heads, blocks, d_out)
    launch(
        answer_backward_kernel, (batch * heads * blocks,),
        grad, q, *two, None if norm is None else norm.contiguous(), grad_q, pushed, grad_gain,
        time, heads, d_in, width, d_out, EPS, *_steps(q), *_steps(grad), **fixed,
    )  # fmt: skip
    grad_norm = None if grad_gain is None else grad_gain.sum((0, 2))
    if not learned:
        return grad_q, grad_norm, [None] * len(weights)
    stretch, parts = stretches(time)
    sums = [wide(parts, *w.shape) for w in weights]
    fixed = _fixed(answer_backward_weights_kernel, activation, products, time, norm, weights)
    launch(
        answer_backward_weights_kernel, (batch * heads, triton.cdiv(width, fixed["BLOCK"]), parts),
        q, pushed, *two, sums[0], sums[-1],
        time, heads, stretch, d_in, width, d_out, *_steps(q), *_steps(pushed), **fixed,
    )  # fmt: skip
    return grad_q, grad_norm, [x.sum(0) if parts > 1 else x[0] for x in sums]


def _fixed(
    kernel: Any,
    activation: str,
    products: dict[str, Any],
    time: int,
    norm: Tensor | None,
    weights: tuple[Tensor, ...] | list[Tensor],
) -> dict[str, Any]:
    """What a kernel is compiled for, and how it is launched."""
    d_out, width = weights[-1].shape[2:]
    known = dict(
        LAYERS=len(weights), ACTIVATION=ACTIVATION_NUMBERS[activation], NORM=norm is not None,
        WIDE=tl.float64 if weights[0].dtype == torch.float64 else tl.float32,
        **schedule(kernel.__name__, time, weights[0].shape[3], width, d_out), **products,
    )  # fmt: skip
    return {name: x for name, x in known.items() if name in (*kernel.arg_names, "num_warps", "num_stages")}


def _dense(x: Tensor) -> Tensor:
    """With each vector's numbers side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _two(weights: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, Tensor]:
    """The two layers' weights; one layer stands in the second's place."""
    dense = [w.contiguous() for w in weights]
    return dense[0], dense[-1]


def _steps(x: Tensor) -> tuple[int, int, int]:
    """From batch row to batch row, from token to token and from head to head of ``[batch, time, heads, ...]``."""
    return x.stride(0), x.stride(1), x.stride(2)
