"""``y = norm(a) f(norm(b))`` in Triton: the normalizations and gates around attention and memory.

The story. A token is ``heads`` vectors of ``dim`` numbers; each vector is normalized on its own,
``x / sqrt(|x|^2 / divisor + eps)``, and scaled by the gain of its head. A program takes one head of a stretch of
tokens, ``ROWS`` vectors at a time, and reads each number once. Nothing is kept for backward but the inputs: it
normalizes again, and adds up the gradients of the gains over its own stretch. These sums are added in one fixed order,
so that every run gives the same bits.

Bytes: forward reads ``a`` (and ``b``) and writes ``y``; backward reads those and ``grad`` and writes their gradients.
The work per number is a few operations: both are bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import differentiable
from ..triton_runtime import VARYING, launch
from . import torch_backend
from .form import GATE, GATED_NORM, NORM, SILU_GATE, Form

_NORM, _GATE, _GATED_NORM, _SILU_GATE = map(tl.constexpr, (NORM, GATE, GATED_NORM, SILU_GATE))


@triton.jit
def _vectors(x, row, column, inside, step, wide: tl.constexpr):
    """The vectors at ``row``, one head's columns of each, in the type that sums are taken in."""
    return tl.load(x + row[:, None] * step + column[None, :], mask=inside, other=0.0).to(wide)


@triton.jit
def _gain(gain, column, inside, given: tl.constexpr, wide: tl.constexpr):
    if given:
        return tl.load(gain + column, mask=inside, other=0.0).to(wide)[None, :]
    return tl.full((1, column.shape[0]), 1.0, wide)


@triton.jit
def _inverse(x, DIVISOR: tl.constexpr, EPS: tl.constexpr):
    return 1 / tl.sqrt(tl.sum(x * x, axis=1) / DIVISOR + EPS)[:, None]


