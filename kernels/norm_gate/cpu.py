"""``norm(a) f(norm(b))`` on the C kernel: normalisations and gates, one pass over memory each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, tracks
from ..cpu_runtime.huge_pages import fresh
from .form import SILU_GATE, Form

_FORWARD = Kernel("gated_forward", 20, 2)
_BACKWARD = Kernel("gated_backward", 20, 2)


def refuse(*, same: bool = True, **facts: Any) -> str | None:
    """``same``: all tensors are of one dtype."""
    return library.refuse(**facts) if same else "takes one dtype"


def gated(
    form: Form, a: Tensor, b: Tensor | None = None, gain_a: Tensor | None = None, gain_b: Tensor | None = None
) -> Tensor:
    """``norm(a) f(norm(b))`` in the shape of ``b``, or of ``a`` where there is no ``b``; gains are ``[heads, dim]``."""
    if gain_a is not None:
        gain_a = gain_a.contiguous()
    if gain_b is not None:
        gain_b = gain_b.contiguous()
    if tracks(a, b, gain_a, gain_b):
        return _Gated.apply(form, a, b, gain_a, gain_b)
    return _forward(form, a, b, gain_a, gain_b)


class _Gated(torch.autograd.Function):
    """Keeps its inputs, which exist anyway."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None
    ) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(a, b, gain_a, gain_b)
        return _forward(form, a, b, gain_a, gain_b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, gain_a, gain_b = ctx.saved_tensors
        # hooks on saved tensors may give them back laid out otherwise
        gain_a, gain_b = (None if gain is None else gain.contiguous() for gain in (gain_a, gain_b))
        form, width = ctx.form, ctx.form.heads * ctx.form.dim
        grad_a = fresh(a.shape, a.dtype)
        grad_b = None if b is None else fresh(b.shape, a.dtype)
        grad_gain_a = None if gain_a is None or not ctx.needs_input_grad[3] else a.new_empty(gain_a.shape)
        grad_gain_b = None if gain_b is None or not ctx.needs_input_grad[4] else a.new_empty(gain_b.shape)
        (a, a_step), (b, b_step), (grad, grad_step) = (_laid_out(x, width) for x in (a, b, grad))
        _BACKWARD(
            a.dtype,
            form.kind, torch.get_num_threads(), a.numel() // max(width, 1), form.heads, form.dim,
            a.data_ptr(), address(b), a_step, b_step, address(gain_a), address(gain_b), 0,
            grad.data_ptr(), grad_step, grad_a.data_ptr(), address(grad_b), width, width,
            address(grad_gain_a), address(grad_gain_b), form.divisor, form.eps,
        )  # fmt: skip
        return None, grad_a, grad_b, grad_gain_a, grad_gain_b


def prepare_gated(
    form: Form, like: Tensor, gain_a: Tensor, gain_b: Tensor | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """:func:`gated` for many times ``a`` and ``b`` as dense as ``like``, into one tensor. Without gradients."""
    y = torch.empty_like(like)
    width = form.heads * form.dim
    call = _FORWARD.prepared(
        like.dtype, 5, 2, form.kind, 1, like.numel() // width, form.heads, form.dim, 0, 0, width, width,
        gain_a, gain_b, y, *[0] * 8, form.divisor, form.eps,
    )  # fmt: skip

    def run(a: Tensor, b: Tensor | None) -> Tensor:
        a, b = a.contiguous(), None if b is None else b.contiguous()
        call(a.data_ptr(), address(b))
        return y

    return run


def _forward(form: Form, a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None) -> Tensor:
    kind, heads, dim, divisor, eps = form
    width = heads * dim
    y = fresh(a.shape if b is None else b.shape, a.dtype)
    a, a_step = _laid_out(a, width)
    b, b_step = _laid_out(b, width)
    _FORWARD(
        a.dtype,
        kind, torch.get_num_threads(), a.numel() // max(width, 1), heads, dim,
        a.data_ptr(), address(b), a_step, b_step, address(gain_a), address(gain_b), y.data_ptr(),
        0, 0, 0, 0, 0, 0, 0, 0, divisor, eps,
    )  # fmt: skip
    return y


def _laid_out(x: Any, width: int) -> tuple[Any, int]:
    """The tensor with each token's numbers side by side, and the step between tokens; a view where one will do."""
    if x is None or x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def swiglu(x: Tensor) -> Tensor:
    """``silu(x[..., :hidden]) * x[..., hidden:]``: ``[..., 2 * hidden]`` -> ``[..., hidden]``."""
    return _Swiglu.apply(x) if tracks(x) else _swiglu(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        hidden = x.shape[-1] // 2
        grad_x = fresh(x.shape, x.dtype)  # both halves' gradients, where they belong
        (x, step), (grad, grad_step) = _laid_out(x, 2 * hidden), _laid_out(grad, hidden)
        left, grad_left, half = x.data_ptr(), grad_x.data_ptr(), hidden * x.element_size()
        _BACKWARD(
            x.dtype,
            SILU_GATE, torch.get_num_threads(), x.numel() // max(2 * hidden, 1), 1, hidden,
            left + half, left, step, step, 0, 0, 0,
            grad.data_ptr(), grad_step, grad_left + half, grad_left, 2 * hidden, 2 * hidden, 0, 0, 1.0, 0.0,
        )  # fmt: skip
        return grad_x


def _swiglu(x: Tensor) -> Tensor:
    hidden = x.shape[-1] // 2
    y = fresh((*x.shape[:-1], hidden), x.dtype)
    x, step = _laid_out(x, 2 * hidden)
    left = x.data_ptr()
    _FORWARD(
        x.dtype,
        SILU_GATE, torch.get_num_threads(), x.numel() // max(2 * hidden, 1), 1, hidden,
        left + hidden * x.element_size(), left, step, step, 0, 0, y.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 1.0, 0.0,
    )  # fmt: skip
    return y
