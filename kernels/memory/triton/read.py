"""Reading at fixed weights on Triton kernels, with gradients.

A program takes ``TOKENS`` queries of one head of one batch row through the network, ``BLOCK`` hidden units at a
time, so that hidden values never leave it. It reads the weights once for every ``TOKENS`` queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...autograd import differentiable
from ...dispatch import needs_grad
from ...triton_runtime import VARYING, launch
from ..network_torch import ACTIVATION_NUMBERS, read_formula
from .schedule import operands, schedule
from .tiles import activate, dot, layer_norm, layer_norm_vjp, load, load_gain, load_rows, slope, store


def triton_read(
    q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None
) -> Tensor:
    """``read_memory`` for one or two layers; ``half``: what products are rounded to (``half_dtype``)."""
    products = operands(weights[0].dtype, None if half is None else getattr(torch, half))
    if needs_grad(q, norm, *weights):
        return _Read.apply(activation, products, q, norm, *weights)
    return _forward(activation, products, q, norm, weights)


class _Read(torch.autograd.Function):
    """Keeps the queries and the weights, which exist anyway, and no hidden value."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, products: dict[str, Any], q: Tensor, norm: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, norm, *weights)
        ctx.activation, ctx.products = activation, products
        return _forward(activation, products, q, norm, weights)

    @staticmethod
    @differentiable(read_formula, first=2)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, norm, *weights = ctx.saved_tensors
        learned = any(ctx.needs_input_grad[4:])
        grad_q, grad_norm, grad_weights = _backward(ctx.activation, ctx.products, grad, q, norm, weights, learned)
        return None, None, grad_q, grad_norm, *grad_weights