@triton.jit
def _logistic(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _through_norm(grad, x, inverse, DIVISOR: tl.constexpr):
    """From the gradient of ``x * inverse`` to that of ``x``."""
    along = tl.sum(grad * x, axis=1)[:, None]
    return inverse * grad - x * (inverse * inverse * inverse) * (along / DIVISOR)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    left, right, gain_a, gain_b, y,
    tokens, dim, heads, a_step, b_step,
    DIVISOR: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of ``ROWS`` tokens."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    column = head * dim + at
    inside = (row < tokens)[:, None] & (at < dim)[None, :]
    out = _vectors(left, row, column, inside, a_step, WIDE)
    if KIND != _SILU_GATE:
        out *= _inverse(out, DIVISOR, EPS) * _gain(gain_a, column, at < dim, GIVEN, WIDE)
    if KIND != _NORM:
        z = _vectors(right, row, column, inside, b_step, WIDE)
        if KIND == _GATE:
            out *= _logistic(z * _inverse(z, DIVISOR, EPS) * _gain(gain_b, column, at < dim, True, WIDE))
        else:
            out *= z * _logistic(z)
    tl.store(y + row[:, None] * tl.cast(heads * dim, tl.int64) + column[None, :], out, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    left, right, gain_a, gain_b, grad, grad_a, grad_b, grad_gain_a, grad_gain_b,
    tokens, dim, heads, a_step, b_step, grad_step, grad_a_step, grad_b_step, stretch,
    DIVISOR: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of a stretch of tokens; the gains' gradients are sums over it."""
    part, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, WIDTH)
    column = head * dim + at
    sum_a = tl.zeros((WIDTH,), WIDE)
    sum_b = tl.zeros((WIDTH,), WIDE)
    of_a = _gain(gain_a, column, at < dim, GIVEN and KIND != _SILU_GATE, WIDE)
    of_b = _gain(gain_b, column, at < dim, KIND == _GATE, WIDE)
    for start in range(0, stretch, ROWS):
        row = part.to(tl.int64) * stretch + start + tl.arange(0, ROWS)
        inside = (row < tokens)[:, None] & (at < dim)[None, :]
        x = _vectors(left, row, column, inside, a_step, WIDE)
        g = _vectors(grad, row, column, inside, grad_step, WIDE)
        out = x
        if KIND != _SILU_GATE:
            inverse_a = _inverse(x, DIVISOR, EPS)
            out = x * inverse_a * of_a
        through = g  # the gradient of the left factor
        if KIND != _NORM:
            z = _vectors(right, row, column, inside, b_step, WIDE)
            if KIND == _GATE:
                inverse_b = _inverse(z, DIVISOR, EPS)
                s = _logistic(z * inverse_b * of_b)
                through = g * s
                pushed = g * out * s * (1 - s)
                sum_b += tl.sum(pushed * z * inverse_b, axis=0)
                to_b = _through_norm(pushed * of_b, z, inverse_b, DIVISOR)
            else:
                s = _logistic(z)
                through = g * z * s
                to_b = g * out * (s + z * s * (1 - s))
            tl.store(grad_b + row[:, None] * grad_b_step + column[None, :], to_b, mask=inside)
        if KIND == _SILU_GATE:
            to_a = through
        else:
            sum_a += tl.sum(through * x * inverse_a, axis=0)
            to_a = _through_norm(through * of_a, x, inverse_a, DIVISOR)
        tl.store(grad_a + row[:, None] * grad_a_step + column[None, :], to_a, mask=inside)
    sums = (part * heads + head).to(tl.int64) * dim + at
    if GIVEN and KIND != _SILU_GATE:
        tl.store(grad_gain_a + sums, sum_a, mask=at < dim)
    if KIND == _GATE:
        tl.store(grad_gain_b + sums, sum_b, mask=at < dim)


PARTS = 1024
"""Stretches of tokens at most: enough programs for any GPU, few enough sums to be added up at once."""


def tiles(dim: int) -> tuple[int, int]:
    """Vectors at a time, and their width in registers."""
    width = triton.next_power_of_2(dim)
    return max(1, 1024 // width), width


def _wide(*tensors: Tensor | None) -> tl.dtype:
    return tl.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else tl.float32


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _laid_out(x: Tensor, width: int) -> tuple[Tensor, int]:
    """The tensor with each token's numbers side by side, and the step between tokens; a view where one will do."""
    x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def _result(a: Tensor, b: Tensor | None) -> Tensor:
    return a.new_empty(a.shape) if b is None else b.new_empty(b.shape, dtype=torch.promote_types(a.dtype, b.dtype))


def run_forward(
    a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None,
    kind: int, heads: int, dim: int, divisor: float, eps: float,
) -> Tensor:  # fmt: skip
    """``norm(a) f(norm(b))`` in the shape of ``b``, or of ``a`` where there is no ``b``; gains are ``[heads, dim]``.

    Under autocast the tensors have several dtypes. The result has the wider one of ``a`` and ``b``.
    """
    width = heads * dim
    y = _result(a, b)
    left, a_step = _laid_out(a, width)
    right, b_step = (None, 0) if b is None else _laid_out(b, width)
    tokens, (rows, register) = len(left), tiles(dim)
    if tokens:
        launch(
            forward_kernel, (triton.cdiv(tokens, rows), heads),
            left, right, _dense(gain_a), _dense(gain_b), y,
            tokens, dim, heads, a_step, b_step,
            DIVISOR=divisor, EPS=eps, KIND=kind, GIVEN=gain_a is not None,
            WIDE=_wide(a, b, gain_a, gain_b), ROWS=rows, WIDTH=register,
        )  # fmt: skip
    return y


gated_operator = torch.library.custom_op("titans_build::gated", run_forward, mutates_args=())


@gated_operator.register_fake
def _(a, b, gain_a, gain_b, kind, heads, dim, divisor, eps):
    return _result(a, b)


def run_backward(
    grad: Tensor, a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None,
    kind: int, heads: int, dim: int, divisor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``a``, ``b`` and the gains; empty tensors where there is none of these."""
    width = heads * dim
    left, a_step = _laid_out(a, width)
    right, b_step = (None, 0) if b is None else _laid_out(b, width)
    pulled, grad_step = _laid_out(grad, width)
    tokens, (rows, register) = len(left), tiles(dim)
    stretch = triton.cdiv(triton.cdiv(tokens, rows), PARTS) * rows
    parts = triton.cdiv(tokens, stretch) if tokens else 0
    grad_a, grad_b, _, _ = _gradients(a, b, gain_a, gain_b)
    wide = torch.float64 if _wide(a, b, gain_a, gain_b) == tl.float64 else torch.float32
    # operators may not return one tensor twice: each one that is missing is an empty one of its own
    sum_a = a.new_empty(0 if gain_a is None else (parts, heads, dim), dtype=wide)
    sum_b = a.new_empty(0 if gain_b is None else (parts, heads, dim), dtype=wide)
    if tokens:
        launch(
            backward_kernel, (parts, heads),
            left, right, _dense(gain_a), _dense(gain_b), pulled, grad_a, grad_b, sum_a, sum_b,
            tokens, dim, heads, a_step, b_step, grad_step, width, width, stretch,
            DIVISOR=divisor, EPS=eps, KIND=kind, GIVEN=gain_a is not None,
            WIDE=_wide(a, b, gain_a, gain_b), ROWS=rows, WIDTH=register,
        )  # fmt: skip
    to_gain = lambda sums, gain: sums if gain is None else sums.sum(0).view(gain.shape).to(gain.dtype)  # noqa: E731
    return grad_a, grad_b, to_gain(sum_a, gain_a), to_gain(sum_b, gain_b)


def _gradients(
    a: Tensor, b: Tensor | None, gain_a: Tensor | None, gain_b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = lambda x: a.new_empty(0 if x is None else x.shape, dtype=None if x is None else x.dtype)  # noqa: E731
    return dense(a), dense(b), dense(gain_a), dense(gain_b)


gated_backward_operator = torch.library.custom_op("titans_build::gated_backward", run_backward, mutates_args=())


@gated_backward_operator.register_fake
def _(grad, a, b, gain_a, gain_b, kind, heads, dim, divisor, eps):
    return _gradients(a, b, gain_a, gain_b)


def _keep(ctx, inputs, output):
    a, b, gain_a, gain_b, *ctx.form = inputs
    ctx.save_for_backward(a, b, gain_a, gain_b)


@differentiable(lambda ctx, *tensors: torch_backend.formula(Form(*ctx.form), *tensors), stop=4)
def _backward(ctx, grad):
    found = gated_backward_operator(grad, *ctx.saved_tensors, *ctx.form)
    return *(g if x is not None else None for g, x in zip(found, ctx.saved_tensors)), *[None] * 5


gated_operator.register_autograd(_backward, setup_context=_keep)


def gated(
    form: Form, a: Tensor, b: Tensor | None = None, gain_a: Tensor | None = None, gain_b: Tensor | None = None
) -> Tensor:
    """``norm(a) f(norm(b))`` in the shape of ``b``, or of ``a`` where there is no ``b``; gains are ``[heads, dim]``."""
    y: Tensor = gated_operator(a, b, gain_a, gain_b, *form)
    return y
