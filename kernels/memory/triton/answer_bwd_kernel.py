"""The backward of ``memory_answer``, in Triton, in two launches that have no order among their programs.

The story. Hidden values are computed again wherever they are needed, so that none of them is ever in global memory. The
first launch is the queries' side: ``ROWS`` queries of one row take the gradient of their answers back through the
normalisation and down the layers. It leaves behind the gradient of the last layer's output (``pushed``). The second is
the weights' side: a program has ``BLOCK`` hidden units of one row, whose rows of the first layer and columns of the
last stay in registers, and walks a stretch of the row's queries, adding up their gradients as it goes. Nothing is added
up between programs: the stretches' sums, and those of the gain, are added afterwards, in one fixed order.

A query costs ``5 P`` and ``4 P`` FLOP (``3 P`` in the first launch without LayerNorm), of which ``4 P`` are the
gradients themselves and the rest is computing again. The weights' side reads each query and its ``pushed`` once for
every block of hidden units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .answer_kernel import place, queries
from .network_kernel import activate, normalise, pull, slope
from .tiles_kernel import dot, gains, load, store


@triton.jit
def answer_backward_kernel(
    grad_y, q, weight_1, weight_2, gain, grad_q, pushed, grad_gain,
    time, heads, d_in, width, d_out, eps, q_row, q_step, q_head, y_row, y_step, y_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of one row. Layers as in ``step_kernel``; ``y_step`` is from token to token of ``grad_y``.

    Without ``NORM``, ``pushed`` would be ``grad_y``, and is not written.
    """
    at, block = place(time, ROWS)
    row, head = at // heads, at % heads
    t = block * ROWS + tl.arange(0, ROWS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    q += row * q_row + head * q_head
    grad_y += row * y_row + head * y_head
    if LAYERS == 2:
        query = queries(q, t, i, time, d_in, q_step, WIDE)
    g = queries(grad_y, t, o, time, d_out, y_step, WIDE)
    if NORM:
        z = tl.zeros((ROWS, OUT), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            if LAYERS == 2:
                tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
                x = activate(dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION), ACTIVATION)
            else:
                x = queries(q, t, h, time, width, q_step, WIDE)
            tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
            z += dot(x, tl.trans(tile), OPERAND, WIDE, PRECISION)
        n, inverse = normalise(z, o < d_out, d_out, eps)
        sums = grad_gain + tl.program_id(0).to(tl.int64) * d_out + o
        tl.store(sums, tl.sum(g * n, axis=0), mask=o < d_out)
        of_gain = gains(gain, head, o, d_out, OUT, NORM, WIDE)
        g = pull(g * of_gain[None, :], n, inverse, o < d_out, d_out)
        store(pushed + at * time * d_out, t.to(tl.int64), o, time, d_out, g)

    to_q = tl.zeros((ROWS, IN), WIDE)
    first = ((row * time + t[:, None]) * heads + head) * (width if LAYERS == 1 else d_in)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
        to_x = dot(g, tile, OPERAND, WIDE, PRECISION)
        if LAYERS == 2:
            tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
            below = dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION)
            to_q += dot(to_x * slope(below, ACTIVATION), tile_1, OPERAND, WIDE, PRECISION)
        else:
            if NORM:  # a residual network is as wide at its end as at its beginning
                to_x += queries(grad_y, t, h, time, d_out, y_step, WIDE)
            tl.store(grad_q + first + h[None, :], to_x, mask=(t < time)[:, None] & (h < width)[None, :])
    if LAYERS == 2:
        if NORM:
            to_q += queries(grad_y, t, i, time, d_out, y_step, WIDE)
        tl.store(grad_q + first + i[None, :], to_q, mask=(t < time)[:, None] & (i < d_in)[None, :])


@triton.jit
def answer_backward_weights_kernel(
    q, pushed, weight_1, weight_2, grad_weight_1, grad_weight_2,
    time, heads, stretch, d_in, width, d_out, q_row, q_step, q_head, p_row, p_step, p_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` hidden units of one row, over a stretch of its queries."""
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q += row * q_row + head * q_head
    pushed += row * p_row + head * p_head
    first = tl.program_id(2) * stretch
    to_2 = tl.zeros((OUT, BLOCK), WIDE)
    if LAYERS == 2:
        to_1 = tl.zeros((BLOCK, IN), WIDE)
        tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
    for t0 in range(first, tl.minimum(first + stretch, time), ROWS):
        t = t0 + tl.arange(0, ROWS)
        g = queries(pushed, t, o, time, d_out, p_step, WIDE)
        if LAYERS == 2:
            query = queries(q, t, i, time, d_in, q_step, WIDE)
            below = dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION)
            x = activate(below, ACTIVATION)
            to_below = dot(g, tile, OPERAND, WIDE, PRECISION) * slope(below, ACTIVATION)
            to_1 += dot(tl.trans(to_below), query, OPERAND, WIDE, PRECISION)
        else:
            x = queries(q, t, h, time, width, q_step, WIDE)
        to_2 += dot(tl.trans(g), x, OPERAND, WIDE, PRECISION)
    part = tl.program_id(2) * tl.num_programs(0) + at
    store(grad_weight_2 + part * d_out * width, o, h, d_out, width, to_2)
    if LAYERS == 2:
        store(grad_weight_1 + part * width * d_in, h, i, width, d_in, to_1)


PARTS = 16
"""Stretches of a row's queries at most, each with gradients of its own of all the row's weights."""
LEAST = 512
"""Queries of a stretch at least, so that reading them takes longer than writing and adding up these."""


def stretches(time: int) -> tuple[int, int]:
    """The queries of a stretch, and how many stretches there are."""
    stretch = triton.cdiv(triton.cdiv(time, LEAST), PARTS) * LEAST
    return stretch, triton.cdiv(time, stretch)