def _forward(
    activation: str, products: dict[str, Any], q: Tensor, norm: Tensor | None, weights: tuple[Tensor, ...]
) -> Tensor:
    batch, time, heads, d_in = q.shape
    d_out, width = weights[-1].shape[2:]
    y = torch.empty(batch, time, heads, d_out, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    q, fixed = dense(q), _fixed(read_fixed_kernel, activation, products, time, norm, weights)
    launch(
        read_fixed_kernel, (batch * heads * triton.cdiv(time, fixed["TOKENS"]),),
        q, *_two(weights), None if norm is None else norm.contiguous(), y,
        time, heads, d_in, width, d_out, *steps(q), **fixed,
    )  # fmt: skip
    return y


def _backward(
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
    q, grad, two = dense(q), dense(grad), _two(weights)
    wide = lambda *shape: torch.empty(shape, dtype=weights[0].dtype, device=q.device)  # noqa: E731
    fixed = _fixed(read_fixed_backward_kernel, activation, products, time, norm, weights)
    blocks = triton.cdiv(time, fixed["TOKENS"])
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_z, grad_gain = grad, None
    if norm is not None:
        grad_z, grad_gain = wide(batch, heads, time, d_out).transpose(1, 2), wide(batch, heads, blocks, d_out)
    launch(
        read_fixed_backward_kernel, (batch * heads * blocks,),
        grad, q, *two, None if norm is None else norm.contiguous(), grad_q, grad_z, grad_gain,
        time, heads, d_in, width, d_out, *steps(q), *steps(grad), **fixed,
    )  # fmt: skip
    grad_norm = None if grad_gain is None else grad_gain.sum((0, 2))
    if not learned:
        return grad_q, grad_norm, [None] * len(weights)
    stretch, parts = stretches(time)
    sums = [wide(parts, *w.shape) for w in weights]
    fixed = _fixed(read_fixed_backward_weights_kernel, activation, products, time, norm, weights)
    launch(
        read_fixed_backward_weights_kernel, (batch * heads, triton.cdiv(width, fixed["BLOCK"]), parts),
        q, grad_z, *two, sums[0], sums[-1],
        time, heads, stretch, d_in, width, d_out, *steps(q), *steps(grad_z), **fixed,
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
        **schedule(kernel.__name__, 16 if time <= 16 else 64, weights[0].shape[3], width, d_out, products), **products,
    )  # fmt: skip
    return {name: x for name, x in known.items() if name in (*kernel.arg_names, "num_warps", "num_stages")}


def dense(x: Tensor) -> Tensor:
    """With each vector's numbers side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _two(weights: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, Tensor]:
    """The two layers' weights; one layer stands in the second's place."""
    laid_out = [w.contiguous() for w in weights]
    return laid_out[0], laid_out[-1]


def steps(x: Tensor) -> tuple[int, int, int]:
    """From batch row to batch row, from token to token and from head to head of ``[batch, time, heads, ...]``."""
    return x.stride(0), x.stride(1), x.stride(2)


# -- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def place(time, TOKENS: tl.constexpr):
    """The head of a program, and its block of queries: on one axis, because the others end at 65,535."""
    program, blocks = tl.program_id(0), tl.cdiv(time, TOKENS)
    return (program // blocks).to(tl.int64), program % blocks


@triton.jit(do_not_specialize=VARYING)
def read_fixed_kernel(
    q, weight_1, weight_2, gain, y,
    time, heads, d_in, width, d_out, q_row, q_step, q_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` queries of one head. Layers as in ``step_kernel``; ``q_step`` is from token to token."""
    at, block = place(time, TOKENS)
    row, head = at // heads, at % heads
    t = block * TOKENS + tl.arange(0, TOKENS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    q += row * q_row + head * q_head
    z = tl.zeros((TOKENS, OUT), WIDE)
    if LAYERS == 2:
        query = load_rows(q, t, i, time, d_in, q_step).to(WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
            x = activate(dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION), ACTIVATION)
        else:
            x = load_rows(q, t, h, time, width, q_step).to(WIDE)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
        z += dot(x, tl.trans(tile), OPERAND, WIDE, PRECISION)
    if NORM:
        n, _ = layer_norm(z, o < d_out, d_out)
        gain_o = load_gain(gain, head, o, d_out, OUT, NORM, WIDE)
        z = load_rows(q, t, o, time, d_in, q_step).to(WIDE) + n * gain_o[None, :]
    inside = (t < time)[:, None] & (o < d_out)[None, :]
    tl.store(y + ((row * time + t[:, None]) * heads + head) * d_out + o[None, :], z, mask=inside)


# -- backward ---------------------------------------------------------------------------------------------------
#
# Two launches whose programs have no order. Hidden values are recomputed wherever they are needed, so that none of
# them is ever in global memory. The first launch is the queries' side: ``TOKENS`` queries of one head take the gradient
# of their outputs back through LayerNorm and down the layers, and store the gradient of the last layer's output
# (``grad_z``). The second is the weights' side: a program has ``BLOCK`` hidden units of one head, whose rows of the
# first layer and columns of the last stay in registers, and adds up their gradients over a stretch of the head's
# queries. Nothing is added between programs: the sums of the stretches, and those of the gain, are added afterwards,
# in a fixed order.
#
# A query costs ``5 P`` and ``4 P`` FLOP (``3 P`` in the first launch without LayerNorm), of which ``4 P`` are the
# gradients themselves and the rest is recomputation.


@triton.jit(do_not_specialize=VARYING)
def read_fixed_backward_kernel(
    grad_y, q, weight_1, weight_2, gain, grad_q, grad_z, grad_gain,
    time, heads, d_in, width, d_out, q_row, q_step, q_head, y_row, y_step, y_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` queries of one head. Layers as in ``step_kernel``; ``y_step`` is from token to token of ``grad_y``.

    Without ``NORM``, ``grad_z`` would be ``grad_y``, and is not written.
    """
    at, block = place(time, TOKENS)
    row, head = at // heads, at % heads
    t = block * TOKENS + tl.arange(0, TOKENS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    q += row * q_row + head * q_head
    grad_y += row * y_row + head * y_head
    if LAYERS == 2:
        query = load_rows(q, t, i, time, d_in, q_step).to(WIDE)
    g = load_rows(grad_y, t, o, time, d_out, y_step).to(WIDE)
    if NORM:
        z = tl.zeros((TOKENS, OUT), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            if LAYERS == 2:
                tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
                x = activate(dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION), ACTIVATION)
            else:
                x = load_rows(q, t, h, time, width, q_step).to(WIDE)
            tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
            z += dot(x, tl.trans(tile), OPERAND, WIDE, PRECISION)
        n, inverse = layer_norm(z, o < d_out, d_out)
        sums = grad_gain + tl.program_id(0).to(tl.int64) * d_out + o
        tl.store(sums, tl.sum(g * n, axis=0), mask=o < d_out)
        gain_o = load_gain(gain, head, o, d_out, OUT, NORM, WIDE)
        g = layer_norm_vjp(g * gain_o[None, :], n, inverse, o < d_out, d_out)
        store(grad_z + at * time * d_out, t.to(tl.int64), o, time, d_out, g)

    dq = tl.zeros((TOKENS, IN), WIDE)
    first = ((row * time + t[:, None]) * heads + head) * (width if LAYERS == 1 else d_in)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
        dx = dot(g, tile, OPERAND, WIDE, PRECISION)
        if LAYERS == 2:
            tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
            preact = dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION)
            dq += dot(dx * slope(preact, ACTIVATION), tile_1, OPERAND, WIDE, PRECISION)
        else:
            if NORM:  # a residual network is as wide at its end as at its beginning
                dx += load_rows(grad_y, t, h, time, d_out, y_step).to(WIDE)
            tl.store(grad_q + first + h[None, :], dx, mask=(t < time)[:, None] & (h < width)[None, :])
    if LAYERS == 2:
        if NORM:
            dq += load_rows(grad_y, t, i, time, d_out, y_step).to(WIDE)
        tl.store(grad_q + first + i[None, :], dq, mask=(t < time)[:, None] & (i < d_in)[None, :])


@triton.jit(do_not_specialize=VARYING)
def read_fixed_backward_weights_kernel(
    q, grad_z, weight_1, weight_2, grad_weight_1, grad_weight_2,
    time, heads, stretch, d_in, width, d_out, q_row, q_step, q_head, p_row, p_step, p_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` hidden units of one head, over a stretch of its queries."""
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q += row * q_row + head * q_head
    grad_z += row * p_row + head * p_head
    first = tl.program_id(2) * stretch
    d2 = tl.zeros((OUT, BLOCK), WIDE)
    if LAYERS == 2:
        d1 = tl.zeros((BLOCK, IN), WIDE)
        tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
    for t0 in range(first, tl.minimum(first + stretch, time), TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        g = load_rows(grad_z, t, o, time, d_out, p_step).to(WIDE)
        if LAYERS == 2:
            query = load_rows(q, t, i, time, d_in, q_step).to(WIDE)
            preact = dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION)
            x = activate(preact, ACTIVATION)
            dpreact = dot(g, tile, OPERAND, WIDE, PRECISION) * slope(preact, ACTIVATION)
            d1 += dot(tl.trans(dpreact), query, OPERAND, WIDE, PRECISION)
        else:
            x = load_rows(q, t, h, time, width, q_step).to(WIDE)
        d2 += dot(tl.trans(g), x, OPERAND, WIDE, PRECISION)
    part = tl.program_id(2) * tl.num_programs(0) + at
    store(grad_weight_2 + part * d_out * width, o, h, d_out, width, d2)
    if LAYERS == 2:
        store(grad_weight_1 + part * width * d_in, h, i, width, d_in, d1)


STRETCHES = 16
"""Stretches of a head's queries at most, each with gradients of its own of all the head's weights."""
SHORTEST = 512
"""Queries of a stretch at least, so that reading them takes longer than writing and adding up these."""


def stretches(time: int) -> tuple[int, int]:
    """The queries of a stretch, and how many stretches there are."""
    stretch = triton.cdiv(triton.cdiv(time, SHORTEST), STRETCHES) * SHORTEST
    return stretch, triton.cdiv(time, stretch)
