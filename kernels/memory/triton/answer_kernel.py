"""Queries answered by a memory that nothing is written to, in Triton: what ``memory.reading`` does.

The story. A program takes ``ROWS`` queries of one row (a batch row and a head) through the network, ``BLOCK`` hidden
units at a time, so that hidden values never leave it. Reads the weights once for every ``ROWS`` queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .network_kernel import activate, normalise
from .tiles_kernel import dot, gains, load


@triton.jit
def queries(q, t, column, time, columns, step, WIDE: tl.constexpr):
    inside = (t < time)[:, None] & (column < columns)[None, :]
    return tl.load(q + t[:, None].to(tl.int64) * step + column[None, :], mask=inside, other=0.0).to(WIDE)


@triton.jit
def place(time, ROWS: tl.constexpr):
    """The row that a program has, and which block of its queries: on one axis, since the others end at 65,535."""
    program, blocks = tl.program_id(0), tl.cdiv(time, ROWS)
    return (program // blocks).to(tl.int64), program % blocks


@triton.jit
def answer_kernel(
    q, weight_1, weight_2, gain, y,
    time, heads, d_in, width, d_out, eps, q_row, q_step, q_head,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of one row. Layers as in ``step_kernel``; ``q_step`` is from token to token."""
    at, block = place(time, ROWS)
    row, head = at // heads, at % heads
    t = block * ROWS + tl.arange(0, ROWS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    q += row * q_row + head * q_head
    z = tl.zeros((ROWS, OUT), WIDE)
    if LAYERS == 2:
        query = queries(q, t, i, time, d_in, q_step, WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            tile_1 = load(weight_1 + at * width * d_in, h, i, width, d_in, WIDE)
            x = activate(dot(query, tl.trans(tile_1), OPERAND, WIDE, PRECISION), ACTIVATION)
        else:
            x = queries(q, t, h, time, width, q_step, WIDE)
        tile = load(weight_2 + at * d_out * width, o, h, d_out, width, WIDE)
        z += dot(x, tl.trans(tile), OPERAND, WIDE, PRECISION)
    if NORM:
        n, _ = normalise(z, o < d_out, d_out, eps)
        z = queries(q, t, o, time, d_in, q_step, WIDE) + n * gains(gain, head, o, d_out, OUT, NORM, WIDE)[None, :]
    inside = (t < time)[:, None] & (o < d_out)[None, :]
    tl.store(y + ((row * time + t[:, None]) * heads + head) * d_out + o[None, :], z, mask=inside)
